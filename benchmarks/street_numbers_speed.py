"""Length and digit heads as one product and one masked loss, beside what ports do place by place.

    python -m benchmarks.street_numbers_speed

The peer has a linear layer for the length and one for every digit, and adds up cross entropies of the digits that
exist one place after another; weights and losses are the same, which is checked. Then coverage by sorting, beside
trying every confidence as the threshold, and composing pictures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import compare, record, table
from isthmus import data
from isthmus.decoders.digit_sequence import DigitSequence, NumberScores, negative_log_likelihood, read
from isthmus.metrics.coverage import coverage

WIDTH, DIGITS, BATCH, SAMPLES = 3072, 5, 256, 4000


class PlaceByPlace(nn.Module):
    """Six linear layers with the weights of a :class:`DigitSequence`."""

    def __init__(self, ours: DigitSequence) -> None:
        super().__init__()
        self.length = nn.Linear(WIDTH, DIGITS + 2)
        self.digits = nn.ModuleList(nn.Linear(WIDTH, 10) for _ in range(DIGITS))
        self.length.load_state_dict(ours.length_head.state_dict())
        with torch.no_grad():
            for i, layer in enumerate(self.digits):
                layer.weight.copy_(ours.digit_heads.weight[10 * i : 10 * i + 10])  # type: ignore[union-attr, operator]
                layer.bias.copy_(ours.digit_heads.bias[10 * i : 10 * i + 10])  # type: ignore[union-attr, operator]

    def loss(self, x: Tensor, length: Tensor, digits: Tensor) -> Tensor:
        total = F.cross_entropy(self.length(x), length, reduction="sum")
        for i, layer in enumerate(self.digits):
            exists = (length > i) & (length <= DIGITS)
            if exists.any():
                total = total + F.cross_entropy(layer(x[exists]), digits[exists, i], reduction="sum")
        return total / len(x)

    def read(self, x: Tensor) -> list[tuple[int, float]]:
        length = self.length(x).log_softmax(1)
        best = [layer(x).log_softmax(1).max(1).values for layer in self.digits]
        found = []
        for row in range(len(x)):
            scores = [float(length[row, n]) + sum(float(best[i][row]) for i in range(n)) for n in range(DIGITS + 1)]
            scores.append(float(length[row, DIGITS + 1]))
            found.append(max(enumerate(scores), key=lambda pair: pair[1]))
        return found


def every_threshold(confidence: Tensor, correct: Tensor) -> float:
    best = 0.0
    for threshold in confidence.unique():
        kept = confidence >= threshold
        if correct[kept].double().mean() >= 0.98:
            best = max(best, float(kept.double().mean()))
    return best


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = DigitSequence(WIDTH, DIGITS, grid=1)
    peer, x = PlaceByPlace(ours), torch.randn(BATCH, WIDTH)
    length, digits = torch.randint(DIGITS + 2, (BATCH,)), torch.randint(10, (BATCH, DIGITS))

    def step() -> Tensor:
        ours.zero_grad()
        loss = negative_log_likelihood(ours([x]), length, digits).mean()
        loss.backward()
        return loss.detach()

    def peer_step() -> Tensor:
        peer.zero_grad()
        loss = peer.loss(x, length, digits)
        loss.backward()
        return loss.detach()

    assert torch.allclose(step(), peer_step(), atol=1e-4), "the same loss"
    with torch.no_grad():
        reading: NumberScores = ours([x])
        told = read(reading)
        assert [n for n, _ in peer.read(x)] == told.length.tolist(), "the same numbers"
    confidence = torch.rand(SAMPLES)
    correct = torch.rand(SAMPLES) < 0.9 + 0.1 * confidence
    assert abs(coverage(confidence, correct).coverage - every_threshold(confidence, correct)) < 1e-9

    def compose() -> object:
        return data.load("street-numbers", "train", ("image", "labels")).fetch(range(64))

    def reads() -> object:
        with torch.no_grad():
            return read(ours([x]))

    def peer_reads() -> object:
        with torch.no_grad():
            return peer.read(x)

    rows = compare(
        {
            "training step of the heads": step,
            "training step, place by place": peer_step,
            "reading": reads,
            "reading, number by number": peer_reads,
            "coverage at 98 %": lambda: coverage(confidence, correct),
            "coverage, every threshold": lambda: every_threshold(confidence, correct),
            "64 pictures composed, 54 px": compose,
        },
        rounds=7,
    )
    names = list(rows)
    ratios = {names[i]: rows[names[i + 1]]["seconds"] / rows[names[i]]["seconds"] for i in (0, 2, 4)}
    print(table(rows))
    print(ratios)
    record("street_numbers_speed", rows, batch=BATCH, width=WIDTH, samples=SAMPLES, ratios=ratios)


if __name__ == "__main__":
    main()
