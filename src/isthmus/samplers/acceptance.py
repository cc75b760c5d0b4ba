"""The test of speculative sampling: which guessed tokens may stay so that the outcome is an exact sample.

Leviathan et al. (arXiv 2211.17192, section 2.3) and Chen et al. (arXiv 2302.01318): a guess d that was drawn from q is
kept with probability min(1, p(d) / q(d)), and at the first refusal the token is drawn from the normalised max(p - q, 0)
instead. What comes out is distributed as p, whatever q is. ::

    count, residual = verify(p, q, tokens, generator)   # tokens[:, :count] stay
    following = draw(residual, generator)               # the token after them
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.samplers.logits import uniform


def verify(
    p: Tensor,
    q: Tensor,
    tokens: Tensor,
    generator: torch.Generator | None = None,
    *,
    chance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Judge guesses from left to right, each by the row of ``p`` that predicts it.

    Row i of ``p`` is the model's distribution of token i given all before it; for a causal model fed with
    ``[last, d_0, d_1, …]`` that is the output at the input *before* d_i. Both distributions are taken after every
    filter, mask and temperature, and nothing is applied to the residual. Ratios are formed in float32 at least.

    Args:
        p: ``(B, W, V)``, or ``(B, W + 1, V)`` with the distribution of the token after the last guess.
        q: ``(B, W, V)``, what every guess was drawn from; one-hot rows are guesses without randomness.
        tokens: int64 ``(B, W)``, the guesses.
        generator: for the uniforms; the global one where it is ``None``.
        chance: ``(B, W)``, the uniforms themselves, in place of ``generator``.

    Returns:
        ``count`` int64 ``(B,)``, how many leading guesses stay, and ``residual`` ``(B, V)``, the distribution of the
        token that follows them: normalised max(p - q, 0) after a refusal (p itself where rounding leaves nothing of
        it), the last row of ``p`` where all W guesses stay, and zeros where ``p`` has no such row.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, width = tokens.shape
    vocabulary = p.shape[-1]
    if q.shape != (batch, width, vocabulary) or p.shape not in (
        (batch, width, vocabulary),
        (batch, width + 1, vocabulary),
    ):
        raise ValueError(
            f"tokens {tuple(tokens.shape)} need q of shape ({batch}, {width}, V) and p with as many rows or one more, "
            f"got q {tuple(q.shape)} and p {tuple(p.shape)}."
        )
    dtype = torch.promote_types(p.dtype, torch.float32)
    p, q = p.to(dtype), q.to(dtype)
    if chance is None:
        chance = uniform((batch, width), generator, p)
    index = tokens[..., None]
    # u < min(1, p / q) without the division: where q is 0 the guess stays exactly if p is not.
    stays = chance * q.gather(2, index)[..., 0] < p[:, :width].gather(2, index)[..., 0]
    count = stays.long().cumprod(1).sum(1)

    refused = count < width
    rows = torch.arange(batch, device=p.device)
    at = p[rows, count.clamp_max(p.shape[1] - 1)]  # p of the first token that does not stay, or of the one after all
    if width:
        left = (at - q[rows, count.clamp_max(width - 1)]).clamp_min_(0)
        mass = left.sum(-1, keepdim=True)
        left = torch.where(mass > 0, left / mass.clamp_min(torch.finfo(dtype).tiny), at)
    else:
        left = at
    beyond = at if p.shape[1] > width else torch.zeros_like(at)
    return count, torch.where(refused[:, None], left, beyond)
