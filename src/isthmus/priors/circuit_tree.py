"""The tree beneath a hidden Chow-Liu circuit: which variables tell most about each other (arXiv 2106.02264).

    tree = chow_liu_tree(mutual_information(x, categories))

``x`` is ``(N, D)`` of category numbers. A tree is a tuple of parents, ``-1`` at its root; the root is the centre of the
graph, so that no variable is far from it. Everything here is deterministic: of equally good edges or centres, the one
with the lowest numbers is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Parent of every variable, -1 for the root.
Tree = tuple[int, ...]
_CELLS = 2**24  # entries of the joint tables that are held at once


def mutual_information(x: Tensor, categories: int, levels: int | None = None) -> Tensor:
    """Mutual information in nats of every pair of variables, from exact counts: float64 ``(D, D)``.

    The diagonal holds the entropies. Rows of ``x (N, D)`` with a negative entry have that entry missing; a pair is
    counted over the rows that have both.

    Args:
        x: category numbers.
        categories: how many there are, C.
        levels: with fewer than C, every variable is first cut into that many intervals of about equal frequency,
            because C² cells of a joint table ask for many samples. ``None`` takes 16 where C exceeds 64.
    """
    if x.ndim != 2 or not x.shape[0] or not x.shape[1]:
        raise ValueError(f"mutual information wants samples (N, D) of at least one variable, got {tuple(x.shape)}.")
    levels = min(16 if categories > 64 else categories, categories) if levels is None else min(levels, categories)
    if levels < categories:
        x = _equal_frequency(x, categories, levels)
    count, variables = x.shape
    found = torch.zeros(variables, variables, dtype=torch.float64, device=x.device)
    missing = bool((x < 0).any())
    width = levels + 1 if missing else levels
    if missing:
        x = torch.where(x < 0, levels, x)
    step = max(1, min(_CELLS // width**2, _CELLS // count))
    for i in range(variables):
        for start in range(i, variables, step):
            stop = min(start + step, variables)
            cell = x[:, i : i + 1] * width + x[:, start:stop]
            cell = cell + torch.arange(stop - start, device=x.device) * width**2
            joint = torch.bincount(cell.flatten(), minlength=(stop - start) * width**2).view(-1, width, width)
            joint = joint[:, :levels, :levels].double()
            joint = joint / joint.sum((1, 2), keepdim=True).clamp_min(1)
            found[i, start:stop] = _entropy(joint.sum(2)) + _entropy(joint.sum(1)) - _entropy(joint.flatten(1))
    return torch.triu(found) + torch.triu(found, 1).mT


def smoothed_mutual_information(x: Tensor, bins: int = 32, sigma: float = 0.5 / 32, chunk: int = 64) -> Tensor:
    """The estimate of the released code for ordered values, ``(D, D)`` float64.

    Values of a chunk of variables are scaled to [0, 1] together, every value is spread over ``bins`` points by a
    Gaussian of width ``sigma``, and ``log(p + 1e-4)`` stands for the logarithm. The marginals weigh every sample alike,
    the joint distribution weighs it by the kernels' mass.
    """
    values = x.double()
    variables = x.shape[1]
    found = torch.zeros(variables, variables, dtype=torch.float64, device=x.device)
    for first in range(0, variables, chunk):
        a = _soft_bins(values[:, first : first + chunk], bins, sigma)
        for second in range(0, variables, chunk):
            b = _soft_bins(values[:, second : second + chunk], bins, sigma)
            joint = (a.flatten(1).mT @ b.flatten(1)).view(a.shape[1], bins, b.shape[1], bins).transpose(1, 2)
            joint = (joint / joint.sum((2, 3), keepdim=True)).flatten(2)
            one, two = ((k / k.sum(2, keepdim=True)).mean(0) for k in (a, b))
            entropies = (-(p * (p + 1e-4).log()).sum(-1) for p in (one, two, joint))
            h1, h2, h12 = entropies
            found[first : first + chunk, second : second + chunk] = h1[:, None] + h2 - h12
    return found


def maximum_spanning_tree(weight: Tensor) -> list[tuple[int, int]]:
    """Edges ``(a, b)``, a < b, sorted, of the spanning tree with the largest sum of ``weight (D, D)`` (Prim).

    Weights that are no numbers, as those of a variable without variation may be, count as 0. Of equal edges the one
    between the lowest numbers is taken, so that a variable that tells nothing hangs on variable 0.
    """
    w = np.nan_to_num(weight.detach().cpu().double().numpy(), nan=0.0)
    w = np.maximum(w, w.T)
    # Estimates of equal weights differ in their last bits from machine to machine; ties are told apart by number.
    w = np.round(w, 12)
    size = len(w)
    inside = np.zeros(size, bool)
    inside[0] = True
    best, source = w[0].copy(), np.zeros(size, np.int64)
    edges = []
    for _ in range(size - 1):
        new = int(np.argmax(np.where(inside, -np.inf, best)))
        edges.append((min(new, int(source[new])), max(new, int(source[new]))))
        inside[new] = True
        better = (w[new] > best) | ((w[new] == best) & (new < source))
        best, source = np.where(better, w[new], best), np.where(better, new, source)
    return sorted(edges)


def rooted(edges: list[tuple[int, int]], variables: int, root: int | None = None) -> Tree:
    """The tree of these edges as parents, hung up at ``root`` or else at its centre.

    Raises:
        ValueError: the edges are no tree over the variables.
    """
    around: list[list[int]] = [[] for _ in range(variables)]
    for a, b in edges:
        around[a].append(b)
        around[b].append(a)
    if root is None:
        root = _centre(around)
    parents, seen, stack = [-1] * variables, {root}, [root]
    while stack:
        node = stack.pop()
        for other in around[node]:
            if other not in seen:
                seen.add(other)
                parents[other] = node
                stack.append(other)
    if len(edges) != variables - 1 or len(seen) != variables:
        raise ValueError(f"{len(edges)} edges are no tree over {variables} variables.")
    return tuple(parents)


def chow_liu_tree(information: Tensor) -> Tree:
    """The tree with the largest mutual information along its edges ``(D, D)``, hung up at its centre."""
    return rooted(maximum_spanning_tree(information), len(information))


def random_tree(variables: int, generator: torch.Generator) -> Tree:
    """A tree drawn at random: every variable, in random order, hangs on one drawn from those before it."""
    order = torch.randperm(variables, generator=generator).tolist()
    draws = torch.rand(variables, generator=generator).tolist()
    edges = [tuple(sorted((order[i], order[int(draws[i] * i)]))) for i in range(1, variables)]
    return rooted([(a, b) for a, b in edges], variables)


def chain(variables: int) -> Tree:
    """The variables one after the other, as a hidden Markov model has them; hung up at its middle."""
    return rooted([(i, i + 1) for i in range(variables - 1)], variables)


class Level(NamedTuple):
    """Inner nodes of one height with what hangs on them."""

    nodes: tuple[int, ...]  # inner nodes whose children all stand on lower levels
    children: tuple[int, ...]
    slots: tuple[int, ...]  # of every child: which of the nodes is its parent


def levels(parents: Tree) -> list[Level]:
    """Inner nodes by height; the root alone on the last level."""
    children: dict[int, list[int]] = {v: [] for v in range(len(parents))}
    for node, above in enumerate(parents):
        if above >= 0:
            children[above].append(node)
    height, order = [0] * len(parents), [parents.index(-1)]
    for node in order:
        order.extend(children[node])
    for node in reversed(order):
        height[node] = 1 + max((height[c] for c in children[node]), default=-1)
    height[order[0]] = max(height[order[0]], 1)  # a root without children is no leaf
    found = []
    for h in range(1, height[order[0]] + 1):
        nodes = tuple(v for v in range(len(parents)) if height[v] == h)
        pairs = [(child, slot) for slot, node in enumerate(nodes) for child in children[node]]
        found.append(Level(nodes, tuple(c for c, _ in pairs), tuple(s for _, s in pairs)))
    return found


def checked(parents: Sequence[int]) -> Tree:
    """The parents as a tuple.

    Raises:
        ValueError: they are no tree.
    """
    tree = tuple(int(p) for p in parents)
    good = tree.count(-1) == 1 and all(-1 <= p < len(tree) for p in tree)
    if good:
        reached, frontier = 0, [tree.index(-1)]
        children: list[list[int]] = [[] for _ in tree]
        for node, above in enumerate(tree):
            if above >= 0:
                children[above].append(node)
        while frontier:
            reached += 1
            frontier.extend(children[frontier.pop()])
        good = reached == len(tree)
    if not good:
        raise ValueError("parents name, for every variable, another one, and -1 for the one root; they are no tree.")
    return tree


def _soft_bins(values: Tensor, bins: int, sigma: float) -> Tensor:
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low + 1e-8)
    points = torch.linspace(0, 1, bins, dtype=values.dtype, device=values.device)
    return (-0.5 * ((scaled[..., None] - points) / sigma) ** 2).exp()


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def _equal_frequency(x: Tensor, categories: int, levels: int) -> Tensor:
    """Every column's categories, in order, cut into ``levels`` intervals that hold about equally many samples."""
    columns = []
    for column in x.T:
        counts = torch.bincount(column[column >= 0], minlength=categories).double()
        middle = counts.cumsum(0) - counts / 2
        level = (middle / counts.sum().clamp_min(1) * levels).long().clamp_max(levels - 1)
        columns.append(torch.where(column < 0, column, level[column.clamp_min(0)]))
    return torch.stack(columns, 1)


def _centre(around: list[list[int]]) -> int:
    """The node whose farthest node is nearest; of two, the lower number."""

    def distances(start: int) -> np.ndarray:
        far = np.full(len(around), -1)
        far[start], frontier = 0, [start]
        while frontier:
            following = []
            for node in frontier:
                for other in around[node]:
                    if far[other] < 0:
                        far[other] = far[node] + 1
                        following.append(other)
            frontier = following
        return far

    one = distances(0)
    end = distances(int(one.argmax()))
    other = distances(int(end.argmax()))
    return int(np.maximum(end, other).argmin())  # in a tree the ends of a longest path are farthest from everyone
