"""A probabilistic circuit with exact likelihoods, marginals and conditionals (arXiv 2111.11632; structure 2106.02264).

    circuit = HCLT.from_data(x, categories=17, latents=8, generator=g).fit([x], epochs=40)
    circuit.log_prob(x)  # nats, (B,); with observed= the other variables are summed out, exactly
    circuit.conditional(x, i)  # p(x_i | all others), (B, C)

A hidden Chow-Liu tree gives every variable ``X_v`` of a tree a latent ``Z_v`` with K states and hangs ``X_v`` on it.
As a circuit, from the leaves up: the *region* of a leaf ``v`` is its K input nodes ``p(x_v | state)``; an inner ``v``
has K products, the k-th of its own input k and node k of the region of every child, and its region is K sums over
those products, with weights ``W_v (K, K)`` whose rows sum to 1; the root has a single sum. So a leaf hangs on the state
of its parent. There are ``D·K·C + I·K² + K`` parameters, I being the inner nodes below the root.

Values are logarithms; sums are taken level by level as one batched product of matrices around the largest term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from isthmus import bounds
from isthmus.bounds import Count, NonNegative
from isthmus.codec import part
from isthmus.priors.circuit_tree import Tree, checked, chow_liu_tree, levels, mutual_information

_CHUNK = 512  # rows that pass through the circuit at once


class Flows(NamedTuple):
    """Expected counts of a set of samples: how often each parameter is used.

    Attributes:
        inputs: ``(D, K, C)``.
        sums: ``(I, K, K)``.
        root: ``(K,)``.
        log_prob: of all samples together, in nats.
        samples: how many there were.
    """

    inputs: Tensor
    sums: Tensor
    root: Tensor
    log_prob: float
    samples: int


@part
@bounds.checked
class HCLT(nn.Module):
    """Hidden Chow-Liu tree over D categorical variables; learns by expectation maximisation, without gradients.

    Args:
        parents: of every variable in the tree, -1 for the root; see :mod:`isthmus.priors.circuit_tree`.
        categories: C, the values of every variable are 0 to C - 1.
        latents: K, states of every latent; 1 makes the variables independent.
        pseudocount: added to the flow of every node in the M-step, spread evenly over its children, so that what never
            came up in training keeps some probability.

    Attributes:
        inputs: ``(D, K, C)``, ``inputs[v, k, c] = p(x_v = c | state k)``.
        sums: ``(I, K, K)``, ``sums[i, o, k]``: weight of product k in sum o of the inner node ``inner[i]``.
        root: ``(K,)``, weights of the one sum of the root.
        inner: inner nodes below the root, those nearest to leaves first.
        history: mean log-likelihood in nats of every pass of ``fit`` over its batches.
    """

    def __init__(
        self, parents: Sequence[int], categories: Count, latents: Count = 16, pseudocount: NonNegative = 0.01
    ) -> None:
        super().__init__()
        self.parents, self.categories, self.latents = checked(parents), categories, latents
        self.pseudocount = float(pseudocount)
        self._levels = levels(self.parents)
        self.inner = tuple(node for level in self._levels[:-1] for node in level.nodes)
        self.root_node = self.parents.index(-1)
        for i, level in enumerate(self._levels):
            for name, numbers in zip(("nodes", "children", "slots"), level, strict=True):
                self.register_buffer(f"_{name}{i}", torch.tensor(numbers, dtype=torch.long), persistent=False)
        leaves = sorted(set(range(len(self.parents))) - set(self.inner) - {self.root_node})
        self.register_buffer("_leaves", torch.tensor(leaves, dtype=torch.long), persistent=False)
        self.inputs: Tensor
        self.sums: Tensor
        self.root: Tensor
        self._fitted: Tensor
        self.register_buffer("inputs", torch.empty(len(self.parents), latents, categories))
        self.register_buffer("sums", torch.empty(len(self.inner), latents, latents))
        self.register_buffer("root", torch.empty(latents))
        self.register_buffer("_fitted", torch.tensor(False))
        self.history: list[float] = []
        self.randomize(torch.Generator().manual_seed(0))

    @classmethod
    def from_data(
        cls,
        x: Tensor,
        categories: int,
        latents: int = 16,
        pseudocount: float = 0.01,
        *,
        generator: torch.Generator,
        tree: Tree | None = None,
        samples: int = 4096,
    ) -> Self:
        """A circuit on the Chow-Liu tree of ``x (N, D)``, with random parameters around the frequencies of ``x``.

        Args:
            x: category numbers.
            categories, latents, pseudocount: as in the constructor.
            generator: draws parameters.
            tree: another tree, instead of that of the mutual information.
            samples: evenly spaced rows of ``x`` that the tree is found on; counting pairs takes ``samples·D²``.
        """
        _check_samples(x, x.shape[1] if x.ndim == 2 else 0, categories)
        if not len(x):
            raise ValueError("there are no samples to learn from.")
        if tree is None:
            tree = chow_liu_tree(mutual_information(x[:: -(-len(x) // samples)], categories))
        circuit = cls(tree, categories, latents, pseudocount)
        circuit.randomize(generator, x)
        return circuit

    def randomize(self, generator: torch.Generator, x: Tensor | None = None) -> None:
        """Draw all parameters; inputs around the frequencies of ``x (N, D)``, or around equal ones.

        States that start alike stay alike, so every state gets its own.
        """
        shape = (len(self.parents), self.latents, self.categories)
        if x is None:
            frequency = torch.full((len(self.parents), self.categories), 1 / self.categories, dtype=torch.float64)
        else:
            counts = [torch.bincount(column, minlength=self.categories) for column in x.T.cpu()]
            frequency = torch.stack(counts).double() / len(x)
            frequency = 0.9 * frequency + 0.1 / self.categories
        draws = torch.rand(shape, generator=generator, dtype=torch.float64)
        inputs = frequency[:, None] * draws if self.latents > 1 else frequency[:, None]
        sums, root = (
            0.1 + torch.rand(s, generator=generator, dtype=torch.float64) for s in (self.sums.shape, self.root.shape)
        )
        for own, drawn in ((self.inputs, inputs), (self.sums, sums), (self.root, root)):
            own.copy_(drawn / drawn.sum(-1, keepdim=True))
        self._fitted.fill_(False)

    # ------------------------------------------------------------------------------------------------------- learning

    @property
    def fitted(self) -> bool:
        """Whether the parameters were learnt or loaded; what uses a circuit before raises."""
        return bool(self._fitted)

    def fit(
        self,
        batches: Iterable[Tensor | tuple[Tensor, Tensor]],
        epochs: int = 40,
        step: float | tuple[float, float] | None = None,
        watch: Callable[[int, float], object] | None = None,
    ) -> Self:
        """Expectation maximisation.

        Args:
            batches: tensors ``(B, D)`` of category numbers, or pairs of them and what is observed of them, bool
                ``(B, D)`` or ``(D,)``; gone through once an epoch. What is missing is summed out.
            epochs: passes over the batches.
            step: ``None``: one full M-step a pass. Otherwise mini-batch EM: after every batch the parameters move that
                share of the way to those of the batch; a pair is annealed linearly from the first to the last pass.
            watch: called after every pass with its number, from 1, and the mean log-likelihood in nats met on the way.

        Raises:
            ValueError: no samples, something that is no category, or a sample that the circuit finds impossible.
        """
        first, last = step if isinstance(step, tuple) else (step, step)
        if epochs < 1 or (first is not None and not (0 < first <= 1 and 0 < (last or 0) <= 1)):
            raise ValueError(f"epochs is at least 1 and a step lies in (0, 1], got {epochs} and {step}.")
        for epoch in range(epochs):
            total, log_prob, samples = None, 0.0, 0
            for batch in batches:
                flows = self.expected_counts(*(batch if isinstance(batch, tuple) else (batch,)))
                log_prob, samples = log_prob + flows.log_prob, samples + flows.samples
                if first is not None and last is not None:
                    if flows.samples:
                        self.update(flows, first + (last - first) * epoch / max(epochs - 1, 1))
                    continue
                total = flows if total is None else _add(total, flows)
            if not samples:
                again = " in its second pass; give a list, not a generator" if epoch else ""
                raise ValueError(f"fit got no samples{again}.")
            if total is not None:
                self.update(total)
            self.history.append(log_prob / samples)
            if watch is not None:
                watch(epoch + 1, self.history[-1])
        self._fitted.fill_(True)
        return self

    def expected_counts(self, x: Tensor, observed: Tensor | None = None) -> Flows:
        """The E-step: flows of samples ``(B, D)`` under the present parameters.

        Every sample sends a flow of 1 into the root; a sum gives child c the share ``w_c·value(c) / value(sum)``, a
        product gives all of it to every child, and input k of variable v collects it at the category observed there.
        """
        mask = None if observed is None else self._observed(x, observed)
        self._check(x, mask)
        inputs, sums, root = (torch.zeros_like(t) for t in (self.inputs.mT.contiguous(), self.sums, self.root))
        flat = inputs.view(-1, self.latents)
        offsets = torch.arange(len(self.parents), device=x.device)[:, None] * self.categories
        log_prob = 0.0
        tables = self._tables()
        for start in range(0, len(x), _CHUNK):
            rows = slice(start, start + _CHUNK)
            chunk, there = x[rows], None if mask is None else mask[rows]
            values = self._up(chunk, there, tables)
            if not torch.isfinite(values.log_prob).all():
                raise ValueError("a sample has probability 0 under this circuit; use a pseudocount above 0.")
            flow = self._down(values, sums, root)
            if there is not None:
                chunk = torch.where(there, chunk, 0)
                flow = flow * there.T[..., None]
            flat.index_add_(0, (chunk.T + offsets).flatten(), flow.flatten(0, 1))
            log_prob += float(values.log_prob.sum())
        return Flows(inputs.mT, sums, root, log_prob, len(x))

    def update(self, flows: Flows, step: float = 1.0) -> None:
        """The M-step: move ``step`` of the way to the parameters that the flows ask for."""
        for own, counts in ((self.inputs, flows.inputs), (self.sums, flows.sums), (self.root, flows.root)):
            smoothed = counts + self.pseudocount / counts.shape[-1]
            mass = smoothed.sum(-1, keepdim=True)
            wanted = torch.where(mass > 0, smoothed / mass.clamp_min(torch.finfo(mass.dtype).tiny), own)
            own.lerp_(wanted, step) if step < 1 else own.copy_(wanted)

    # ------------------------------------------------------------------------------------------------------ inference

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Log-likelihood in nats ``(B,)`` of samples ``(B, D)``.

        Args:
            x: category numbers; what stands where nothing is observed does not matter.
            observed: bool ``(B, D)`` or ``(D,)``; variables where it is false are summed out.

        Raises:
            ValueError: not fitted, a wrong shape, or an observed value outside 0…C-1.
        """
        return (
            torch.cat([values.log_prob for values in self._values(x, observed)]) if len(x) else self.root.new_zeros(0)
        )

    def conditional(self, x: Tensor, i: int, observed: Tensor | None = None) -> Tensor:
        """``p(x_i | evidence)`` as ``(B, C)``; the evidence is every *other* observed variable.

        Whether ``x_i`` itself is observed does not matter: its value never counts as evidence for itself.

        Args:
            x: category numbers ``(B, D)``.
            i: the variable.
            observed: as in :meth:`log_prob`; all variables are observed without it.

        Raises:
            ValueError: as :meth:`log_prob`; or the evidence of a row has probability 0.
        """
        variables = len(self.parents)
        if not -variables <= i < variables:
            raise ValueError(f"there are variables 0 to {variables - 1}, got {i}.")
        mask = self._observed(x, observed).clone()
        mask[:, i % variables] = False
        found = []
        for values in self._values(x, mask):
            if not torch.isfinite(values.log_prob).all():
                raise ValueError("the evidence has probability 0 under this circuit, so nothing follows from it.")
            state = self._down(values)[i % variables]
            found.append(state / state.sum(-1, keepdim=True) @ self.inputs[i])
        return torch.cat(found) if found else self.root.new_zeros(0, self.categories)

    def sample(
        self, count: int, generator: torch.Generator, x: Tensor | None = None, observed: Tensor | None = None
    ) -> Tensor:
        """Draw ``(count, D)``; given ``x (count, D)`` and ``observed``, the rest is drawn given what is observed."""
        variables, device = len(self.parents), self.root.device
        if x is None:
            x, observed = torch.zeros(count, variables, dtype=torch.long, device=device), torch.tensor(False)
            observed = observed.expand(variables)
        mask, drawn = self._observed(x, observed), []
        for values in self._values(x, mask):
            batch = len(values.log_prob)
            state = torch.zeros(variables, batch, dtype=torch.long, device=device)
            for i in reversed(range(len(self._levels))):
                nodes, children, slots = self._numbers(i)
                top = i == len(self._levels) - 1
                weights = self.root.expand(1, batch, -1) if top else self._rows(i, state[nodes])
                picked = _pick(weights * values.shares[i], generator)
                state[nodes], state[children] = picked, picked[slots]
            chosen = self.inputs.gather(1, state[..., None].expand(-1, -1, self.categories))
            drawn.append(_pick(chosen, generator).T)
        return torch.where(mask, x, torch.cat(drawn)) if drawn else x

    # ---------------------------------------------------------------------------------------------------- both passes

    def _values(self, x: Tensor, observed: Tensor | None) -> Iterator[_Values]:
        if not self.fitted:
            raise ValueError("this circuit has not learnt anything yet; call fit, or load_state_dict.")
        mask = None if observed is None else self._observed(x, observed)
        self._check(x, mask)
        tables = self._tables()
        for start in range(0, len(x), _CHUNK):
            rows = slice(start, start + _CHUNK)
            yield self._up(x[rows], None if mask is None else mask[rows], tables)

    def _tables(self) -> Tensor:
        return self.inputs.log().mT.contiguous()

    def _up(self, x: Tensor, observed: Tensor | None, tables: Tensor) -> _Values:
        """Values of all sums, leaves first."""
        index = x.T if observed is None else torch.where(observed, x, 0).T
        every = torch.arange(len(tables), device=x.device)[:, None]
        region = tables[every, index]  # (D, B, K): of inputs at first, of regions at last
        if observed is not None:
            region.masked_fill_(~observed.T[..., None], 0.0)
        shares, sums = [], []
        value = largest = region
        for i in range(len(self._levels)):
            nodes, children, slots = self._numbers(i)
            product = region[nodes]
            if len(children):
                product.index_add_(0, slots, region[children])
            largest = product.amax(-1, keepdim=True)
            largest.masked_fill_(largest == -torch.inf, 0.0)  # impossible in every state
            share = product.sub_(largest).exp_()
            value = share @ self._weights(i).mT
            shares.append(share)
            sums.append(value)
            if i < len(self._levels) - 1:
                region[nodes] = value.log() + largest
        return _Values(shares, sums, (value.log() + largest)[0, :, 0])

    def _down(self, values: _Values, sums: Tensor | None = None, root: Tensor | None = None) -> Tensor:
        """Flows ``(D, B, K)`` into the inputs; those of sums are added to ``sums`` and ``root``."""
        batch = values.log_prob.shape[0]
        flow = self.root.new_empty(len(self.parents), batch, self.latents)
        tiny = torch.finfo(flow.dtype).tiny
        start = len(self.inner)
        for i in reversed(range(len(self._levels))):
            nodes, children, slots = self._numbers(i)
            share, weights = values.shares[i], self._weights(i)
            if i == len(self._levels) - 1:
                product = weights * share / values.sums[i].clamp_min(tiny)
                if root is not None:
                    root += product[0].sum(0)
            else:
                ratio = flow[nodes] / values.sums[i].clamp_min(tiny)
                product = (ratio @ weights).mul_(share)
                start -= len(nodes)
                if sums is not None:
                    sums[start : start + len(nodes)] += ratio.mT @ share * weights
            flow[nodes] = product
            if len(children):
                flow[children] = product[slots]
        return flow

    def _numbers(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(getattr(self, f"_{name}{level}") for name in ("nodes", "children", "slots"))  # type: ignore

    def _weights(self, level: int) -> Tensor:
        """``(n, K, K)`` of a level's inner nodes, ``(1, 1, K)`` of the root."""
        if level == len(self._levels) - 1:
            return self.root[None, None]
        start = sum(len(below.nodes) for below in self._levels[:level])
        return self.sums[start : start + len(self._levels[level].nodes)]

    def _rows(self, level: int, state: Tensor) -> Tensor:
        """Weights ``(n, B, K)`` of the sums that ``state (n, B)`` names."""
        return self._weights(level).gather(1, state[..., None].expand(-1, -1, self.latents))

    def _observed(self, x: Tensor, observed: Tensor | None) -> Tensor:
        if observed is None:
            return torch.ones_like(x, dtype=torch.bool)
        if observed.dtype != torch.bool or observed.shape not in (x.shape, x.shape[1:]):
            raise ValueError(
                f"observed is bool {tuple(x.shape)} or {tuple(x.shape[1:])}, got {observed.dtype} "
                f"{tuple(observed.shape)}."
            )
        return observed.to(x.device).expand(x.shape)

    def _check(self, x: Tensor, observed: Tensor | None = None) -> None:
        _check_samples(x, len(self.parents), self.categories, observed)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):  # type: ignore
        """As of any module; afterwards the circuit counts as fitted where the state says so or does not say."""
        state = {"_fitted": torch.tensor(True), **state_dict}
        return super().load_state_dict(state, strict, assign)


