"""Reading fetched values: the vote of the discrete key-value bottleneck (arXiv 2207.11240), which has no parameters,
and the parametric heads that its code tries beside it."""

from __future__ import annotations

from torch import Tensor, nn

from isthmus.bounds import Count, Share, checked
from isthmus.codec import part
from isthmus.layers.pool import as_tokens


@part
@checked
class Vote(nn.Module):
    """The mean over codebooks and tokens of values that are as wide as there are classes: logits.

    Args:
        classes: width of a value.
        dropout: share of codebooks whose vote is left out in training.
        level: which entry of the pyramid is read.
    """

    def __init__(self, classes: Count, dropout: Share = 0.0, level: int = -1) -> None:
        super().__init__()
        self.classes, self.level = classes, level
        self.drop = nn.Dropout1d(dropout)

    def forward(self, features: list[Tensor]) -> Tensor:
        """A level of C·classes channels, ``(B, C, H, W)``, ``(B, N, C)`` or ``(B, C)``, to ``(B, classes)``.

        Raises:
            ValueError: the channels are no multiple of the classes.
        """
        tokens = as_tokens(features[self.level])
        if tokens.shape[-1] % self.classes:
            raise ValueError(
                f"{tokens.shape[-1]} channels are no values of {self.classes} classes each; give the bottleneck "
                f"value_dim={self.classes}, or read its values with FlatHead."
            )
        votes = tokens.mean(1).unflatten(-1, (-1, self.classes))
        return self.drop(votes).mean(1)


@part
@checked
class FlatHead(nn.Module):
    """A linear layer, or two with a ReLU between, on all numbers of a level laid out flat.

    Args:
        values: numbers a sample.
        classes: number of logits.
        hidden: width between the layers; one layer without it. The paper's MLP has 128.
        bias: of the layers.
        level: which entry of the pyramid is read.
    """

    def __init__(
        self, values: Count, classes: Count, hidden: Count | None = None, bias: bool = True, level: int = -1
    ) -> None:
        super().__init__()
        self.level = level
        layers: list[nn.Module] = [nn.Flatten()]
        if hidden is not None:
            layers += [nn.Linear(values, hidden, bias=bias), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden or values, classes, bias=bias))

    def forward(self, features: list[Tensor]) -> Tensor:
        """A level of ``values`` numbers a sample to ``(B, classes)``."""
        return self.layers(features[self.level])
