"""The exact affine map that a network applies at one input (LinearScopes, arXiv 1908.05168).

    scope = LinearScope(model, image)             # (1, 3, H, W), as the model takes it
    scope.product(z); scope.adjoint(u)            # F z and Fᵀ u, F never formed
    scope.contribution(5); scope.svd(8)           # what every pixel adds to logit 5; leading singular vectors

Once every non-linear unit keeps the decision it took at x, the network is y = F z + r: F x + r is its own output, r is
what all biases add up to, columns of F are impulse responses, rows are receptive filters. z is what the model takes; if
it subtracts a mean first, that belongs to r. ``lenses/frozen_units.py`` says how each unit is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from isthmus.lenses.frozen_pass import FrozenPass, Gates, Storage
from isthmus.lenses.frozen_units import Smooth
from isthmus.lenses.interception import Rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGEST = 2**27  # numbers in a matrix that is formed


class SVD(NamedTuple):
    """Leading singular triplets: ``u`` ``(k, *output)``, ``s`` ``(k,)`` descending, ``v`` ``(k, *input)``."""

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True)
class Fidelity:
    """How well F x + r gives the output back: the largest difference, absolute and over the largest output."""

    absolute: float
    relative: float


class LinearScope:
    """``y = F z + r`` around one input, as an operator with both products, and what can be read off it.

    The model has to be in evaluation mode or to have no dropout; its mode, parameters and hooks stay as they are.

    Args:
        model: any callable of one tensor. For a transformer or a gated network say ``gates="freeze"``.
        x: the input at which decisions are taken, one sample ``(1, …)``, float32 or float64.
        output: picks the tensor ``(B, …)`` to look at out of what the model returns; the whole by default.
        smooth: how smooth activations are frozen, see :func:`~isthmus.lenses.frozen_units.smooth`.
        gates: ``refuse`` products of two things that both depend on the input, or ``freeze`` one factor.
        storage: ``record`` keeps every decision for all later passes; ``batch`` keeps none, runs x beside every z
            instead, and takes the memory of one more sample.
        rules: function or name → rule, for functions that are not known here.
        batch: samples run at once.
        tolerance: relative error of F x + r that is accepted; ``None`` checks nothing.

    Attributes:
        y: ``(1, …)`` the model's own output.
        residual: r, ``(1, …)``: the frozen system's answer to zero.
        fidelity: of F x + r.

    Raises:
        ValueError: more than one sample, values that are not finite, a unit that cannot be frozen (it is named), or
            an error above the tolerance.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Any],
        x: Tensor,
        output: Callable[[Any], Tensor] | None = None,
        smooth: Smooth = "ratio",
        gates: Gates = "refuse",
        storage: Storage = "record",
        rules: dict[Callable[..., Any] | str, Rule] | None = None,
        batch: int = 64,
        tolerance: float | None = 1e-4,
    ) -> None:
        if x.ndim < 2 or len(x) != 1:
            raise ValueError(f"a scope looks at one sample (1, …), got {tuple(x.shape)}; make one scope for each.")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"x is {x.dtype}; analyse the model in float32 or float64.")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("x has values that are NaN or infinite.")
        self.x, self.batch = x.detach(), batch
        self._pass = FrozenPass(model, self.x, output, smooth, gates, storage, rules)
        self.y = self._pass.y
        with torch.no_grad():
            self.residual = self._pass(torch.zeros_like(self.x))
            error = float((self._pass(self.x) - self.y).abs().max())
        largest = float(self.y.abs().max())
        self.fidelity = Fidelity(error, error / max(largest, 1e-30))
        if tolerance is not None and not self.fidelity.relative <= tolerance:
            raise ValueError(
                f"F x + r misses the output by {self.fidelity.relative:.1e} of its largest value: the model does "
                "something that cannot be seen from outside (compiled, scripted or custom functions, randomness)."
            )

    # -------------------------------------------------------------------------------------------------- products

    def system(self, z: Tensor) -> Tensor:
        """The frozen system on other inputs: ``(K, *input)`` → F z + r, ``(K, *output)``. Differentiable."""
        self._check(z, self.x, "z")
        return torch.cat([self._pass(part) for part in z.split(self.batch)])

    @torch.no_grad()
    def product(self, z: Tensor) -> Tensor:
        """F z: ``(K, *input)`` → ``(K, *output)``."""
        return self.system(z) - self.residual

    def adjoint(self, u: Tensor) -> Tensor:
        """Fᵀ u: ``(K, *output)`` → ``(K, *input)``."""
        self._check(u, self.y, "u")
        found = []
        for part in u.split(self.batch):
            with torch.enable_grad():
                z = torch.zeros(len(part), *self.x.shape[1:], dtype=u.dtype, device=u.device, requires_grad=True)
                (gradient,) = torch.autograd.grad(self._pass(z), z, part, allow_unused=True)
            found.append(torch.zeros_like(z) if gradient is None else gradient)
        return torch.cat(found).detach()

    def columns(self, places: Sequence[int] | Tensor) -> Tensor:
        """Impulse responses: columns of F at flat input places, ``(K, *output)``."""
        return self.product(self._impulses(places, self.x))

    def rows(self, places: Sequence[int] | Tensor) -> Tensor:
        """Receptive filters: rows of F at flat output places, ``(K, *input)``."""
        return self.adjoint(self._impulses(places, self.y))

    def matrix(self) -> Tensor:
        """F itself, ``(outputs, inputs)``, both flattened.

        Raises:
            ValueError: it would have more than 2²⁷ numbers; use the products, which need no matrix.
        """
        outputs, inputs = self.y[0].numel(), self.x[0].numel()
        if outputs * inputs > _LARGEST:
            raise ValueError(
                f"F would be {outputs} × {inputs}; use product, adjoint, rows, columns or svd, which do not form it."
            )
        if inputs <= outputs:
            return self.columns(range(inputs)).flatten(1).T
        return self.rows(range(outputs)).flatten(1)

    # ---------------------------------------------------------------------------------------------- what it tells

    def contribution(self, place: int | Tensor) -> Tensor:
        """What every input value adds to one output value: row · x, ``(*input,)``; its sum is y - r there.

        Args:
            place: flat output place, or a direction ``(*output)`` to project the output on.
        """
        if isinstance(place, Tensor):
            return self.adjoint(place[None].to(self.y))[0] * self.x[0]
        return self.rows([place])[0] * self.x[0]

    def bias_share(self, centred: bool = False) -> float:
        """‖r‖ over ‖F x‖ + ‖r‖; ``centred`` takes the mean over outputs away first, which a softmax does not see."""
        r, through = self.residual.flatten(), (self.y - self.residual).flatten()
        if centred:
            r, through = r - r.mean(), through - through.mean()
        total = float(r.norm() + through.norm())
        return float(r.norm()) / total if total else 0.0

    def residual_by_layer(self, place: int | None = None) -> dict[str, Tensor]:
        """What each layer's constants (biases, frozen pieces, statistics) add to r, by the module's name.

        Args:
            place: flat output place: numbers, from a single backward pass. All outputs by default, ``(*output,)``
                each, from a pass a layer.
        """
        names = self._pass.constants
        if place is None:
            with torch.no_grad():
                zero = torch.zeros_like(self.x)
                return {n: self._pass(zero, {other: float(other == n) for other in names})[0] for n in names}
        with torch.enable_grad():
            switches = {
                name: torch.ones((), dtype=self.x.dtype, device=self.x.device).requires_grad_() for name in names
            }
            y = self._pass(torch.zeros_like(self.x), switches).flatten()[place]
            found = torch.autograd.grad(y, list(switches.values()), allow_unused=True) if y.requires_grad else ()
        blank = [torch.zeros_like(y) if each is None else each for each in found] or [torch.zeros_like(y)] * len(names)
        return dict(zip(names, blank, strict=True))

    @torch.no_grad()
    def svd(self, k: int = 8, sweeps: int = 12, extra: int = 8, generator: torch.Generator | None = None) -> SVD:
        """The ``k`` leading singular triplets of F by subspace iteration; F is not formed.

        Every sweep is one product and one adjoint of k + ``extra`` vectors, orthonormalised in between (Halko et al.
        2011, arXiv 0909.4061, algorithm 4.4). More sweeps are needed where singular values lie close together.

        Args:
            k: triplets wanted.
            sweeps: rounds at most; it stops where singular values no longer change by 1e-6 of the largest.
            extra: vectors beyond ``k``.
            generator: of the start; fixed without it.

        Raises:
            ValueError: ``k`` is not positive, or F has not so many.
        """
        inputs, outputs = self.x[0].numel(), self.y[0].numel()
        if not 1 <= k <= min(inputs, outputs):
            raise ValueError(f"F is {outputs} × {inputs} and has 1 to {min(inputs, outputs)} triplets; asked for {k}.")
        width = min(k + extra, inputs, outputs)
        if width == min(inputs, outputs):  # so few rows or columns that forming them is one round
            u, s, vh = torch.linalg.svd(self.matrix(), full_matrices=False)
            return SVD(u.T[:k].reshape(k, *self.y.shape[1:]), s[:k], vh[:k].reshape(k, *self.x.shape[1:]))
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        start = torch.randn(inputs, width, generator=generator, dtype=torch.float64).to(self.x)
        v, before = torch.linalg.qr(start)[0], None
        u = s = w = None
        for _ in range(max(1, sweeps)):
            u, _ = torch.linalg.qr(self.product(v.T.reshape(-1, *self.x.shape[1:])).flatten(1).T)
            back = self.adjoint(u.T.reshape(-1, *self.y.shape[1:])).flatten(1)  # rows: Fᵀ u
            w, s, vh = torch.linalg.svd(back, full_matrices=False)
            v = vh.T
            if before is not None and bool((s[:k] - before).abs().max() <= 1e-6 * s[0].clamp_min(1e-30)):
                break
            before = s[:k].clone()
        assert u is not None
        assert s is not None
        assert w is not None
        left = (u @ w)[:, :k].T
        return SVD(left.reshape(k, *self.y.shape[1:]), s[:k], v[:, :k].T.reshape(k, *self.x.shape[1:]))

    def components(self, svd: SVD) -> Tensor:
        """σ_k ⟨v_k, x⟩ u_k, ``(k, *output)``: with r they add up to y when all are taken."""
        weight = svd.s * (svd.v.flatten(1) @ self.x.flatten())
        return weight.view(-1, *[1] * (self.y.ndim - 1)) * svd.u

    def figure(self, place: int | None = None, triplets: int = 4) -> Figure:
        """The input, what its pixels add to one output, leading singular vectors, and the layers' parts of r."""
        return _figure(self, place, triplets)

    # -------------------------------------------------------------------------------------------------- helpers

    def _impulses(self, places: Sequence[int] | Tensor, like: Tensor) -> Tensor:
        index = torch.as_tensor(list(places) if not isinstance(places, Tensor) else places, device=like.device)
        count = like[0].numel()
        if index.ndim != 1 or not len(index) or bool((index < -count).any()) or bool((index >= count).any()):
            raise ValueError(f"places are flat numbers from 0 to {count - 1}, got {index.tolist()[:8]}.")
        impulses = torch.zeros(len(index), count, dtype=like.dtype, device=like.device)
        impulses[torch.arange(len(index)), index] = 1
        return impulses.view(len(index), *like.shape[1:])

    @staticmethod
    def _check(given: Tensor, like: Tensor, name: str) -> None:
        if given.shape[1:] != like.shape[1:] or not len(given):
            raise ValueError(f"{name} is {tuple(given.shape)}; this scope takes (K, {str(tuple(like.shape[1:]))[1:]}.")


