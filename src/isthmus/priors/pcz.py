"""``.pcz``: pictures of any size and channel count, losslessly, through a circuit of patches.

    coder = PictureCoder(circuit, patch=8, channels=3)
    data = coder.compress(Image.open("photo.png"))
    coder.decompress(data)  # the same pixels

A picture is turned into residuals (:mod:`isthmus.priors.lifting`) and cut into patches, whose pixels are the variables
of the circuit. Pixels beyond the border, and colours of a grey picture, are variables that are summed out: nothing is
padded. All patches are coded in lock-step, variable by variable, 1,024 to a stream. Where the circuit does worse than
deflate, as for drawings, deflate is taken; planes of one value take a byte.

File, little-endian: magic, version, mode, width, height, model, digest of the pixels, length of the extras and the
extras, a method for every plane, the streams with their lengths, and 8 bytes of BLAKE2b over all that. It opens with
the model it was written with only, and what comes out is checked against the digest: never a wrong picture.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from isthmus.codec import UserError
from isthmus.priors.circuit import HCLT
from isthmus.priors.circuit_coding import CircuitCoder
from isthmus.priors.lifting import decorrelate, recorrelate, residuals, restore
from isthmus.priors.pictures import LARGEST, MODES, Picture, from_image, inflate, pack_extras, to_image, unpack_extras

_MAGIC, _VERSION = b"\x89PCZ", 1
_HEADER = struct.Struct("<4sBBII8s8sI")
_CHECKSUM = 8
_CRAFTED = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
"""What reading bytes raises that somebody sealed with a checksum without being this encoder."""
_CONSTANT, _CIRCUIT, _DEFLATE = range(3)
_TOGETHER = 1024  # patches of a stream


class _Kind(NamedTuple):
    """Patches of one shape: inside the picture, or cut off by its right, lower, or both borders."""

    rows: slice  # of patches
    columns: slice
    height: int  # pixels of a patch that are there
    width: int

    @property
    def count(self) -> int:
        """How many there are."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


