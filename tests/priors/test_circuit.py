"""Circuits are distributions: sums to 1, exact marginals and conditionals; EM climbs; what cannot be is refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.codec import Fitted, build, spec_of
from isthmus.priors.circuit import HCLT, from_official
from isthmus.priors.circuit_tree import (
    chain,
    chow_liu_tree,
    levels,
    maximum_spanning_tree,
    mutual_information,
    random_tree,
    rooted,
    smoothed_mutual_information,
)


def data(count: int = 300, seed: int = 0, categories: int = 3, variables: int = 5) -> Tensor:
    """Every variable copies its predecessor, with mistakes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, categories, (count, variables), generator=g)
    for i in range(1, variables):
        keep = torch.rand(count, generator=g) < 0.7
        x[:, i] = torch.where(keep, x[:, i - 1], x[:, i])
    return x


def learnt(latents: int = 3, parents: tuple[int, ...] | None = None, categories: int = 3, **options: Any) -> HCLT:
    g = torch.Generator().manual_seed(1)
    variables = len(parents) if parents else 5
    x = data(variables=variables, categories=categories)
    circuit = HCLT.from_data(x, categories, latents, generator=g, tree=parents, **options).double()
    return circuit.fit([x], epochs=5)


def everything(categories: int, variables: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(categories), repeat=variables)))


