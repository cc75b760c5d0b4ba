"""The carrier: a tensor that looks like a dense map to a timm model and holds only what is visible.

:class:`SparseTensor` goes through an unmodified network. Every torch function that receives one is looked up in
:data:`FORMS`, the table of *sparse forms* that ``ops.py``, ``norms.py``, ``convs.py`` and ``reduce.py`` fill; a
function without an entry is refused with the name of the module that called it.

Two ways of holding the values, with the same axes in the same order:

- *canvas*: the dense map ``(B, C, H, W)``, zero where hidden.
- *tiles*: ``(K, C, p, q)`` for the ``K`` visible cells of the whole batch, each of ``p x q`` pixels. Nothing hidden
  exists, so nothing hidden is computed.

A permutation to channels-last, or a reshape that splits channels in groups, only moves the three special axes (image,
row, column); ``axes`` says where they are, counted from the right so that broadcasting does not move them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isthmus.codec import UserError

from .context import SparseContext

NCHW = (-4, -2, -1)


class Padding(NamedTuple):
    """Padding that waits for the convolution or pool it was made for."""

    left: int
    right: int
    top: int
    bottom: int
    mode: str = "constant"
    value: float = 0.0


class SparseTensor(Tensor):
    """A map of which only the visible cells count. Made by :func:`isthmus.layers.sparse_conv.sparse_features`.

    Attributes:
        values: the canvas or the tiles, an ordinary tensor with its autograd history.
        context: the :class:`SparseContext` of this forward pass.
        axes: positions of image, row and column axis, negative.
        extent: rows and columns ``(H, W)`` of the whole map (without ``padding``).
        tiled: whether ``values`` holds tiles.
        padding: what ``F.pad`` asked for and the next convolution or pool will do.
    """

    values: Tensor
    context: SparseContext
    axes: tuple[int, int, int]
    extent: tuple[int, int]
    tiled: bool
    padding: Padding | None

    @staticmethod
    def __new__(
        cls: type[SparseTensor],
        values: Tensor,
        context: SparseContext,
        extent: tuple[int, int],
        tiled: bool,
        axes: tuple[int, int, int] = NCHW,
        padding: Padding | None = None,
    ) -> SparseTensor:
        if context.grad and not torch.is_grad_enabled():
            refuse_lost_gradient(context)
        shape = list(values.shape)
        for axis, length in zip(axes, (context.batch, *extent), strict=True):
            shape[axis] = length
        if padding is not None:
            shape[axes[1]] += padding.top + padding.bottom
            shape[axes[2]] += padding.left + padding.right
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=values.dtype, device=values.device)  # type: ignore[attr-defined]
        self.values = values
        self.context = context
        self.extent = extent
        self.tiled = tiled
        self.axes = axes
        self.padding = padding
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        form = FORMS.get(func)
        if form is None:
            raise no_form(func, args, kwargs)
        return form(func, *args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Sequence, args: Sequence = (), kwargs: dict | None = None) -> Any:
        raise no_form(func, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        held = "tiles" if self.tiled else "canvas"
        return f"SparseTensor(shape={tuple(self.shape)}, {held}={tuple(self.values.shape)}, axes={self.axes})"

    # ------------------------------------------------------------------------------------------ making new carriers

    def like(self, values: Tensor, axes: tuple[int, int, int] | None = None) -> SparseTensor:
        """A carrier of the same geometry around values that are right already (zero where hidden, or tiles)."""
        return SparseTensor(values, self.context, self.extent, self.tiled, axes or self.axes)

    def finish(self, values: Tensor, axes: tuple[int, int, int] | None = None, clean: bool = False) -> SparseTensor:
        """A carrier of the same geometry around fresh values: whatever stands in hidden places is made zero.

        ``clean`` promises that it is zero already.
        """
        axes = axes or self.axes
        if not self.tiled:
            values = hide(values, self.context, self.extent, axes, clean)
        return SparseTensor(values, self.context, self.extent, self.tiled, axes)

    def become(self, other: SparseTensor) -> SparseTensor:
        """Take another carrier's place: how in-place functions change the carrier they were given."""
        self.values, self.tiled, self.axes = other.values, other.tiled, other.axes
        return self

    # ------------------------------------------------------------------------------------------ reading the values

    @property
    def tile(self) -> tuple[int, int] | None:
        """Pixels per cell, or None where this map has no tiles."""
        return self.context.tile_size(self.extent)

    @property
    def pixels(self) -> int:
        """Pixels of the whole maps of the batch."""
        return self.context.batch * self.extent[0] * self.extent[1]

    def mask_like(self) -> Tensor:
        """The visibility of the canvas with singleton channel axes, so that it broadcasts against it."""
        return place_mask(self.context, self.extent, self.axes, self.values.dim(), torch.bool)

    def cleaned(self) -> Tensor:
        """The values for an operation that reads neighbours: hidden places of a canvas are zero even under poison."""
        if self.context.poison and not self.tiled:
            return self.values.masked_fill(~self.mask_like(), 0)
        return self.values

    def as_canvas(self) -> SparseTensor:
        """The same map held as a dense canvas."""
        if not self.tiled:
            return self
        from .tiles import tiles_to_canvas

        order = image_first(self)
        values = undo(tiles_to_canvas(self.values.permute(order), self.context, self.extent), order)
        values = hide(values, self.context, self.extent, self.axes, True)
        return SparseTensor(values, self.context, self.extent, False, self.axes, self.padding)

    def as_tiles(self) -> SparseTensor:
        """The same map held as tiles."""
        if self.tiled:
            return self
        from .tiles import canvas_to_tiles

        order = image_first(self)
        values = undo(canvas_to_tiles(self.values.permute(order), self.context, self.extent), order)
        return SparseTensor(values, self.context, self.extent, True, self.axes, self.padding)


