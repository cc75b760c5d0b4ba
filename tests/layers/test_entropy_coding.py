"""Tables own every integer once, bytes give back what went in, and the length is what the tables say."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from isthmus.codec import UserError
from isthmus.layers.entropy_coding import PRECISION, Decoder, Encoder, encode, quantize_cdf, quantize_pmf

pytest.importorskip("constriction")


@settings(deadline=None, max_examples=60)
@given(
    pmf=arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.floats(0, 1e6)),
    precision=st.integers(6, PRECISION),
)
def test_every_symbol_owns_at_least_one_count_and_all_are_given_out(pmf: np.ndarray, precision: int) -> None:
    tables = quantize_pmf(torch.from_numpy(pmf), precision)
    assert tables.dtype == torch.int64
    assert tables.shape == (pmf.shape[0], pmf.shape[1] + 1)
    assert (tables[:, 0] == 0).all()
    assert (tables[:, -1] == 2**precision).all()
    assert (tables.diff(dim=1) >= 1).all()


def test_tables_follow_the_probabilities() -> None:
    pmf = torch.rand(50, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = quantize_pmf(pmf).diff(dim=1).double() / 2**PRECISION
    torch.testing.assert_close(share, pmf / pmf.sum(1, keepdim=True), atol=1e-5, rtol=0)
    assert quantize_pmf(torch.zeros(4), 4).tolist() == [0, 4, 8, 12, 16]
    assert quantize_pmf(torch.tensor([0.0, 1.0, 0.0]), 3).tolist() == [0, 1, 7, 8]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.integers(1, 30), count=st.integers(0, 50), precision=st.integers(5, PRECISION))
def test_round_trip_with_a_table_each(data: st.DataObject, size: int, count: int, precision: int) -> None:
    seed = data.draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    pmf = rng.random((count, size)) ** 40  # nearly certain symbols among them
    tables = quantize_pmf(torch.from_numpy(pmf), precision)
    symbols = torch.from_numpy(rng.integers(0, size, count))
    decoder = Decoder(encode(symbols, tables))
    assert torch.equal(decoder.pop(tables), symbols)
    assert decoder.exhausted


def test_pieces_and_single_symbols_are_the_same_stream() -> None:
    rng = np.random.default_rng(0)
    tables = quantize_pmf(torch.from_numpy(rng.random((30, 5))))
    symbols = torch.from_numpy(rng.integers(0, 5, 30))
    encoder = Encoder()
    encoder.push(symbols[:7], tables[:7])
    encoder.push(symbols[7:], tables[7:])
    data = encoder.finish()
    assert data == encode(symbols, tables)
    decoder = Decoder(data)
    assert [decoder.pop(table) for table in tables] == symbols.tolist()


def test_one_table_for_all_and_the_length_is_the_entropy() -> None:
    pmf = torch.tensor([0.9, 0.05, 0.03, 0.015, 0.005])
    table = quantize_pmf(pmf)
    symbols = torch.multinomial(pmf, 20000, replacement=True, generator=torch.Generator().manual_seed(0))
    data = encode(symbols.view(100, 200), table)
    bits = -(table.diff() / 2**PRECISION).log2()[symbols].sum()
    assert 8 * len(data) == pytest.approx(float(bits), rel=1e-3, abs=64)
    assert torch.equal(Decoder(data).pop(table.expand(20000, -1)), symbols)


def test_only_the_interval_of_a_symbol_matters() -> None:
    rng = np.random.default_rng(1)
    cdf = np.concatenate([np.zeros((40, 1)), rng.random((40, 9)).cumsum(1)], 1)
    symbols = rng.integers(0, 9, 40)
    tables = quantize_cdf(cdf)
    low = np.take_along_axis(tables, symbols[:, None], 1)[:, 0]
    high = np.take_along_axis(tables, symbols[:, None] + 1, 1)[:, 0]
    encoder = Encoder()
    encoder.push_intervals(low, high - low)
    assert np.array_equal(Decoder(encoder.finish()).pop(tables), symbols)


def test_certain_symbols_take_no_bytes() -> None:
    table = torch.tensor([0, 16])
    assert encode(torch.zeros(5, dtype=torch.long), table) == b""
    assert Decoder(b"").pop(table) == 0


@pytest.mark.parametrize(
    ("symbols", "table", "told"),
    [
        ([3], [0, 4, 8, 16], "0…2, got 3"),
        ([-1], [0, 4, 8, 16], "0…2, got -1"),
        ([0], [0, 4, 4, 16], "at least one count"),
        ([0], [0, 4, 8, 15], "power of two"),
        ([0], [1, 4, 8, 16], "rise from 0"),
        ([0], [0], "at least two entries"),
        ([0, 1], [[0, 4, 8, 16]], "need tables"),
        ([0.5], [0, 4, 8, 16], "are integers"),
    ],
)
def test_what_is_no_table_or_no_symbol_is_refused(symbols: list, table: list, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        encode(np.array(symbols), np.array(table))


def test_bad_probabilities_and_bad_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ([0.5, -0.1], [0.5, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="finite and not negative"):
            quantize_pmf(torch.tensor(bad))
    with pytest.raises(ValueError, match="holds 1 to 4 symbols, got 5"):
        quantize_pmf(torch.ones(5), 2)
    with pytest.raises(ValueError, match="precision is 1 to 22"):
        quantize_pmf(torch.ones(5), 30)
    with pytest.raises(UserError, match="cut short: 3 bytes"):
        Decoder(b"abc")
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match=r"isthmus\[coding\]"):
        Decoder(b"")
