"""A folder of pictures as people have it, with damaged ones, odd modes and splits of its own."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus import data
from isthmus.codec import UserError
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import as_image, decode_image
from isthmus.data.readers.headers import header
from isthmus.data.readers.masks import Palette, as_mask, decode_mask


def picture(size=(40, 30), seed=0, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode="L") if mode == "L" else Image.fromarray(pixels, mode=mode)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder, names, size=(40, 30)):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(size, number).save(folder / name)


def test_class_folders_give_labels(tmp_path):
    fill(tmp_path, [f"{kind}/{i}.png" for kind in ("cat", "ant") for i in range(20)])
    dataset = data.load(f"folder:{tmp_path}", "all", needs=("image", "label"))
    assert dataset.classes == ["ant", "cat"]
    assert dataset.columns == ("image", "label")
    assert [int(dataset[i]["label"]) for i in (0, 19, 20, 39)] == [0, 0, 1, 1]


def test_a_flat_folder_has_no_label(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(5)] + ["deep/er/6.png"])
    assert data.load(f"folder:{tmp_path}", "all").columns == ("image",)
    with pytest.raises(UserError, match="no column label"):
        data.load(f"folder:{tmp_path}", needs=("label",))


def test_splits_by_hash_are_disjoint_complete_and_stay_when_a_file_is_added(tmp_path):
    fill(tmp_path, [f"{i:03}.png" for i in range(100)], size=(8, 8))
    names = {}
    for part in ("train", "val", "test", "all"):
        dataset = data.load(f"folder:{tmp_path}", part)
        names[part] = {dataset.identify(i) for i in range(len(dataset))}
    if hasattr(data.load(f"folder:{tmp_path}"), "files"):
        assert names["train"] | names["val"] | names["test"] == names["all"]
    lengths = [len(data.load(f"folder:{tmp_path}", part)) for part in ("train", "val", "test")]
    assert sum(lengths) == 100
    assert min(lengths[1:]) >= 3
    fill(tmp_path, ["zzz.png"], size=(8, 8))
    again = [len(data.load(f"folder:{tmp_path}", part)) for part in ("train", "val", "test")]
    assert sum(b - a for a, b in zip(lengths, again, strict=True)) == 1


@pytest.mark.parametrize("count", [3, 4, 7])
def test_a_handful_of_pictures_still_fills_every_split(tmp_path, count):
    fill(tmp_path, [f"{i}.png" for i in range(count)], size=(100, 100))
    parts = [data.load(f"folder:{tmp_path}", part) for part in ("train", "val", "test")]
    names = [part.identify(i) for part in parts for i in range(len(part))]
    assert all(len(part) for part in parts)
    assert sorted(names) == [f"{i}.png" for i in range(count)]


def test_one_picture_cannot_be_split(tmp_path):
    fill(tmp_path, ["0.png"])
    assert len(data.load(f"folder:{tmp_path}")) == 1
    with pytest.raises(UserError, match="none for the split 'test'"):
        data.load(f"folder:{tmp_path}", "test")


def test_split_folders_are_used_and_a_missing_one_is_carved_from_train(tmp_path):
    fill(tmp_path, [f"train/a/{i}.png" for i in range(60)] + [f"Test/a/{i}.png" for i in range(7)])
    sizes = {part: len(data.load(f"folder:{tmp_path}", part)) for part in ("train", "val", "test", "train+val")}
    assert sizes["test"] == 7
    assert sizes["train"] + sizes["val"] == sizes["train+val"] == 60
    assert 0 < sizes["val"] < 20
    assert data.load(f"folder:{tmp_path}").classes == ["a"]


@pytest.mark.parametrize("size", [(40, 30), (200, 150)], ids=["kept in memory", "decoded on demand"])
def test_damaged_files_are_replaced_by_the_next_and_named(tmp_path, size):
    fill(tmp_path, [f"{i}.jpg" for i in range(8)], size)
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:400])
    (tmp_path / "3.jpg").write_bytes(b"")
    (tmp_path / "7.jpg").write_text("not a picture")
    dataset = data.load(f"folder:{tmp_path}", "all")
    batch = dataset.fetch(range(8))
    assert batch["index"].tolist() == [0, 1, 4, 4, 4, 5, 6, 0]
    assert torch.equal(batch["image"][2], decode_image(tmp_path / "4.jpg"))
    assert dict(dataset.skipped).keys() == {"2.jpg", "3.jpg", "7.jpg"}
    assert len(dataset.skipped) == 3
    assert dict(dataset.skipped)["3.jpg"] == "the file is empty"
    assert torch.cat([b["index"] for b in data.evaluation_batches(dataset, 3)]).tolist() == [0, 1, 4, 5, 6]


def test_a_subset_replaces_from_its_own_samples_only(tmp_path):
    fill(tmp_path, [f"{i}.jpg" for i in range(4)])
    (tmp_path / "1.jpg").write_bytes(b"")
    subset = data.load(f"folder:{tmp_path}", "all").select([0, 1, 3])
    assert subset.fetch([1])["index"].tolist() == [3]
    assert data.load(f"folder:{tmp_path}", "all").select([1, 0]).fetch([0, 1])["index"].tolist() == [0, 0]


def test_nothing_readable_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"none of its 3 samples can be read \(0.jpg"):
        data.load(f"folder:{tmp_path}", "all")


def test_an_empty_a_missing_and_a_foreign_folder_are_told_apart(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="it is empty"):
        data.load(f"folder:{tmp_path / 'pictures'}")
    with pytest.raises(UserError, match=r"Nearest: .*pictures"):
        data.load(f"folder:{tmp_path / 'pictuers'}")
    (tmp_path / "pictures" / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"1 other files, such as notes\.txt"):
        data.load(f"folder:{tmp_path / 'pictures'}")
    with pytest.raises(UserError, match="is a file"):
        data.load(f"folder:{tmp_path / 'pictures' / 'notes.txt'}")
    with pytest.raises(UserError, match="write folder:"):
        data.load(str(tmp_path / "pictures"))


def test_hidden_files_and_other_files_are_passed_over(tmp_path):
    fill(tmp_path, ["a/1.png", "a/.2.png", ".thumbs/3.png", "__MACOSX/4.png"])
    (tmp_path / "a" / "list.csv").write_text("1")
    assert len(data.load(f"folder:{tmp_path}", "all")) == 1


def test_a_folder_that_links_to_itself_ends(tmp_path):
    fill(tmp_path, ["a/1.png"])
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert len(data.load(f"folder:{tmp_path}", "all")) == 1


# ------------------------------------------------------------------------------------------------------- decoding


def test_exif_rotation_is_applied():
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    shown = np.asarray(image).transpose(1, 0, 2)[:, ::-1]
    assert np.array_equal(decode_image(encoded(image, exif=exif)).permute(1, 2, 0).numpy(), shown)
    turned = decode_image(encoded(image, "JPEG", exif=exif, quality=100, subsampling=0))
    assert turned.shape == (3, 40, 30)


def test_grey_becomes_three_equal_channels():
    pixels = decode_image(encoded(picture(mode="L")))
    assert pixels.shape == (3, 30, 40)
    assert torch.equal(pixels[0], pixels[2])


def test_sixteen_bits_are_scaled_and_not_cut():
    deep = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    assert decode_image(encoded(Image.fromarray(deep)))[0].tolist() == [[0, 1, 128, 255]]
    assert decode_image(encoded(Image.fromarray(deep), "TIFF"))[0].tolist() == [[0, 1, 128, 255]]


def test_floating_point_pixels():
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert decode_image(encoded(unit, "TIFF"))[0].tolist() == [[0, 128, 255]]
    with pytest.raises(Unreadable, match="outside"):
        decode_image(encoded(Image.fromarray(np.array([[-1.0, 5e4]], dtype=np.float32)), "TIFF"))


def test_transparency_is_laid_over_white():
    clear = np.zeros((1, 2, 4), dtype=np.uint8)
    clear[0, 1] = (10, 20, 30, 255)
    assert decode_image(encoded(Image.fromarray(clear))).permute(1, 2, 0).tolist() == [[[255] * 3, [10, 20, 30]]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([200, 0, 0])
    assert decode_image(encoded(palette)).flatten().tolist() == [200, 0, 0]
    assert decode_image(encoded(palette, transparency=0)).flatten().tolist() == [255, 255, 255]


def test_cmyk_animations_and_two_colours():
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert decode_image(encoded(ink, "JPEG", quality=100))[:, 4, 4].tolist()[0] > 200
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    assert decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).min() == 255
    assert decode_image(encoded(Image.new("1", (4, 4), 1))).min() == 255


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_quick_jpeg_decoder_gives_pillows_pixels(progressive, subsampling, mode):
    options = {} if mode == "L" else {"subsampling": subsampling}
    file = encoded(picture((77, 53), mode=mode), "JPEG", quality=80, progressive=progressive, **options)
    with Image.open(io.BytesIO(file)) as image:
        assert np.array_equal(decode_image(file).permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_of_any_kind_is_unreadable(kind):
    file = encoded(picture((200, 200)), kind)
    with pytest.raises(Unreadable):
        decode_image(file[: len(file) // 2])


def test_masks_are_class_numbers():
    numbers = np.array([[0, 3], [11, 255]], dtype=np.uint8)
    expected = [[0, 3], [11, 255]]
    assert decode_mask(encoded(Image.fromarray(numbers))).tolist() == expected
    palette = Image.fromarray(numbers, mode="L").convert("P")
    palette.putdata(numbers.flatten().tolist())
    assert decode_mask(encoded(palette)).tolist() == expected
    assert decode_mask(encoded(Image.fromarray(np.stack([numbers] * 3, -1)))).tolist() == expected
    assert decode_mask(encoded(Image.fromarray(numbers.astype(np.uint16) * 100))).tolist() == [[0, 300], [1100, 25500]]
    assert as_mask(expected).tolist() == expected
    with pytest.raises(Unreadable, match="colours"):
        decode_mask(encoded(picture()))


def test_images_given_as_arrays():
    pixels = np.asarray(picture())
    expected = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    for form in (pixels, pixels.transpose(2, 0, 1), pixels.tolist(), Image.fromarray(pixels)):
        assert torch.equal(as_image(np.asarray(form, dtype=np.uint8) if isinstance(form, list) else form), expected)
    assert as_image(pixels[..., 0]).shape == (3, 30, 40)
    assert as_image((pixels / 255).astype(np.float32)).sub(expected).abs().max() == 0
    with pytest.raises(Unreadable, match="no image"):
        as_image(np.zeros(7))
    with pytest.raises(Unreadable, match="empty"):
        as_image(None)


def test_a_picture_of_numbers_has_one_range() -> None:
    red = np.zeros((2, 2, 3), dtype=np.float32) + (200, 100, 1)
    assert as_image(red)[:, 0, 0].tolist() == [200, 100, 1]
    assert as_image(red / 255)[:, 0, 0].tolist() == [200, 100, 1]
    assert as_image(red.astype(np.int64))[:, 0, 0].tolist() == [200, 100, 1]
    assert as_image(red.astype(np.uint16) * 257)[:, 0, 0].tolist() == [200, 100, 1]
    deep = np.zeros((2, 2, 3), dtype=np.int32) + (65535, 257, 0)
    assert as_image(deep)[:, 0, 0].tolist() == [255, 1, 0]
    assert as_image(np.zeros((2, 3), dtype=np.int8) + 100).unique().tolist() == [100]
    assert as_image(np.eye(4, dtype=bool)).unique().tolist() == [0, 255]
    assert as_image(np.stack([np.eye(4, dtype=bool)] * 3)).unique().tolist() == [0, 255]
    clear = np.zeros((1, 1, 4), dtype=np.float64) + (1, 0, 0, 0)
    assert as_image(clear)[:, 0, 0].tolist() == [255, 255, 255]
    for wrong in (np.full((2, 2), np.nan), np.full((2, 2), "a"), np.full((2, 2), 1j), red - 300):
        with pytest.raises(Unreadable, match="pixels"):
            as_image(wrong)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("own", [True, False], ids=["both are tagged", "the picture is tagged"])
def test_masks_and_boxes_are_turned_as_their_picture_is(turn, kind, own):
    exif = Image.Exif()
    exif[0x0112] = turn
    pixels = np.zeros((5, 9), dtype=np.uint8)
    pixels[1:3, 2:8] = 7
    picture = encoded(Image.fromarray(pixels * 30), kind, exif=exif)
    shown = decode_image(picture)[0] // 30
    known = header(picture)
    mask = encoded(Image.fromarray(pixels), kind, **({"exif": exif} if own else {}))
    assert torch.equal(decode_mask(mask, known), shown.long())
    left, top, right, bottom = known.turned(torch.tensor([[2.0, 1.0, 8.0, 3.0]]))[0].long().tolist()
    assert (shown[top:bottom, left:right] == 7).all()
    assert (shown == 7).sum() == (bottom - top) * (right - left)


def test_a_mask_that_was_drawn_on_the_turned_picture_stays():
    exif = Image.Exif()
    exif[0x0112] = 6
    known = header(encoded(picture((9, 5)), exif=exif))
    drawn = np.arange(45, dtype=np.uint8).reshape(9, 5)
    assert decode_mask(encoded(Image.fromarray(drawn)), known).tolist() == drawn.tolist()


def test_masks_of_other_modes_are_class_numbers():
    numbers = np.array([[0, 3], [2, 1]], dtype=np.uint8)
    clear = np.stack([numbers, np.array([[255, 0], [9, 255]], dtype=np.uint8)], -1)
    expected = numbers.tolist()
    assert decode_mask(encoded(Image.fromarray(clear, mode="LA"))).tolist() == expected
    assert decode_mask(encoded(Image.fromarray(np.stack([numbers] * 3 + [clear[..., 1]], -1)))).tolist() == expected
    assert decode_mask(encoded(Image.fromarray(numbers > 1))).tolist() == [[0, 1], [1, 0]]
    assert decode_mask(encoded(Image.fromarray(numbers.astype(np.float32)), "TIFF")).tolist() == expected
    assert as_mask(numbers > 1).tolist() == [[0, 1], [1, 0]]
    assert as_mask(numbers[None].astype(np.float64)).tolist() == expected
    with pytest.raises(Unreadable, match="real numbers"):
        as_mask(numbers / 2)
    with pytest.raises(Unreadable, match="holds 1000000000; class numbers are below 65536"):
        as_mask(numbers.astype(np.int64) * 10**9 // 3)


def test_a_palette_says_what_colours_stand_for():
    palette = Palette([(0, 0, 0), (128, 0, 0), (0, 128, 64)])
    colours = np.array([[(0, 128, 64), (0, 0, 0)], [(128, 0, 0), (128, 0, 0)]], dtype=np.uint8)
    assert decode_mask(encoded(Image.fromarray(colours)), palette=palette).tolist() == [[2, 0], [1, 1]]
    with pytest.raises(Unreadable, match="the colour 1 2 3, which stands for no class"):
        decode_mask(encoded(Image.new("RGB", (2, 2), (1, 2, 3))), palette=palette)


def _claiming(kind: str, width: int, height: int) -> bytes:
    """A small file whose header says that its picture is large."""
    small, wide, high = encoded(picture((16, 16)), kind), width.to_bytes(2), height.to_bytes(2)
    if kind == "JPEG":
        start = small.index(b"\xff\xc0") + 5
        return small[:start] + high + wide + small[start + 4 :]
    if kind == "PNG":
        import zlib

        head = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + small[24:29]
        return small[:12] + head + zlib.crc32(head).to_bytes(4) + small[33:]
    if kind == "BMP":
        return small[:18] + width.to_bytes(4, "little") + height.to_bytes(4, "little") + small[26:]
    if kind == "GIF":
        return small[:6] + width.to_bytes(2, "little") + height.to_bytes(2, "little") + small[10:]
    return b"P6 %d %d 255\n" % (width, height)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "PPM"])
@pytest.mark.parametrize("decode", [decode_image, decode_mask])
def test_every_format_has_one_limit_which_holds_before_decoding(kind, decode, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as others set it in the same process
    with pytest.raises(Unreadable, match="is too large"):
        decode(_claiming(kind, 20_000, 20_000))


def test_only_regular_files_are_read(tmp_path):
    fill(tmp_path, ["a.png", "c.png"])
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "d.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "e.png").symlink_to("/dev/zero")
    dataset = data.load(f"folder:{tmp_path}", "all")
    assert dataset.fetch(range(5))["index"].tolist() == [0, 2, 2, 0, 0]
    assert dict(dataset.skipped) == {
        "b.png": "is no regular file",
        "d.png": "cannot be opened (No such file or directory)",
        "e.png": "is no regular file",
    }