def from_official(params: Mapping[str, Tensor], parents: Sequence[int], pseudocount: float = 0.01) -> HCLT:
    """A circuit from parameters by tree node, as pyjuice's regions hold them, in their dtype.

    Args:
        params: ``input.v (K, C)`` of every variable, ``sum.v (K, K)`` of every inner node, ``(1, K)`` of the root.
        parents: the tree.
        pseudocount: as in :class:`HCLT`.

    Raises:
        ValueError: parameters are missing or of another shape than the tree asks for.
    """
    try:
        latents, categories = params["input.0"].shape
        circuit = HCLT(parents, categories, latents, pseudocount).to(params["input.0"].dtype)
        state = {
            "inputs": torch.stack([params[f"input.{v}"] for v in range(len(circuit.parents))]),
            "sums": torch.stack([params[f"sum.{v}"] for v in circuit.inner]) if circuit.inner else circuit.sums,
            "root": params[f"sum.{circuit.root_node}"][0],
        }
        circuit.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"these are not the parameters of this tree: {error}") from error
    return circuit


class _Values(NamedTuple):
    shares: list[Tensor]  # of every level (n, B, K): products over the largest of their node
    sums: list[Tensor]  # of every level (n, B, K): sums over the same, (1, B, 1) of the root
    log_prob: Tensor  # (B,)


def _check_samples(x: Tensor, variables: int, categories: int, observed: Tensor | None = None) -> None:
    if x.ndim != 2 or x.shape[1] != variables or not variables:
        raise ValueError(f"samples are (B, {variables or 'D'}) category numbers, got shape {tuple(x.shape)}.")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"category numbers are int64, got {x.dtype}.")
    outside = (x < 0) | (x >= categories)
    if observed is not None:
        outside &= observed
    if outside.any():
        raise ValueError(f"category numbers lie in 0…{categories - 1}, got {int(x[outside][0])}.")


def _add(a: Flows, b: Flows) -> Flows:
    return Flows(*(one + two for one, two in zip(a, b, strict=True)))  # type: ignore[arg-type]


def _pick(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Indices ``(…)`` drawn in proportion to ``weights (…, K)``."""
    cumulative = weights.cumsum(-1)
    draw = torch.rand(weights.shape[:-1], generator=generator, dtype=torch.float64).to(weights)
    found = torch.searchsorted(cumulative, (draw * cumulative[..., -1])[..., None], right=True)
    return found[..., 0].clamp_max(weights.shape[-1] - 1)
