"""Learning to enlarge images: the pixels' and the spectrum's mean absolute error (MetaMixer, arXiv 2406.02021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import Loss


def fft_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the real and imaginary parts of the unnormalised two-dimensional spectra.

    Args:
        prediction: ``(B, C, H, W)``.
        target: the same.

    Returns:
        A scalar. Half precision is transformed in float32, where the sum over a map fits.

    Raises:
        ValueError: other shapes.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"the prediction is {tuple(prediction.shape)} and the target {tuple(target.shape)}.")
    wide = torch.promote_types(prediction.dtype, torch.float32)
    difference = torch.fft.rfft2(prediction.to(wide) - target.to(wide))  # the transform is linear
    return torch.view_as_real(difference).abs().mean()


class SuperResolution(nn.Module):
    """L1 + λ · :func:`fft_loss` between ``batch["image"]`` and what ``model`` makes of it made small.

    Args:
        model: ``model([small]) -> large``, as decoders have it.
        scale: factor between the two; images are cut to multiples of it.
        frequency: λ, 0.02 as published.

    Metrics: ``psnr`` in decibels for pixels in [0, 1].

    Raises:
        ValueError: a scale below 1; images smaller than it.
    """

    def __init__(self, model: nn.Module, scale: int = 2, frequency: float = 0.02) -> None:
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale {scale}: it is a whole number of at least 1.")
        self.model, self.scale, self.frequency = model, scale, frequency

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """The batch to the loss; ``outputs`` are the small, the enlarged and the true images."""
        image = batch["image"]
        small, image = shrink(image, self.scale)
        large = self.model([small])
        loss = F.l1_loss(large, image) + self.frequency * fft_loss(large, image)
        error = F.mse_loss(large.detach().clamp(0, 1).float(), image.float())
        return Loss(
            loss, {"psnr": -10 * error.clamp_min(1e-10).log10()}, {"small": small, "large": large, "true": image}
        )


def shrink(image: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Images made ``scale`` times smaller (bicubic, antialiased), and cut to a multiple of it.

    Raises:
        ValueError: the image is smaller than ``scale``.
    """
    height, width = (side // scale * scale for side in image.shape[-2:])
    if not height or not width:
        raise ValueError(f"images of {image.shape[-2]}x{image.shape[-1]} pixels cannot be made {scale} times smaller.")
    image = image[..., :height, :width]
    small = F.interpolate(image, (height // scale, width // scale), mode="bicubic", antialias=scale > 1)
    return small.clamp(0, 1), image
