"""Which cells of an image are visible, and what follows from it for a map of any size.

SparK (arXiv 2301.03580) hides square patches of an image and treats the rest as a sparse set of points. A
:class:`SparseContext` holds that choice for one forward pass. Nothing of it is global: two models, two threads or a
recomputation under activation checkpointing each carry their own.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import UserError


def upsample_mask(visible: Tensor, size: tuple[int, int]) -> Tensor:
    """The visibility of every pixel of a map of ``size``: nearest neighbour, as the paper's "mask of stage s".

    Args:
        visible: ``(B, h, w)`` bool, True where a cell is visible.
        size: rows and columns of the map; at least ``(h, w)``, usually a multiple of it.

    Returns:
        ``(B, 1, H, W)`` bool.

    Raises:
        UserError: the map is smaller than the grid, so that one pixel would be hidden and visible at once.
    """
    height, width = size
    if height < visible.shape[1] or width < visible.shape[2]:
        raise UserError(
            f"a map of {height}x{width} pixels is smaller than the {visible.shape[1]}x{visible.shape[2]} grid, so a "
            "pixel would be hidden and visible at once; use larger cells (the total stride of the encoder)."
        )
    if (height, width) == tuple(visible.shape[1:]):
        return visible[:, None]
    # The same index as F.interpolate(mode="nearest"): floor(i * h / H), in integers.
    rows = torch.arange(height, device=visible.device) * visible.shape[1] // height
    columns = torch.arange(width, device=visible.device) * visible.shape[2] // width
    return visible[:, rows][:, :, columns][:, None]


class SparseContext:
    """The visible cells of a batch of images and every table derived from them, made on first use.

    Args:
        visible: ``(B, h, w)`` bool.
        mode: ``"masked"`` (dense maps, zero where hidden: the published algorithm), ``"tiled"`` (only visible cells
            are stored and computed) or ``"auto"`` (tiled where that is faster).
        poison: fill hidden places with NaN after every operation, so that any operation that reads them shows it in
            its output (used by the leak check, masked mode only).
        sync: batch norm uses the statistics of all ranks, as ``SyncBatchNorm`` does.
    """

    def __init__(self, visible: Tensor, mode: str = "masked", poison: bool = False, sync: bool = False) -> None:
        self.visible = visible
        self.mode = mode
        self.poison = poison
        self.sync = sync
        self.grad = torch.is_grad_enabled()
        self.tiling = False  # whether the image was cut into tiles
        self.root: nn.Module | None = None  # the encoder, asked for names of modules when something is refused
        self.leaks: list[str] = []  # under poison: modules in which NaN reached a visible place
        self.work = {"tiles": 0, "canvas": 0}  # multiply-adds by form, counted as if for the whole map
        self._masks: dict[tuple, Tensor] = {}
        self.tables: dict[tuple, Any] = {}  # gather tables of tiled.py, by (operation, geometry)

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.visible.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return self.visible.shape[1], self.visible.shape[2]

    def mask(self, size: tuple[int, int], dtype: torch.dtype = torch.bool) -> Tensor:
        """Visibility ``(B, 1, H, W)`` of the pixels of a map, in ``dtype``."""
        key = (size, dtype)
        if key not in self._masks:
            mask = upsample_mask(self.visible, size)
            self._masks[key] = mask.to(dtype)
        return self._masks[key]

    def counts(self, size: tuple[int, int]) -> Tensor:
        """Number of visible pixels of every image at a map size, ``(B,)`` int64."""
        key = ("counts", size)
        if key not in self._masks:
            self._masks[key] = self.mask(size).sum((1, 2, 3))
        return self._masks[key]

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """Numbers of the visible pixels among the ``B * H * W`` pixels of a map, ascending, ``(M,)`` int64."""
        key = ("pixels", size)
        if key not in self._masks:
            self._masks[key] = self.mask(size).flatten().nonzero()[:, 0]
        return self._masks[key]

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column of the ``K`` visible cells, image by image: three ``(K,)`` int64 tensors."""
        image, row, column = self.visible.nonzero(as_tuple=True)
        return image, row, column

    @cached_property
    def tile_of(self) -> Tensor:
        """``(B, h, w)`` number of the tile of every cell, -1 where hidden."""
        number = torch.full_like(self.visible, -1, dtype=torch.int64)
        number[self.visible] = torch.arange(len(self.cells[0]), device=self.visible.device)
        return number

    def tile_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Pixels per cell of a map, or None where its size is no multiple of the grid (such maps have no tiles)."""
        h, w = self.grid
        return None if size[0] % h or size[1] % w else (size[0] // h, size[1] // w)


def check_visible(x: Tensor, visible: Tensor) -> None:
    """Raise a UserError unless ``visible`` fits the images ``x`` and leaves something to see."""
    if x.dim() != 4:
        raise UserError(f"images must be (B, C, H, W); got {tuple(x.shape)}.")
    if visible.dim() == 4 and visible.shape[1] == 1:
        raise UserError(f"visible must be (B, h, w) bool; got {tuple(visible.shape)}: drop the channel axis.")
    if visible.dim() != 3 or visible.dtype != torch.bool or visible.shape[0] != x.shape[0]:
        raise UserError(
            f"visible must be (B, h, w) bool with B = {x.shape[0]}; got {tuple(visible.shape)} {visible.dtype}."
        )
    if visible.shape[1] > x.shape[2] or visible.shape[2] > x.shape[3]:
        raise UserError(
            f"the grid {tuple(visible.shape[1:])} has more cells than the image {tuple(x.shape[2:])} has pixels."
        )
    if not bool(visible.any()):
        raise UserError("every cell of every image is hidden; leave at least one visible.")
