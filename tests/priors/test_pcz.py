"""Pictures of every kind come back to the last bit; whatever else a file holds is told, and never becomes a picture."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from isthmus.codec import UserError
from isthmus.priors import pcz, pictures
from isthmus.priors.circuit import HCLT
from isthmus.priors.lifting import decorrelate, recorrelate, residuals, restore
from isthmus.priors.pcz import PictureCoder
from isthmus.priors.pictures import from_image, png, read

pytest.importorskip("constriction")


def make(patch: int, channels: int, seed: int = 0, latents: int = 3) -> HCLT:
    """A circuit of residuals: near 128, as if the guess was mostly right."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.randint(1, 12, (200, 1), generator=g)
    x = (torch.randn(200, patch * patch * channels, generator=g) * spread + 128).round().clamp(0, 255).long()
    return HCLT.from_data(x, 256, latents, generator=g).fit([x], epochs=2)


@pytest.fixture(scope="module")
def colour() -> PictureCoder:
    return PictureCoder(make(4, 3), 4)


@pytest.fixture(scope="module")
def grey() -> PictureCoder:
    return PictureCoder(make(3, 1), 3, channels=1, threads=1)


def same(one: Image.Image, two: Image.Image) -> bool:
    if one.mode != two.mode or one.size != two.size or not np.array_equal(np.asarray(one), np.asarray(two)):
        return False
    return np.array_equal(np.asarray(one.convert("RGBA")), np.asarray(two.convert("RGBA")))


