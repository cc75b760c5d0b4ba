"""Circuits: a step of EM, conditionals, and coding, beside the published algorithms.

    python -m benchmarks.pc_compression_speed                   # everything, one thread
    python -m benchmarks.pc_compression_speed --only coding --rounds 3

*Training*: one full E- and M-step. The peer is the layer-wise algorithm in log space that pyjuice publishes, written
down from its description, since pyjuice itself needs a GPU: every layer's products are summed logarithms; a sum layer
subtracts the largest, exponentiates, multiplies by the weights and takes the logarithm; the backward pass computes the
products anew and turns flows into logarithms and back. Both give the same parameters.

*Conditionals*: all prefix probabilities of samples by full evaluation O(D·|p|), by the paper's partial evaluation
O(log D·|p|), and carried down and up once, O(|p|). The same numbers.

*Coding*: a photograph to ``.pcz`` and back. The rows' ``limit`` is what a pixel value has to cost at least with this
scheme and one multiplication and addition a nanosecond: 2·K² for the two mixtures of an inner node, 5·K for the ends of
the intervals (encoding) or 2·(√C + 1)·K for the two digits (decoding).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import compare, record, table
from isthmus.data.builtin.photos import photograph
from isthmus.priors.circuit import HCLT, Flows
from isthmus.priors.circuit_schedule import Schedule
from isthmus.priors.circuit_tree import levels
from isthmus.priors.lifting import decorrelate, residuals
from isthmus.priors.pcz import PictureCoder


class LayerWise:
    """The published E-step on the parameters of a circuit."""

    def __init__(self, circuit: HCLT) -> None:
        self.circuit, self.levels = circuit, levels(circuit.parents)

    def counts(self, x: Tensor) -> Flows:
        c = self.circuit
        variables, latents, categories = c.inputs.shape
        every = torch.arange(variables)[:, None]
        own = c.inputs.log().mT[every, x.T]  # (D, B, K)
        region = own.clone()
        for i, level in enumerate(self.levels):
            nodes, weights = list(level.nodes), self._weights(i)
            products = self._products(own, region, level)
            largest = products.amax(-1, keepdim=True)
            value = ((products - largest).exp() @ weights.mT).log() + largest
            if i < len(self.levels) - 1:
                region[nodes] = value
        log_prob = value[0, :, 0]
        sums, flows = torch.zeros_like(c.sums), torch.zeros_like(region)
        below, root = len(c.inner), torch.zeros_like(c.root)
        for i in reversed(range(len(self.levels))):
            level, weights = self.levels[i], self._weights(i)
            nodes = list(level.nodes)
            products = self._products(own, region, level)
            if i == len(self.levels) - 1:
                flow = (products + weights.log() - log_prob[None, :, None]).exp()
                root += flow[0].sum(0)
            else:
                ratio = flows[nodes].log() - region[nodes]
                largest = ratio.amax(-1, keepdim=True)
                scaled = (ratio - largest).exp()
                flow = (products + (scaled @ weights).log() + largest).exp()
                below -= len(nodes)
                peak = products.amax(-1, keepdim=True)
                share = (products - peak).exp()
                sums[below : below + len(nodes)] += weights * ((ratio + peak).exp().mT @ share)
            flows[nodes] = flow
            for child, slot in zip(level.children, level.slots, strict=True):
                flows[child] = flow[slot]
        inputs = torch.zeros(variables, categories, latents)
        for v in range(variables):
            inputs[v].index_add_(0, x[:, v], flows[v])
        return Flows(inputs.mT, sums, root, float(log_prob.sum()), len(x))

    def _products(self, own: Tensor, region: Tensor, level: Any) -> Tensor:
        products = own[list(level.nodes)]
        for child, slot in zip(level.children, level.slots, strict=True):
            products[slot] += region[child]
        return products

    def _weights(self, level: int) -> Tensor:
        if level == len(self.levels) - 1:
            return self.circuit.root[None, None]
        start = sum(len(each.nodes) for each in self.levels[:level])
        return self.circuit.sums[start : start + len(self.levels[level].nodes)]


def residual_patches(count: int, seed: int = 0) -> Tensor:
    """8×8 patches of residuals of a photograph, ``(count, 192)``."""
    planes = residuals(decorrelate(photograph("coffee")))
    height, width = (n // 8 * 8 for n in planes.shape[:2])
    cut = planes[:height, :width].reshape(height // 8, 8, width // 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 192)
    order = np.random.default_rng(seed).permutation(len(cut))[:count]
    return torch.from_numpy(cut[order]).long()


def training(rounds: int) -> dict[str, dict[str, float]]:
    """Rows of a step of EM."""
    rows = {}
    g = torch.Generator().manual_seed(0)
    small = torch.randint(0, 17, (1437, 64), generator=g)
    cases = {"64 variables of 17 values": (small, 17, (8, 32)), "192 of 256": (residual_patches(512), 256, (16, 32))}
    for name, (x, categories, widths) in cases.items():
        for latents in widths:
            circuit = HCLT.from_data(x, categories, latents, generator=g)
            other = LayerWise(copy.deepcopy(circuit))
            ours, theirs = circuit.expected_counts(x), other.counts(x)
            torch.testing.assert_close(ours.inputs, theirs.inputs, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(ours.sums, theirs.sums, atol=1e-3, rtol=1e-3)
            told = f"EM, {name}, {latents} states, {len(x)} samples"
            rows |= compare(
                {
                    f"{told}, ours": lambda c=circuit, x=x: c.update(c.expected_counts(x)),
                    f"{told}, published": lambda o=other, x=x: o.circuit.update(o.counts(x)),
                },
                rounds=rounds,
            )
    return rows


def conditionals(rounds: int) -> dict[str, dict[str, float]]:
    """Rows of the three schedules."""
    rows = {}
    for latents in (8, 16):
        x = residual_patches(2000)
        circuit = HCLT.from_data(x, 256, latents, generator=torch.Generator().manual_seed(0)).fit([x], epochs=1)
        schedule, some = Schedule(circuit), x[:64]
        ways: dict[str, Callable[[], Any]] = {
            f"conditionals, 192 variables, {latents} states, 64 samples, {name}": lambda way=way, some=some: way(some)
            for name, way in {
                "carried": schedule.carried,
                "partial (paper)": schedule.partial,
                "full evaluation": schedule.from_scratch,
            }.items()
        }
        found = compare(ways, rounds=rounds)
        for (name, row), way in zip(found.items(), ways.values(), strict=True):
            rows[name] = {**row, "evaluations": way().evaluated / schedule.nodes}
    return rows


def coding(rounds: int) -> dict[str, dict[str, float]]:
    """Rows of a photograph to bytes and back."""
    rows = {}
    image = Image.fromarray(photograph("chelsea"))
    values = image.width * image.height * 3
    for latents in (8, 16, 32):
        x = residual_patches(2000)
        circuit = HCLT.from_data(x, 256, latents, generator=torch.Generator().manual_seed(0)).fit([x], epochs=3)
        coder = PictureCoder(circuit, 8, threads=1)
        data = coder.compress(image)
        inner = len(circuit.inner) / len(circuit.parents)
        told = f"coding, 451x300 photograph, {latents} states"
        found = compare(
            {
                f"{told}, to .pcz": lambda coder=coder: coder.compress(image),
                f"{told}, from .pcz": lambda coder=coder, data=data: coder.decompress(data),
            },
            rounds=rounds,
        )
        for (name, row), ends in zip(found.items(), (5, 2 * 17), strict=True):
            limit = 1e-9 * values * (2 * inner * latents**2 + ends * latents)
            rows[name] = {
                **row,
                "MB/s": values / 1e6 / row["seconds"],
                "limit": limit,
                "bits a value": 8 * len(data) / values,
            }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("training", "conditionals", "coding"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: dict[str, dict[str, float]] = {}
    for part in (training, conditionals, coding):
        if arguments.only in (None, part.__name__):
            found = part(arguments.rounds)
            print(table(found))
            rows |= found
    if not arguments.dry:
        print(record("pc_compression_speed", rows))


if __name__ == "__main__":
    main()
