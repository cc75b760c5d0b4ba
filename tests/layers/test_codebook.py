"""Codebooks: nearest codes against plain distances, ties, masks, precision; k-means; moving averages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from isthmus.layers import codebook
from isthmus.layers.codebook import EMACodebook, kmeans, nearest


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@pytest.mark.parametrize("size", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize("topk", [None, 1, 3])
@pytest.mark.parametrize("chunk", [None, 1, 500])
def test_finds_what_all_distances_would_tell(size: int, topk: int | None, chunk: int | None) -> None:
    topk = topk and min(topk, size)
    x, codes = _draw(3, 37, 5), _draw(3, size, 5, seed=1)
    index, score = nearest(x, codes, topk, chunk=chunk)
    distance = (x.double()[:, :, None] - codes.double()[:, None]).square().sum(-1)
    best = distance.topk(topk or 1, largest=False)
    want_index, want = (best.indices, -best.values) if topk else (best.indices[..., 0], -best.values[..., 0])
    assert torch.equal(index, want_index)
    torch.testing.assert_close(score.double(), want, rtol=1e-5, atol=1e-6)
    assert score.dtype == torch.float32


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_other_metrics(metric: str) -> None:
    x, codes = _draw(2, 9, 6), _draw(200, 6, seed=1)
    index, score = nearest(x, codes, 4, metric)  # type: ignore[arg-type]
    a, b = (x, codes) if metric == "dot" else (x / x.norm(dim=-1, keepdim=True), codes / codes.norm(dim=-1)[:, None])
    best = (a @ b.T).topk(4)
    assert torch.equal(index, best.indices)
    torch.testing.assert_close(score, best.values)


@pytest.mark.parametrize("distinct", [1, 3, 40])
def test_the_lowest_index_wins_where_codes_are_alike(distinct: int) -> None:
    base = _draw(distinct, 14)
    codes = base[torch.arange(1027) % distinct]
    x = _draw(300, 14, seed=2)
    index, _ = nearest(x, codes)
    assert int(index.max()) < distinct
    several, score = nearest(x[:20], codes, 4)
    copies = torch.arange(4) * distinct
    assert torch.equal(several, index[:20, None] + copies)
    assert (score == score[:, :1]).all()


def test_leading_dimensions_broadcast() -> None:
    x, codes = _draw(4, 2, 11, 3), _draw(2, 70, 3, seed=1)
    index, _ = nearest(x, codes)
    assert index.shape == (4, 2, 11)
    for i in range(4):
        assert torch.equal(index[i], nearest(x[i], codes)[0])
    assert nearest(_draw(6, 3), codes)[0].shape == (2, 6)
    assert nearest(_draw(5, 0, 3), codes[0])[0].shape == (5, 0)


def test_codes_that_are_not_valid_are_not_chosen() -> None:
    x, codes = _draw(2, 50, 4), _draw(2, 80, 4, seed=1)
    valid = torch.zeros(2, 80, dtype=torch.bool)
    valid[0, [3, 70]] = True
    index, score = nearest(x, codes, 3, valid=valid)
    assert set(index[0, :, :2].unique().tolist()) == {3, 70}
    assert torch.isfinite(score[0, :, :2]).all()
    for missing in (score[0, :, 2], score[1]):
        assert (missing == -math.inf).all()
    assert (index[1] == 0).all()


def test_half_precision_and_autocast_are_computed_in_full() -> None:
    x, codes = _draw(64, 8), _draw(512, 8, seed=1)
    want = nearest(x.half().float(), codes)
    with torch.autocast("cpu", torch.bfloat16):
        got = nearest(x.half(), codes)
    assert torch.equal(want[0], got[0])
    assert torch.equal(want[1], got[1])
    assert nearest(x.double(), codes.double())[1].dtype == torch.float64


def test_a_common_offset_costs_no_precision() -> None:
    x, codes = _draw(200, 6), _draw(300, 6, seed=1)
    far = nearest(x + 1000, codes + 1000)[0]
    assert (far == nearest(x, codes)[0]).float().mean() > 0.99


def test_memory_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is larger than the chunk asked for."""
    largest, product = 0, torch.bmm

    def watched(a: Tensor, b: Tensor, out: Tensor) -> None:
        nonlocal largest
        product(a, b, out=out)
        largest = max(largest, out.numel())

    monkeypatch.setattr(codebook.torch, "bmm", watched)
    nearest(_draw(8, 512, 4), _draw(8, 1024, 4, seed=1), chunk=2**17)
    assert 0 < largest <= 2**17


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.zeros(3, 2), torch.zeros(4, 3)), "one D"),
        ((torch.zeros(3, 2), torch.zeros(4, 2), 5), "between 1 and the 4 codes"),
        ((torch.zeros(3, 2), torch.zeros(4, 2), 0), "between 1"),
        ((torch.zeros(3, 2), torch.zeros(4, 2), None, "manhattan"), "metric is one of"),
        ((torch.zeros(3, 2), torch.zeros(4, 2), None, "dot", torch.ones(4)), "booleans"),
        ((torch.zeros(3, 2, dtype=torch.int64), torch.zeros(4, 2)), "floating-point"),
    ],
)
def test_mistakes_are_told(arguments: tuple, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        nearest(*arguments)


# ----------------------------------------------------------------------------------------------------------- k-means


def test_kmeans_finds_separate_heaps() -> None:
    heaps = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = (heaps[:, None] + 0.1 * _draw(3, 50, 2)).reshape(-1, 2)
    centres, index = kmeans(x, 3, 20, start=x[[0, 60, 120]])
    torch.testing.assert_close(centres, x.view(3, 50, 2).mean(1))
    assert index.view(3, 50).eq(torch.arange(3)[:, None]).all()


def test_kmeans_never_gets_worse_and_takes_many_problems() -> None:
    x = _draw(4, 200, 3)
    last = math.inf
    for steps in (0, 1, 3, 10):
        centres, index = kmeans(x, 12, steps, generator=torch.Generator().manual_seed(3))
        assert centres.shape == (4, 12, 3)
        assert torch.equal(index, nearest(x, centres)[0])
        error = float((x - centres.gather(1, index[..., None].expand(-1, -1, 3))).square().sum())
        assert error <= last + 1e-3
        last = error


def test_kmeans_weights_count_as_repeats() -> None:
    x, start = _draw(30, 2), _draw(5, 2, seed=4)
    weight = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(1))
    repeated = kmeans(x.repeat_interleave(weight, 0), 5, 8, start=start)[0]
    torch.testing.assert_close(kmeans(x, 5, 8, weight=weight.float(), start=start)[0], repeated)