def _figure(scope: LinearScope, place: int | None, triplets: int) -> Figure:
    from matplotlib.figure import Figure

    if scope.x.ndim != 4:
        raise ValueError("only images can be drawn.")
    place = int(scope.y.flatten().argmax()) if place is None else place
    found = scope.svd(min(triplets, scope.x[0].numel(), scope.y[0].numel()))
    figure = Figure(figsize=(2.1 * (3 + len(found.s)), 4.4), layout="constrained")
    axes = figure.subplots(2, 2 + len(found.s), squeeze=False)
    added = scope.contribution(place).sum(0)
    _picture(axes[0, 0], scope.x[0], "input")
    _picture(axes[0, 1], added[None], f"adds {float(added.sum()):.3g} to output {place}", signed=True)
    image_out = scope.y.ndim == 4 and min(scope.y.shape[2:]) > 1
    for i, value in enumerate(found.s.tolist()):
        _picture(axes[0, 2 + i], found.v[i].mean(0, keepdim=True), f"v{i + 1}, σ = {value:.3g}", signed=True)
        if image_out:
            _picture(axes[1, 2 + i], found.u[i].mean(0, keepdim=True), f"u{i + 1}", signed=True)
        else:
            axes[1, 2 + i].bar(range(min(64, found.u[i].numel())), found.u[i].flatten()[:64].tolist())
            axes[1, 2 + i].set_title(f"u{i + 1}", fontsize=8)
    if image_out:
        _picture(axes[1, 0], scope.y[0], "output")
    else:
        axes[1, 0].bar(range(min(64, scope.y.numel())), scope.y.flatten()[:64].tolist())
        axes[1, 0].set_title("output", fontsize=8)
    parts = {name or "model": float(value) for name, value in scope.residual_by_layer(place).items()}
    largest = sorted(parts, key=lambda name: -abs(parts[name]))[:8]
    axes[1, 1].barh([name[-18:] for name in largest][::-1], [parts[name] for name in largest][::-1])
    axes[1, 1].set_title(f"r of output {place}: {sum(parts.values()):.3g}", fontsize=8)
    axes[1, 1].tick_params(labelsize=6)
    return figure


def _picture(axis: Any, image: Tensor, title: str, signed: bool = False) -> None:
    shown = image.detach().float().cpu()
    if signed or len(shown) not in (1, 3):
        flat = shown.sum(0)
        bound = float(flat.abs().max()) or 1.0
        axis.imshow(flat.numpy(), cmap="RdBu_r" if signed else "gray", vmin=-bound if signed else None, vmax=bound)
    else:
        low, high = float(shown.min()), float(shown.max())
        shown = (shown - low) / ((high - low) or 1.0)
        axis.imshow((shown if len(shown) == 3 else shown.repeat(3, 1, 1)).permute(1, 2, 0).numpy())
    axis.set_title(title, fontsize=8)
    axis.axis("off")