TREES = {
    "leaf": (-1,),
    "star": (-1, 0, 0, 0, 0),
    "chain": (1, 2, -1, 2, 3),
    "mixed": (3, 0, 0, -1, 3),
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("latents", [1, 2, 5])
def test_probabilities_of_all_samples_sum_to_one_and_marginals_are_their_sums(name: str, latents: int) -> None:
    parents = TREES[name]
    circuit, all_of_them = learnt(latents, parents), everything(3, len(parents))
    p = circuit.log_prob(all_of_them).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-9)
    observed = torch.rand(len(parents), generator=torch.Generator().manual_seed(2)) < 0.5
    some = all_of_them[:: max(len(all_of_them) // 7, 1)]
    alike = (all_of_them[:, observed] == some[:, None, observed]).all(-1)
    torch.testing.assert_close(circuit.log_prob(some, observed).exp(), alike.double() @ p)
    assert float(circuit.log_prob(some, torch.zeros(len(parents), dtype=torch.bool)).abs().max()) < 1e-9


def test_conditionals_are_ratios_of_marginals_and_ignore_the_variable_itself() -> None:
    circuit, x = learnt(4, TREES["mixed"]), data(20, seed=3)
    observed = torch.rand(20, 5, generator=torch.Generator().manual_seed(4)) < 0.6
    for i in range(5):
        found = circuit.conditional(x, i, observed)
        joint = []
        for c in range(3):
            changed, mask = x.clone(), observed.clone()
            changed[:, i], mask[:, i] = c, True
            joint.append(circuit.log_prob(changed, mask).exp())
        wanted = torch.stack(joint, 1)
        torch.testing.assert_close(found, wanted / wanted.sum(1, keepdim=True))
        other, flipped = x.clone(), observed.clone()
        other[:, i], flipped[:, i] = 99, ~observed[:, i]
        torch.testing.assert_close(circuit.conditional(other, i, flipped), found)
    torch.testing.assert_close(circuit.conditional(x, -1), circuit.conditional(x, 4))


def test_what_is_not_observed_may_be_anything() -> None:
    circuit, x = learnt(), data(10)
    observed = torch.tensor([True, False, True, False, True])
    changed = torch.where(observed, x, -7)
    torch.testing.assert_close(circuit.log_prob(changed, observed), circuit.log_prob(x, observed))


def test_samples_follow_the_distribution_also_given_evidence() -> None:
    circuit, g = learnt(4, TREES["mixed"]), torch.Generator().manual_seed(5)
    everyone = everything(3, 5)
    p = circuit.log_prob(everyone).exp()
    code = 3 ** torch.arange(4, -1, -1)
    drawn = circuit.sample(20000, g)
    share = torch.bincount(drawn @ code, minlength=243) / 20000
    assert float((share - p).abs().sum()) < 0.12, "total variation of sampling alone is about 0.04"
    observed = torch.tensor([True, False, False, True, False])
    given = torch.tensor([[2, 0, 0, 1, 0]]).expand(20000, -1)
    drawn = circuit.sample(20000, g, given, observed)
    assert (drawn[:, observed] == given[:, observed]).all()
    fits = (everyone[:, observed] == given[0, observed]).all(1)
    wanted = torch.where(fits, p, 0.0) / p[fits].sum()
    share = torch.bincount(drawn @ code, minlength=243) / 20000
    assert float((share - wanted).abs().sum()) < 0.05


def test_one_state_makes_variables_independent() -> None:
    x = data()
    circuit = HCLT.from_data(x, 3, 1, 1e-9, generator=torch.Generator().manual_seed(0)).double().fit([x], epochs=2)
    frequency = torch.stack([torch.bincount(c, minlength=3) for c in x.T]).double() / len(x)
    wanted = sum(frequency[v, x[:, v]].log() for v in range(5))
    torch.testing.assert_close(circuit.log_prob(x), wanted, rtol=1e-6, atol=1e-6)


def test_em_never_falls_and_states_matter() -> None:
    x = data()
    likelihoods = {}
    for latents in (1, 3):
        circuit = HCLT.from_data(x, 3, latents, 1e-6, generator=torch.Generator().manual_seed(0)).double()
        circuit.fit([x[:100], x[100:]], epochs=15)
        assert all(b >= a - 1e-9 for a, b in itertools.pairwise(circuit.history))
        likelihoods[latents] = circuit.history[-1]
    assert likelihoods[3] > likelihoods[1] + 0.3


def test_batches_add_up_and_mini_batches_move_part_of_the_way() -> None:
    x = data()
    one, two = (HCLT.from_data(x, 3, 3, generator=torch.Generator().manual_seed(0)).double() for _ in range(2))
    one.fit([x], epochs=1)
    two.fit(x.split(70), epochs=1)
    torch.testing.assert_close(one.inputs, two.inputs)
    start = HCLT.from_data(x, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    before = start.sums.clone()
    start.fit([x], epochs=1, step=0.25)
    torch.testing.assert_close(start.sums, before + 0.25 * (one.sums - before))
    seen = []
    annealed = HCLT.from_data(x, 3, 3, generator=torch.Generator().manual_seed(0))
    annealed.fit(x.split(50), epochs=8, step=(0.5, 0.05), watch=lambda epoch, value: seen.append((epoch, value)))
    assert [e for e, _ in seen] == list(range(1, 9))
    assert seen[-1][1] > seen[0][1]


def test_missing_values_are_summed_out_in_training() -> None:
    x, observed = data(), torch.rand(300, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    circuit = learnt()
    flows = circuit.expected_counts(torch.where(observed, x, -1), observed)
    torch.testing.assert_close(flows.inputs.sum((1, 2)), observed.sum(0).double())
    assert flows.log_prob == pytest.approx(float(circuit.log_prob(x, observed).sum()))
    before = circuit.log_prob(x, observed).mean()
    circuit.fit([(x, observed)], epochs=5)
    assert circuit.log_prob(x, observed).mean() > before
    everything_seen = circuit.expected_counts(x, torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(everything_seen.sums, circuit.expected_counts(x).sums)


def test_far_apart_likelihoods_do_not_underflow() -> None:
    variables = 400
    x = data(50, variables=variables, categories=50)
    circuit = HCLT.from_data(
        x, 50, 4, 1e-6, generator=torch.Generator().manual_seed(0), tree=(-1, *[0] * (variables - 1))
    )
    circuit.fit([x], epochs=10)
    other = data(50, seed=9, variables=variables, categories=50)
    found = circuit.log_prob(other)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), circuit.double().log_prob(other), rtol=1e-4, atol=0)
    assert float(found.max()) < -1000


def test_it_is_a_part_that_saves_and_learns_as_the_contract_says() -> None:
    circuit = learnt()
    assert isinstance(circuit, Fitted)
    again = build(json.loads(json.dumps(spec_of(circuit)))).double()
    assert not again.fitted
    again.load_state_dict(circuit.state_dict())
    assert again.fitted
    x = data(5)
    torch.testing.assert_close(again.log_prob(x), circuit.log_prob(x))
    assert circuit.log_prob(x[:0]).shape == (0,)
    assert circuit.conditional(x[:0], 0).shape == (0, 3)
    assert circuit.sample(0, torch.Generator()).shape == (0, 5)
    assert circuit.float().log_prob(x).dtype == torch.float32


def test_number_of_parameters() -> None:
    circuit = HCLT(TREES["mixed"], 7, 4)
    assert sum(t.numel() for t in (circuit.inputs, circuit.sums, circuit.root)) == 5 * 4 * 7 + 1 * 16 + 4
    mnist = HCLT(chain(784), 256, 3)
    assert mnist.inputs.numel() == 200_704 * 3


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda c, x: c.log_prob(x[:, :3]), r"samples are \(B, 5\)"),
        (lambda c, x: c.log_prob(x.float()), "int64, got torch.float32"),
        (lambda c, x: c.log_prob(x + 3), r"lie in 0…2, got"),
        (lambda c, x: c.log_prob(x - 1), r"lie in 0…2, got -1"),
        (lambda c, x: c.log_prob(x, torch.ones(5)), "observed is bool"),
        (lambda c, x: c.log_prob(x, torch.ones(4, dtype=torch.bool)), "observed is bool"),
        (lambda c, x: c.conditional(x, 5), "variables 0 to 4, got 5"),
        (lambda c, x: c.fit([]), "no samples"),
        (lambda c, x: c.fit([x[:0]]), "no samples"),
        (lambda c, x: c.fit(iter([x]), epochs=2), "not a generator"),
        (lambda c, x: c.fit([x], epochs=0), "epochs is at least 1"),
        (lambda c, x: c.fit([x], step=1.5), "a step lies in"),
        (lambda c, x: c.fit([x], step=(0.1, 0.0)), "a step lies in"),
        (lambda c, x: HCLT((-1, 0), 3, 2).log_prob(x[:, :2]), "not learnt anything yet; call fit"),
        (lambda c, x: HCLT((0, 1), 3), "they are no tree"),
        (lambda c, x: HCLT((-1, 2, 1), 3), "they are no tree"),
        (lambda c, x: HCLT((-1, -1), 3), "they are no tree"),
        (lambda c, x: HCLT((), 3), "they are no tree"),
        (lambda c, x: HCLT((-1, 9), 3), "they are no tree"),
        (lambda c, x: HCLT((-1,), 0), "at least 1"),
        (lambda c, x: HCLT.from_data(x[:0], 3, generator=torch.Generator()), "no samples to learn from"),
        (lambda c, x: HCLT.from_data(x, 2, generator=torch.Generator()), "lie in 0…1"),
        (lambda c, x: from_official({"input.0": c.inputs[0]}, TREES["star"]), "not the parameters of this tree"),
        (lambda c, x: rooted([(0, 1)], 3), "no tree over 3"),
        (lambda c, x: mutual_information(x[:0], 3), "at least one variable"),
    ],
)
def test_mistakes_are_told(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call(learnt(), data(4))


def test_impossible_samples_and_evidence_are_told_but_have_a_likelihood() -> None:
    x = torch.zeros(20, 3, dtype=torch.long)
    circuit = HCLT((-1, 0, 0), 2, 2, pseudocount=0.0).fit([x], epochs=2)
    other = torch.ones(1, 3, dtype=torch.long)
    assert circuit.log_prob(other).item() == -torch.inf
    with pytest.raises(ValueError, match="evidence has probability 0"):
        circuit.conditional(other, 0)
    with pytest.raises(ValueError, match="pseudocount above 0"):
        circuit.expected_counts(other)
    never_seen = HCLT((-1, 0, 0), 2, 2, pseudocount=0.1).fit([x], epochs=2)
    assert torch.isfinite(never_seen.log_prob(other)).all()


# ---------------------------------------------------------------------------------------------------------------- trees


def test_mutual_information_is_that_of_the_counts() -> None:
    from sklearn.metrics import mutual_info_score

    x = data()
    found = mutual_information(x, 3)
    for i, j in itertools.product(range(5), repeat=2):
        assert float(found[i, j]) == pytest.approx(mutual_info_score(x[:, i], x[:, j]), abs=1e-9)
    missing = torch.where(torch.rand(300, 5, generator=torch.Generator().manual_seed(0)) < 0.3, -1, x)
    both = (missing[:, 0] >= 0) & (missing[:, 1] >= 0)
    wanted = mutual_info_score(x[both, 0], x[both, 1])
    assert float(mutual_information(missing, 3)[0, 1]) == pytest.approx(wanted, abs=1e-9)


def test_many_categories_are_counted_in_intervals() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(2000, generator=g)
    noise = torch.randn(2000, 3, generator=g)
    x = torch.stack([base, base + 0.3 * noise[:, 0], base + 2 * noise[:, 1], noise[:, 2]], 1)
    x = (x * 30 + 128).long().clamp(0, 255)
    found = mutual_information(x, 256)
    assert found[0, 1] > found[0, 2] > found[0, 3]
    assert float(found[0, 3]) < 0.12
    assert float(found.diagonal().max()) <= float(np.log(16)) + 1e-9


def test_the_tree_is_the_best_one_and_its_ties_are_told_apart() -> None:
    weight = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    weight = weight + weight.T
    edges = maximum_spanning_tree(weight)
    pairs = list(itertools.combinations(range(5), 2))
    best = -1.0
    for chosen in itertools.combinations(pairs, 4):
        try:
            rooted(list(chosen), 5)
        except ValueError:
            continue
        best = max(best, float(sum(weight[a, b] for a, b in chosen)))
    assert float(sum(weight[a, b] for a, b in edges)) == pytest.approx(best)
    assert maximum_spanning_tree(torch.zeros(4, 4)) == [(0, 1), (0, 2), (0, 3)]
    assert maximum_spanning_tree(torch.full((3, 3), torch.nan)) == [(0, 1), (0, 2)]
    assert maximum_spanning_tree(torch.zeros(1, 1)) == []


def test_the_root_is_the_centre() -> None:
    assert rooted([(0, 1), (1, 2), (2, 3), (3, 4)], 5) == (1, 2, -1, 2, 3)
    assert chain(4).index(-1) == 1, "of two centres the lower number"
    assert chain(1) == (-1,)
    assert chow_liu_tree(mutual_information(data(3000), 3)) == chain(5), "neighbours copy each other"
    drawn = {random_tree(6, torch.Generator().manual_seed(s)) for s in range(5)}
    assert len(drawn) == 5
    assert [len(level.nodes) for level in levels(chain(5))] == [2, 1]


def test_constant_variables_get_a_place() -> None:
    x = data()
    x[:, 2] = 0
    for information in (mutual_information(x, 3), smoothed_mutual_information(x, 3, 0.2)):
        assert len(chow_liu_tree(information)) == 5
    circuit = HCLT.from_data(x, 3, 4, generator=torch.Generator().manual_seed(0)).fit([x], epochs=3)
    assert torch.isfinite(circuit.log_prob(data())).all()
