"""What is cut from a cache is as if it had never been there, for every kind of cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.samplers.cache import held, select, truncate


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)) for _ in range(2)]


def dynamic() -> Any:
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache()
    for layer, (keys, values) in enumerate(pairs()):
        cache.update(keys, values, layer)
    return cache


@pytest.mark.parametrize("make", [pairs, lambda: tuple(pairs()), lambda: torch.randn(2, 6, 4), dynamic])
def test_truncating_is_selecting_the_first(make: Any) -> None:
    torch.manual_seed(0)
    cut = truncate(make(), 4)
    torch.manual_seed(0)
    chosen = select(make(), torch.arange(4))
    torch.manual_seed(0)
    rows = select(make(), torch.arange(4).expand(2, -1))
    assert held(cut) == held(chosen) == held(rows) == 4
    for a, b, c in zip(*(tensors(x) for x in (cut, chosen, rows)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_rows_may_keep_different_tokens_in_any_order() -> None:
    cache = pairs()
    kept = select(cache, torch.tensor([[5, 0, 0], [2, 3, 1]]))
    assert torch.equal(kept[1][0][0], cache[1][0][0][:, [5, 0, 0]])
    assert torch.equal(kept[0][1][1], cache[0][1][1][:, [2, 3, 1]])


def test_own_caches_and_empty_ones() -> None:
    class Own:
        def get_seq_length(self) -> int:
            return 3

        def truncate(self, length: int) -> str:
            return f"cut to {length}"

        def select(self, index: torch.Tensor) -> str:
            return f"took {index.tolist()}"

    assert truncate(Own(), 2) == "cut to 2"
    assert select(Own(), torch.tensor([1])) == "took [1]"
    assert held(None) == 0


def test_what_cannot_be_cut_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="a cache of 6 tokens cannot be cut to 7"):
        truncate(pairs(), 7)
    with pytest.raises(ValueError, match="an index of 3 rows cannot select from a cache of 2"):
        select(pairs(), torch.zeros(3, 1, dtype=torch.long))

    class Nothing:
        def get_seq_length(self) -> int:
            return 3

    with pytest.raises(ValueError, match=r"give it select\(\) and truncate\(\)"):
        truncate(Nothing(), 1)


def tensors(cache: Any) -> list[torch.Tensor]:
    if isinstance(cache, torch.Tensor):
        return [cache]
    if isinstance(cache, (list, tuple)):
        return [x for pair in cache for x in pair]
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]
