"""Effective receptive field: which input pixels move the centre of a network's last map, and how much.

Luo et al. (arXiv 1701.04128), as measured by RepLKNet (arXiv 2203.06717) and the large-kernel journal paper
(arXiv 2410.08049). The input should be much larger than the field (1024 pixels in the papers): at 224 pixels everything
saturates and rankings can invert. Compare trained networks; at random initialisation residual branches are weak and all
fields look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["published", "raw", "relative"]
THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


class AreaRatio(NamedTuple):
    """Smallest centred squares: ``side`` in pixels (int64, -1 where none is large enough), ``ratio`` = side²/(H·W)."""

    side: Tensor
    ratio: Tensor


@dataclass(frozen=True)
class ReceptiveField:
    """What :func:`receptive_field` found.

    Attributes:
        map: ``(H, W)`` mean contribution of every input pixel, not normalised.
        images: how many images the mean is over.
        skipped: numbers of the images left out, because their gradient was zero everywhere or not finite.
    """

    map: Tensor
    images: int
    skipped: tuple[int, ...] = ()

    def area_ratio(self, thresholds: Sequence[float] = THRESHOLDS, scale: Scale = "published") -> AreaRatio:
        """See :func:`area_ratio`."""
        return area_ratio(self.map, thresholds, scale)

    @property
    def rms_radius(self) -> float:
        """See :func:`rms_radius`."""
        return rms_radius(self.map)

    def figure(self, scale: Scale = "relative") -> Figure:
        """The map, and the share of it inside a centred square as the square grows."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.6), layout="constrained")
        picture, curve = figure.subplots(1, 2)
        shown = normalise(self.map, scale).cpu().numpy()
        picture.imshow(shown, cmap="viridis", vmin=0)
        picture.set_title(f"contribution, {scale} scale, {self.images} images", fontsize=9)
        picture.set_axis_off()
        for name in ("published", "raw", "relative"):
            shares = _shares(normalise(self.map, name)).cpu().numpy()
            curve.plot(range(1, 2 * len(shares), 2), shares, label=name)
        curve.set_xlabel("side of the centred square, pixels")
        curve.set_ylabel("share of the map")
        curve.set_ylim(0, 1.02)
        curve.legend(fontsize=8)
        return figure


def receptive_field(
    model: nn.Module, images: Tensor | Iterable[Tensor], features: Callable[[Tensor], Tensor] | None = None
) -> ReceptiveField:
    """Mean over images of Σ_{b,c} ReLU(∂ Σ ReLU(o[:, :, h/2, w/2]) / ∂x), o the last map.

    The model is measured in eval mode, without gradient checkpointing, and given back as it was; its parameters'
    gradients are left alone.

    Args:
        model: a timm model or anything whose output is a map or a list of maps (the last is taken).
        images: ``(N, C, H, W)``, normalised as the model wants it, or images ``(C, H, W)`` of one size.
        features: ``(1, C, H, W)`` → ``(1, c, h, w)``, where the last map is not what should be measured.

    Raises:
        ValueError: there are no images, they differ in size, the output is no map, no gradient reaches the input, or
            the gradient of every image is zero or not finite.
    """
    total, used, skipped, count = None, 0, [], 0
    with _as_deployed(model), torch.inference_mode(False), torch.enable_grad():
        for image in images:
            one = contribution(model, image, features)
            if total is not None and one.shape != total.shape:
                raise ValueError(f"image {count} is {tuple(one.shape)}, the ones before are {tuple(total.shape)}.")
            if bool(torch.isfinite(one).all()) and bool(one.any()):
                total = one if total is None else total + one
                used += 1
            else:
                skipped.append(count)
            count += 1
    if total is None:
        why = "there are no images" if count == 0 else f"the gradients of all {count} images are zero or not finite"
        raise ValueError(f"no receptive field: {why}.")
    return ReceptiveField(total / used, used, tuple(skipped))


def effective_receptive_field(model: nn.Module, images: Tensor | Iterable[Tensor]) -> Tensor:
    """The map ``(H, W)`` of :func:`receptive_field`."""
    return receptive_field(model, images).map