def image_first(x: SparseTensor) -> list[int]:
    """The order of axes that puts image first, then every channel axis, then row and column."""
    special = [axis % x.values.dim() for axis in x.axes]
    return [special[0], *(a for a in range(x.values.dim()) if a not in special), special[1], special[2]]


def undo(values: Tensor, order: Sequence[int]) -> Tensor:
    """Undo a permutation."""
    inverse = [0] * len(order)
    for position, axis in enumerate(order):
        inverse[axis] = position
    return values.permute(inverse)


def place_mask(
    context: SparseContext, extent: tuple[int, int], axes: tuple[int, int, int], ndim: int, dtype: torch.dtype
) -> Tensor:
    """The visibility ``(B, 1, H, W)`` of a map laid along ``axes`` of a tensor of ``ndim`` axes."""
    mask = context.mask(extent, dtype)
    if axes == NCHW and ndim == 4:
        return mask
    shape = [1] * ndim
    for axis, length in zip(axes, (context.batch, *extent), strict=True):
        shape[axis] = length
    order = sorted(range(3), key=lambda k: axes[k])
    return mask[:, 0].permute(order).reshape(shape)


def hide(
    values: Tensor, context: SparseContext, extent: tuple[int, int], axes: tuple[int, int, int], clean: bool
) -> Tensor:
    """A canvas with zeros where hidden (NaN under poison); ``clean`` says that they are zero already."""
    if context.poison and values.is_floating_point():
        mask = place_mask(context, extent, axes, values.dim(), torch.bool)
        if (values.isnan() & mask).any():
            context.leaks.append(calling_module(context))
        return values.masked_fill(~mask, float("nan"))
    if clean:
        return values
    # Multiplying, not filling: one pass forward and one backward. A hidden place whose value is infinite would give
    # NaN, so operations that are singular at zero are kept away from it (see SINGULAR in ops.py).
    return values * place_mask(context, extent, axes, values.dim(), values.dtype)


# --------------------------------------------------------------------------------------------------- table, refusals

#: torch function -> its sparse form, called as ``form(function, *args, **kwargs)``.
FORMS: dict[Any, Callable[..., Any]] = {}


def sparse_form(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the decorated ``form(function, *args, **kwargs)`` stands for every one of ``functions``."""

    def enter(form: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            FORMS[function] = form
        return form

    return enter


def find_carrier(*values: Any) -> SparseTensor | None:
    """The first carrier among arguments, lists of arguments and dictionaries of them."""
    for value in values:
        if isinstance(value, SparseTensor):
            return value
        if isinstance(value, (list, tuple)):
            found = find_carrier(*value)
            if found is not None:
                return found
        if isinstance(value, dict):
            found = find_carrier(*value.values())
            if found is not None:
                return found
    return None


def no_form(func: Any, args: Any = (), kwargs: Any = None, why: str = "") -> UserError:
    """The refusal of a function: names it and the module of the model in which it was called."""
    carrier = find_carrier(args, kwargs)
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = f"Tensor.{getattr(getattr(func, '__self__', None), '__name__', 'attribute')}"
    shape = f" on a map of shape {tuple(carrier.shape)}" if carrier is not None else ""
    where = calling_module(carrier.context if carrier is not None else None)
    return UserError(
        f"{name}{shape} in {where} has no sparse form{': ' + why if why else ''}; hidden pixels would leak through it. "
        "Choose a convolutional encoder without it, or only the levels before it."
    )


def calling_module(context: SparseContext | None) -> str:
    """``'stages.2.blocks.0.attn' (Attention)``: the innermost module of the model on the call stack.

    Walking the stack costs nothing until something is refused, and needs no hooks in the model.
    """
    root = context.root if context is not None else None
    names = {id(module): name for name, module in root.named_modules()} if root is not None else {}
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            name = names.get(id(module))
            kind = type(module).__name__
            return f"{name!r} ({kind})" if name else kind
        frame = frame.f_back
    return "the encoder"


def refuse_lost_gradient(context: SparseContext) -> None:
    """Raise if this runs inside a ``torch.autograd.Function``: a carrier passes through it without its history.

    Reentrant activation checkpointing is one. A plain ``torch.no_grad()`` block, as around a frozen stage, is fine.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("ctx"), torch.autograd.function.FunctionCtx):
            if "run_function" in frame.f_locals:
                raise UserError(
                    "sparse maps need activation checkpointing with use_reentrant=False (timm's default); "
                    f"{calling_module(context)} uses the reentrant kind, through which no gradient would flow."
                )
            raise UserError(
                f"{calling_module(context)} applies a torch.autograd.Function of its own, which has no sparse form."
            )
        frame = frame.f_back
