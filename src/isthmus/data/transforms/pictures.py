"""Augmentation of whole batches, or of single samples as batches of one, with a generator instead of global randomness.

A transform is called as ``transform(batch, generator) -> batch``. It draws for the global batch and keeps its own rows
(:func:`isthmus.layers.random.rows`), so that the number of devices changes nothing, and it moves ``mask`` and ``boxes``
along with ``image``, and the ``masks`` of objects and ``depth`` of scenes. Images are ``(B, C, H, W)``, uint8 or float
in [0, 1].

``batches`` runs a transform on single samples only as far as needed: where images differ in size, up to the first one
that gives them a fixed size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.layers.random import rows


class Transform(ABC):
    """Base of all transforms. ``fixes_size`` tells that images of any sizes leave with one."""

    fixes_size = False

    @abstractmethod
    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """A batch whose images have one size → the transformed batch."""

    def one(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """A single sample, without the batch dimension → the same."""
        batch = {key: value[None] if isinstance(value, Tensor) else [value] for key, value in sample.items()}
        return {key: values[0] for key, values in self(batch, generator).items()}


def as_floats(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with a uint8 ``image`` turned to float32 in [0, 1]."""
    image = batch.get("image")
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        return {**batch, "image": image.float().div_(255)}
    return batch


