"""Is the sampler exact? Thousands of short sequences from a chain whose distribution is known, and two broken samplers.

The chain looks two tokens back, has four tokens, and 1,024 sequences of five; counts of sampled sequences are judged by
a chi-square test. A test that cannot fail shows nothing, so it is tried on samplers that are almost right as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.metrics.distributions import ChiSquare, chi_square, survival
from isthmus.priors.markov import MarkovChain
from isthmus.samplers.acceptance import verify
from isthmus.samplers.ordinary import Sampling
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi

TEMPERATURES = (0.7, 1.0, 1.4)
_LENGTH, _WINDOW = 5, 3


def residual_forgotten(
    p: Tensor, q: Tensor, tokens: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Broken: after a refusal the token is drawn from p, in place of what of p exceeds q."""
    count, _ = verify(p, q, tokens, generator)
    return count, p[torch.arange(len(p), device=p.device), count]


def newest_as_draft(p: Tensor, q: Tensor, tokens: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Broken: the newest distribution stands for the one that the guess was drawn from."""
    return verify(p, p[:, : q.shape[1]], tokens, generator)


def judge(
    decoder: SpeculativeJacobi, sequences: int, temperatures: tuple[float, ...], generator: torch.Generator
) -> ChiSquare:
    """One verdict over a new chain and so many sequences at every temperature; independent tests add up.

    Args:
        decoder: with any settings but the window, which is 3.
        sequences: drawn at every temperature.
        temperatures: of sampling.
        generator: of the tables and the draws.
    """
    statistic, degrees = 0.0, 0
    for temperature in temperatures:
        chain = MarkovChain(4, generator=generator)
        sampling = Sampling(temperature=temperature)
        drawn = decoder.sample(chain, chain.prompt(sequences), _LENGTH, sampling, generator=generator).tokens
        _, probabilities = chain.exact(_LENGTH, lambda logits, t=temperature: logits / t)
        found = chi_square(torch.bincount(chain.number(drawn), minlength=len(probabilities)), probabilities)
        statistic, degrees = statistic + found.statistic, degrees + found.degrees
    return ChiSquare(statistic, degrees, survival(statistic, degrees))


def verdicts(sequences: int, generator: torch.Generator) -> dict[str, ChiSquare]:
    """Our sampler with both kinds of first guesses, and the broken ones."""
    ours = [
        judge(SpeculativeJacobi(_WINDOW, start=start), sequences, TEMPERATURES, generator)
        for start in ("random", "repeat_horizon")
    ]
    statistic, degrees = sum(each.statistic for each in ours), sum(each.degrees for each in ours)
    found = {"exact": ChiSquare(statistic, degrees, survival(statistic, degrees))}
    for name, accept in (("residual_forgotten", residual_forgotten), ("newest_as_draft", newest_as_draft)):
        found[name] = judge(SpeculativeJacobi(_WINDOW, accept=accept), sequences, (1.0,), generator)
    return found
