"""Three schedules give the same prefix probabilities at very different costs; bytes give back every sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.codec import UserError
from isthmus.priors.circuit import HCLT
from isthmus.priors.circuit_coding import CircuitCoder
from isthmus.priors.circuit_schedule import CODE, Schedule
from isthmus.priors.circuit_tree import Tree, chain, random_tree

pytest.importorskip("constriction")


def circuit_of(tree: Tree, categories: int = 3, latents: int = 3, seed: int = 0) -> HCLT:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, categories, (100, len(tree)), generator=g)
    return HCLT.from_data(x, categories, latents, generator=g, tree=tree).fit([x], epochs=2)


def samples(count: int, tree: Tree, categories: int = 3, seed: int = 7) -> Tensor:
    return torch.randint(0, categories, (count, len(tree)), generator=torch.Generator().manual_seed(seed))


def decompressed(coder: CircuitCoder, files: list[bytes]) -> Tensor:
    indices = coder.decompress(files).indices
    assert indices is not None
    return indices


def balanced(variables: int) -> Tree:
    return tuple((v - 1) // 2 if v else -1 for v in range(variables))


TREES = {
    "single": (-1,),
    "pair": (1, -1),
    "star": (-1, *[0] * 8),
    "chain": chain(9),
    "hung at its end": tuple(range(-1, 8)),
    "balanced": balanced(15),
    "random": random_tree(20, torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("name", TREES)
def test_all_schedules_give_the_marginals_of_every_prefix(name: str) -> None:
    tree = TREES[name]
    circuit = circuit_of(tree).double()
    schedule, x = Schedule(circuit), samples(6, tree)
    wanted = []
    for length in range(1, len(tree) + 1):
        observed = torch.zeros(len(tree), dtype=torch.bool)
        observed[list(schedule.order[:length])] = True
        wanted.append(circuit.log_prob(x, observed))
    for way in (schedule.from_scratch, schedule.partial, schedule.carried):
        np.testing.assert_allclose(way(x).log_prob, torch.stack(wanted, 1).numpy(), atol=1e-6)


def test_coding_order_takes_larger_subtrees_first_and_the_own_variable_last() -> None:
    assert Schedule(circuit_of((-1, 0, 0, 1, 1, 2))).order == (3, 4, 1, 5, 2, 0)
    assert Schedule(circuit_of((-1, 0, 0, 2))).order == (3, 2, 1, 0), "ties by number, larger first"


@pytest.mark.parametrize("tree", [balanced(127), chain(128), random_tree(128, torch.Generator().manual_seed(0))])
def test_partial_evaluation_computes_o_log_d_of_the_circuit(tree: Tree) -> None:
    schedule, x = Schedule(circuit_of(tree, latents=2)), samples(2, tree)
    scratch, partial, carried = (way(x) for way in (schedule.from_scratch, schedule.partial, schedule.carried))
    variables = len(tree)
    assert scratch.evaluated == variables * schedule.nodes
    assert partial.evaluated <= 2 * math.log2(variables) * schedule.nodes, "O(log D·|p|)"
    assert partial.evaluated / scratch.evaluated <= 4 * math.log2(variables) / variables
    assert carried.evaluated <= 2 * schedule.nodes, "O(|p|), whatever the tree"
    np.testing.assert_allclose(partial.log_prob, scratch.log_prob, atol=1e-9)


def test_a_chain_costs_as_much_as_one_evaluation_and_a_balanced_tree_its_depth() -> None:
    """What the order is for: each step of a chain adds one leaf on the right."""
    share = {}
    for name, tree in {"chain": tuple(range(-1, 126)), "balanced": balanced(127)}.items():
        schedule = Schedule(circuit_of(tree, latents=2))
        share[name] = schedule.partial(samples(1, tree)).evaluated / schedule.nodes
    assert share["chain"] <= 1.5
    assert 1.5 < share["balanced"] < 2 * math.log2(127)


@pytest.mark.parametrize("categories", [1, 2, 17, 33, 256])
@pytest.mark.parametrize("name", ["single", "chain", "random"])
def test_round_trip(categories: int, name: str) -> None:
    tree = TREES[name]
    coder = CircuitCoder(circuit_of(tree, categories))
    x = samples(12, tree, categories)
    files = coder.compress(x)
    assert torch.equal(decompressed(coder, files), x)
    assert torch.equal(coder.decode(coder.encode(x), 12), x)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), latents=st.integers(1, 6), categories=st.sampled_from([2, 5, 40]))
def test_any_samples_of_any_circuit_round_trip(seed: int, latents: int, categories: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tree = random_tree(int(torch.randint(1, 9, (), generator=g)), g)
    coder = CircuitCoder(circuit_of(tree, categories, latents, seed))
    x = samples(3, tree, categories, seed)
    assert torch.equal(decompressed(coder, coder.compress(x)), x)
    coded = (torch.rand(len(tree), generator=g) < 0.6).tolist()
    found = coder.decode(coder.encode(x, coded), 3, coded)
    assert torch.equal(found[:, coded], x[:, coded])


def test_the_length_is_the_likelihood() -> None:
    tree = TREES["random"]
    for categories in (9, 256):
        circuit = circuit_of(tree, categories).double()
        x = circuit.sample(400, torch.Generator().manual_seed(0))
        coder = CircuitCoder(circuit)
        ideal = -circuit.log_prob(x) / math.log(2)
        assert 8 * len(coder.encode(x)) <= 1.001 * float(ideal.sum()) + 64
        bits = coder.decompress(coder.compress(x)).bits
        assert bits is not None
        assert (bits <= 1.01 * ideal + 64).all()
        low, probability = coder.intervals(x)
        torch.testing.assert_close(-probability.log2().sum(1), ideal)
        assert ((low >= 0) & (low + probability <= 1 + 1e-12)).all()


def test_what_training_never_saw_is_still_coded() -> None:
    x = torch.zeros(50, 4, dtype=torch.long)
    circuit = HCLT((-1, 0, 0, 1), 40, 2, pseudocount=0.0).fit([x], epochs=3)
    coder = CircuitCoder(circuit)
    other = samples(20, circuit.parents, 40)
    assert torch.equal(decompressed(coder, coder.compress(other)), other)
    assert len(coder.encode(x)) <= 4 * 4


def test_bytes_do_not_depend_on_the_batch_the_threads_or_the_precision_of_the_module() -> None:
    tree = TREES["random"]
    circuit = circuit_of(tree, 40, latents=9)
    coder, x = CircuitCoder(circuit), samples(33, tree, 40)
    files = coder.compress(x)
    assert [coder.compress(x[i : i + 1])[0] for i in range(33)] == files
    assert torch.equal(decompressed(coder, files[5:6]), x[5:6])
    assert CircuitCoder(circuit.double()).compress(x) == files
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert CircuitCoder(circuit).compress(x) == files
    finally:
        torch.set_num_threads(threads)


def test_empty_batches() -> None:
    coder = CircuitCoder(circuit_of(TREES["chain"]))
    assert coder.compress(torch.zeros(0, 9, dtype=torch.long)) == []
    assert decompressed(coder, []).shape == (0, 9)
    assert coder.decode(coder.encode(torch.zeros(0, 9, dtype=torch.long)), 0).shape == (0, 9)


def test_summed_out_parts_are_not_walked() -> None:
    schedule = Schedule(circuit_of(balanced(15)))
    coded = [v == 7 for v in range(15)]
    program = schedule.program(coded)
    assert [node for step, node in program if step == CODE] == [7]
    assert {node for _, node in program} == {0, 1, 3, 7}
    assert schedule.program([False] * 15) == [("enter", 0), ("leave", 0)]


def test_damage_is_told_and_never_becomes_another_sample() -> None:
    tree = TREES["random"]
    coder = CircuitCoder(circuit_of(tree, 256))
    x = samples(1, tree, 256)
    (data,) = coder.compress(x)
    for at in range(len(data)):
        wrong = bytearray(data)
        wrong[at] ^= 0x10
        with pytest.raises(UserError):
            coder.decompress([bytes(wrong)])
        with pytest.raises(UserError):
            coder.decompress([data[:at]])
    with pytest.raises(UserError):
        coder.decompress([data + b"\0\0\0\0"])
    with pytest.raises(UserError, match="no coded sample"):
        coder.decompress([b"something else, twenty bytes or more"])
    with pytest.raises(UserError, match="format version 9"):
        coder.decompress([data[:3] + b"\x09" + data[4:]])
    with pytest.raises(UserError, match="another circuit"):
        CircuitCoder(circuit_of(tree, 256, seed=1)).decompress([data])
    with pytest.raises(UserError, match="more than was to be decoded"):
        coder.decode(coder.encode(samples(30, tree, 256)), 1)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(2, 8, dtype=torch.long), r"samples are \(N, 9\)"),
        (torch.zeros(9, dtype=torch.long), r"samples are \(N, 9\)"),
        (torch.zeros(2, 9), "category numbers, got"),
        (torch.full((2, 9), 3), "lie in 0…2"),
        (torch.full((2, 9), -1), "lie in 0…2"),
    ],
)
def test_mistakes_are_told(x: Tensor, told: str) -> None:
    coder = CircuitCoder(circuit_of(TREES["chain"]))
    for call in (coder.compress, coder.encode):
        with pytest.raises(ValueError, match=told):
            call(x)


def test_circuits_that_learnt_nothing_cannot_code() -> None:
    with pytest.raises(ValueError, match="not learnt anything yet"):
        CircuitCoder(HCLT((-1, 0), 3))
