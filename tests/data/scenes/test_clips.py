"""Clips: objects go where their factors say, and pictures follow."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import pytest
import torch

from isthmus.data.builtin.scenes import (
    CANVAS,
    MOTIONS,
    Motion,
    Scene,
    Space,
    Thing,
    clip,
    describe,
    draw_motions,
    move,
    render,
    sample,
)

BALL = Thing("circle", "red", 200, 512, 512, depth=5)


def ball(x: int = 512, y: int = 512) -> Scene:
    return Scene((dataclasses.replace(BALL, x=x, y=y),), ground="black")


def test_a_moving_object_is_where_its_speed_takes_it() -> None:
    frames = move(ball(300, 400), [Motion(30, -20, spin=7)], 8)
    assert [(s.objects[0].x, s.objects[0].y) for s in frames] == [(300 + 30 * t, 400 - 20 * t) for t in range(8)]
    assert [s.objects[0].rotation for s in frames] == [7 * t for t in range(8)]
    assert frames[0] == ball(300, 400)


def test_pictures_follow_the_factors() -> None:
    film = clip(ball(200, 600), 6, 64, [Motion(96, 0)])
    assert film.video.shape == (6, 3, 64, 64)
    columns = torch.arange(64) + 0.5
    for frame, scene in zip(film.video, film.scenes, strict=True):
        red = frame[0] - frame[1]
        assert (red * columns).sum() / red.sum() == pytest.approx(scene.objects[0].x / 16, abs=0.1)
        assert (red * columns[:, None]).sum() / red.sum() == pytest.approx(600 / 16, abs=0.1)
    assert torch.equal(film.video, render(film.scenes, 64)["image"])


def test_the_background_and_its_grain_stand_still() -> None:
    scene = dataclasses.replace(ball(200, 200), texture="noise", grain=8)
    video = clip(scene, 4, 64, [Motion(40, 0)]).video
    assert torch.equal(video[0, :, 32:], video[3, :, 32:])


def test_an_object_bounces_off_the_edges() -> None:
    frames = move(ball(900, 512), [Motion(50, 0)], 60)
    xs = [scene.objects[0].x for scene in frames]
    assert min(xs) >= 100
    assert max(xs) <= CANVAS - 100
    assert xs[:3] == [900, 898, 848]  # 24 to the edge at 924, 26 back
    steps = [abs(b - a) for a, b in itertools.pairwise(xs)]
    assert max(steps) == 50
    assert steps.count(50) > 50


def test_an_orbit_keeps_its_distance_and_turns_clockwise() -> None:
    frames = move(ball(512, 200), [Motion(orbit=30)], 13)
    places = [(s.objects[0].x - 512, s.objects[0].y - 512) for s in frames]
    assert all(abs((x * x + y * y) ** 0.5 - 312) < 1.5 for x, y in places)
    assert places[0] == places[12]
    assert places[3] == (312, 0)  # from the top over the right


@pytest.mark.parametrize("name", MOTIONS)
def test_drawn_motions_have_room_and_are_called_by_their_names(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    moving = 0
    for scene in sample(60, "uniform", generator, Space(objects=(1, 2, 3))):
        motions = draw_motions(scene, 8, generator, [name])
        told = describe(scene, motions)
        frames = move(scene, motions, 8)
        for k, motion in enumerate(motions):
            if motion == Motion():
                continue
            moving += 1
            start, end = scene.objects[k], frames[-1].objects[k]
            assert f"{start.colour} {start.shape} {name}" in told
            for frame in frames:
                thing = frame.objects[k]
                assert min(thing.x, thing.y) >= thing.size // 2 - 1
                assert max(thing.x, thing.y) <= CANVAS - thing.size // 2 + 1
            dx, dy, _, _ = MOTIONS[name]
            if dx or dy:
                assert (end.x - start.x) * dx + (end.y - start.y) * dy >= CANVAS // 8
                assert (end.x - start.x) * dy == (end.y - start.y) * dx == 0
    assert (moving > 20) == (name != "stays still")


def test_all_motions_are_drawn() -> None:
    generator = torch.Generator().manual_seed(1)
    told: collections.Counter[str] = collections.Counter()
    for scene in sample(200, "uniform", generator, Space(objects=(1,))):
        text = describe(scene, draw_motions(scene, 8, generator))
        told[text.split(f"{scene.objects[0].shape} ")[1]] += 1
    assert set(told) == set(MOTIONS)


def test_same_seed_same_clip() -> None:
    scene = sample(1, "uniform", torch.Generator().manual_seed(0))[0]
    one, other = (clip(scene, 5, 32, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.motions == other.motions
    assert torch.equal(one.video, other.video)


def test_clips_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="needs motions, or a generator"):
        clip(ball(), 3)
    with pytest.raises(ValueError, match="1 objects, 2 motions"):
        move(ball(), [Motion(), Motion()], 3)
    with pytest.raises(ValueError, match="motion 'flies' is unknown"):
        draw_motions(ball(), 3, torch.Generator(), ["flies"])