def test_kmeans_start_leaves_out_what_weighs_nothing_and_repeats_only_at_need() -> None:
    x = torch.arange(20.0)[:, None]
    weight = (torch.arange(20) < 6).float()
    centres, _ = kmeans(x, 6, 0, weight, torch.Generator().manual_seed(0))
    assert sorted(centres.flatten().tolist()) == [0, 1, 2, 3, 4, 5]
    few, index = kmeans(x[:3], 8, 5, generator=torch.Generator().manual_seed(0))
    assert few.shape == (8, 1)
    assert len(index) == 3


def test_kmeans_mistakes_are_told() -> None:
    for arguments, told in (
        ({"x": torch.zeros(0, 2), "k": 2}, "N of 1 or more"),
        ({"x": torch.tensor([[0.0, math.nan]]), "k": 1}, "1 values that are NaN"),
        ({"x": torch.zeros(3, 2), "k": 0}, "k of 1 or more"),
        ({"x": torch.zeros(3, 2), "k": 2, "weight": -torch.ones(3)}, "not negative"),
        ({"x": torch.zeros(3, 2), "k": 2, "weight": torch.zeros(3)}, "weights of a problem are 0"),
        ({"x": torch.zeros(3, 2), "k": 2, "start": torch.zeros(3, 2)}, "start must be"),
    ):
        with pytest.raises(ValueError, match=told):
            kmeans(**arguments)


