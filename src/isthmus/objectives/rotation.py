"""RotNet: learn features by telling how an image was rotated (Gidaris et al., arXiv 1803.07728, section 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from isthmus.codec import FeatureInfo, Loss
from isthmus.layers.pool import GlobalMean

_CACHED = 2**21  # bytes of images that are turned at a time


class Rotation(nn.Module):
    """Show every image in every rotation and classify which rotation it is (equations 2 and 3).

    The loss is the cross entropy averaged over all ``K·B`` copies. Crops, flips and normalisation come before, in the
    batch, and are shared by the copies of an image; a batch augmentation that rotates would destroy the task, and so
    do images without an upright orientation. ``Rotation(Backbone("resnet18"))`` works for any encoder; a network that
    ends in its own classifier is trained whole with ``Rotation(network, head=nn.Identity())``.

    Args:
        encoder: maps images ``(N, C, H, W)`` to what ``head`` reads, a pyramid as a rule.
        head: maps that to logits ``(N, K)``; by default a linear layer on the mean of the deepest level.
        rotations: degrees, counter-clockwise; the label is the place in this list. See :func:`rotate`.
        weight: factor of the loss, for use beside another objective.
        circle: blank everything outside the largest centred circle with zeros, the mean colour of normalised images,
            for images whose borders or corners give the angle away (fisheye, padded scans, 45-degree rotations).

    Raises:
        ValueError: fewer than two rotations, a repeated one, or no head for an encoder without a described pyramid.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module | None = None,
        rotations: Sequence[int] = (0, 90, 180, 270),
        weight: float = 1.0,
        circle: bool = False,
    ) -> None:
        super().__init__()
        if len(rotations) < 2 or len({degrees % 360 for degrees in rotations}) != len(rotations):
            raise ValueError(f"rotations need at least two different angles, got {tuple(rotations)}.")
        if head is None:
            deepest = (getattr(encoder, "feature_info", None) or [None])[-1]
            if not isinstance(deepest, FeatureInfo):
                raise ValueError(
                    f"{type(encoder).__name__} does not describe a pyramid; give Rotation a head, wrap a timm model in "
                    "Backbone, or train a network's own classifier with head=nn.Identity()."
                )
            head = nn.Sequential(GlobalMean(), nn.Linear(deepest.channels, len(rotations)))
        self.encoder = encoder
        self.head = head
        self.rotations = tuple(rotations)
        self.weight = weight
        self.circle = circle

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """``batch["image"]`` ``(B, C, H, W)`` to the loss and the share of rotations told right (``accuracy``).

        Raises:
            ValueError: images that cannot be batched in these rotations, or a head with another number of outputs.
        """
        images, target = self.copies(batch["image"])
        logits = self.logits(images)
        loss = self.weight * F.cross_entropy(logits, target)
        accuracy = (logits.detach().argmax(1) == target).float().mean()
        return Loss(loss, {"accuracy": accuracy}, {"image": images, "target": target, "logits": logits})

    def copies(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, C, H, W)`` to all copies ``(K·B, C, H, W)``, image by image, and their labels ``(K·B,)``, int64."""
        copies = rotate_all(images, self.rotations)
        if self.circle:
            copies = copies * centre_circle(*copies.shape[-2:], device=copies.device).to(copies.dtype)
        return copies, torch.arange(len(self.rotations), device=images.device).repeat(len(images))

    def logits(self, images: Tensor) -> Tensor:
        """Scores ``(N, K)`` of every rotation for images as they are."""
        logits = self.head(self.encoder(images))
        if not isinstance(logits, Tensor) or logits.shape != (len(images), len(self.rotations)):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"the head must give {len(self.rotations)} logits an image, one a rotation; it gave {got}."
            )
        return logits

    @torch.no_grad()
    def tell(self, images: Tensor) -> Tensor:
        """Probability ``(B, K)`` of each rotation for images that may have been rotated.

        Where the rotations form a group (all multiples of one angle), every image is looked at in all of them, and
        what is seen of a copy counts for the image: rotated by ``b``, an image rotated by ``a`` is one rotated by
        ``a + b``. The geometric mean of the K answers errs less often than one look.
        """
        count, turned = len(self.rotations), [degrees % 360 for degrees in self.rotations]
        if {(a + b) % 360 for a in turned for b in turned} != set(turned):
            images = images * centre_circle(*images.shape[-2:], device=images.device) if self.circle else images
            return self.logits(images).softmax(1)
        seen = self.logits(self.copies(images)[0]).log_softmax(1).view(len(images), count, count)
        places = [[turned.index((a + b) % 360) for a in turned] for b in turned]
        index = torch.tensor(places, device=seen.device).expand(len(images), -1, -1)
        return seen.gather(2, index).mean(1).softmax(1)


def rotate_all(images: Tensor, rotations: Sequence[int] = (0, 90, 180, 270)) -> Tensor:
    """Every image in every rotation, image-major: image 0 in all rotations, image 1 in all rotations, …

    Args:
        images: ``(B, C, H, W)``, any dtype, contiguous or channels-last; the result has the same dtype and layout.
        rotations: degrees, see :func:`rotate`.

    Returns:
        ``(len(rotations)·B, C, H, W)``.

    Raises:
        ValueError: no batch of images, or images that are not square while a rotation is not 0 or 180.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}.")
    if images.shape[2] != images.shape[3] and any(degrees % 180 for degrees in rotations):
        raise ValueError(
            f"images of {images.shape[2]}×{images.shape[3]} pixels do not keep their shape under {tuple(rotations)} "
            "degrees; crop them square, or use rotations=(0, 180)."
        )
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    copies = torch.empty(
        (len(rotations) * len(images), *images.shape[1:]),
        dtype=images.dtype,
        device=images.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    # On a CPU a few images at a time, which stay in its cache: twice as fast for large batches.
    size = max(1, images[:1].numel() * images.element_size())
    step = max(1, _CACHED // size) if images.device.type == "cpu" else max(1, len(images))
    for start in range(0, len(images), step):
        some = images[start : start + step]
        block = copies[len(rotations) * start :][: len(rotations) * len(some)]
        for place, degrees in enumerate(rotations):
            block[place :: len(rotations)] = rotate(some, degrees)
    return copies


def rotate(images: Tensor, degrees: int) -> Tensor:
    """Rotate ``(…, C, H, W)`` counter-clockwise about the centre.

    Multiples of 90 only move pixels (transposes and flips), so nothing but the content tells them apart. Any other
    angle is bilinear with zeros outside the image: its blur and empty corners are a cue that the paper's 8-rotation
    ablation shares, and that ``Rotation(circle=True)`` reduces to the blur.
    """
    if degrees % 90 == 0:
        return torch.rot90(images, degrees // 90, dims=(-2, -1))
    return TF.rotate(images, float(degrees), interpolation=InterpolationMode.BILINEAR)


def centre_circle(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """True ``(H, W)`` where a pixel's centre lies in the largest centred circle; rotations by 90 degrees keep it."""
    y = torch.arange(height, device=device) - (height - 1) / 2
    x = torch.arange(width, device=device) - (width - 1) / 2
    return y[:, None] ** 2 + x[None, :] ** 2 <= (min(height, width) / 2) ** 2