def contribution(model: nn.Module, image: Tensor, features: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The map ``(H, W)`` of one image ``(C, H, W)``, in the mode that the model is in; see :func:`receptive_field`."""
    if image.ndim != 3 or not image.is_floating_point():
        raise ValueError(
            f"an image is (C, H, W) of real numbers, normalised as the model wants it, not {tuple(image.shape)} of "
            f"{image.dtype}."
        )
    x = image.detach().clone().unsqueeze(0).requires_grad_()
    out = last_map(model, x) if features is None else features(x)
    if not isinstance(out, Tensor) or out.ndim != 4:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"the network returned {shape}; a receptive field is that of a map (B, C, H, W).")
    if not out.requires_grad:
        raise ValueError("no gradient reaches the input: the model runs without gradients (no_grad, inference_mode).")
    centre = out[:, :, out.shape[2] // 2, out.shape[3] // 2].relu().sum()
    (gradient,) = torch.autograd.grad(centre, x)
    return gradient.relu().sum((0, 1))


def field_of_noise(body: nn.Module, size: int, device: torch.device | None = None) -> Tensor:
    """How much every pixel ``(H, W)`` of a picture of noise counts for the centre of an untrained network's last map.

    Batch norm runs on statistics of three other pictures: those of the batch itself would carry gradients everywhere.

    Args:
        body: a timm model; its batch norms are reset to means over what they see.
        size: pixels a side.
        device: where the noise is drawn.
    """
    features: Any = body.forward_features
    body.to(device).train()
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean over what is seen
    with torch.no_grad():
        for _ in range(3):
            features(torch.randn(1, 3, size, size, device=device))
    x = torch.randn(1, 3, size, size, device=device, requires_grad=True)
    body.eval()
    last = features(x)
    (gradient,) = torch.autograd.grad(last[:, :, last.shape[2] // 2, last.shape[3] // 2].sum(), x)
    return gradient.abs().sum((0, 1)).cpu()


def last_map(model: nn.Module, x: Tensor) -> Tensor:
    """The deepest map before pooling and head norm: timm's ``forward_intermediates``, or what the model returns."""
    if hasattr(model, "forward_intermediates"):
        found: Any = model
        return found.forward_intermediates(x, indices=1, output_fmt="NCHW", intermediates_only=True)[-1]
    out = model(x)
    return out[-1] if isinstance(out, (list, tuple)) else out


def normalise(contribution: Tensor, scale: Scale = "published") -> Tensor:
    """A map between 0 and 1.

    ``"published"`` is log10(m + 1) over its maximum: tiny gradients stay nearly linear, large ones are compressed, so
    it depends on the scale of the network's output. ``"raw"`` is m over its maximum; ``"relative"`` is
    log10(1000·m/max + 1) over its maximum, three decades whatever the scale.

    Raises:
        ValueError: the map is zero, negative or not finite, or no map.
    """
    if contribution.ndim != 2 or not bool(torch.isfinite(contribution).all()) or not bool(contribution.max() > 0):
        raise ValueError(f"a map {tuple(contribution.shape)} that is finite and positive somewhere is needed.")
    if scale == "published":
        m = torch.log10(contribution + 1)
    elif scale == "relative":
        m = torch.log10(1000 * contribution / contribution.max() + 1)
    elif scale == "raw":
        m = contribution
    else:
        raise ValueError(f"scale {scale!r} is none of 'published', 'raw', 'relative'.")
    return m / m.max()


def area_ratio(contribution: Tensor, thresholds: Sequence[float] = THRESHOLDS, scale: Scale = "published") -> AreaRatio:
    """Side and relative area of the smallest centred square that holds more than a share t of the map.

    The side is 2i + 1 with i from 1 to min(H, W) // 2 - 1; where even the largest square holds no more than t the side
    is -1 and so is the ratio.

    Args:
        contribution: ``(H, W)``.
        thresholds: the shares t, between 0 and 1.
        scale: see :func:`normalise`.
    """
    height, width = contribution.shape
    shares = _shares(normalise(contribution, scale))
    wanted = torch.tensor(thresholds, dtype=shares.dtype, device=shares.device)
    enough = shares[1:].unsqueeze(0) > wanted.unsqueeze(1)  # (T, i), i from 1
    first = enough.to(torch.int64).argmax(1) + 1 if enough.shape[1] else torch.zeros_like(wanted, dtype=torch.int64)
    side = torch.where(enough.any(1), 2 * first + 1, -1)
    ratio = torch.where(side > 0, side.square() / (height * width), torch.full_like(wanted, -1))
    return AreaRatio(side, ratio.to(contribution.dtype))


def _shares(m: Tensor) -> Tensor:
    """Share of the map inside the centred square of side 2i + 1, for i = 0, 1, … min(H, W) // 2 - 1, in float64."""
    rows, columns = (torch.arange(n, device=m.device) - n // 2 for n in m.shape)
    ring = torch.maximum(rows.abs().unsqueeze(1), columns.abs().unsqueeze(0))
    wide = m.to(torch.float64) if m.device.type != "mps" else m
    sums = wide.new_zeros(int(ring.max()) + 1).index_add_(0, ring.flatten(), wide.flatten())
    return (sums.cumsum(0) / sums.sum())[: max(min(m.shape) // 2, 1)]


def rms_radius(contribution: Tensor) -> float:
    """Root mean square distance, in pixels, of the contribution from the centre ``(H // 2, W // 2)``.

    Raises:
        ValueError: the map is zero, negative or not finite.
    """
    m = normalise(contribution, "raw")
    rows, columns = (torch.arange(n, device=m.device, dtype=m.dtype) - n // 2 for n in m.shape)
    squares = rows.square().unsqueeze(1) + columns.square().unsqueeze(0)
    return float(((m * squares).sum() / m.sum()).sqrt())


@contextmanager
def _as_deployed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient checkpointing inside; every module's own state afterwards, also after an error."""
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise ValueError("the model was made under torch.inference_mode and has no gradients; make it outside.")
    training = {module: module.training for module in model.modules()}
    checkpointing: dict[Any, Any] = {
        m: m.grad_checkpointing for m in model.modules() if hasattr(m, "grad_checkpointing")
    }
    try:
        model.eval()
        for module in checkpointing:
            module.grad_checkpointing = False
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for module, enabled in checkpointing.items():
            module.grad_checkpointing = enabled
