"""MEG decoding: the convnet beside a plain transcription, ridge beside scikit-learn, and a stream on one core.

    python -m benchmarks.meg_speed                       # everything, the paper's sizes, one thread
    python -m benchmarks.meg_speed --only network --batch 32 --rounds 3

*Network*: the retrieval model (272 sensors, 181 samples, 4 people, 6.4 M parameters), forward and training step, beside
the published way with the same weights: a position embedding and attention for every sample, and a copy of a subject's
matrix for every sample. Where all share a helmet, ours makes attention once; the convolutions, which are the same in
both, are the limit (the count of multiply-adds is printed).

*Ridge*: eight penalties searched for every target by leave-one-out, beside ``RidgeCV(alpha_per_target=True)``: 700
trials of 46 sensors x 33 samples (dual) and 3,000 of 200 numbers (primal), 768 targets. The same penalties and
predictions come out.

*Stream*: one step of the retrieval model at 120 Hz, folded (spatial part one matrix, sum over time before the last
product), beside the network called whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from benchmarks.common import compare, record, table
from isthmus.codec import Codec
from isthmus.decoders.latent_heads import LatentHeads
from isthmus.decoders.ridge import Ridge
from isthmus.decoders.streaming import StreamingDecoder
from isthmus.encoders.signals.meg_conv import MEGConv
from isthmus.encoders.signals.sensor_attention import fourier

SENSORS, LENGTH, SUBJECTS, FEATURES = 272, 181, 4, 768
ALPHAS = tuple(10.0**power for power in range(8))


class Published(nn.Module):
    """The published equations over the same weights: everything per sample."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, x: Tensor, condition: dict[str, Tensor]) -> Tensor:
        encoder: Any = self.codec.encoder
        embedded = fourier(condition["positions"], encoder.attention.dim)
        heads = encoder.attention.heads[None].expand(len(x), -1, -1)
        weights = torch.einsum("bcd,bod->boc", embedded, heads).softmax(2)
        x = encoder.mix(torch.einsum("bct,boc->bot", x, weights))
        gathered = encoder.subject.weights.index_select(0, condition["subject"])
        x = torch.einsum("bct,bcd->bdt", x, gathered)
        decoder: Any = self.codec.decoder
        return decoder([encoder.temporal(x, condition["subject"]).mT]).retrieval


def model() -> Codec:
    """The paper's retrieval model; without its random disc, so that both compute the same."""
    return Codec(MEGConv(SUBJECTS, attention_dropout=0.0), decoder=LatentHeads(2048, FEATURES, length=LENGTH))


