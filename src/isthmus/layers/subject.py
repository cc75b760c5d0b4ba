"""One linear layer a person: brains differ, so the sensors of each are mixed by weights of their own.

``y[d] = sum_c x[c] W_s[c, d]`` (Défossez et al. 2023, arXiv 2208.12266, section 2.3). The published code copies a whole
weight matrix for every sample of a batch; here the samples are sorted by subject, and each subject's share is one
product, which needs no copies of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, Share, checked
from isthmus.codec import part

SOMEBODY_ELSE = -1
"""The subject index of a person who was not trained on."""


@part
@checked
class SubjectLinear(nn.Module):
    """Linear map ``(B, C)`` → ``(B, D)`` or ``(B, C, T)`` → ``(B, D, T)`` with weights of each sample's subject.

    Args:
        in_features: C; a list gives every subject a width of its own (voxel counts differ). Inputs are then padded to
            the largest, and what lies beyond a subject's width is not read.
        out_features: D.
        subjects: S, how many people.
        bias: add a vector of each subject's own.
        dropout: share of training samples that go through one more matrix, which then serves people who were never
            seen: give them the subject index -1. 0 makes no such matrix.
        identity: start as the identity over sqrt(C), as the published option does, in place of N(0, 1/C).

    Raises:
        ValueError: impossible sizes; a subject index that has no weights.
    """

    conditions = frozenset({"subject"})

    def __init__(
        self,
        in_features: Count | Sequence[Count],
        out_features: Count,
        subjects: Count,
        bias: bool = False,
        dropout: Share = 0.0,
        identity: bool = False,
    ) -> None:
        super().__init__()
        if subjects < 1 or out_features < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"SubjectLinear needs subjects and out_features of 1 or more and dropout in [0, 1), got {subjects}, "
                f"{out_features} and {dropout}."
            )
        widths = [in_features] * subjects if isinstance(in_features, int) else list(in_features)
        if len(widths) != subjects or min(widths) < 1:
            raise ValueError(f"in_features must be one width, or one for each of {subjects} subjects, got {widths}.")
        if identity and set(widths) != {out_features}:
            raise ValueError(f"an identity needs equal widths, got {sorted(set(widths))} and {out_features}.")
        if dropout and len(set(widths)) > 1:
            raise ValueError("subjects of different widths have no weights in common, so dropout must be 0.")
        self.subjects, self.out_features, self.dropout, self.widths = subjects, out_features, dropout, widths
        rows = subjects + bool(dropout)
        self.weights: nn.Parameter | nn.ParameterList
        if isinstance(in_features, int):
            start = torch.randn(rows, in_features, out_features)
            if identity:
                start = torch.eye(in_features).expand(rows, -1, -1)
            self.weights = nn.Parameter(start / in_features**0.5)
        else:
            self.weights = nn.ParameterList(torch.randn(width, out_features) / width**0.5 for width in widths)
        self.bias = nn.Parameter(torch.zeros(rows, out_features)) if bias else None

    def forward(self, x: Tensor, subject: Tensor | Mapping[str, Tensor]) -> Tensor:
        """``(B, C)`` or ``(B, C, T)`` and subjects ``(B,)`` (or a mapping that holds them) → ``(B, D[, T])``."""
        if isinstance(subject, Mapping):
            subject = subject["subject"]
        if x.ndim not in (2, 3) or subject.shape != x.shape[:1]:
            raise ValueError(
                f"SubjectLinear reads (B, C) or (B, C, T) with subjects (B,), got {tuple(x.shape)} and "
                f"{tuple(subject.shape)}."
            )
        if x.shape[1] != max(self.widths):
            raise ValueError(f"SubjectLinear has weights for {max(self.widths)} channels, got {x.shape[1]}.")
        rows = self.rows(subject)
        if self.training and self.dropout:
            rows = rows.masked_fill(torch.rand(rows.shape, device=rows.device) < self.dropout, self.subjects)
        order = rows.argsort(stable=True)
        present, counts = rows[order].unique_consecutive(return_counts=True)
        if len(present) == 1:
            return self._one(x, int(present))
        shares = x[order].split(counts.tolist())
        out = torch.cat([self._one(share, row) for share, row in zip(shares, present.tolist(), strict=True)])
        return out[order.argsort()]

    def rows(self, subject: Tensor) -> Tensor:
        """Subject indices ``(B,)`` → rows of the weights; -1, somebody else, is the last row.

        Raises:
            ValueError: an index without weights.
        """
        lowest = SOMEBODY_ELSE if self.dropout else 0
        low, high = (int(v) for v in subject.aminmax())
        if low < lowest or high >= self.subjects:
            wrong = low if low < lowest else high
            told = (
                "; a layer made with dropout > 0 also takes -1, somebody who was not trained on"
                if wrong == SOMEBODY_ELSE
                else ""
            )
            raise ValueError(f"subject {wrong} has no weights; there are subjects 0 to {self.subjects - 1}{told}.")
        return subject.where(subject >= 0, torch.full_like(subject, self.subjects))

    def _one(self, x: Tensor, row: int) -> Tensor:
        weight = self.weights[row]
        x = x[:, : weight.shape[0]]
        out = x @ weight if x.ndim == 2 else weight.t() @ x
        if self.bias is None:
            return out
        return out + (self.bias[row] if x.ndim == 2 else self.bias[row][:, None])

    def extra_repr(self) -> str:
        widths = self.widths[0] if len(set(self.widths)) == 1 else self.widths
        return f"{widths}, {self.out_features}, subjects={self.subjects}, dropout={self.dropout}"
