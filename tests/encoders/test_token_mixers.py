"""Token mixers that are compared in one frame: of equal size, and only one of them mixes no places."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from isthmus.codec import build, spec_of
from isthmus.encoders.images.metamixer import MixerNet
from isthmus.encoders.images.token_mixers import mixer_network, token_mixer

NAMES = ("ffnified", "attention", "pooling", "depthwise", "identity", "hybrid")


@pytest.mark.parametrize("heads", [2, 4])
def test_merged_networks_have_the_same_size(heads: int) -> None:
    """Within the 5 % of the claim, and every mixer of its own within 7 % of FFNified attention."""
    sizes, parts = {}, {}
    for name in NAMES:
        model = MixerNet(token_mixer(name, heads, 4), num_classes=8).eval()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.constant_(norm.running_mean, 0.1)  # type: ignore[arg-type]
        model.reparameterize()
        sizes[name] = sum(p.numel() for p in model.parameters())
        mixers = [m for n, m in model.named_modules() if n.endswith("token_mixer.main")]
        parts[name] = [sum(p.numel() for p in m.parameters()) for m in mixers]
    assert max(sizes.values()) / min(sizes.values()) < 1.05
    for name in NAMES:
        assert all(abs(math.log(a / b)) < 0.07 for a, b in zip(parts[name], parts["ffnified"], strict=True))


def test_only_identity_mixes_no_places() -> None:
    for name in NAMES:
        part = token_mixer(name, 2, 2)(8, 1).eval()
        x = torch.zeros(1, 8, 9, 9)
        x[..., 4, 4] = torch.randn(8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            away = (part(x) - part(torch.zeros_like(x)))[0, :, 5, 4].abs().max()
        assert (float(away) > 1e-6) == (name != "identity"), name


def test_a_network_is_described_by_the_name_of_its_mixer() -> None:
    model = mixer_network("hybrid", (1, 1), (8, 16), heads=2, num_classes=3).eval()
    again = build(spec_of(model)).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(x), model(x))
