"""Every encoder with every part that should take it, at tiny scale: works, or refuses with a reason.

``python -m tests.crossing`` writes the table to results/crossing.json and results/crossing.md; tests/test_crossing.py
keeps it true. A crossing makes the part for the encoder, runs it forwards, and trains or uses it for one step.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bottlenecks.key_value import KeyValueBottleneck
from isthmus.bottlenecks.latent_quantization import LatentQuantization
from isthmus.bottlenecks.splitters import RandomProjection
from isthmus.codec import Codec, write_atomically
from isthmus.decoders.digit_sequence import DigitSequence, negative_log_likelihood, read
from isthmus.decoders.ffnet_head import FFNetHead
from isthmus.decoders.voting import Vote
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.as_image import AsImage, AudioImage
from isthmus.encoders.signals.meg_conv import MEGConv
from isthmus.layers.pool import GlobalMean
from isthmus.lenses.linear_scope import LinearScope
from isthmus.lenses.relevance import relevance
from isthmus.robustness.crop_selection import CropSelection

RESULTS = Path(__file__).resolve().parent.parent / "results"
CLASSES = 4

Make = Callable[[], tuple[nn.Module, Tensor]]
Cross = Callable[[Any, Tensor], None]


def _image() -> Tensor:
    return torch.rand(2, 3, 64, 64)


class _OnePerson(nn.Module):
    """A brain encoder that needs no condition: one person, sensors where the layout says."""

    def __init__(self) -> None:
        super().__init__()
        layout = [[0.1 * i, 0.9 - 0.1 * i] for i in range(8)]
        sizes = {"attention": 6, "position_dim": 32, "mix": 6, "hidden": 8, "depth": 2, "attention_dropout": 0.0}
        self.encoder = MEGConv(out_channels=8, layout=layout, subject_layer=None, **sizes)
        self.feature_info = self.encoder.feature_info

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.encoder(x, {})


ENCODERS: dict[str, Make] = {
    "unireplknet (ours)": lambda: (
        Backbone("unireplknet_a", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        _image(),
    ),
    "hornet (ours)": lambda: (
        Backbone("hornet_tiny_7x7", depths=(1, 1, 1, 1), dims=(32, 32, 64, 64)),
        _image(),
    ),
    "transnext (ours)": lambda: (
        Backbone(
            "transnext_micro", embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), pretrain_size=64
        ),
        _image(),
    ),
    "resnet (timm)": lambda: (Backbone("resnet10t"), _image()),
    "convnext (timm)": lambda: (Backbone("convnext_atto", depths=(1, 1, 1, 1)), _image()),
    "vit (timm)": lambda: (Backbone("vit_tiny_patch16_224", depth=2, embed_dim=48, img_size=64), _image()),
    "sound as image": lambda: (
        AsImage(
            AudioImage(8000, 32, 32), Backbone("unireplknet_a", in_chans=1, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
        ),
        torch.randn(2, 4000),
    ),
    "brain signals": lambda: (_OnePerson(), torch.randn(2, 8, 30)),
}


# ---------------------------------------------------------------------------------------------------------- crossings


def _key_value(encoder: Any, x: Tensor) -> None:
    """Keys are placed on the features, the vote is trained for a step, predictions come out."""
    width = encoder.feature_info[-1].channels
    bottleneck = KeyValueBottleneck(RandomProjection(width, 4, 3), 8, CLASSES)
    with torch.no_grad():
        bottleneck.fit_keys([encoder(x)])
    bottleneck.freeze_keys()
    codec = Codec(encoder.requires_grad_(False), bottleneck, Vote(4)).train()
    out = codec(x)
    F.cross_entropy(out.prediction, torch.zeros(len(x), dtype=torch.int64)).backward()
    assert bottleneck.values.grad is not None
    assert bottleneck.values.grad.abs().sum() > 0
    assert out.code.indices is not None
    assert out.prediction.shape == (len(x), CLASSES)


def _latents(encoder: Any, x: Tensor) -> None:
    """Six quantised latents; their tables and the encoder learn for a step."""
    bottleneck = LatentQuantization(6, 5, channels=encoder.feature_info[-1].channels)
    codec = Codec(encoder, bottleneck, DigitSequence(6, max_digits=1, grid=1)).train()
    out = codec(x)
    (out.prediction.digits.logsumexp(2).sum() + out.code.loss).backward()
    assert out.code.indices is not None
    assert out.code.indices.shape == (len(x), 6)
    assert bottleneck.tables.grad is not None
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def _segmentation(encoder: Any, x: Tensor) -> None:
    """Logits at the finest level, and a training step."""
    head = FFNetHead([level.channels for level in encoder.feature_info], CLASSES, divisor=16)
    logits = Codec(encoder, decoder=head).train()(x).prediction
    F.cross_entropy(logits, torch.zeros(len(x), *logits.shape[2:], dtype=torch.int64)).backward()
    assert logits.shape[:2] == (len(x), CLASSES)
    assert all(p.grad is not None for p in head.last.parameters())


def _street_numbers(encoder: Any, x: Tensor) -> None:
    """A number is read, and its likelihood trained for a step."""
    decoder = DigitSequence(encoder.feature_info[-1].channels, max_digits=2, grid=2)
    scores = Codec(encoder, decoder=decoder).train()(x).prediction
    length, digits = torch.ones(len(x), dtype=torch.int64), torch.zeros(len(x), 2, dtype=torch.int64)
    negative_log_likelihood(scores, length, digits).mean().backward()
    assert all(text is None or text.isdigit() or text == "" for text in read(scores).strings())


def _linear_scope(encoder: Any, x: Tensor) -> None:
    """F x + r is the output; gates are frozen where there are any."""
    model = nn.Sequential(encoder, GlobalMean()).eval()
    scope = LinearScope(model, x[:1], gates="freeze", tolerance=1e-4)
    assert scope.contribution(0).shape == x.shape[1:]


def _relevance(encoder: Any, x: Tensor) -> None:
    """Every layer gets its share of one unit, and the input too."""
    model = nn.Sequential(encoder, GlobalMean()).eval()
    found = relevance(model, x[:1], target=0, reduce=lambda _, each: each.flatten(1).sum(1))
    assert len(found) > 1
    assert found.input.shape == x[:1].shape
    assert all(torch.isfinite(each).all() for each in found.values())


def _crop_selection(encoder: Any, x: Tensor) -> None:
    """Shifted views that choose the same crop give the same features."""
    robust = CropSelection(encoder, 48, size=64, cyclic=True).eval()
    with torch.no_grad():
        for a, b in zip(robust(x), robust(x.roll((3, 5), (2, 3))), strict=True):
            assert torch.equal(a, b)


PARTS: dict[str, Cross] = {
    "key-value bottleneck": _key_value,
    "latent quantisation": _latents,
    "segmentation head": _segmentation,
    "street-number head": _street_numbers,
    "linear interpreter": _linear_scope,
    "relevance": _relevance,
    "crop selection": _crop_selection,
}


def cross(encoder: str, part: str) -> str:
    """``works``, or the reason for which the part refuses the encoder."""
    torch.manual_seed(0)
    made, x = ENCODERS[encoder]()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PARTS[part](made, x)
    except ValueError as error:
        return str(error)
    return "works"


def main() -> None:
    found = {part: {encoder: cross(encoder, part) for encoder in ENCODERS} for part in PARTS}
    write_atomically(RESULTS / "crossing.json", (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    reasons: list[str] = []
    lines = ["# Encoders × parts", "", "Written by `python -m tests.crossing`; `tests/test_crossing.py` keeps it.", ""]
    lines += ["| | " + " | ".join(ENCODERS) + " |", "|-" * (len(ENCODERS) + 1) + "|"]
    for part, row in found.items():
        cells = []
        for told in row.values():
            if told != "works" and told not in reasons:
                reasons.append(told)
            cells.append("works" if told == "works" else f"refuses ({reasons.index(told) + 1})")
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))]
    text = "\n".join(lines) + "\n"
    write_atomically(RESULTS / "crossing.md", text.encode())
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
