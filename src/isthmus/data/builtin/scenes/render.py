"""The second layer: pictures, masks, boxes and depth of scenes, at any size, the same bits on every machine.

Objects are signed distances, so that edges are smooth at any size; they are painted from far to near, each in a window
just large enough for it. Arithmetic is float32 with operations that IEEE 754 rounds alike everywhere (see
:mod:`isthmus.data.builtin.scenes.shapes`), and the picture ends as whole numbers from 0 to 255.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.data.builtin.scenes.factors import (
    CANVAS,
    COLOURS,
    GROUNDS,
    SHAPES,
    TEXTURES,
    THING_FIELDS,
    Scene,
    Table,
    encode,
)
from isthmus.data.builtin.scenes.shapes import DISTANCE, TURN
from isthmus.data.builtin.scenes.textures import TONE, hashed

OUTPUTS = ("image", "masks", "amodal", "boxes", "depth", "owner")
_PIXELS = 2**18  # of one chunk: what is worked on stays in the processor's cache
_FILL = 84.0  # difference of a fill's two tones, of 255
_PERIODS = {"gradient": 1, "stripes": 3, "checker": 2, "dots": 3, "speckle": 2, "noise": 3, "waves": 2, "bar": 4}
_SHADOW = 30  # length of shadows, scene units
_SOFT = 28  # width of their edges
_REACH = 36  # how far those reach beyond the sharpest tip, a star's: half the width over the sine of half its angle
_UNITS = 8  # sizes of windows, to keep the groups few


def render(
    scenes: Sequence[Scene],
    size: int,
    outputs: Sequence[str] = ("image", "masks", "boxes", "depth"),
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Draw scenes.

    Args:
        scenes: B of them.
        size: pixels of a side, S.
        outputs: which of these to make.
        device: where to.

    Returns:
        ``image``: float32 ``(B, 3, S, S)``, multiples of 1/255.
        ``masks``: bool ``(B, K, S, S)``, what is seen of object k; K is the largest number of objects. Masks of one
        scene do not overlap; a pixel belongs to an object that covers at least half of it.
        ``amodal``: bool ``(B, K, S, S)``, the whole objects, hidden parts too.
        ``boxes``: float32 ``(B, K, 4)``, xyxy in pixels, around the whole objects as far as they lie within the
        picture; zeros for objects that a scene lacks or that lie outside it.
        ``depth``: float32 ``(B, S, S)``, distance from the viewer, 1 for the background.
        ``owner``: int64 ``(B, S, S)``, number of the object seen, −1 for the background.

    Raises:
        ValueError: an unknown output, or a size below 8.
    """
    drawn = paint(encode(scenes), size, outputs, device)
    if "image" in drawn:
        drawn["image"] = drawn["image"].float() / 255
    return drawn