class PictureCoder:
    """Compresses pictures with a circuit over the pixels of patches.

    Args:
        circuit: 256 categories; variables are the ``patch·patch·channels`` values of a patch, row by row, channel last.
        patch: pixels a side.
        channels: 3 (green, red less green, blue less green) or 1. With 1, every plane is coded by itself; with 3, grey
            and alpha planes are coded as green.
        prediction: the circuit is one of residuals; without it, of the planes themselves.
        threads: streams that are coded at the same time; all cores by default. The file is the same for any number.

    Raises:
        ValueError: the circuit has another number of variables or categories, or is not fitted.
    """

    def __init__(
        self, circuit: HCLT, patch: int, channels: int = 3, prediction: bool = True, threads: int | None = None
    ) -> None:
        if channels not in (1, 3) or patch < 1 or len(circuit.parents) != patch * patch * channels:
            raise ValueError(
                f"a circuit of {len(circuit.parents)} variables does not fit patches of {patch}x{patch} pixels and "
                f"{channels} channels (1 or 3)."
            )
        if circuit.categories != 256:
            raise ValueError(f"pictures have 256 values a pixel, the circuit has {circuit.categories}.")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is at least 1, got {threads}.")
        self.coder, self.patch, self.channels, self.prediction = CircuitCoder(circuit), patch, channels, prediction
        self.threads = threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0, 1])
        geometry = repr((_VERSION, patch, channels, prediction)).encode()
        self.model = hashlib.blake2b(self.coder.model + geometry, digest_size=8).digest()

    def compress(self, image: Image.Image, name: str = "the picture") -> bytes:
        """The bytes of a ``.pcz`` file.

        Args:
            image: 8 bits a channel; bilevel, grey, colour or palette, with or without alpha.
            name: of the picture, for messages.

        Raises:
            UserError: pixels of more than 8 bits, or a colour mode that PNG does not have.
        """
        picture = from_image(image, name)
        extras = pack_extras(picture.extras)
        height, width = picture.planes.shape[:2]
        mode = list(MODES).index(picture.mode)
        header = _HEADER.pack(_MAGIC, _VERSION, mode, width, height, self.model, picture.digest, len(extras))
        planes = self._split(picture.planes)
        methods, streams = bytearray(), []
        for group in self._groups(picture.mode):
            values = [self._constant(planes[..., i]) for i in group]
            varying = [i for i, value in zip(group, values, strict=True) if value is None]
            method, found = self._encode(planes[..., varying], [i - group[0] for i in varying])
            methods += b"".join(bytes([method] if value is None else [_CONSTANT, value]) for value in values)
            streams += found
        body = header + extras + bytes(methods) + b"".join(struct.pack("<I", len(s)) + s for s in streams)
        return body + _checksum(body)

    def decompress(self, data: bytes, name: str = "the file") -> Image.Image:
        """The picture of a ``.pcz`` file.

        Raises:
            UserError: foreign, cut or changed bytes, another version, or a file of another model.
        """
        if data[:4] != _MAGIC:
            raise UserError(f"{name} is no .pcz file.")
        if len(data) > 4 and data[4] != _VERSION:
            raise UserError(f"{name} has .pcz version {data[4]}; this isthmus reads version {_VERSION}.")
        body = data[:-_CHECKSUM]
        if len(body) < _HEADER.size or _checksum(body) != data[-_CHECKSUM:]:
            raise UserError(f"{name} is damaged or cut short: its checksum does not fit.")
        _, _, mode_number, width, height, model, digest, extras_length = _HEADER.unpack_from(body)
        if model != self.model:
            raise UserError(
                f"{name} was written with another model ({model.hex()}, this one is {self.model.hex()}); "
                "use the run it was written with."
            )
        try:
            picture = self._decompress(body, list(MODES)[mode_number], height, width, extras_length)
            if picture.digest == digest:
                return to_image(picture)
        except _CRAFTED as error:
            raise UserError(f"{name} is no valid .pcz file ({error}).") from error
        raise UserError(f"{name} decodes to other pixels than were encoded; nothing is written. It is damaged.")

    def _decompress(self, body: bytes, mode: str, height: int, width: int, extras_length: int) -> Picture:
        if not 0 < width * height * MODES[mode] <= LARGEST:
            raise UserError(f"{width}x{height} pixels")
        at = _HEADER.size
        extras = unpack_extras(body[at : at + extras_length], mode)
        at += extras_length
        constants: dict[int, int] = {}
        plans: list[tuple[list[int], list[int], int]] = []
        for group in self._groups(mode):
            varying, methods = [], set()
            for i in group:
                method, at = body[at], at + 1
                if method == _CONSTANT:
                    constants[i], at = body[at], at + 1
                else:
                    varying.append(i)
                    methods.add(method)
            if len(methods) > 1:
                raise UserError("planes that belong together have several methods")
            plans.append((group, varying, methods.pop() if methods else _CONSTANT))
        found = list(_streams(body, at))
        wanted = sum(self._stream_count(method, height, width) for _, varying, method in plans if varying)
        if len(found) != wanted:
            raise UserError(f"{len(found)} streams, and {width}x{height} pixels have {wanted}")
        streams = iter(found)
        planes = np.zeros((height, width, MODES[mode]), np.uint8)
        for i, value in constants.items():
            planes[..., i] = value
        for group, varying, method in plans:
            if varying:
                channels = [i - group[0] for i in varying]
                planes[..., varying] = self._decode(streams, method, height, width, channels)
        return Picture(mode, self._join(planes), extras)

    # ----------------------------------------------------------------------------------------------------- planes

    def _groups(self, mode: str) -> list[list[int]]:
        """Planes that are coded together."""
        count = MODES[mode]
        if count >= 3 and self.channels == 3:
            return [[0, 1, 2], *([3] for _ in range(count - 3))]
        return [[i] for i in range(count)]

    @staticmethod
    def _split(planes: np.ndarray) -> np.ndarray:
        if planes.shape[2] < 3:
            return planes
        return np.concatenate([decorrelate(planes[..., :3]), planes[..., 3:]], axis=2)

    @staticmethod
    def _join(planes: np.ndarray) -> np.ndarray:
        if planes.shape[2] < 3:
            return planes
        return np.concatenate([recorrelate(planes[..., :3]), planes[..., 3:]], axis=2)

    @staticmethod
    def _constant(plane: np.ndarray) -> int | None:
        return int(plane.flat[0]) if (plane == plane.flat[0]).all() else None

    def _encode(self, planes: np.ndarray, channels: list[int]) -> tuple[int, list[bytes]]:
        """The better of two methods, and its streams."""
        if not channels:
            return _CIRCUIT, []
        values = residuals(planes) if self.prediction else planes
        jobs = []
        for kind in self._kinds(*planes.shape[:2]):
            patches = torch.from_numpy(self._patches(values, kind, channels))
            coded = self._coded(kind, channels)
            jobs += [(patches[i : i + _TOGETHER], coded) for i in range(0, len(patches), _TOGETHER)]
        with ThreadPoolExecutor(self.threads) as pool:
            streams = list(pool.map(lambda job: self.coder.encode(*job), jobs))
        deflated = zlib.compress(np.ascontiguousarray(planes).tobytes(), 9)
        if len(deflated) + 4 < sum(len(stream) + 4 for stream in streams):
            return _DEFLATE, [deflated]
        return _CIRCUIT, streams

    def _decode(
        self, streams: Iterator[bytes], method: int, height: int, width: int, channels: list[int]
    ) -> np.ndarray:
        """Planes ``(H, W, len(channels))``."""
        if method == _DEFLATE:
            raw = inflate(next(streams), height * width * len(channels))
            return np.frombuffer(raw, np.uint8).reshape(height, width, len(channels))
        values = np.zeros((height, width, len(channels)), np.uint8)
        kinds = list(self._kinds(height, width))
        jobs = []
        for kind in kinds:
            for i in range(0, kind.count, _TOGETHER):
                jobs.append((next(streams), min(_TOGETHER, kind.count - i), self._coded(kind, channels)))
        with ThreadPoolExecutor(self.threads) as pool:
            decoded = pool.map(lambda job: self.coder.decode(*job), jobs)
            for kind in kinds:
                patches = torch.cat([next(decoded) for _ in range(0, kind.count, _TOGETHER)]).numpy()
                self._place(values, kind, channels, patches)
        return restore(values) if self.prediction else values

    def _stream_count(self, method: int, height: int, width: int) -> int:
        """How many streams the planes of a group have."""
        if method == _DEFLATE:
            return 1
        if method != _CIRCUIT:
            raise UserError(f"method {method} is unknown")
        return sum(-(-kind.count // _TOGETHER) for kind in self._kinds(height, width))

    # ---------------------------------------------------------------------------------------------------- patches

    def _kinds(self, height: int, width: int) -> Iterator[_Kind]:
        """The at most four kinds of patches of a picture."""
        whole = (height // self.patch, width // self.patch)
        rest = (height % self.patch, width % self.patch)
        rows = [(slice(0, whole[0]), self.patch), (slice(whole[0], whole[0] + 1), rest[0])]
        columns = [(slice(0, whole[1]), self.patch), (slice(whole[1], whole[1] + 1), rest[1])]
        for row, tall in rows:
            for column, wide in columns:
                if tall and wide and row.stop > row.start and column.stop > column.start:
                    yield _Kind(row, column, tall, wide)

    def _coded(self, kind: _Kind, channels: list[int]) -> list[bool]:
        """For every variable of a patch, whether it is there."""
        there = np.zeros((self.patch, self.patch, self.channels), bool)
        there[: kind.height, : kind.width, channels] = True
        return there.ravel().tolist()

    def _patches(self, values: np.ndarray, kind: _Kind, channels: list[int]) -> np.ndarray:
        """``(N, D)`` int64 of ``values (H, W, len(channels))``."""
        part = values[self._window(kind)]
        rows, columns = kind.rows.stop - kind.rows.start, kind.columns.stop - kind.columns.start
        cut = part.reshape(rows, kind.height, columns, kind.width, len(channels)).transpose(0, 2, 1, 3, 4)
        patches = np.zeros((rows * columns, self.patch, self.patch, self.channels), np.int64)
        patches[:, : kind.height, : kind.width, channels] = cut.reshape(-1, kind.height, kind.width, len(channels))
        return patches.reshape(len(patches), -1)

    def _place(self, values: np.ndarray, kind: _Kind, channels: list[int], patches: np.ndarray) -> None:
        """The inverse of :meth:`_patches`."""
        window = self._window(kind)
        rows, columns = kind.rows.stop - kind.rows.start, kind.columns.stop - kind.columns.start
        cut = patches.reshape(rows, columns, self.patch, self.patch, self.channels)
        cut = cut[:, :, : kind.height, : kind.width, channels].transpose(0, 2, 1, 3, 4)
        values[window] = cut.reshape(values[window].shape)

    def _window(self, kind: _Kind) -> tuple[slice, slice]:
        top, left = kind.rows.start * self.patch, kind.columns.start * self.patch
        rows, columns = kind.rows.stop - kind.rows.start, kind.columns.stop - kind.columns.start
        return slice(top, top + rows * kind.height), slice(left, left + columns * kind.width)


def _streams(body: bytes, at: int) -> Iterator[bytes]:
    while at < len(body):
        (length,) = struct.unpack_from("<I", body, at)
        if at + 4 + length > len(body):
            raise UserError("a stream is longer than the file")
        yield body[at + 4 : at + 4 + length]
        at += 4 + length


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM).digest()
