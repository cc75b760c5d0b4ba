"""The latent of a picture in any vision model of timm or transformers: what brain decoders are trained to predict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import UserError, create_timm


class ImageEmbedding(nn.Module):
    """Frozen pictures-to-latents: ``(B, 3, H, W)`` in [0, 1] → ``(B, F)``, resized and normalised as the model wants.

    Args:
        name: ``timm:NAME`` (pooled features, no classifier), or ``transformers:NAME`` of the hub or of a folder
            (``image_embeds`` or ``pooler_output`` where there is one, else the mean of the last hidden state).
        pretrained: for timm; without it the weights are random.

    Raises:
        UserError: an unknown model, or one that takes no pictures.
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
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pictures to latents."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        images = (images - self.mean) / self.std
        if self.kind == "timm":
            return self.model(images).flatten(1)
        output: Any = self.model(pixel_values=images)
        for key in ("image_embeds", "pooler_output"):
            if getattr(output, key, None) is not None:
                return getattr(output, key).flatten(1)
        hidden = output.last_hidden_state
        return hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))

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
        model = maker.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"transformers has no vision model {name!r} within reach ({str(error).splitlines()[0]})."
        ) from error
    inner = getattr(config, "vision_config", config)
    if not hasattr(inner, "image_size"):
        raise UserError(f"transformers:{name} takes no pictures (a {config.model_type}).")
    size = inner.image_size
    shape = (size, size) if isinstance(size, int) else tuple(size)
    mean, std = [0.5] * 3, [0.5] * 3
    try:
        processor: Any = transformers.AutoImageProcessor.from_pretrained(name)
        mean, std = list(processor.image_mean), list(processor.image_std)
    except (OSError, ValueError, ImportError):
        pass  # a folder without one: pictures from -1 to 1, as most models take them
    return model, shape, mean, std  # type: ignore[return-value]
