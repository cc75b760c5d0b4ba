"""Randomness is the same for any number of processes that share a global batch."""

from __future__ import annotations

import pytest
import torch

from isthmus.layers.random import ShardedGenerator, derive_seed, rows


def _draw(batch: int, rank: int, world: int) -> torch.Tensor:
    generator = ShardedGenerator(7, "masks", 3, rank=rank, world=world)
    return rows(lambda n: torch.rand(n, 5, generator=generator), batch, generator)


def test_two_processes_draw_what_one_draws() -> None:
    assert torch.equal(torch.cat([_draw(4, 0, 2), _draw(4, 1, 2)]), _draw(8, 0, 1))


def test_processes_stay_in_step_over_several_draws() -> None:
    generators = [ShardedGenerator(1, rank=r, world=2) for r in range(2)]
    for batch in (3, 5):
        halves = [rows(lambda n, g=g: torch.rand(n, generator=g), batch, g) for g in generators]
        assert not torch.equal(*halves)
    assert generators[0].get_state().equal(generators[1].get_state())


def test_ordinary_generator_draws_the_batch() -> None:
    plain = torch.Generator().manual_seed(0)
    assert rows(lambda n: torch.rand(n, generator=plain), 6, plain).shape == (6,)


def test_seed_depends_on_every_part_and_its_kind() -> None:
    seeds = {derive_seed(1, 2), derive_seed(12), derive_seed("1", 2), derive_seed(1, "2"), derive_seed(2, 1)}
    assert len(seeds) == 5
    assert derive_seed(0, "phase", 17) == 8981519764025962032, "a seed means the same on every machine"


def test_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank"):
        ShardedGenerator(0, rank=2, world=2)
