"""17-pc-compression: hidden Chow-Liu trees, their likelihoods, conditionals, coding intervals and one step of EM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.priors.circuit import from_official
from isthmus.priors.circuit_coding import CircuitCoder
from isthmus.priors.circuit_tree import maximum_spanning_tree, rooted, smoothed_mutual_information
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    if case.object != "HCLT + TensorCircuit":
        raise UnknownCase(case.object)
    config, given = case.config, case.inputs
    x, x_em = given["x"], given["x_em"]
    information = smoothed_mutual_information(given["x_structure"], config["num_bins"], config["sigma"])
    edges = maximum_spanning_tree(information)
    assert rooted(edges, config["D"], int(given["root"])) == tuple(given["parent"].tolist())

    circuit = from_official(case.params, given["parent"].tolist(), config["em_pseudocount"]).double()
    assert circuit.categories == config["num_cats"]
    assert circuit.latents == config["num_latents"]
    assert sum(t.numel() for t in (circuit.inputs, circuit.sums, circuit.root)) == case.meta["official_param_count"]
    observed = given["missing"] == 0
    coder = CircuitCoder(circuit)
    assert list(coder.order) == given["coding_order"].tolist()
    low, probability = coder.intervals(x)
    found = {
        "mutual_information": information,
        "tree_edges": torch.tensor(edges),
        "log_likelihood": circuit.log_prob(x),
        "marginal_log_likelihood": circuit.log_prob(x, observed),
        "conditional": torch.stack([circuit.conditional(x, i, observed) for i in range(config["D"])], 1),
        "interval_low": low,
        "interval_prob": probability,
        "ideal_bits": -probability.log2().sum(1),
    }
    circuit.update(circuit.expected_counts(x_em), config["em_step_size"])
    found |= {f"em_input.{v}": circuit.inputs[v] for v in range(config["D"])}
    found |= {f"em_sum.{v}": circuit.sums[i] for i, v in enumerate(circuit.inner)}
    found[f"em_sum.{circuit.root_node}"] = circuit.root[None]
    return found


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    raise UnknownCase(name)