# ------------------------------------------------------------------------------------------------------- EMACodebook


def test_moving_average_comes_to_the_means() -> None:
    heaps = torch.tensor([[-5.0, 0.0], [5.0, 1.0]])
    book = EMACodebook(2, 2, decay=0.5)
    book.place(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    for step in range(40):
        index = book.update((heaps[:, None] + 0.01 * _draw(2, 20, 2, seed=step)).reshape(-1, 2))
    torch.testing.assert_close(book.codes, heaps, atol=0.02, rtol=0)
    torch.testing.assert_close(book.counts, torch.full((2,), 20.0), atol=1e-3, rtol=0)
    assert index.shape == (40,)


def test_groups_are_codebooks_of_their_own() -> None:
    x = _draw(3, 64, 4)
    many = EMACodebook(8, 4, groups=3, decay=0.9)
    alone = [EMACodebook(8, 4, decay=0.9) for _ in range(3)]
    for codes, book in zip(many.codes, alone, strict=True):
        book.place(codes)
    for _ in range(3):
        index = many.update(x)
        for i, book in enumerate(alone):
            assert torch.equal(index[i], book.update(x[i]))
            torch.testing.assert_close(many.codes[i], book.codes)


@pytest.mark.parametrize("revive", ["whole", "released"])
def test_a_dead_code_is_put_on_a_vector_and_stays_there_only_if_whole(revive: str) -> None:
    x = _draw(100, 2)
    book = EMACodebook(3, 2, decay=0.5, threshold=0.9, revive=revive)  # type: ignore[arg-type]
    far = torch.tensor([[0.0, 0.0], [1.0, 0.0], [500.0, 500.0]])
    book.place(far)
    book.update(x, torch.Generator().manual_seed(0))
    assert (book.codes[2] == x).all(1).any()
    x_elsewhere = x[(x - book.codes[2]).square().sum(1) > 1.0]
    book.threshold = 0.0
    revived = book.codes[2].clone()
    book.update(x_elsewhere[:1])  # nothing near it in the next step
    if revive == "whole":
        torch.testing.assert_close(book.codes[2], revived, atol=1e-3, rtol=1e-3)
    else:
        assert book.codes[2].norm() > 100


@pytest.mark.parametrize("steps", [0, 5])
def test_start_leaves_sums_that_fit_so_that_codes_do_not_collapse(steps: int) -> None:
    x = 3 + _draw(2, 200, 4)
    book = EMACodebook(10, 4, groups=2)
    book.start(x, steps, torch.Generator().manual_seed(0))
    before = book.codes.clone()
    torch.testing.assert_close(book.sums, book.codes * book.counts[..., None])
    book.update(x)
    assert (book.codes - before).abs().max() < 1.0
    assert book.codes.mean() > 2.5


def test_the_same_generator_gives_the_same_codebook() -> None:
    def made() -> Tensor:
        book, g = EMACodebook(6, 3, threshold=2.0), torch.Generator().manual_seed(5)
        book.start(_draw(50, 3), 2, g)
        book.update(_draw(50, 3, seed=1), g)
        return book.codes

    assert torch.equal(made(), made())


def test_codebook_mistakes_are_told() -> None:
    book = EMACodebook(4, 3)
    for x, told in (
        (torch.full((5, 3), math.inf), "15 values that are NaN or infinite"),
        (torch.zeros(5, 2), r"vectors \(N, 3\), got \(5, 2\)"),
        (torch.zeros(0, 3), r"\(0, 3\)"),
    ):
        with pytest.raises(ValueError, match=told):
            book.update(x)
    with pytest.raises(ValueError, match=r"vectors \(2, N, 3\), got \(5, 3\)"):
        EMACodebook(4, 3, groups=2).update(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="decay"):
        EMACodebook(4, 3, decay=1.0)
    with pytest.raises(ValueError, match="revive"):
        EMACodebook(4, 3, revive="now")  # type: ignore[arg-type]
