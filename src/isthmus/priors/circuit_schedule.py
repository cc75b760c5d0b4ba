"""In what order a circuit's variables are coded, and how little of it is evaluated for each (arXiv 2111.11632).

Coding needs ``p(x_1 … x_i)`` for every i along an order of the variables. Three ways, with the same numbers coming out:

- :meth:`Schedule.from_scratch`: the whole circuit for every variable, O(D·|p|).
- :meth:`Schedule.partial`, the paper's: only nodes between the variable and the lowest part of the circuit that holds
  all variables coded so far, O(log D·|p|), because the larger part of every product comes first.
- :meth:`Schedule.carried`, what the coder uses: in a tree, what has been coded is a weight on the states at hand, which
  is carried down on entering a subtree and up on leaving it, once each: O(|p|).

All are float64 NumPy, one state after the other in a fixed order: no matrix product and no exp or log, whose last bits
depend on the machine, the number of threads or the size of the batch. Arrays of values are ``(K, N)``, one column a
sample, and every column depends on its own sample only.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from isthmus.priors.circuit import HCLT

_FLOOR = 1e-150  # smaller shares count as nothing, so that no product falls where machines treat numbers differently


class Prefixes(NamedTuple):
    """Log-probabilities of growing prefixes.

    Attributes:
        log_prob: ``(N, D)`` float64 nats, of the first ``1 … D`` variables of the coding order.
        evaluated: nodes of the circuit that were computed for it, for every sample.
    """

    log_prob: np.ndarray
    evaluated: int


class Schedule:
    """Coding order of a fitted circuit, with its parameters as float64 arrays.

    Attributes:
        order: variables as they are coded: subtrees of children by decreasing size, the own variable last.
        children: of every tree node, in that order.
        nodes: |p|, how many nodes the circuit has with products of two factors.

    Raises:
        ValueError: the circuit is not fitted.
    """

    def __init__(self, circuit: HCLT) -> None:
        if not circuit.fitted:
            raise ValueError("this circuit has not learnt anything yet; call fit, or load_state_dict.")
        self.parents, self.root = circuit.parents, circuit.root_node
        self.latents, self.categories, variables = circuit.latents, circuit.categories, len(circuit.parents)
        self.inputs = _distributions(circuit.inputs)
        self.top = _distributions(circuit.root)
        self.sums = dict(zip(circuit.inner, _distributions(circuit.sums), strict=True))
        self.children: list[list[int]] = [[] for _ in range(variables)]
        for node, above in enumerate(self.parents):
            if above >= 0:
                self.children[above].append(node)
        downwards = [self.root]
        for node in downwards:
            downwards.extend(self.children[node])
        self.sizes = [1] * variables
        for node in reversed(downwards[1:]):
            self.sizes[self.parents[node]] += self.sizes[node]
        for below in self.children:
            below.sort(key=lambda child: (-self.sizes[child], child))
        self.downwards = downwards
        self.order = tuple(node for step, node in self.program([True] * variables) if step == CODE)
        inner = [self.root, *self.sums]
        products = sum(max(len(self.children[node]), 1) for node in inner)
        self.nodes = self.latents * (variables + products + len(self.sums)) + 1

    # -------------------------------------------------------------------------------------------- what the coder uses

    def program(self, coded: Sequence[bool]) -> list[tuple[str, int]]:
        """Steps ``(ENTER | CODE | LEAVE, tree node)`` that code these variables; parts without any are left out."""
        wanted = [bool(c) for c in coded]
        for node in reversed(self.downwards[1:]):
            wanted[self.parents[node]] |= wanted[node]
        steps: list[tuple[str, int]] = []
        stack: list[tuple[str, int]] = [(ENTER, self.root)]
        while stack:
            step, node = stack.pop()
            leaf = node not in self.sums and node != self.root
            if step != ENTER or leaf:
                steps.append((CODE if leaf else step, node))
                continue
            steps.append((ENTER, node))
            stack.append((LEAVE, node))
            if coded[node]:
                stack.append((CODE, node))
            stack.extend((ENTER, child) for child in reversed(self.children[node]) if wanted[child])
        return steps

    def walk(self, program: list[tuple[str, int]], count: int) -> Generator[tuple[int, np.ndarray], np.ndarray, int]:
        """Yields ``(variable, weights (K, count))`` for every variable in turn and wants its values ``(count,)`` sent.

        ``Σ_k weights[k]·inputs[variable, k, c]`` is, up to scale, the probability of category c given everything coded
        before, later variables summed out. Returns how many nodes were evaluated for a sample.
        """
        weights: dict[int, np.ndarray] = {}  # of an inner node's products, by what has been coded outside it
        inside: dict[int, np.ndarray] = {}  # values of its products, by what has been coded inside it
        evaluated = 0
        for step, node in program:
            above, leaf = self.parents[node], node not in self.sums and node != self.root
            if step == ENTER:
                if node == self.root:
                    weights[node] = np.repeat(self.top[:, None], count, axis=1)
                else:
                    weights[node] = normalised(mix(self.sums[node].T, weights[above] * inside[above]))
                inside[node] = np.ones((self.latents, count))
                evaluated += self.latents
            elif step == CODE:
                place = above if leaf else node
                values = yield node, weights[place] * inside[place]
                inside[place] = normalised(inside[place] * self.inputs[node][:, values])
                evaluated += 2 * self.latents
            elif node != self.root:
                value = normalised(mix(self.sums[node], inside.pop(node)))
                inside[above] = normalised(inside[above] * value)
                del weights[node]
                evaluated += 2 * self.latents
        return evaluated

    # ------------------------------------------------------------------------------------- prefix probabilities, thrice

    def carried(self, x: Tensor) -> Prefixes:
        """By weights that are carried down and up once."""
        numbers = x.cpu().numpy()
        walk = self.walk(self.program([True] * len(self.parents)), len(numbers))
        found = []
        try:
            node, weights = next(walk)
            while True:
                values = numbers[:, node]
                found.append(_dot(weights, self.inputs[node][:, values]) / _dot(weights, self.inputs[node].sum(1)))
                node, weights = walk.send(values)
        except StopIteration as stop:
            evaluated = int(stop.value)
        return Prefixes(np.log(np.stack(found, 1)).cumsum(1), evaluated)

    def partial(self, x: Tensor) -> Prefixes:
        """By the paper's partial evaluation: from the variable up to the first node that holds all coded ones."""
        numbers, count = x.cpu().numpy(), len(x)
        chance = self._chances()
        first = self.order[0]
        holds = {first}  # tree nodes whose subtree holds the first variable
        while self.parents[first] >= 0:
            first = self.parents[first]
            holds.add(first)
        inside = {node: (np.ones((self.latents, 1)), np.zeros(count)) for node in (self.root, *self.sums)}
        found, evaluated = [], 0
        for node in self.order:
            value, scale = self.inputs[node][:, numbers[:, node]], np.zeros(count)
            evaluated += self.latents
            region, complete = node not in inside, True  # of a leaf, the region is its inputs
            if not region:
                value, scale = _times(inside[node], value, scale)
                evaluated += self.latents
            at = node
            # Upwards; whatever hangs on the way and has not been coded yet counts as 1.
            while at not in holds:
                if not region:
                    value = mix(self.sums[at], value)
                    evaluated += self.latents
                above = self.parents[at]
                value, scale = _times(inside[above], value, scale)
                evaluated += self.latents
                if complete:
                    inside[above], complete = (value, scale), False
                at, region = above, False
            if complete and at != self.root:
                # The variable completes a subtree that holds the first one: its value waits for the next larger part.
                above = self.parents[at]
                completed = value if region else mix(self.sums[at], value)
                evaluated += 0 if region else self.latents
                inside[above] = _times(inside[above], completed, scale)
            weight = chance[at][0 if region else 1]
            found.append(np.log(_dot(weight, value)) + scale)
        return Prefixes(np.stack(found, 1), evaluated)

    def from_scratch(self, x: Tensor) -> Prefixes:
        """By evaluating the whole circuit for every prefix."""
        numbers, count = x.cpu().numpy(), len(x)
        found, evaluated = [], 0
        for length in range(1, len(self.order) + 1):
            coded, values = set(self.order[:length]), {}
            for node in reversed(self.downwards):
                value = self.inputs[node][:, numbers[:, node]] if node in coded else np.ones((self.latents, count))
                scale = np.zeros(count)
                evaluated += self.latents
                for i, child in enumerate(self.children[node]):
                    value, scale = _times(values[child], value, scale)
                    evaluated += self.latents if i < max(len(self.children[node]), 1) else 0
                if node != self.root and node in self.sums:
                    value = mix(self.sums[node], value)
                    evaluated += self.latents
                values[node] = value, scale
            value, scale = values[self.root]
            evaluated += 1
            found.append(np.log(_dot(self.top, value)) + scale)
        return Prefixes(np.stack(found, 1), evaluated)

    def _chances(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Top-down probabilities of every tree node's region and, where it has them, products: ``(K,)`` each."""
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {self.root: (self.top, self.top)}
        for node in self.downwards[1:]:
            region = found[self.parents[node]][1]
            found[node] = (region, mix(self.sums[node].T, region[:, None])[:, 0] if node in self.sums else region)
        return found


ENTER, CODE, LEAVE = "enter", "code", "leave"


def mix(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``weights (O, K) @ values (K, N)``, one k after the other, so that the sum is the same everywhere."""
    total = weights[:, :1] * values[0]
    term = np.empty_like(total)
    for k in range(1, len(values)):
        np.multiply(weights[:, k : k + 1], values[k], out=term)
        np.add(total, term, out=total)
    return total


def normalised(values: np.ndarray) -> np.ndarray:
    """Every column over its largest entry; a column without any entry becomes ones. Works in place."""
    largest = values.max(axis=0)
    if not largest.all():
        values[:, largest == 0] = 1.0
        largest = np.where(largest == 0, 1.0, largest)
    values /= largest
    values[values < _FLOOR] = 0.0
    return values


def _times(one: tuple[np.ndarray, np.ndarray], value: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Product of two values, each with its logarithmic scale, brought to a largest entry of 1."""
    product = one[0] * value
    largest = product.max(axis=0)
    safe = np.where(largest == 0, 1.0, largest)
    return product / safe, one[1] + scale + np.log(safe)


def _dot(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum over states, one after the other."""
    total = weights[0] * values[0]
    for k in range(1, len(values)):
        total = total + weights[k] * values[k]
    return total


def _distributions(tensor: Tensor) -> np.ndarray:
    """Float64 with rows that sum to 1, as nearly as can be, after parameters that may be narrower."""
    array = tensor.detach().cpu().double().numpy()
    return array / np.cumsum(array, axis=-1)[..., -1:]