def smooth(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """Something like a photograph: slopes and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    wave = 100 + 50 * np.sin(x / 9 + y / 7) + y / 2
    planes = wave[..., None] + rng.normal(0, 2, (height, width, channels)) + 10 * np.arange(channels)
    return planes.clip(0, 255).astype(np.uint8).squeeze()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P"])
@pytest.mark.parametrize(
    ("size", "content"),
    [
        ((1, 1), "noise"),
        ((1, 9), "smooth"),
        ((9, 1), "extremes"),
        ((4, 4), "noise"),
        ((8, 12), "smooth"),
        ((13, 5), "noise"),
        ((33, 30), "constant"),
        ((33, 30), "extremes"),
    ],
)
def test_round_trip(size: tuple[int, int], mode: str, content: str, colour: PictureCoder, grey: PictureCoder) -> None:
    rng = np.random.default_rng(1)
    shape = (*size, 4)
    planes = {
        "smooth": smooth(*size, 4).reshape(shape),
        "noise": rng.integers(0, 256, shape, dtype=np.uint8),
        "constant": np.full(shape, 77, np.uint8),
        "extremes": rng.choice(np.array([0, 255], np.uint8), shape),
    }[content]
    image = Image.fromarray(planes)
    if mode == "P":
        image = image.convert("RGB").quantize(17)
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    if mode == "LA":
        image.putalpha(Image.fromarray(planes[..., 3]))
    for coder in (colour, grey):
        data = coder.compress(image)
        assert same(coder.decompress(data), image)
        raw = image.convert("L" if mode == "1" else mode).tobytes()
        assert len(data) < len(raw) + 900, "noise costs what it holds, a palette up to 800 bytes"


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    channels=st.sampled_from([1, 2, 3, 4]),
    levels=st.sampled_from([1, 2, 3, 256]),
    seed=st.integers(0, 2**31),
)
def test_any_pixels_round_trip(
    height: int, width: int, channels: int, levels: int, seed: int, colour: PictureCoder
) -> None:
    rng = np.random.default_rng(seed)
    planes = rng.integers(0, 256, levels, dtype=np.uint8)[rng.integers(0, levels, (height, width, channels))]
    image = Image.fromarray(planes[..., 0] if channels == 1 else planes)
    assert same(colour.decompress(colour.compress(image)), image)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31))
def test_prediction_is_undone(height: int, width: int, planes: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, planes), dtype=np.uint8)
    assert np.array_equal(restore(residuals(pixels)), pixels)
    if planes == 3:
        assert np.array_equal(recorrelate(decorrelate(pixels)), pixels)
    slope = (np.mgrid[:height, :width][1] * 3 + 10).astype(np.uint8)[..., None]
    assert (residuals(slope)[1:, 1:] == 128).all(), "a slope is guessed exactly"


def test_the_file_does_not_depend_on_threads_nor_on_more_patches_than_one_stream_holds() -> None:
    circuit = make(2, 3)
    image = Image.fromarray(smooth(70, 131, 3))
    one, many = (PictureCoder(circuit, 2, threads=t) for t in (1, 4))
    data = one.compress(image)
    assert data == many.compress(image)
    assert same(many.decompress(data), image)


def test_a_circuit_of_plain_pixels_and_many_patches() -> None:
    coder = PictureCoder(make(2, 1), 2, channels=1, prediction=False)
    image = Image.fromarray(smooth(30, 40, 3))
    assert same(coder.decompress(coder.compress(image)), image)


def test_smooth_pictures_shrink_by_the_circuit(colour: PictureCoder) -> None:
    image = Image.fromarray(smooth(64, 64, 3))
    data = colour.compress(image)
    assert len(data) < 0.6 * 64 * 64 * 3
    planes = np.asarray(image)
    at = pcz._HEADER.size
    assert data[at] == pcz._CIRCUIT
    grey = Image.fromarray(np.repeat(planes[..., :1], 3, 2))
    single = colour.compress(grey.convert("L"))
    assert len(colour.compress(grey)) < len(single) + 10, "colours that are grey cost a few bytes"


def test_what_makes_a_picture_look_so_is_kept(colour: PictureCoder, tmp_path: Path) -> None:
    palette = Image.fromarray(smooth(9, 9, 3)).convert("P", palette=Image.Palette.ADAPTIVE, colors=5)
    for transparency in (2, bytes([0, 100, 255])):
        palette.info["transparency"] = transparency
        back = colour.decompress(colour.compress(palette))
        (tmp_path / "a.png").write_bytes(png(palette))
        (tmp_path / "b.png").write_bytes(png(back))
        assert same(read(tmp_path / "a.png"), read(tmp_path / "b.png"))
    photo = Image.fromarray(smooth(9, 9, 3))
    exif = photo.getexif()
    exif[274] = 6  # turned by a quarter
    photo.info |= {"exif": exif.tobytes(), "icc_profile": b"a profile"}
    back = Image.open(io.BytesIO(png(colour.decompress(colour.compress(photo)))))
    assert back.getexif()[274] == 6
    assert back.info["icc_profile"] == b"a profile"


FACTS = {
    "gAMA": struct.pack(">I", 45455),
    "sRGB": b"\x02",
    "cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    "pHYs": struct.pack(">IIB", 2835, 2834, 1),
}


def chunks(data: bytes) -> dict[str, bytes]:
    found, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        found[data[at + 4 : at + 8].decode()] = data[at + 8 : at + 8 + length]
        at += 12 + length
    return found


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("facts", [FACTS, {"gAMA": FACTS["gAMA"]}, {"pHYs": struct.pack(">IIB", 3, 2, 0)}, {}])
def test_gamma_rendering_and_density_come_back_as_they_were(
    mode: str, facts: dict[str, bytes], colour: PictureCoder, tmp_path: Path
) -> None:
    plain = Image.fromarray(smooth(5, 6, 3)).convert(mode)
    data = png(plain)
    extra = b"".join(pictures._chunk(kind.encode(), value) for kind, value in facts.items())
    (tmp_path / "a.png").write_bytes(data[:33] + extra + data[33:])
    back = png(colour.decompress(colour.compress(read(tmp_path / "a.png"))))
    assert {kind: value for kind, value in chunks(back).items() if kind in FACTS} == facts
    (tmp_path / "b.png").write_bytes(back)
    assert from_image(read(tmp_path / "b.png")).digest == from_image(read(tmp_path / "a.png")).digest


def test_a_photographs_dots_per_inch_and_profile_are_kept_and_nonsense_is_left_out(
    colour: PictureCoder, tmp_path: Path
) -> None:
    Image.fromarray(smooth(9, 9, 3)).save(tmp_path / "a.jpg", dpi=(300, 300), icc_profile=b"a profile")
    back = chunks(png(colour.decompress(colour.compress(read(tmp_path / "a.jpg")))))
    assert back["pHYs"] == struct.pack(">IIB", 11811, 11811, 1)
    assert "iCCP" in back
    image = Image.new("L", (2, 2))
    image.info |= {"dpi": (float("nan"), 0), "gamma": "dark", "srgb": None, "chromaticity": (1, 2)}
    assert not FACTS.keys() & chunks(png(colour.decompress(colour.compress(image)))).keys()


def test_pixels_beyond_a_short_palette_stay_what_they_are(colour: PictureCoder, tmp_path: Path) -> None:
    """Such files are about; written with as few bits as their palette asks for, their pixels would change."""
    planes = np.arange(0, 240, 6, dtype=np.uint8).reshape(5, 8)
    image = Image.frombytes("P", (8, 5), planes.tobytes())
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200], "RGB")
    back = colour.decompress(colour.compress(image))
    (tmp_path / "a.png").write_bytes(png(back))
    assert len(back.getpalette("RGB") or []) == 9
    opened = read(tmp_path / "a.png")
    assert np.array_equal(np.asarray(opened), planes)
    assert np.array_equal(np.asarray(opened.convert("RGB")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_transparent_colour_becomes_alpha(mode: str, colour: PictureCoder, tmp_path: Path) -> None:
    image = Image.fromarray(smooth(6, 6, 3)).convert(mode)
    image.putpixel((2, 2), (1, 2, 3) if mode == "RGB" else 0)
    image.save(tmp_path / "a.png", transparency=(1, 2, 3) if mode == "RGB" else 0)
    opened = read(tmp_path / "a.png")
    back = colour.decompress(colour.compress(opened))
    assert back.mode == ("RGBA" if mode == "RGB" else "LA")
    assert np.array_equal(np.asarray(back.convert("RGBA")), np.asarray(opened.convert("RGBA")))
    assert np.asarray(back.convert("RGBA"))[2, 2, 3] == 0


# ------------------------------------------------------------------------------------------------- what is refused


def test_every_flipped_byte_and_every_cut_is_told(colour: PictureCoder) -> None:
    image = Image.fromarray(smooth(9, 10, 4))
    data = colour.compress(image)
    rng = np.random.default_rng(0)
    for at in range(len(data)):
        wrong = bytearray(data)
        wrong[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(UserError):
            colour.decompress(bytes(wrong))
        with pytest.raises(UserError):
            colour.decompress(data[:at])
    for more in (b"\0", b"more"):
        with pytest.raises(UserError, match="damaged"):
            colour.decompress(data + more)


def resealed(data: bytes, at: int, value: bytes) -> bytes:
    body = data[:at] + value + data[at + len(value) : -8]
    return body + pcz._checksum(body)


def test_a_file_that_was_changed_and_sealed_again_is_told(colour: PictureCoder) -> None:
    image = Image.fromarray(smooth(9, 10, 3))
    data = colour.compress(image)
    header = pcz._HEADER.size
    for at, value in (
        (5, bytes([77])),  # mode
        (6, struct.pack("<I", 11)),  # width
        (6, struct.pack("<II", 2**31, 2**16)),  # more than fits into memory
        (6, struct.pack("<I", 0)),
        (10, struct.pack("<I", 1)),  # height
        (22, b"otherpix"),
        (header, bytes([pcz._DEFLATE])),
        (header, bytes([9])),
        (header + 3, struct.pack("<I", 10**9)),
        (header + 9, b"\xff\xff\xff\xff"),
    ):
        with pytest.raises(UserError, match=r"is no valid \.pcz|other pixels"):
            colour.decompress(resealed(data, at, value))


def crafted(coder: PictureCoder, mode: int, size: tuple[int, int], extras: bytes, rest: bytes) -> bytes:
    """A file with a right checksum that no encoder wrote."""
    header = pcz._HEADER.pack(b"\x89PCZ", 1, mode, *size, coder.model, b"\0" * 8, len(extras))
    return header + extras + rest + pcz._checksum(header + extras + rest)


def packed(text: str) -> bytes:
    return zlib.compress(text.encode())


@pytest.mark.parametrize(
    "extras",
    [
        packed("[1, 2]"), packed('"text"'), packed("7"), packed("null"), packed("[" * 100_000),
        packed('{"a":' * 50_000),
        packed('{"gamma": {"hex": 3}}'), packed('{"gamma": {}}'), packed('{"gamma": "dark"}'), packed('{"gamma": -1}'),
        packed('{"gamma": 1e999}'), packed('{"gamma": NaN}'), packed('{"gamma": true}'), packed('{"other": 1}'),
        packed('{"transparency": [1]}'), packed('{"palette": {"hex": "0000"}}'), packed('{"density": [0, 1, 1]}'),
        packed('{"exif": {"hex": "zz"}}'), packed('{"exif": 5}'), packed("{"), b"no deflate", packed("{}")[:-3],
        packed("{}") + b"more", zlib.compress(b"\xff\xfe{}"), packed('{"gamma": ' + "9" * 5000 + "}"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mode", [1, 3, 5])
def test_crafted_extras_are_told(extras: bytes, mode: int, colour: PictureCoder) -> None:
    with pytest.raises(UserError, match=r"is no valid \.pcz file"):
        colour.decompress(crafted(colour, mode, (2, 2), extras, b"\0\0" * 4))


@settings(deadline=None, max_examples=150)
@given(
    mode=st.integers(0, 255),
    width=st.integers(0, 40),
    height=st.integers(0, 40),
    extras=st.binary(max_size=40),
    rest=st.binary(max_size=60),
)
def test_crafted_headers_are_told(
    mode: int, width: int, height: int, extras: bytes, rest: bytes, colour: PictureCoder
) -> None:
    with pytest.raises(UserError, match=r"is no valid \.pcz file|other pixels"):
        colour.decompress(crafted(colour, mode, (width, height), extras, rest))


@pytest.mark.parametrize("kind", ["deflate", "extras", "streams", "planes", "fewer"])
def test_a_small_file_cannot_ask_for_more_memory_than_its_picture_has(kind: str, colour: PictureCoder) -> None:
    bomb = zlib.compress(bytes(200_000_000), 9)
    one = struct.pack("<I", len(bomb)) + bomb
    data = {
        "deflate": crafted(colour, 1, (4, 4), b"", bytes([pcz._DEFLATE]) + one),
        "extras": crafted(colour, 1, (4, 4), bomb, b"\0\0"),
        "streams": crafted(colour, 1, (2**14, 2**14), b"", bytes([pcz._CIRCUIT]) + bytes(4)),
        "planes": crafted(colour, 4, (2**14, 2**14), b"", b"\0\7" * 4),
        "fewer": crafted(colour, 1, (4, 4), b"", bytes([pcz._DEFLATE]) + bytes(4) + one),
    }[kind]
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"is no valid \.pcz file"):
            colour.decompress(data)
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


def test_more_beside_a_picture_than_there_is_room_for_is_refused(
    colour: PictureCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", (3, 3))
    image.info["icc_profile"] = bytes(2**23 + 1)
    with pytest.raises(UserError, match="colour profile or EXIF of more than"):
        colour.compress(image)
    monkeypatch.setattr(pictures, "LARGEST", 26)
    with pytest.raises(UserError, match="holds up to 26 values"):
        colour.compress(Image.new("RGB", (3, 3)))


def test_other_models_versions_and_files_are_told(colour: PictureCoder, grey: PictureCoder) -> None:
    image = Image.fromarray(smooth(9, 10, 3))
    data = colour.compress(image)
    other = PictureCoder(make(4, 3, seed=1), 4)
    without = PictureCoder(make(4, 3), 4, prediction=False)
    for coder in (other, grey, without):
        with pytest.raises(UserError, match="written with another model"):
            coder.decompress(data)
    assert same(PictureCoder(make(4, 3), 4).decompress(data), image), "the same model made again"
    with pytest.raises(UserError, match=r"\.pcz version 9; this isthmus reads version 1"):
        colour.decompress(data[:4] + b"\x09" + data[5:])
    for foreign in (b"", b"\x89PN", png(image), b"\x89PCZ", b"\x89PCZ\x01"):
        with pytest.raises(UserError, match=r"no \.pcz file|damaged or cut short"):
            colour.decompress(foreign)


def test_more_than_eight_bits_and_foreign_colours_are_refused(colour: PictureCoder, tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((3, 3), 40000, np.uint16))
    deep.save(tmp_path / "deep.png")
    for path in (tmp_path / "deep.png", _png16(tmp_path / "rgb.png", colours=2), _ppm16(tmp_path / "rgb.ppm")):
        with pytest.raises(UserError, match="does not have 8 bits a channel"):
            read(path)
    for image in (deep, Image.new("F", (2, 2)), Image.new("I", (2, 2))):
        with pytest.raises(UserError, match="does not have 8 bits a channel"):
            colour.compress(image)
    with pytest.raises(UserError, match="colour mode CMYK"):
        colour.compress(Image.new("CMYK", (2, 2)))
    with pytest.raises(UserError, match="no pixels"):
        colour.compress(Image.new("L", (0, 5)))
    moving = [Image.new("L", (4, 4), value) for value in (0, 255)]
    moving[0].save(tmp_path / "moving.gif", save_all=True, append_images=moving[1:])
    with pytest.raises(UserError, match="2 frames"):
        read(tmp_path / "moving.gif")
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(smooth(30, 30, 3)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    for name in ("text.png", "cut.png"):
        with pytest.raises(UserError, match="no picture that can be read"):
            read(tmp_path / name)


@pytest.mark.parametrize("kind", ["tif", "sgi", "jp2", "avif"])
def test_other_formats_that_pillow_reads_as_fewer_bits_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"deep.{kind}"
    plain = Image.fromarray(smooth(8, 8, 3))
    if kind.upper() not in {"TIF", "SGI"} and Image.registered_extensions().get(f".{kind}") not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind}")
    plain.save(path)
    assert read(path).mode == "RGB", "8 bits are taken"
    data = path.read_bytes()
    if kind == "tif":
        data = _tiff16()
    elif kind == "sgi":
        data = data[:3] + b"\2" + data[4:] + data[512:]
    elif kind == "jp2":
        at = data.index(b"\xff\x4f\xff\x51") + 42
        data = data[:at] + bytes([15, 1, 1] * 3) + data[at + 9 :]
    else:
        at = data.index(b"av1C") + 6
        data = data[:at] + bytes([data[at] | 0x40]) + data[at + 1 :]
    with Image.open(path) as opened:  # of AVIF only the header is changed, which Pillow would not open
        path.write_bytes(data)
        if kind == "avif":
            with pytest.raises(UserError, match="does not have 8 bits a channel"):
                pictures._check_depth(path, opened)
            return
    with Image.open(path) as opened:
        assert opened.mode == "RGB", "Pillow tells no difference"
    with pytest.raises(UserError, match="does not have 8 bits a channel"):
        read(path)


def test_circuits_that_do_not_fit_are_refused() -> None:
    circuit = make(2, 1)
    for patch, channels in ((3, 1), (2, 3), (2, 2), (0, 1)):
        with pytest.raises(ValueError, match="does not fit patches"):
            PictureCoder(circuit, patch, channels)
    few = HCLT((-1,), 16, 2).fit([torch.zeros(3, 1, dtype=torch.long)])
    with pytest.raises(ValueError, match="256 values a pixel, the circuit has 16"):
        PictureCoder(few, 1, 1)
    with pytest.raises(ValueError, match="threads"):
        PictureCoder(circuit, 2, 1, threads=0)
    with pytest.raises(ValueError, match="not learnt anything yet"):
        PictureCoder(HCLT((-1, 0, 0, 0), 256, 2), 2, 1)


def test_palettes_with_alpha_are_kept_as_pixels(colour: PictureCoder) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 0, 4, 5, 6, 255], "RGBA")
    image.putpixel((1, 0), 1)
    assert from_image(image).mode == "RGBA"
    back = colour.decompress(colour.compress(image))
    assert back.getpixel((0, 0)) == (1, 2, 3, 0)
    assert back.getpixel((1, 0)) == (4, 5, 6, 255)


def _png16(path: Path, colours: int) -> Path:
    """A PNG of 2×1 pixels of 16 bits, which Pillow would read as 8."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, colours, 0, 0, 0)
    pixels = zlib.compress(b"\0" + bytes(range(12)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def _ppm16(path: Path) -> Path:
    path.write_bytes(b"P6 2 1 65535\n" + bytes(range(12)))
    return path


def _tiff16() -> bytes:
    """A TIFF of 2×1 colours of 16 bits."""
    tags = {256: 2, 257: 1, 258: 122, 259: 1, 262: 2, 273: 128, 277: 3, 278: 1, 279: 12}
    long = {258, 273, 279}
    entries = b"".join(
        struct.pack("<HHI", tag, 3 if tag not in long or tag == 258 else 4, 3 if tag == 258 else 1)
        + (struct.pack("<I", value) if tag in long else struct.pack("<HH", value, 0))
        for tag, value in tags.items()
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    assert len(head) == 122
    return head + struct.pack("<HHH", 16, 16, 16) + bytes(range(12))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UserError, match="is no regular file"):
        read(tmp_path / "x.png")