class Compose(Transform):
    """Transforms one after another."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = [each for t in transforms for each in (t.transforms if isinstance(t, Compose) else [t])]
        self.fixes_size = any(each.fixes_size for each in self.transforms)

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        for each in self.transforms:
            batch = each(batch, generator)
        return dict(batch)


def divided(
    transform: Transform | None, image_size: tuple[int, int] | None
) -> tuple[Transform | None, Transform | None]:
    """The part of a transform that must run on single samples, and the part that runs on the whole batch."""
    if transform is None or image_size is not None:
        return None, transform
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    if not isinstance(transform, Transform) or not transform.fixes_size:
        return None, transform  # collating tells what is wrong, if sizes really differ
    last = next(i for i, step in enumerate(steps) if step.fixes_size) + 1
    return Compose(steps[:last]), Compose(steps[last:]) if steps[last:] else None


# -------------------------------------------------------------------------------------------------------- geometry


@dataclass
class Resize(Transform):
    """Resize the shorter side to ``size``, keeping the shape, or to ``(height, width)`` exactly."""

    size: int | tuple[int, int]
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        self.fixes_size = not isinstance(self.size, int)

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        height, width = batch["image"].shape[-2:]
        if isinstance(self.size, int):
            short = min(height, width)
            target = (max(1, round(height * self.size / short)), max(1, round(width * self.size / short)))
        else:
            target = self.size
        return _cropped(batch, [(0, 0, height, width)] * len(batch["image"]), target, self.interpolation)


@dataclass
class CenterCrop(Transform):
    """The middle ``size`` × ``size`` (or height × width); what is smaller is padded with zeros first."""

    size: int | tuple[int, int]
    fixes_size = True

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        target = _pair(self.size)
        batch = _padded(batch, [max(0, t - s) for t, s in zip(target, batch["image"].shape[-2:], strict=True)])
        height, width = batch["image"].shape[-2:]
        box = (round((height - target[0]) / 2), round((width - target[1]) / 2), *target)
        return _cropped(batch, [box] * len(batch["image"]), target, "nearest")


@dataclass
class RandomCrop(Transform):
    """A random ``size`` × ``size`` window after padding every side with ``padding`` zeros (CIFAR's 32 and 4)."""

    size: int | tuple[int, int]
    padding: int = 0
    fixes_size = True

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        target = _pair(self.size)
        batch = _padded(batch, [2 * self.padding] * 2)
        batch = _padded(batch, [max(0, t - s) for t, s in zip(target, batch["image"].shape[-2:], strict=True)])
        (height, width), count = batch["image"].shape[-2:], len(batch["image"])
        draws = rows(lambda n: torch.rand(n, 2, generator=generator, dtype=torch.float64), count, generator)
        tops = (draws[:, 0] * (height - target[0] + 1)).long()
        lefts = (draws[:, 1] * (width - target[1] + 1)).long()
        boxes = [(top, left, *target) for top, left in zip(tops.tolist(), lefts.tolist(), strict=True)]
        return _cropped(batch, boxes, target, "nearest")


@dataclass
class RandomResizedCrop(Transform):
    """A random window of ``scale`` of the area and ``ratio`` width to height, resized to ``size``.

    Szegedy et al. 2015 (arXiv:1409.4842): ten tries for a window that fits, else the largest middle one.
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    fixes_size = True

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        (height, width), count = batch["image"].shape[-2:], len(batch["image"])
        boxes = self.windows(count, height, width, generator)
        return _cropped(batch, [tuple(box) for box in boxes.tolist()], _pair(self.size), self.interpolation)

    def windows(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """``(count, 4)`` int64: top, left, height and width of the windows."""
        tries = 10
        draws = rows(lambda n: torch.rand(n, 2 * tries + 2, generator=generator, dtype=torch.float64), count, generator)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * draws[:, :tries])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = (low + (high - low) * draws[:, tries : 2 * tries]).exp()
        w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.long().argmax(dim=1, keepdim=True)
        w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
        shape = min(max(width / height, self.ratio[0]), self.ratio[1])
        whole_w, whole_h = min(width, round(height * shape)), min(height, round(width / shape))
        none = ~fits.any(dim=1)
        w, h = torch.where(none, whole_w, w), torch.where(none, whole_h, h)
        top = torch.where(none, (height - h) // 2, (draws[:, -2] * (height - h + 1)).long())
        left = torch.where(none, (width - w) // 2, (draws[:, -1] * (width - w + 1)).long())
        return torch.stack([top, left, h, w], dim=1)


@dataclass
class Flip(Transform):
    """Mirror left and right with probability ``p``."""

    p: float = 0.5

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        image = batch["image"]
        draws = rows(lambda n: torch.rand(n, generator=generator), len(image), generator)
        flipped = draws < self.p
        batch = {**batch, "image": _where(flipped, image.flip(-1), image)}
        for key in _planes(batch):
            planes = batch[key]
            if isinstance(planes, Tensor):
                batch[key] = _where(flipped, planes.flip(-1), planes)
            else:
                batch[key] = [p.flip(-1) if flip else p for p, flip in zip(planes, flipped.tolist(), strict=True)]
        if "boxes" in batch:
            width = image.shape[-1]
            batch["boxes"] = [
                torch.stack([width - b[:, 2], b[:, 1], width - b[:, 0], b[:, 3]], dim=1) if flip else b
                for b, flip in zip(batch["boxes"], flipped.tolist(), strict=True)
            ]
        return batch


# ---------------------------------------------------------------------------------------------------------- colour


@dataclass
class ColorJitter(Transform):
    """Brightness, contrast and saturation, each times a factor from ``[1 − x, 1 + x]``, in this order."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        image = batch["image"]
        draws = rows(lambda n: torch.rand(n, 3, generator=generator), len(image), generator) * 2 - 1
        factors = (1 + draws * torch.tensor([self.brightness, self.contrast, self.saturation])).clamp_min(0)
        bright, contrast, saturation = factors.to(image.device, torch.float32)[:, :, None, None, None].unbind(1)
        was = image.dtype
        x = image.float() / 255 if was == torch.uint8 else image
        x = (x * bright).clamp(0, 1)
        x = torch.lerp(grey(x).mean(dim=(2, 3), keepdim=True), x, contrast.to(x.dtype)).clamp(0, 1)
        x = torch.lerp(grey(x), x, saturation.to(x.dtype)).clamp(0, 1)
        return {**batch, "image": (x * 255).round().to(was) if was == torch.uint8 else x}


@dataclass
class Normalize(Transform):
    """``(image − mean) / std`` a channel; for models that do not normalise on their own."""

    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        image = batch["image"]
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        mean, std = (image.new_tensor(list(values))[:, None, None] for values in (self.mean, self.std))
        return {**batch, "image": (image - mean).div_(std)}


def grey(image: Tensor) -> Tensor:
    """Luma of ITU-R BT.601, ``(B, 3, H, W)`` → ``(B, 1, H, W)``."""
    weights = image.new_tensor([0.299, 0.587, 0.114])
    return (image * weights[:, None, None]).sum(dim=1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------- mixing


@dataclass
class Mixup(Transform):
    """Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) of neighbouring samples, with label smoothing.

    ``label`` becomes float32 ``(B, classes)``. The partner of sample 2k is 2k + 1 and the other way round, which stay
    on one device however many there are; every pair has a ratio of its own.

    Args:
        classes: number of labels.
        mixup: both parameters of the Beta distribution of mixup's ratio; 0 turns it off.
        cutmix: the same for CutMix; where both are on, each pair takes either with equal chance.
        smoothing: ε of label smoothing, shared by all classes.
    """

    classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        image, label = batch["image"], batch["label"]
        count, (height, width) = len(image), image.shape[-2:]
        if count % 2:
            raise ValueError(f"Mixup pairs neighbours and needs an even batch on every device, got {count}.")
        off, on = self.smoothing / self.classes, 1 - self.smoothing + self.smoothing / self.classes
        target = torch.full((count, self.classes), off).scatter_(1, label.cpu()[:, None], on).to(image.device)
        if not self.mixup and not self.cutmix:
            return {**batch, "label": target}

        def draw(n: int) -> Tensor:
            uniform = torch.rand(n // 2, 3, generator=generator, dtype=torch.float64)
            ratios = [_beta(alpha, n // 2, generator) for alpha in (self.mixup, self.cutmix)]
            return torch.cat([uniform, *ratios], dim=1).repeat_interleave(2, dim=0)

        use_cut, y, x, mixup, cutmix = rows(draw, count, generator).to(image.device).unbind(1)
        cut = (use_cut < 0.5) if self.mixup and self.cutmix else torch.full_like(use_cut, bool(self.cutmix)).bool()
        # CutMix: a window of (1 − ratio) of the area around (y, x); at the border it is cut and the ratio corrected.
        half_h, half_w = (1 - cutmix).sqrt() * height / 2, (1 - cutmix).sqrt() * width / 2
        top, bottom = (y * height - half_h).clamp_min(0).long(), (y * height + half_h).clamp_max(height).long()
        left, right = (x * width - half_w).clamp_min(0).long(), (x * width + half_w).clamp_max(width).long()
        ratio = torch.where(cut, 1 - (bottom - top) * (right - left) / (height * width), mixup).float()
        in_rows = _between(height, top, bottom)[:, None, :, None]
        window = in_rows & _between(width, left, right)[:, None, None, :]
        other = image.view(count // 2, 2, *image.shape[1:]).flip(1).view_as(image)
        mixed = torch.lerp(other, image, ratio[:, None, None, None].to(image.dtype))
        pasted = torch.where(window, other, image)
        partner = target.view(count // 2, 2, -1).flip(1).view_as(target)
        target = torch.lerp(partner, target, ratio[:, None])
        return {**batch, "image": _where(cut, pasted, mixed), "label": target}


def _beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """``(count, 1)`` draws from Beta(α, α) as a ratio of Gamma variables."""
    gamma = torch._standard_gamma(torch.full((count, 2), alpha or 1.0, dtype=torch.float64), generator=generator)
    return (gamma[:, :1] / gamma.sum(dim=1, keepdim=True)).nan_to_num(0.5)


def _between(size: int, low: Tensor, high: Tensor) -> Tensor:
    """``(B, size)``: whether a position lies in ``[low, high)`` of its row."""
    place = torch.arange(size, device=low.device)
    return (place >= low[:, None]) & (place < high[:, None])


# --------------------------------------------------------------------------------------------------------- helpers


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition.to(yes.device).view(-1, *[1] * (yes.ndim - 1)), yes, no)


def _padded(batch: Mapping[str, Any], total: Sequence[int]) -> dict[str, Any]:
    """``total`` zeros more rows and columns, half of them before; masks are padded with zeros too."""
    top, left = total[0] // 2, total[1] // 2
    edges = (left, total[1] - left, top, total[0] - top)
    if not any(edges):
        return dict(batch)
    batch = {**batch, "image": F.pad(batch["image"], edges)}
    for key in _planes(batch):
        planes = batch[key]
        batch[key] = F.pad(planes, edges) if isinstance(planes, Tensor) else [F.pad(each, edges) for each in planes]
    if "boxes" in batch:
        batch["boxes"] = [b + b.new_tensor([left, top, left, top]) for b in batch["boxes"]]
    return batch


def _cropped(
    batch: Mapping[str, Any], windows: Sequence[tuple[int, int, int, int]], size: tuple[int, int], interpolation: str
) -> dict[str, Any]:
    """Every sample's window (top, left, height, width), resized to ``size``; boxes outside the window are dropped."""
    batch = {**batch, "image": _windows(batch["image"], windows, size, interpolation)}
    for key in _planes(batch):
        planes = batch[key]
        if isinstance(planes, Tensor):
            batch[key] = _nearest(planes, windows, size)
        else:
            batch[key] = [_nearest(p, [window] * len(p), size) for p, window in zip(planes, windows, strict=True)]
    if "boxes" in batch:
        moved = [_moved(boxes, window, size) for boxes, window in zip(batch["boxes"], windows, strict=True)]
        kept = [(b[:, 2] > b[:, 0]) & (b[:, 3] > b[:, 1]) for b in moved]
        batch["boxes"] = [b[k] for b, k in zip(moved, kept, strict=True)]
        for key in ("labels", "masks"):
            if isinstance(batch.get(key), list):
                batch[key] = [each[k] for each, k in zip(batch[key], kept, strict=True)]
    return batch


def _planes(batch: Mapping[str, Any]) -> list[str]:
    """The columns that are laid over the image: one plane a sample, or a list with planes for every object."""
    return [key for key in ("mask", "depth", "masks") if key in batch]


def _nearest(planes: Tensor, windows: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> Tensor:
    """``(N, H, W)`` planes, whose values must not be mixed, cropped and resized."""
    if not len(planes):
        return planes.new_zeros((0, *size))
    return _windows(planes[:, None].float(), windows, size, "nearest-exact")[:, 0].to(planes.dtype)


def _windows(
    image: Tensor, windows: Sequence[tuple[int, int, int, int]], size: tuple[int, int], interpolation: str
) -> Tensor:
    # One call a sample beats one batched matrix product or grid_sample here: cropping first means that only the window
    # is read, and antialiased weights are sparse (31,000 against 6,000 images a second at 32 pixels on one core).
    resize: Callable[..., Tensor] = F.interpolate
    smooth = interpolation in ("bilinear", "bicubic")
    options: dict[str, Any] = {"mode": interpolation}
    if smooth and size == (1, 1) and image.dtype == torch.uint8:  # torch 2.12 stops with an internal error there
        return (_windows(image.float() / 255, windows, size, interpolation) * 255).round().byte()
    if smooth:
        options |= {"antialias": True, "align_corners": False}
    out = image.new_empty((len(image), image.shape[1], *size))
    whole = (0, 0, *image.shape[-2:])
    if len(set(windows)) == 1:  # one window for all: one call
        top, left, height, width = windows[0]
        part = image if windows[0] == whole else image[:, :, top : top + height, left : left + width]
        part = part if part.shape[-2:] == size else resize(part, size=size, **options)
        return part.clamp(0, 1) if smooth and image.is_floating_point() else part
    for i, (top, left, height, width) in enumerate(windows):
        part = image[i : i + 1, :, top : top + height, left : left + width]
        out[i : i + 1] = part if part.shape[-2:] == size else resize(part, size=size, **options)
    return out.clamp_(0, 1) if smooth and image.is_floating_point() else out


def _moved(boxes: Tensor, window: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """Boxes in the coordinates of a window that is resized to ``size``, clipped to it."""
    top, left, height, width = window
    scale = boxes.new_tensor([size[1] / width, size[0] / height] * 2)
    moved = (boxes - boxes.new_tensor([left, top, left, top])) * scale
    return torch.minimum(moved.clamp_min(0), boxes.new_tensor([size[1], size[0]] * 2))
