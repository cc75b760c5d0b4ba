"""Decode while the recording goes on: samples come in as they arrive, latents go out at every stride.

The convolutions look both ways inside their window, so a latent for a moment exists when the window that begins before
it has ended; what comes on top is the computing time, which every step tells (Benchetrit, Banville, King, arXiv
2310.19812, "toward real-time"). Three lines::

    decoder = StreamingDecoder(codec, scale, rate=120, length=181, before=60)
    for samples in amplifier:                    # (C, n), any n
        for step in decoder.push(samples): print(step.time, step.latents.retrieval, step.milliseconds)
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isthmus.codec import PassThrough
from isthmus.decoders.latent_heads import TimeLinear


class Step(NamedTuple):
    """One decoded window.

    Attributes:
        time: seconds from the first sample ever pushed to the last of this window.
        latents: what the codec predicts, of one sample.
        milliseconds: computing time of this step.
        waiting: samples that arrived with this push after the window's end, as seconds.
        latency: seconds from the end of the window's baseline, the moment that is decoded, until this answer.
    """

    time: float
    latents: Any
    milliseconds: float
    waiting: float
    latency: float


class StreamingDecoder:
    """A ring buffer over the newest samples, decoded every ``stride`` samples.

    Each window is treated as in training: the mean of its first ``before`` samples, all of which lie in the past, is
    its baseline; then it is scaled and decoded. A window that begins ``before`` samples ahead of an onset gives the
    very numbers that an epoch cut around that onset gives.

    Args:
        codec: encoder and heads in evaluation mode. Where the encoder can be folded (:class:`MEGConv`), attention, 1x1
            convolutions and subject layer become one matrix.
        scale: maps ``(signal, subject)`` to the scaled signal, or ``None``.
        rate: samples a second.
        length: T of a window.
        before: samples of its baseline; 0 takes none away.
        stride: samples between two steps.
        subject: who is recorded; -1 for somebody unknown, if the encoder knows such.
        positions: ``(C, 2)``; the encoder's own layout where left out.

    Raises:
        ValueError: impossible sizes; samples of another number of channels, or not finite.
    """

    def __init__(
        self,
        codec: Any,
        scale: nn.Module | None,
        rate: float,
        length: int,
        before: int = 0,
        stride: int = 1,
        subject: int = 0,
        positions: Tensor | None = None,
    ) -> None:
        if rate <= 0 or length < 1 or stride < 1 or not 0 <= before < length:
            raise ValueError(
                f"rate, length and stride must be above 0 and before less than length; got {rate}, {length}, {stride}, "
                f"{before}."
            )
        self.codec, self.scale = codec.eval(), scale
        self.rate, self.length, self.before, self.stride = rate, length, before, stride
        self.subject = torch.tensor([subject])
        self.positions = positions
        self._folded: tuple[Tensor, Tensor] | None = None
        if hasattr(codec.encoder, "fold"):
            try:
                self._folded = codec.encoder.fold(positions, subject)
            except ValueError:
                self._folded = None
        # With nothing between them, the sum over time goes before the encoder's last and widest product.
        aggregation = getattr(codec.decoder, "aggregation", None)
        straight = isinstance(codec.bottleneck, PassThrough) and isinstance(aggregation, TimeLinear)
        self._over_time: TimeLinear | None = aggregation if straight else None
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._ring: Tensor | None = None  # (C, 2 T): written twice, so that every window lies in one piece
        self.seen = 0

    @torch.no_grad()
    def push(self, samples: Tensor) -> list[Step]:
        """New samples ``(C, n)`` → the steps that have become due, oldest first."""
        if samples.ndim != 2 or (self._ring is not None and len(samples) != len(self._ring)):
            had = "C" if self._ring is None else len(self._ring)
            raise ValueError(f"samples must be ({had}, n), got {tuple(samples.shape)}.")
        if not bool(torch.isfinite(samples).all()):
            raise ValueError(f"samples after {self.seen / self.rate:.3f} s have NaN or infinite values; skip those.")
        if self._ring is None:
            self._ring = samples.new_zeros(len(samples), 2 * self.length)
        steps, done, count = [], 0, samples.shape[1]
        while done < count:
            due = (
                self.length
                if self.seen < self.length
                else self.seen + self.stride - (self.seen - self.length) % self.stride
            )
            take = min(count - done, due - self.seen)
            self._write(samples[:, done : done + take])
            done += take
            if self.seen == due:
                steps.append(self._step((count - done) / self.rate))
        return steps

    def _write(self, samples: Tensor) -> None:
        assert self._ring is not None
        newest = samples[:, -self.length :]
        places = (self.seen + samples.shape[1] - newest.shape[1] + torch.arange(newest.shape[1])) % self.length
        self._ring[:, places] = newest
        self._ring[:, places + self.length] = newest
        self.seen += samples.shape[1]

    def _step(self, waiting: float) -> Step:
        assert self._ring is not None
        begun = time.perf_counter()
        first = self.seen % self.length
        window = self._ring[None, :, first : first + self.length]
        if self.before:
            window = window - window[..., : self.before].mean(-1, keepdim=True)
        if self.scale is not None:
            window = self.scale(window, self.subject)
        latents = self._decode(window)
        spent = time.perf_counter() - begun
        after = (self.length - self.before) / self.rate
        return Step(self.seen / self.rate, latents, 1000 * spent, waiting, after + waiting + spent)

    def _decode(self, window: Tensor) -> Any:
        if self._folded is None:
            condition = {"subject": self.subject, **({} if self.positions is None else {"positions": self.positions})}
            return self.codec(window, condition).prediction
        weight, bias = self._folded
        x = weight @ window + bias[:, None]
        if self._over_time is not None:
            summary = self.codec.encoder.summary(x, self.subject, self._over_time.weight[0], self._over_time.bias)
            return self.codec.decoder.of(summary)
        return self.codec.decode(self.codec.bottleneck([self.codec.encoder.temporal(x, self.subject).mT]))
