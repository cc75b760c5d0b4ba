"""SparK: masked image modelling for convolutional networks, sparse and hierarchical (arXiv 2301.03580).

Square patches as large as the encoder's coarsest cell are hidden. The encoder treats what is left as a sparse set of
pixels, so nothing leaks into or out of hidden places; a U-Net (:mod:`isthmus.decoders.spark_unet`) fills the holes of
every scale and predicts the hidden patches, each normalised to zero mean and unit variance.

At the end of the file: the names of published checkpoints, both ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from isthmus.bounds import checked
from isthmus.codec import Loss, part
from isthmus.layers.masking import normalise_patches, patchify, random_mask, unpatchify
from isthmus.layers.sparse_conv import sparse_features

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@part
@checked
class SparK(nn.Module):
    """Hide patches, predict them. ``SparK(encoder, decoder)(batch, generator).loss`` is what to minimise.

    Args:
        encoder: any convnet with a pyramid, for example ``Backbone("resnet50")``.
        decoder: takes the pyramid and ``visible``, returns an image; normally a
            :class:`isthmus.decoders.spark_unet.SparKUNet` for the same pyramid.
        ratio: share of hidden patches, 0.6 as published at 224 px (0.75 at 384 px).
        mean, std: of the image channels, in [0, 1]; images are normalised with them here.
        mode: ``"auto"``, ``"tiled"`` or ``"masked"``: how the encoder is kept sparse, with the same result (see
            :func:`isthmus.layers.sparse_conv.sparse_features`); ``"zeroed"`` is the ablation, an ordinary dense encoder
            that sees hidden pixels as zeros.

    Raises:
        ValueError: a ratio outside (0, 1), an unknown mode, a decoder made for another pyramid, or a mean, a deviation
            or a decoder for images of other channels than the encoder's.
    """

    encoder: Any
    decoder: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        ratio: float = 0.6,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        mode: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 < ratio < 1:
            raise ValueError(f"the mask ratio is {ratio}; it is the share of hidden patches, between 0 and 1.")
        if mode not in ("auto", "tiled", "masked", "zeroed"):
            raise ValueError(f'mode is {mode!r}; it is "auto", "tiled", "masked" or "zeroed".')
        _check_channels(encoder, decoder, mean, std)
        info = cast(Any, encoder).feature_info
        made_for = getattr(getattr(decoder, "densify", None), "input_info", None)
        if made_for is not None and [tuple(i)[:2] for i in made_for] != [tuple(i)[:2] for i in info]:
            raise ValueError(
                f"the decoder was made for (channels, reduction) {[tuple(i)[:2] for i in made_for]}, the encoder has "
                f"{[tuple(i)[:2] for i in info]}."
            )
        self.encoder, self.decoder = encoder, decoder
        self.ratio, self.mode = ratio, mode
        self.patch: int = info[-1].reduction  #: side of a hidden patch in pixels
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """The loss of a batch whose ``image`` is ``(B, 3, H, W)`` in [0, 1], with masks drawn from ``generator``."""
        image = batch["image"]
        visible = self.draw_mask(image, generator)
        return self.loss(self.normalise(image), visible)

    def normalise(self, image: Tensor) -> Tensor:
        """From [0, 1] to zero mean and unit variance per channel."""
        return (image - self.mean) / self.std

    def draw_mask(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """A random mask ``(B, h, w)`` for images ``(B, 3, H, W)``, True is visible.

        Raises:
            ValueError: a side is no multiple of the patch, everything or nothing would be hidden, or batch norm would
                see a single pixel.
        """
        grid = self.grid(image)
        keep = visible_cells(grid[0] * grid[1], self.ratio)
        if self.training and image.shape[0] * keep < 2 and any(isinstance(m, _BatchNorm) for m in self.modules()):
            raise ValueError(
                "one visible patch in the whole batch leaves batch norm a single pixel at the coarsest stage: use a "
                "larger batch, larger images or a smaller mask ratio."
            )
        return random_mask(image.shape[0], grid, keep, generator)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of an image ``(B, C, H, W)``."""
        height, width = image.shape[-2:]
        if height % self.patch or width % self.patch or 0 in (height, width):
            raise ValueError(
                f"images of {height}x{width} pixels have no whole number of {self.patch}-pixel patches (the encoder's "
                f"total stride); use sides that are multiples of {self.patch}, for example "
                f"{max(round(height / self.patch), 1) * self.patch}x{max(round(width / self.patch), 1) * self.patch}."
            )
        return height // self.patch, width // self.patch

    def encode(self, image: Tensor, visible: Tensor) -> list[Tensor]:
        """The pyramid of a normalised image of which only the visible patches count."""
        if self.mode == "zeroed":
            pixels = visible.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
            return self.encoder(image * pixels[:, None])
        return sparse_features(self.encoder, image, visible, mode=self.mode)  # type: ignore[call-arg]

    def predict(self, image: Tensor, visible: Tensor) -> Tensor:
        """The decoder's image ``(B, 3, H, W)``, in units of each patch's own mean and deviation."""
        visible = visible.to(image.device)
        return self.decoder(self.encode(image, visible), {"visible": visible})

    def loss(self, image: Tensor, visible: Tensor) -> Loss:
        """The loss for a normalised image ``(B, 3, H, W)`` and a mask ``(B, h, w)``.

        Raises:
            ValueError: the mask does not fit the image.
        """
        if visible.dtype != torch.bool or visible.shape != (len(image), *self.grid(image)):
            raise ValueError(
                f"a mask of {visible.dtype} {tuple(visible.shape)} was given; it has to be torch.bool "
                f"{(len(image), *self.grid(image))}, one cell for every {self.patch}-pixel patch."
            )
        visible = visible.to(image.device)
        prediction = self.predict(image, visible)
        loss = masked_loss(prediction, image, visible, self.patch)
        return Loss(
            loss, {"explained": 1 - loss.detach()}, {"image": image, "visible": visible, "prediction": prediction}
        )

    def draw(self, image: Tensor, prediction: Tensor, visible: Tensor) -> Tensor:
        """The normalised image with its hidden patches predicted, back in [0, 1] for looking at."""
        filled = fill_hidden(prediction, image, visible.to(image.device), self.patch)
        return (filled * self.std + self.mean).clamp(0, 1)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, visible: Tensor) -> Tensor:
        """A picture ``(B, 3, H, W)`` in [0, 1] with its hidden patches predicted; sets evaluation mode."""
        self.eval()
        normal = self.normalise(image)
        return self.draw(normal, self.predict(normal, visible), visible)


