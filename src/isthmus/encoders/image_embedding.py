"""The latent of a picture in any vision model of timm or transformers: what brain decoders are trained to predict."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import UserError, create_timm


class ImageEmbedding(nn.Module):
    """Frozen pictures-to-latents: ``(B, 3, H, W)`` in [0, 1] → ``(B, F)``, resized and normalised as the model wants.

    It computes in float32 whatever the checkpoint was stored in, sees every part of a picture (masked autoencoders mask
    nothing) and gives the same latent every time.

    Args:
        name: ``timm:NAME`` (pooled features, no classifier), or ``transformers:NAME`` of the hub or of a folder
            (``image_embeds`` or ``pooler_output`` where there is one, else the mean of the last hidden state).
        pretrained: for timm; without it the weights are random.

    Raises:
        UserError: an unknown model, one that takes no pictures, or one that draws at random.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool = True) -> None:
        super().__init__()
        kind, _, rest = name.partition(":")
        if kind not in ("timm", "transformers") or not rest:
            raise UserError(f"{name!r} is no vision model; write timm:NAME or transformers:NAME.")
        self.kind = kind
        self.model, size, mean, std = _timm(rest, pretrained) if kind == "timm" else _transformers(rest)
        self.size = size
        names = inspect.signature(self.model.forward).parameters
        self.in_order = "noise" in names and hasattr(getattr(self.model, "config", None), "mask_ratio")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.eval().requires_grad_(False)
        self._check_repeatable()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pictures to latents."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        images = (images - self.mean) / self.std
        if self.kind == "timm":
            return self.model(images).flatten(1)
        output: Any = self.model(pixel_values=images, **self._order(images))
        for key in ("image_embeds", "pooler_output"):
            if getattr(output, key, None) is not None:
                return getattr(output, key).flatten(1)
        hidden = output.last_hidden_state
        return hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))

    def train(self, mode: bool = True) -> ImageEmbedding:
        """Stays in evaluation mode, inside a model that trains too."""
        return super().train(False)

    def _order(self, images: Tensor) -> dict[str, Tensor]:
        """What a masked autoencoder shuffles its patches by: rising numbers keep them in order."""
        if not self.in_order:
            return {}
        config: Any = self.model.config
        patches = math.prod(side // config.patch_size for side in self.size)
        return {"noise": torch.arange(patches, dtype=images.dtype, device=images.device).expand(len(images), -1)}

    def _check_repeatable(self) -> None:
        picture = torch.linspace(0, 1, 3 * math.prod(self.size)).view(1, 3, *self.size)
        with torch.random.fork_rng(devices=[]):
            first, second = self(picture), self(picture)
        if not torch.allclose(first, second, equal_nan=True):
            name = type(self.model).__name__
            raise UserError(f"{name} gives one picture another latent every time; choose a model without random parts.")

    def embed(self, batches: Iterable[Tensor]) -> Tensor:
        """Latents of many batches of uint8 or float pictures: ``(N, F)``."""
        found = [self(b.float() / 255 if b.dtype == torch.uint8 else b) for b in batches]
        if not found:
            raise UserError("there are no pictures to embed.")
        return torch.cat(found)


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, tuple[int, int], list[float], list[float]]:
    from timm.data import resolve_data_config

    try:
        model = create_timm(name, pretrained=pretrained, num_classes=0)
    except UserError:
        raise
    except Exception as error:  # no weights, no network
        raise UserError(
            f"the weights of timm:{name} cannot be had ({type(error).__name__}); fetch them once with a network, or "
            "take random ones with --no-pretrained."
        ) from error
    config = resolve_data_config({}, model=model)
    height, width = config["input_size"][-2:]
    return model, (height, width), list(config["mean"]), list(config["std"])


def _transformers(name: str) -> tuple[nn.Module, tuple[int, int], list[float], list[float]]:
    import transformers

    try:
        config: Any = transformers.AutoConfig.from_pretrained(name)
        clip = {"clip": "CLIPVisionModelWithProjection", "clip_vision_model": "CLIPVisionModelWithProjection"}
        maker: Any = getattr(transformers, clip.get(config.model_type, "AutoModel"))
        model = maker.from_pretrained(name, dtype=torch.float32).float()
    except (OSError, ValueError) as error:
        raise UserError(
            f"transformers has no vision model {name!r} within reach ({str(error).splitlines()[0]})."
        ) from error
    if getattr(model, "main_input_name", "") != "pixel_values" and hasattr(model, "vision_model"):
        model = model.vision_model
    if getattr(model, "main_input_name", "") != "pixel_values":
        raise UserError(f"transformers:{name} takes no pictures (a {config.model_type}).")
    if hasattr(model.config, "mask_ratio"):
        model.config.mask_ratio = 0.0
    mean, std, size = [0.5] * 3, [0.5] * 3, getattr(getattr(config, "vision_config", config), "image_size", None)
    try:
        processor: Any = transformers.AutoImageProcessor.from_pretrained(name)
        mean, std = list(processor.image_mean or mean), list(processor.image_std or std)
        size = size or _side(processor)
    except (OSError, ValueError, ImportError):
        pass  # a folder without one: pictures from -1 to 1, as most models take them
    size = 224 if size is None else size
    height, width = (size, size) if isinstance(size, int) else size
    return model, (height, width), mean, std


def _side(processor: Any) -> int | None:
    """The side in pixels that a processor without the model's own size makes pictures of."""
    size = dict(getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {})
    return size.get("height") or size.get("shortest_edge")
