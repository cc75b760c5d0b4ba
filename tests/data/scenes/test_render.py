"""Pictures, masks, boxes and depth: against geometry, against each other, and bit for bit against stored sums."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import os
import subprocess
import sys

import pytest
import torch

from isthmus.data.builtin.scenes import (
    COLOURS,
    GROUNDS,
    SHAPES,
    TEXTURES,
    Scene,
    Space,
    Thing,
    encode,
    paint,
    render,
    sample,
    without_texture,
)
from isthmus.data.builtin.scenes.shapes import TURN
from isthmus.data.builtin.scenes.textures import TONE
from tests.conftest import ROOT

EVERYTHING = Space(objects=range(7), shapes=SHAPES, colours=tuple(COLOURS), fills=TEXTURES, textures=TEXTURES)


def scenes(n: int, seed: int = 0, space: Space | None = None) -> list[Scene]:
    return sample(n, "uniform", torch.Generator().manual_seed(seed), space)


def alone(shape: str, **factors: int | str) -> Scene:
    return Scene((Thing(shape, "red", **{"size": 600, "x": 512, "y": 512, **factors}),), ground="black")  # type: ignore[arg-type]


def area_of(shape: str) -> float:
    """Area in squares of the radius of the circle around the shape, from school geometry."""
    lens_d, lens_r, lens_s = 0.52, 0.95, 0.8
    a = math.acos((lens_d**2 + lens_r**2 - lens_s**2) / (2 * lens_d * lens_r))
    b = math.acos((lens_d**2 + lens_s**2 - lens_r**2) / (2 * lens_d * lens_s))
    lens = lens_r**2 * (a - math.sin(2 * a) / 2) + lens_s**2 * (b - math.sin(2 * b) / 2)
    return {
        "circle": math.pi * 0.88**2,
        "square": 2.0,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 5 * 0.46 * math.sin(math.radians(36)),
        "ring": math.pi * (0.89**2 - 0.49**2),
        "cross": 2 * 1.9 * 0.62 - 0.62**2,
        "moon": math.pi * 0.95**2 - lens,
        "ellipse": math.pi * 0.6,
        "rectangle": 4 * 0.6 / 1.36,
        "heart": 4 * 0.555**2 + math.pi * 0.555**2,
        "hexagon": 3 * math.sqrt(3) / 2 * 0.96**2,
        "arrow": 0.56 * 0.90 + (0.97 + 0.05) * (0.59863 + 0.05 * 0.61714) / 0.78686,
    }[shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_the_area_that_geometry_gives_it(shape: str) -> None:
    mask = render([alone(shape)], 256, ("amodal",))["amodal"]
    assert mask.sum().item() / 75**2 == pytest.approx(area_of(shape), rel=0.015)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_stays_within_its_circle_at_every_angle(shape: str) -> None:
    turned = [alone(shape, rotation=angle) for angle in range(0, 360, 15)]
    mask = render(turned, 128, ("amodal",))["amodal"][:, 0]
    centre = torch.arange(128) + 0.5 - 64
    outside = (centre[:, None] ** 2 + centre**2).sqrt() > 37.5 + 0.75
    assert not (mask & outside).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_quarter_turn_of_the_factors_is_a_quarter_turn_of_the_picture(shape: str) -> None:
    mask = render([alone(shape, rotation=angle) for angle in (20, 110)], 96, ("amodal",))["amodal"][:, 0]
    differ = mask[0].rot90(-1) ^ mask[1]  # pixels half covered, to within rounding, may fall on either side
    assert differ.sum() <= 2
    assert mask[0].sum() > 500


def test_moving_by_a_pixel_moves_the_picture_by_a_pixel() -> None:
    still, moved = (without_texture(s) for s in (alone("star", x=400, y=480), alone("star", x=416, y=512)))
    image = render([still, moved], 64)["image"]
    assert torch.equal(image[0, :, :-2, :-1], image[1, :, 2:, 1:])


def test_visible_parts_are_the_whole_objects_less_what_nearer_ones_cover() -> None:
    some = scenes(64, space=EVERYTHING)
    drawn = render(some, 64, ("masks", "amodal"))
    assert drawn["masks"].sum(1).max() == 1
    for scene, masks, amodal in zip(some, drawn["masks"], drawn["amodal"], strict=True):
        for k, thing in enumerate(scene.objects):
            expected = amodal[k].clone()
            for j, other in enumerate(scene.objects):
                if other.depth < thing.depth:
                    expected &= ~amodal[j]
            assert torch.equal(masks[k], expected)
        assert not masks[len(scene) :].any()


def test_an_object_covered_by_another_keeps_its_whole_outline_and_box() -> None:
    far = Thing("square", "blue", 300, 400, 400, depth=200)
    near = Thing("circle", "red", 500, 420, 400, depth=10)
    together = render([Scene((far, near))], 64, ("masks", "amodal", "boxes"))
    single = render([Scene((far,))], 64, ("masks", "amodal", "boxes"))
    assert torch.equal(together["amodal"][0, 0], single["amodal"][0, 0])
    assert torch.equal(together["boxes"][0, 0], single["boxes"][0, 0])
    assert together["masks"][0, 0].sum() < single["masks"][0, 0].sum() // 4


def test_the_picture_shows_the_nearer_object_where_two_overlap() -> None:
    one, other = Thing("square", "green", 400, 480, 512, depth=9), Thing("square", "red", 400, 544, 512, depth=90)
    for first, second, channel in ((one, other, 1), (dataclasses.replace(one, depth=99), other, 0)):
        for order in ((first, second), (second, first)):  # the order in the list means nothing
            assert render([Scene(order)], 64)["image"][0, :, 32, 32].argmax() == channel


def test_boxes_are_tight_around_the_whole_objects() -> None:
    some = scenes(48, 1, dataclasses.replace(EVERYTHING, inside=False))
    drawn = render(some, 48, ("amodal", "boxes"))
    seen = 0
    for masks, boxes in zip(drawn["amodal"], drawn["boxes"], strict=True):
        for mask, box in zip(masks, boxes.tolist(), strict=True):
            y, x = mask.nonzero(as_tuple=True)
            expected = [x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1] if len(x) else [0] * 4
            assert box == expected
            seen += bool(len(x))
    assert seen > 100


def test_masks_and_boxes_are_those_of_the_factors() -> None:
    drawn = render([alone("circle", x=300, y=700, size=400)], 128, ("boxes", "amodal"))
    radius = 0.88 * 200
    expected = torch.tensor([300 - radius, 700 - radius, 300 + radius, 700 + radius]) / 8
    assert (drawn["boxes"][0, 0] - expected).abs().max() <= 1


def test_depth_is_that_of_whatever_is_seen() -> None:
    some = scenes(16, 2)
    drawn = render(some, 64, ("masks", "depth", "owner"))
    for scene, masks, depth, owner in zip(some, drawn["masks"], drawn["depth"], drawn["owner"], strict=True):
        for k, thing in enumerate(scene.objects):
            assert (depth[masks[k]] == torch.tensor(thing.depth).float() / 255).all()
            assert (owner[masks[k]] == k).all()
        assert (depth[~masks.any(0)] == 1).all()
        assert (owner[~masks.any(0)] == -1).all()


def test_a_scene_is_the_same_at_any_size_up_to_resampling() -> None:
    some = [dataclasses.replace(scene, grain=0) for scene in scenes(32, 3, EVERYTHING)]
    large = torch.nn.functional.avg_pool2d(render(some, 192)["image"], 3)
    small = render(some, 64)["image"]
    difference = (large - small).abs()
    assert difference.mean() < 0.008
    assert (difference > 0.15).float().mean() < 0.005
    boxes = [render(some, size, ("boxes",))["boxes"] / size for size in (64, 224)]
    assert (boxes[0] - boxes[1]).abs().max() <= 1.5 / 64


def test_a_scene_does_not_depend_on_what_is_drawn_beside_it() -> None:
    some = scenes(90, 4, EVERYTHING)
    outputs = ("image", "masks", "amodal", "boxes", "depth")
    together = render(some, 64, outputs)
    for i in (0, 17, 89):
        single = render([some[i]], 64, outputs)
        for name in outputs:
            many = together[name][i, : len(some[i])] if name in ("masks", "amodal", "boxes") else together[name][i]
            assert torch.equal(many, single[name][0]), name


def test_outputs_do_not_depend_on_which_others_are_asked_for() -> None:
    table = encode(scenes(20, 5, EVERYTHING))
    whole = paint(table, 64, ("image", "masks", "amodal", "boxes", "depth", "owner"))
    for name, value in whole.items():
        assert torch.equal(paint(table, 64, (name,))[name], value)


def test_windows_cut_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    large = dataclasses.replace(EVERYTHING, shadows=(0, 30, 100), inside=False, sizes=(20, 60, 150, 300, 700, 1300))
    table = encode(scenes(100, 10, large))
    module = importlib.import_module("isthmus.data.builtin.scenes.render")
    for size in (16, 50, 128):
        windows = paint(table, size, ("image", "masks", "amodal", "boxes"))
        with monkeypatch.context() as patch:
            patch.setattr(module, "_UNITS", 1)  # every window is the whole picture
            whole = paint(table, size, ("image", "masks", "amodal", "boxes"))
        for name, value in windows.items():
            assert torch.equal(value, whole[name]), (size, name)


def test_threads_do_not_change_a_bit() -> None:
    table = encode(scenes(64, 6, EVERYTHING))
    one = paint(table, 64)["image"]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(paint(table, 64)["image"], one)
    finally:
        torch.set_num_threads(threads)


def digest(size: int) -> str:
    drawn = paint(encode(scenes(60, 7, EVERYTHING)), size, ("image", "masks", "boxes", "depth"))
    image, masks = drawn["image"].numpy().tobytes(), drawn["masks"].numpy().tobytes()
    numbers = (drawn["boxes"] * 16).int().numpy().tobytes() + (drawn["depth"] * 255).round().byte().numpy().tobytes()
    return hashlib.blake2b(image + masks + numbers, digest_size=8).hexdigest()


SUMS = [(32, "a829dea884488b94"), (64, "d9981e69ad562974"), (100, "af3946c4fa34c124"), (224, "dccb34267080d5c6")]


@pytest.mark.parametrize(("size", "expected"), SUMS)
def test_pictures_are_bit_identical_on_every_machine(size: int, expected: str) -> None:
    """The sums were stored once; a machine, a thread count or a version that changes one pixel changes them."""
    assert digest(size) == expected


def test_instruction_sets_do_not_change_a_bit() -> None:
    """Without vector instructions and fused multiply-add, rounding must be the same."""
    program = "from tests.data.scenes.test_render import digest; print(digest(64))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    assert run.stdout.strip() == dict(SUMS)[64]


def test_the_table_of_turns_is_right() -> None:
    expected = [[round(f(math.radians(d)) * 2**14) for d in range(360)] for f in (math.cos, math.sin)]
    assert torch.equal(TURN, torch.tensor(expected))


@pytest.mark.parametrize("texture", TONE)
def test_textures_show_and_have_the_lightness_of_their_ground(texture: str) -> None:
    plain, drawn = (Scene(texture=t, contrast=80, pitch=120, angle=30, seed=5) for t in ("plain", texture))
    image = render([plain, drawn], 128)["image"]
    assert image[1].std() > 0.04
    assert (image[1] - image[0]).abs().max() <= 40.5 / 255
    if texture not in ("bar", "speckle"):  # those are small marks on the darker tone
        assert abs((image[1] - image[0]).mean()) < 0.08


def test_fills_show_within_their_object_only() -> None:
    for texture in TONE:
        plain, filled = alone("circle", fill="plain"), alone("circle", fill=texture)
        drawn = render([plain, filled], 96)
        differ = (drawn["image"][0] != drawn["image"][1]).any(0)
        assert differ.sum() > 300, texture
        assert not (differ & (drawn["depth"][0] == 1) & ~_grown(drawn["masks"][0, 0])).any()


def _grown(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0


def test_objects_have_their_colours_and_grounds_theirs() -> None:
    for colour, rgb in COLOURS.items():
        scene = dataclasses.replace(alone("square"), objects=(Thing("square", colour, 500, 512, 512),))
        centre = render([scene], 64)["image"][0, :, 30:34, 30:34].mean((1, 2)) * 255
        assert (centre - torch.tensor(rgb)).abs().max() < 4
    for ground, rgb in GROUNDS.items():
        assert (render([Scene(ground=ground)], 16)["image"][0, :, 3, 3] * 255).round().tolist() == list(rgb)


def test_shadows_darken_the_ground_away_from_the_light() -> None:
    lit = Scene(alone("circle", size=400).objects, ground="sand", light=180, shadow=60)  # light from the left
    image = render([lit, dataclasses.replace(lit, shadow=0)], 128)["image"]
    darker = (image[0] < image[1] - 0.02).all(0)
    assert darker.sum() > 50
    assert darker.nonzero()[:, 1].float().mean() > 75  # on the right side
    assert not (image[0] > image[1]).any()


def test_grain_is_fine_noise_of_the_amplitude_asked_for() -> None:
    calm, grainy = (render([Scene(grain=g, seed=3)], 64)["image"][0] * 255 for g in (0, 24))
    noise = (grainy - calm)[0]
    assert noise.abs().max() <= 24.5
    assert noise.std() == pytest.approx(24 / math.sqrt(3), rel=0.05)
    for shifted in (noise.roll(1, 0), noise.roll(1, 1), noise.roll((1, 1), (0, 1))):
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), shifted.flatten()]))[0, 1]) < 0.05
    # Sums over rows and columns show the lattice structure that a poor hash would leave.
    second = noise[1:, 1:] - noise[1:, :-1] - noise[:-1, 1:] + noise[:-1, :-1]
    assert second.std() == pytest.approx(2 * noise.std().item(), rel=0.05)


def test_brightness_scales_the_whole_picture() -> None:
    scene = dataclasses.replace(scenes(1, 8)[0], grain=0, brightness=100)
    image = render([scene, dataclasses.replace(scene, brightness=50), dataclasses.replace(scene, brightness=0)], 64)
    bright, half, none = image["image"]
    assert (half - bright / 2).abs().max() <= 1 / 255 or (bright == 1).any()
    assert not none.any()


def test_without_texture_leaves_the_structure() -> None:
    some = scenes(8, 9, EVERYTHING)
    bare = [without_texture(scene) for scene in some]
    drawn, plain = render(some, 64), render(bare, 64)
    assert torch.equal(drawn["masks"], plain["masks"])
    grid = (torch.arange(64) + 0.5) * 16
    for scene, image in zip(bare, plain["image"], strict=True):
        free = torch.ones(64, 64, dtype=torch.bool)
        for thing in scene.objects:
            free &= ((grid - thing.x) ** 2 + (grid[:, None] - thing.y) ** 2).sqrt() > thing.size / 2 + 16
        assert (image[:, free].amax(1) == image[:, free].amin(1)).all()


def test_no_scenes_and_empty_scenes_are_drawn() -> None:
    nothing = render([], 32)
    assert nothing["image"].shape == (0, 3, 32, 32)
    empty = render([Scene()], 32)
    assert empty["masks"].shape == (1, 0, 32, 32)
    assert (empty["depth"] == 1).all()


def test_impossible_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 8 pixels, got 4"):
        render([Scene()], 4)
    with pytest.raises(ValueError, match="output 'mask' is unknown"):
        render([Scene()], 32, ("mask",))
    with pytest.raises(ValueError, match="colour 'rde' is unknown"):
        render([Scene((Thing("circle", "rde", 100, 5, 5),))], 32)
    with pytest.raises(ValueError, match="size must be a whole number from 1"):
        render([Scene((Thing("circle", "red", 0, 5, 5),))], 32)
