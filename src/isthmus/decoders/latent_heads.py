"""From tokens over time to the latent of an image model: one summary of the window, then a head for each loss.

Benchetrit, Banville, King (arXiv 2310.19812), section 2: the contrastive (retrieval) head and the regression
(generation) head see the same summary.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import part


class Latents(NamedTuple):
    """Predicted latents ``(B, F)``; both are the same tensor where there is one head."""

    retrieval: Tensor
    generation: Tensor


class TimeLinear(nn.Linear):
    """One affine map from T samples to one number, shared by all channels: ``(B, T, C)`` → ``(B, C)``.

    Args:
        length: T; windows of another length are refused.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] != self.in_features:
            raise ValueError(
                f"the aggregation was made for windows of {self.in_features} samples, got {tokens.shape[1]}; cut or "
                "resample the signal to that length."
            )
        return super().forward(tokens.mT).squeeze(-1)


class TimeAttention(nn.Module):
    """Attention over time without a query (Bahdanau et al., arXiv 1409.0473): ``(B, T, C)`` → ``(B, C)``, any T."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.key, self.score = nn.Linear(channels, hidden), nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.score(self.key(tokens).tanh()).softmax(1)
        return (weights * tokens).sum(1)


class TimeMean(nn.Module):
    """The mean over time: ``(B, T, C)`` → ``(B, C)``, any T."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


@part
@checked
class LatentHeads(nn.Module):
    """Tokens ``[(B, T, C)]`` to :class:`Latents` of F numbers.

    Args:
        in_channels: C.
        features: F, the size of the latent.
        length: T, for ``aggregation="linear"``.
        aggregation: ``"linear"``, ``"attention"`` or ``"mean"`` over time.
        two: a head for each loss, as generation needs; else one for both.
        hidden: width of a hidden layer with GELU in every head; ``None`` keeps heads linear.
        attention_hidden: width of the attention over time.

    Raises:
        ValueError: a window of another length than the aggregation's.
    """

    def __init__(
        self,
        in_channels: Count,
        features: Count,
        length: Count | None = None,
        aggregation: Literal["linear", "attention", "mean"] = "linear",
        two: bool = False,
        hidden: Count | None = None,
        attention_hidden: Count = 256,
    ) -> None:
        super().__init__()
        if aggregation == "linear" and not length:
            raise ValueError("a linear aggregation needs the length of the window, in samples.")
        self.aggregation: nn.Module = {
            "linear": lambda: TimeLinear(length or 0),
            "attention": lambda: TimeAttention(in_channels, attention_hidden),
            "mean": TimeMean,
        }[aggregation]()
        self.retrieval = _head(in_channels, features, hidden)
        self.generation = _head(in_channels, features, hidden) if two else None

    def forward(self, features: list[Tensor]) -> Latents:
        """``[(B, T, C)]`` → two latents ``(B, F)``."""
        return self.of(self.aggregation(features[-1]))

    def of(self, summary: Tensor) -> Latents:
        """The same from the summary of the window ``(B, C)``."""
        retrieval = self.retrieval(summary)
        return Latents(retrieval, retrieval if self.generation is None else self.generation(summary))


def _head(in_channels: int, features: int, hidden: int | None) -> nn.Module:
    if hidden is None:
        return nn.Linear(in_channels, features)
    return nn.Sequential(nn.Linear(in_channels, hidden), nn.GELU(), nn.Linear(hidden, features))