def paint(
    table: Table, size: int, outputs: Sequence[str] = ("image",), device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """As :func:`render`, from a table and with ``image`` in uint8."""
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"output {unknown[0]!r} is unknown; choose from {', '.join(OUTPUTS)}")
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    table = table.to(device)
    step = max(1, _PIXELS // (size * size))
    starts = range(0, max(len(table), 1), step)
    parts = [_paint(table.rows(slice(start, start + step)), size, outputs) for start in starts]
    return {name: torch.cat([part[name] for part in parts]) for name in outputs}


@torch.no_grad()
def _paint(table: Table, size: int, outputs: Sequence[str]) -> dict[str, Tensor]:
    n, most = table.present.shape
    device, area = table.scene.device, size * size
    coloured = "image" in outputs
    owned = any(name in outputs for name in ("masks", "depth", "owner"))
    image = _background(table, size) if coloured else torch.empty(0, device=device)
    owner = torch.full((n * area,), -1, dtype=torch.int64, device=device)
    amodal = torch.zeros(n * most * area if "amodal" in outputs else 0, dtype=torch.bool, device=device)
    boxes = torch.zeros(n, most, 4, device=device)

    groups = _windows(table, size)
    for group in groups:
        group.cover(coloured)
        if "boxes" in outputs:
            boxes[group.scene, group.number] = group.boxes()
        if "amodal" in outputs:
            amodal[group.place((group.scene * most + group.number) * area)] = group.alpha >= 0.5
    for rank in range(most if coloured or owned else 0):
        for group in groups:
            group.compose(rank, image, owner, coloured, owned)

    owner = owner.view(n, size, size)
    makers = {
        "image": lambda: _finish(image.view(3, n, size, size), table),
        "masks": lambda: owner[:, None] == torch.arange(most, device=device)[:, None, None],
        "amodal": lambda: amodal.view(n, most, size, size),
        "boxes": lambda: boxes,
        "owner": lambda: owner,
        "depth": lambda: _depth(table, owner),
    }
    return {name: makers[name]() for name in outputs}


def _depth(table: Table, owner: Tensor) -> Tensor:
    far = torch.full((len(table), 1), 255, dtype=torch.int64, device=owner.device)
    depths = torch.cat([far, table.thing("depth")], 1)
    return depths.gather(1, owner.flatten(1) + 1).view(owner.shape).float() / 255


# ------------------------------------------------------------------------------------------------- background


def _grid(size: int, device: torch.device) -> Tensor:
    """Centres of the pixels of a row, in scene units."""
    return (torch.arange(size, device=device).float() + 0.5) * (CANVAS / size)


def _bright(table: Table) -> Tensor:
    return table.whole("brightness").float() * 0.01


def _background(table: Table, size: int) -> Tensor:
    """``(3, N · S · S)`` colours from 0 to 255."""
    n, device = len(table), table.scene.device
    tone = torch.zeros(n, size, size, device=device)
    centre = _grid(size, device) - CANVAS / 2
    texture = table.whole("texture")
    bright = _bright(table)
    for name, function in TONE.items():
        rows = (texture == TEXTURES.index(name)).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        some = table.rows(rows)
        cosine, sine = _turn(some.whole("angle"))
        pitch = some.whole("pitch").float()[:, None]
        if name == "gradient":
            pitch = torch.full_like(pitch, 1.4 * CANVAS)
        along, across = centre * (cosine[:, None] / pitch), centre * (sine[:, None] / pitch)
        u = along[:, None, :] + across[:, :, None]
        v = along[:, :, None] - across[:, None, :]
        sharp = (pitch * (size / CANVAS))[..., None]
        contrast = (some.whole("contrast").float() * bright[rows])[:, None, None]
        tone.index_copy_(0, rows, function(u, v, some.whole("seed").int()[:, None, None], sharp).mul_(contrast))
    ground = _palette(GROUNDS, device)[:, table.whole("ground")] * bright
    return (ground[:, :, None] + tone.view(n, size * size)).view(3, n * size * size)


def _finish(image: Tensor, table: Table) -> Tensor:
    """Add grain and round: ``(3, N, S, S)`` → uint8 ``(N, 3, S, S)``."""
    size, device = image.shape[-1], image.device
    cell = torch.div(torch.arange(size, device=device) * 512 + 256, 2 * size, rounding_mode="floor").int()
    seed = table.whole("seed").int()[:, None]
    # A hash of row and a hash of column, mixed: half the work of hashing every pixel.
    bits = hashed(cell, cell * 0 + 1, seed)[:, :, None] + hashed(cell, cell * 0 + 2, seed)[:, None, :]
    bits = bits.bitwise_xor_(bits >> 15).mul_(0x735A2D97).bitwise_right_shift_(16)
    grain = (table.whole("grain").float() * (1 / 2**15))[:, None, None]
    image = image.add_((bits.float() * grain).add_(0.5)).clamp_(0, 255.5)
    return image.transpose(0, 1).to(torch.uint8, memory_format=torch.contiguous_format)


# ----------------------------------------------------------------------------------------------------- objects


class _Group:
    """Objects whose windows have one size: M of them, sorted by shape, in windows of ``side`` pixels."""

    def __init__(
        self, table: Table, size: int, side: int, middle: Tensor, scene: Tensor, number: Tensor, rank: Tensor
    ) -> None:
        self.table, self.size, self.side = table, size, side
        self.scene, self.number, self.rank = scene, number, rank
        self.of = {name: table.thing(name)[scene, number] for name in THING_FIELDS}
        start = torch.div(middle * size, CANVAS, rounding_mode="floor") - side // 2
        self.left, self.top = start.clamp(0, size - side).unbind(1)
        span = torch.arange(side, device=scene.device)
        self.columns, self.rows = self.left[:, None] + span, self.top[:, None] + span

    def place(self, start: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        """``(M, side, side)`` positions of the windows' pixels in flat pictures that begin at ``start`` ``(M,)``."""
        return (start[:, None] + self.rows[chosen] * self.size)[:, :, None] + self.columns[chosen][:, None, :]

    def cover(self, coloured: bool) -> None:
        """Compute ``alpha``, how much of every pixel the object covers, its colours and its shadow."""
        device = self.scene.device
        grid = _grid(self.size, device)
        dx = grid[self.columns] - self.of["x"].float()[:, None]
        dy = grid[self.rows] - self.of["y"].float()[:, None]
        radius = self.of["size"].float()[:, None] * 0.5
        sharp = (radius * (self.size / CANVAS))[..., None]
        cosine, sine = _turn(self.table.whole("light")[self.scene])
        darkness = self.table.whole("shadow")[self.scene]
        shadowed = coloured and bool(darkness.any())
        if shadowed:  # the distance is computed for both places at once
            dx = torch.stack([dx, dx + cosine[:, None] * _SHADOW], 1)
            dy = torch.stack([dy, dy + sine[:, None] * _SHADOW], 1)
        else:
            dx, dy = dx[:, None], dy[:, None]
        p, q, distances = self._distance(dx, dy, radius[..., None])
        dx, dy, p, q, distance = dx[:, 0], dy[:, 0], p[:, 0], q[:, 0], distances[:, 0]
        self.alpha = (distance * -sharp).add_(0.5).clamp_(0, 1)
        if not coloured:
            return
        bright = _bright(self.table)[self.scene][:, None, None]
        # Lightness: a tone of the fill, more on the side of the light, and a thin dark rim.
        lit = cosine[:, None] / radius * 14, sine[:, None] / radius * 14
        light = (dx * lit[0])[:, None, :] + (dy * lit[1])[:, :, None]
        light = light.sub_(distance.mul_(radius[..., None] / 12).add_(1).clamp_(0, 1).mul_(30))
        light = self._fill(light, p, q, sharp).add_(self.of["shade"].float()[:, None, None])
        colour = _palette(COLOURS, device)[:, self.of["colour"]]
        # What is painted is under · (1 − alpha) · shadow + alpha · (colour + light), all of it brightened.
        alpha = self.alpha * bright
        self.paint = (colour[:, :, None, None] + light).mul_(alpha)
        self.keep = 1 - self.alpha
        if shadowed:
            soft = (distances[:, 1] * (radius * (-1 / _SOFT))[..., None]).add_(0.5).clamp_(0, 1)
            self.keep.mul_(1 - soft.mul_((darkness.float() * 0.01)[:, None, None]))

    def _distance(self, dx: Tensor, dy: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The objects' own coordinates and the signed distance, in radii, from offsets ``(M, 1 or 2, side)``."""
        cosine, sine = _turn(self.of["rotation"])
        cosine, sine = cosine[:, None, None] / radius, sine[:, None, None] / radius
        p = (dx * cosine)[:, :, None, :] + (dy * sine)[:, :, :, None]
        q = (dy * cosine)[:, :, :, None] - (dx * sine)[:, :, None, :]
        aspect = (self.of["aspect"].float() * 0.01)[:, None, None, None]
        counts = torch.bincount(self.of["shape"], minlength=len(SHAPES)).tolist()
        parts = zip(p.split(counts), q.split(counts), aspect.split(counts), strict=True)
        return p, q, torch.cat([DISTANCE[name](*part) for name, part in zip(SHAPES, parts, strict=True)])

    def _fill(self, light: Tensor, p: Tensor, q: Tensor, sharp: Tensor) -> Tensor:
        for name, function in TONE.items():
            rows = (self.of["fill"] == TEXTURES.index(name)).nonzero()[:, 0]
            if len(rows):
                half = _PERIODS[name] * 0.5
                seed = self.table.whole("seed")[self.scene[rows]].int() ^ (self.number[rows].int() + 1) * 0x01000193
                u, v = (x.index_select(0, rows) * half for x in (p, q))
                tone = function(u, v, seed[:, None, None], sharp[rows] * (1 / half))
                light.index_add_(0, rows, tone.mul_(_FILL))
        return light

    def boxes(self) -> Tensor:
        """``(M, 4)`` around the pixels that are covered by half or more."""
        inside = self.alpha >= 0.5
        sides = []
        for line, start in ((inside.any(1), self.left), (inside.any(2), self.top)):
            first = line.int().argmax(1)
            last = self.side - line.flip(1).int().argmax(1)
            found = line.any(1)
            sides.append((torch.where(found, start + first, 0), torch.where(found, start + last, 0)))
        (left, right), (top, bottom) = sides
        return torch.stack([left, top, right, bottom], 1).float()

    def compose(self, rank: int, image: Tensor, owner: Tensor, coloured: bool, owned: bool) -> None:
        """Paint those objects that are the ``rank``-th farthest of their scenes."""
        rows = (self.rank == rank).nonzero()[:, 0]
        if len(rows) == 0:
            return
        place = self.place(self.scene[rows] * (self.size * self.size), rows).view(-1)
        if coloured:
            keep, paint = self.keep.index_select(0, rows).view(-1), self.paint.index_select(1, rows).view(3, -1)
            for channel in range(3):
                image[channel][place] = image[channel].index_select(0, place).mul_(keep).add_(paint[channel])
        if owned:
            number = self.number[rows][:, None, None].expand(-1, self.side, self.side)
            inside = self.alpha.index_select(0, rows) >= 0.5
            owner[place.view(inside.shape)[inside]] = number[inside]


def _windows(table: Table, size: int) -> list[_Group]:
    """Objects in groups of like size, each in a window just large enough for it and its shadow."""
    scene, number = table.present.nonzero(as_tuple=True)
    order = table.thing("shape")[scene, number].argsort(stable=True)
    scene, number = scene[order], number[order]
    middle = torch.stack([table.thing("x")[scene, number], table.thing("y")[scene, number]], 1)
    reach = table.thing("size")[scene, number]
    # A shadow reaches beyond the object by its length and softness on one side, on the other by what is left of that.
    shadowed = (table.whole("shadow")[scene] > 0).int()
    light = TURN.to(scene.device)[:, table.whole("light")[scene].remainder(360)].T
    shift = torch.div(light * -_SHADOW, 2**14, rounding_mode="floor")
    ahead, behind = (_REACH + shift + 1).clamp(min=0), (_REACH - shift + 1).clamp(min=0)
    middle = middle + torch.div(ahead - behind, 2, rounding_mode="floor") * shadowed[:, None]
    reach = reach + (ahead + behind).amax(1) * shadowed
    unit = max(4, size // _UNITS)
    side = torch.div(reach * size, CANVAS, rounding_mode="floor") + 4
    side = (torch.div(side + unit - 1, unit, rounding_mode="floor") * unit).clamp(max=size)
    # From far to near; absent objects come last.
    depth = torch.where(table.present, table.thing("depth"), -1)
    rank = depth.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)[scene, number]
    groups = []
    for length in side.unique().tolist():
        rows = (side == length).nonzero()[:, 0]
        groups.append(_Group(table, size, length, middle[rows], scene[rows], number[rows], rank[rows]))
    return groups


def _turn(degrees: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of whole degrees, from a table."""
    cosine, sine = TURN.to(degrees.device)[:, degrees.remainder(360)].float() * (1 / 2**14)
    return cosine, sine


def _palette(colours: dict[str, tuple[int, int, int]], device: torch.device) -> Tensor:
    """``(3, colours)``."""
    return torch.tensor(list(colours.values()), device=device).float().T