def _check_channels(encoder: Any, decoder: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != len(std) or not mean or not all(0 < value < math.inf for value in std):
        raise ValueError(f"mean and std have a number a channel, std above 0; got {tuple(mean)} and {tuple(std)}.")
    model = getattr(encoder, "model", encoder)
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = getattr(model, "in_chans", None) or first
    if channels is not None and channels != len(mean):
        raise ValueError(
            f"the encoder takes images of {channels} channels, mean and std are those of {len(mean)}; give mean= and "
            f"std= of {channels} channels."
        )
    drawn = getattr(decoder, "channels", None)
    if drawn is not None and drawn != len(mean):
        raise ValueError(
            f"the decoder draws images of {drawn} channels, the encoder takes {len(mean)}; make the decoder with "
            f"channels={len(mean)}."
        )


def visible_cells(cells: int, ratio: float) -> int:
    """How many of ``cells`` stay visible when a share ``ratio`` is hidden, rounded as Python rounds (half to even).

    Raises:
        ValueError: none or all would.
    """
    keep = round(cells * (1 - ratio))
    if not 0 < keep < cells:
        raise ValueError(
            f"a mask ratio of {ratio} over {cells} patches leaves {keep} visible; at least one has to be visible and "
            "one hidden: change the ratio, or use larger images (a patch is as large as the encoder's total stride)."
        )
    return keep


def patch_errors(prediction: Tensor, image: Tensor, patch: int) -> Tensor:
    """Mean squared error ``(B, N)`` of every patch against the image normalised patch by patch."""
    target, _, _ = normalise_patches(patchify(image, patch))
    return (patchify(prediction, patch) - target).square().mean(2)


def masked_loss(prediction: Tensor, image: Tensor, visible: Tensor, patch: int) -> Tensor:
    """Mean of :func:`patch_errors` over the hidden patches of the *global* batch.

    Each process divides by its share of all hidden patches, so that the mean of losses and gradients over processes,
    which is what data-parallel training takes, is that of the whole batch, however the hidden patches are spread.
    """
    hidden = ~visible.flatten(1)
    total = hidden.sum(dtype=torch.float32)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return (patch_errors(prediction, image, patch) * hidden).sum() / (total + 1e-8)


def fill_hidden(prediction: Tensor, image: Tensor, visible: Tensor, patch: int) -> Tensor:
    """The image with hidden patches replaced by the prediction, un-normalised by each patch's true mean and std."""
    _, mean, std = normalise_patches(patchify(image, patch))
    restored = unpatchify(patchify(prediction, patch) * std + mean, patch, (visible.shape[1], visible.shape[2]))
    pixels = visible.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return torch.where(pixels[:, None], image, restored)


# ------------------------------------------------------------------------------------------- published checkpoints

_CONVNEXT = [  # original ConvNeXt names and timm's
    (r"downsample_layers\.0\.(\d+)\.", r"stem.\1."),
    (r"downsample_layers\.(\d+)\.(\d+)\.", r"stages.\1.downsample.\2."),
    (r"stages\.(\d+)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
    (r"stages\.(\d+)\.(\d+)\.norm\.", r"stages.\1.blocks.\2.norm."),
    (r"stages\.(\d+)\.(\d+)\.pwconv(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
    (r"stages\.(\d+)\.(\d+)\.gamma$", r"stages.\1.blocks.\2.gamma"),
    (r"norm\.", r"head.norm."),
    (r"(?:head|fc)\.(weight|bias)$", r"head.fc.\1"),  # fine-tuned files of SparK say fc
]
_CONVNEXT_BACK = [
    (r"stem\.(\d+)\.", r"downsample_layers.0.\1."),
    (r"stages\.(\d+)\.downsample\.(\d+)\.", r"downsample_layers.\1.\2."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.norm\.", r"stages.\1.\2.norm."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"stages.\1.\2.pwconv\3."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.gamma$", r"stages.\1.\2.gamma"),
    (r"head\.norm\.", r"norm."),
    (r"head\.fc\.", r"head."),
]
_UNUSED = ("imn_m", "imn_s", "norm_black", "config")


def _rename(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            return renamed
    return name


def backbone_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published backbone file (``sp_cnn``: timm's ResNet names, or original ConvNeXt names) in timm's names."""
    is_convnext = any(name.startswith("downsample_layers.") for name in state)
    return convnext_from_official(state) if is_convnext else dict(state)


def convnext_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original ConvNeXt names in timm's."""
    return {_rename(name, _CONVNEXT): tensor for name, tensor in state.items()}


def backbone_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`backbone_from_official`; only timm's ConvNeXt has other names in published files."""
    if "stem.0.weight" in state and any(re.match(r"stages\.\d+\.blocks\.\d+\.conv_dw\.", name) for name in state):
        return {_rename(name, _CONVNEXT_BACK): tensor for name, tensor in state.items()}
    return dict(state)


def from_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A published ``withdecoder`` state in the names of :class:`SparK`; scales are counted from the finest here.

    Three unused buffers and the ``config`` are dropped; ``mean`` and ``std`` are not in published files.
    """
    scales = sum(bool(re.fullmatch(r"mask_tokens\.\d+", name)) for name in state)
    prefix = "sparse_encoder.sp_cnn."
    backbone = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    ours = {f"encoder.model.{name}": tensor for name, tensor in backbone_from_official(backbone).items()}
    for name, tensor in state.items():
        if not name.startswith(prefix) and name not in _UNUSED:
            ours[_densify_name(name, scales, official=True)] = tensor
    return ours


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a :class:`SparK` in the names of published ``withdecoder`` files, without the encoder's head."""
    scales = sum(bool(re.fullmatch(r"decoder\.densify\.mask_tokens\.\d+", name)) for name in state)
    prefix = "encoder.model."
    backbone = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    headless = {n: t for n, t in backbone_to_official(backbone).items() if not re.match(r"(fc|head|norm)\.", n)}
    official = {f"sparse_encoder.sp_cnn.{name}": tensor for name, tensor in headless.items()}
    for name, tensor in state.items():
        if not name.startswith(prefix) and name not in ("mean", "std"):
            official[_densify_name(name, scales, official=False)] = tensor
    return official


def _densify_name(name: str, scales: int, official: bool) -> str:
    """Rename what is not the backbone; published files count scales from the coarsest."""
    table = [
        ("dense_decoder.dec.", "decoder.blocks."),
        ("dense_decoder.proj.", "decoder.proj."),
        ("densify_norms.", "decoder.densify.norms."),
        ("densify_projs.", "decoder.densify.projections."),
        ("mask_tokens.", "decoder.densify.mask_tokens."),
    ]
    for theirs, ours in table:
        old, new = (theirs, ours) if official else (ours, theirs)
        if name.startswith(old):
            rest = name.removeprefix(old)
            if "dense_decoder" not in theirs:
                index, dot, tail = rest.partition(".")
                rest = f"{scales - 1 - int(index)}{dot}{tail}"
            return new + rest
    return name