def network(batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Rows of forward and step."""
    codec = model().eval()
    plain = Published(codec)
    x = torch.randn(batch, SENSORS, LENGTH)
    positions = torch.rand(SENSORS, 2).expand(batch, -1, -1)
    condition = {"positions": positions, "subject": torch.randint(SUBJECTS, (batch,))}

    def ours(x: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return codec(x, condition).prediction.retrieval

    with torch.no_grad():
        want, got = plain(x, condition), ours(x, condition)
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=1e-4)
    cases: dict[str, Callable[[], Any]] = {}
    for name, run in {"ours": ours, "published": plain}.items():
        cases[f"{name}, batch {batch}, forward"] = lambda run=run: _forward(run, x, condition)
        cases[f"{name}, batch {batch}, step"] = lambda run=run: _step(codec, run, x, condition)
    rows = compare(cases, rounds=rounds)

    encoder: Any = codec.encoder
    width = x.new_zeros(batch, 270, LENGTH)
    front = {
        "ours, spatial part": lambda: _forward(encoder.spatial, x, condition),
        "published, spatial part": lambda: _forward(_spatial(plain), x, condition),
        "both, temporal part: the limit": lambda: _forward(encoder.temporal, width, condition["subject"]),
    }
    return rows | {f"{name}, batch {batch}, forward": row for name, row in compare(front, rounds=rounds).items()}


def _spatial(plain: Published) -> Callable[..., Tensor]:
    encoder: Any = plain.codec.encoder

    def run(x: Tensor, condition: dict[str, Tensor]) -> Tensor:
        embedded = fourier(condition["positions"], encoder.attention.dim)
        heads = encoder.attention.heads[None].expand(len(x), -1, -1)
        weights = torch.einsum("bcd,bod->boc", embedded, heads).softmax(2)
        x = encoder.mix(torch.einsum("bct,boc->bot", x, weights))
        return torch.einsum("bct,bcd->bdt", x, encoder.subject.weights.index_select(0, condition["subject"]))

    return run


def ridge(rounds: int) -> dict[str, dict[str, float]]:
    """Rows of both forms."""
    rows = {}
    for form, (samples, width) in {"dual": (700, 46 * 33), "primal": (3000, 200)}.items():
        x, weight = torch.randn(samples, width), torch.randn(width, FEATURES) * (torch.rand(FEATURES) < 0.5)
        y = 0.3 * x @ weight + width**0.5 * torch.randn(samples, FEATURES)
        x, y = x.double(), y.double()
        ours, theirs = Ridge(ALPHAS).fit(x, y), RidgeCV(ALPHAS, alpha_per_target=True).fit(x.numpy(), y.numpy())
        torch.testing.assert_close(ours(x), torch.as_tensor(theirs.predict(x.numpy())), rtol=1e-6, atol=1e-6)
        where = f"{form}, {samples} x {width}, {FEATURES} targets"
        cases = {
            f"ridge, ours, {where}": lambda x=x, y=y: Ridge(ALPHAS).fit(x, y),
            f"ridge, scikit-learn, {where}": lambda x=x, y=y: RidgeCV(ALPHAS, alpha_per_target=True).fit(
                x.numpy(), y.numpy()
            ),
        }
        rows |= compare(cases, rounds=rounds)
    return rows


def stream(rounds: int, steps: int = 10) -> dict[str, dict[str, float]]:
    """Rows of ten steps of a stream, folded and whole; real time allows 25 ms a step."""
    codec, positions = model().eval(), torch.rand(SENSORS, 2)
    folded, whole = (StreamingDecoder(codec, None, 120, LENGTH, 60, 3, 0, positions) for _ in range(2))
    whole._folded = None
    samples = torch.randn(SENSORS, 3 * steps)
    for decoder in (folded, whole):
        decoder.push(torch.randn(SENSORS, LENGTH, generator=torch.Generator().manual_seed(0)))
    a, b = folded.push(samples)[-1].latents.retrieval, whole.push(samples)[-1].latents.retrieval
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    cases = {
        f"stream of {steps} steps, ours (real time: {25 * steps} ms)": lambda: folded.push(samples),
        f"stream of {steps} steps, the network called whole": lambda: whole.push(samples),
    }
    return compare(cases, rounds=rounds)


def multiply_adds() -> dict[str, float]:
    """Millions a window, by part."""
    front = SENSORS * 270 * LENGTH + 2 * 270 * 270 * LENGTH
    convs = (270 * 320 + 3 * 320 * 320) * 3 * LENGTH + 2 * 320 * 640 * 3 * LENGTH
    ends = 320 * 640 * LENGTH + 640 * 2048 * LENGTH
    return {"spatial": front / 1e6, "convolutions": convs / 1e6, "projection": ends / 1e6}


@torch.no_grad()
def _forward(run: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return run(*inputs)


def _step(codec: Codec, run: Callable[..., Tensor], *inputs: Any) -> None:
    run(*inputs).square().mean().backward()
    codec.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("network", "ridge", "stream"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: dict[str, dict[str, float]] = {}
    if arguments.only in (None, "network"):
        for batch in arguments.batch:
            rows |= network(batch, arguments.rounds)
    if arguments.only in (None, "ridge"):
        rows |= ridge(arguments.rounds)
    if arguments.only in (None, "stream"):
        rows |= stream(arguments.rounds)
    print(table(rows))
    print("million multiply-adds a window:", {name: round(count) for name, count in multiply_adds().items()})
    if not arguments.dry:
        print(record("meg_speed", rows, multiply_adds=multiply_adds()))


if __name__ == "__main__":
    main()
