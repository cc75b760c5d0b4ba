"""Ridge regression with one factorisation for all penalties and targets: the honest baseline of brain decoding.

With centred X (N, V) the smaller Gram matrix is taken apart once: ``X Xᵀ = U λ Uᵀ`` where N ≤ V (dual), else
``Xᵀ X = Q λ Qᵀ`` (primal), from which ``U = X Q / sqrt(λ)``. Every penalty α is then a filter ``λ / (λ + α)`` on U, and
leave-one-out residuals are ``(y - ŷ) / (1 - h)`` with the leverages ``h = 1/N + Σ_j U_ij² λ_j / (λ_j + α)``; trying a
penalty refits nothing. Three lines::

    ridge = Ridge([1.0, 10.0, 100.0]).fit(signals, latents)      # a penalty for every target, by leave-one-out
    predicted = ridge(other_signals)
    matched = match_moments(predicted, latents.mean(0), latents.std(0))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, NonNegative, checked
from isthmus.codec import part


@part
@checked
class Ridge(nn.Module):
    """Linear regression with a penalty ``α ‖w‖²`` and an intercept that is not penalised.

    Args:
        alpha: one penalty for all targets, or a grid (two or more ascending numbers) of which :meth:`fit` takes the
            best for every target by leave-one-out. Penalties already known for M targets go to :meth:`fit`.
        in_features, out_features: V and M, known after :meth:`fit`; a model file brings them along.

    Attributes:
        weight: ``(V, M)``.
        bias: ``(M,)``.
        alphas: ``(M,)``, penalty of every target.
        fitted: there are weights.

    Raises:
        ValueError: penalties below 0, or a grid with 0.
    """

    weight: Tensor
    bias: Tensor
    alphas: Tensor

    def __init__(
        self,
        alpha: NonNegative | Sequence[NonNegative] = 1.0,
        in_features: Count | None = None,
        out_features: Count | None = None,
    ) -> None:
        super().__init__()
        grid = [float(alpha)] if isinstance(alpha, (int, float)) else [float(a) for a in alpha]
        if not grid or min(grid) < 0 or (len(grid) > 1 and (min(grid) == 0 or grid != sorted(set(grid)))):
            raise ValueError(f"alpha must be a number of 0 or more, or ascending numbers above 0; got {alpha}.")
        self.grid = grid
        self.fitted = in_features is not None and out_features is not None
        shape = (in_features or 0, out_features or 0)
        self.register_buffer("weight", torch.zeros(shape))
        self.register_buffer("bias", torch.zeros(shape[1]))
        self.register_buffer("alphas", torch.zeros(shape[1]))

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor, alpha: Tensor | None = None) -> Self:
        """Learn from ``x`` ``(N, …)``, flattened to ``(N, V)``, and ``y`` ``(N, M)`` or ``(N,)``.

        Args:
            x: inputs. The arithmetic is in 64 bits; the weights get the dtype of x.
            y: targets.
            alpha: ``(M,)``, a known penalty for every target, in place of the constructor's.

        Raises:
            ValueError: other shapes, fewer than two samples, NaN.
        """
        x, y = x.flatten(1), y.flatten(1) if y.ndim > 1 else y[:, None]
        if len(x) != len(y) or len(x) < 2:
            raise ValueError(f"ridge needs as many targets as inputs, two or more; got {len(x)} and {len(y)}.")
        for name, values in (("inputs", x), ("targets", y)):
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"the {name} of ridge have NaN or infinite values; leave those samples out.")
        if alpha is not None and (alpha.shape != y.shape[1:] or not bool((alpha >= 0).all())):
            raise ValueError(f"alpha must be {y.shape[1]} penalties of 0 or more, got {tuple(alpha.shape)}.")
        wide = x.device.type != "mps"
        dtype, kind = x.dtype, torch.float64 if wide else torch.float32
        mean_x, mean_y = x.mean(0, dtype=kind), y.mean(0, dtype=kind)
        x, y = x.to(kind) - mean_x, y.to(kind) - mean_y

        dual = len(x) <= x.shape[1]
        values, vectors = torch.linalg.eigh(x @ x.mT if dual else x.mT @ x)
        kept = values > values[-1].clamp_min(0) * max(x.shape) * torch.finfo(kind).eps  # the others are zero
        values, vectors = values[kept], vectors[:, kept]
        u = vectors if dual else (x @ vectors) / values.sqrt()
        uy = u.mT @ y
        if alpha is not None:
            chosen = alpha.to(uy)
        elif len(self.grid) == 1:
            chosen = torch.full((y.shape[1],), self.grid[0], dtype=kind, device=x.device)
        else:
            grid = torch.tensor(self.grid, dtype=kind, device=x.device)
            errors = torch.stack([_leave_one_out(u, values, uy, y, a) for a in grid])
            chosen = grid[errors.argmin(0)]
        # In both forms the weights are Xᵀ U / (λ + α) · Uᵀ y; the primal has V = Xᵀ U / sqrt(λ) at hand.
        shrunk = uy / (values[:, None] + chosen)
        weight = x.mT @ (u @ shrunk) if dual else vectors @ (values.sqrt()[:, None] * shrunk)
        self.weight, self.bias = weight.to(dtype), (mean_y - mean_x @ weight).to(dtype)
        self.alphas, self.fitted = chosen.to(dtype), True
        arguments = self.__dict__.get("_part_arguments", {})
        arguments.update(in_features=weight.shape[0], out_features=weight.shape[1])
        return self

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """``(N, …)``, or a pyramid whose last level is read, → ``(N, M)``.

        Raises:
            ValueError: not fitted yet, or another number of inputs.
        """
        if not self.fitted:
            raise ValueError("this ridge has not been fitted; call fit(x, y) first.")
        x = (x if isinstance(x, Tensor) else x[-1]).flatten(1)
        if x.shape[1] != self.weight.shape[0]:
            raise ValueError(f"this ridge was fitted to {self.weight.shape[0]} inputs, got {x.shape[1]}.")
        return x @ self.weight + self.bias


def _leave_one_out(u: Tensor, values: Tensor, uy: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """Mean squared error of predicting each sample from the others: ``(M,)``."""
    share = values / (values + alpha)
    leverage = 1 / len(y) + u.square() @ share
    residual = y - u @ (share[:, None] * uy)
    # A leverage of one means that a sample is predicted from itself alone; its error then is unknown, and large.
    return (residual / (1 - leverage).clamp_min(1e-10)[:, None]).square().mean(0)


def match_moments(
    predicted: Tensor, mean: Tensor, std: Tensor, own_mean: Tensor | None = None, own_std: Tensor | None = None
) -> Tensor:
    """Give predictions the mean and spread that targets have; ridge shrinks them, and generators want real latents.

    Args:
        predicted: ``(N, …)``.
        mean, std: of the training targets, as of one sample.
        own_mean, own_std: of predictions; those of ``predicted`` itself where left out (then it takes many at once, as
            in the papers), or those of predictions for training data, which serves single samples.

    Returns:
        The same shape. A column that does not vary becomes the mean.

    Raises:
        ValueError: a single prediction without moments of its own.
    """
    if own_mean is None or own_std is None:
        if len(predicted) < 2:
            raise ValueError(
                "one prediction has no spread; give own_mean and own_std of predictions for training data."
            )
        own_mean, own_std = predicted.mean(0), predicted.std(0)
    flat = own_std <= 1e-8 * own_mean.abs() + torch.finfo(predicted.dtype).tiny
    score = torch.where(flat, torch.zeros_like(predicted), (predicted - own_mean) / own_std.masked_fill(flat, 1.0))
    return score * std + mean
