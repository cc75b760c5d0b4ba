"""Probes: what each computes, what each is blind to, and the published names and initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.decoders.probes import (
    AlexNetProbe,
    AttentiveProbe,
    ConvProbe,
    LinearProbe,
    NonLinearProbe,
    PooledProbe,
    from_official,
)


def _maps(channels: int = 8, side: int = 6, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_linear_probe_reads_maps_tokens_and_vectors_alike() -> None:
    probe, maps = LinearProbe(8, 5).eval(), _maps()
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(probe([maps]), probe([tokens]))
    torch.testing.assert_close(probe([maps]), probe([maps.mean((2, 3))]))
    class_token = LinearProbe(8, 5, token=0).eval()
    torch.testing.assert_close(class_token([tokens]), class_token([tokens[:, :1]]))


def test_linear_probe_with_norm_does_not_care_for_the_scale_of_features() -> None:
    probe, maps = LinearProbe(8, 5), _maps()
    torch.testing.assert_close(probe([maps]), probe([1000 * maps + 7]), rtol=1e-3, atol=1e-4)
    assert not list(probe.norm.parameters()), "the norm has no parameters to fit"


def test_pooled_probe_takes_the_maximum_or_the_mean_of_each_grid_cell() -> None:
    maps = _maps(3, 4)
    for average, reduce in ((False, torch.amax), (True, torch.mean)):
        probe = PooledProbe(3, 5, grid=2, average=average).eval()
        cells = torch.stack(
            [reduce(maps[:, :, i : i + 2, j : j + 2], dim=(2, 3)) for i in (0, 2) for j in (0, 2)], dim=2
        )
        torch.testing.assert_close(probe([maps]), probe.fc((cells / (1 + 1e-5) ** 0.5).flatten(1)))


def test_conv_probe_is_blind_to_shifts_that_wrap_inside_but_non_linear_probe_is_not() -> None:
    """Global pooling forgets where; a linear layer on all cells does not."""
    maps = torch.zeros(2, 4, 9, 9)
    maps[:, :, 3:5, 3:5] = _maps(4, 2, 2)
    shifted = maps.roll((1, 2), dims=(2, 3))
    conv, mlp = ConvProbe(4, 5, width=8).eval(), NonLinearProbe(4 * 81, 5).eval()
    torch.testing.assert_close(conv([maps]), conv([shifted]))
    assert not torch.allclose(mlp([maps]), mlp([shifted]))


def test_non_linear_probe_is_20_wide_a_class_up_to_2048() -> None:
    assert NonLinearProbe(12, 10).fc.in_features == 200
    with torch.device("meta"):
        assert NonLinearProbe(12, 1000).fc.in_features == 2048


def test_alexnet_probe_takes_conv4_and_conv5() -> None:
    maps = _maps(6, 13)
    for conv in (False, True):
        probe = AlexNetProbe(6, 5, conv=conv, width=16).eval()
        assert probe.mlp[0].in_features == 6 * 36
        assert probe([maps]).shape == (4, 5)
        assert isinstance(probe.conv, nn.Identity) is not conv


def test_attentive_probe_does_not_care_for_the_order_of_tokens_but_for_the_tokens() -> None:
    torch.manual_seed(0)
    probe, tokens = AttentiveProbe(8, 5, num_heads=2).eval(), _maps().flatten(2).transpose(1, 2)
    for parameter in probe.parameters():
        nn.init.normal_(parameter)
    shuffled = tokens[:, torch.randperm(tokens.shape[1])]
    torch.testing.assert_close(probe([tokens]), probe([shuffled]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(probe([tokens]), probe([tokens[:, :3]]))
    with pytest.raises(ValueError, match="3 does not divide 8"):
        AttentiveProbe(8, 5, num_heads=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearProbe(8, 3, level=1),
        lambda: PooledProbe(8, 3, grid=2, level=1),
        lambda: NonLinearProbe(8 * 36, 3, level=1),
        lambda: ConvProbe(8, 3, width=8, level=1),
        lambda: AlexNetProbe(8, 3, side=6, width=8, level=1),
        lambda: AttentiveProbe(8, 3, num_heads=2, level=1),
    ],
    ids=["linear", "pooled", "non-linear", "conv", "alexnet", "attentive"],
)
def test_every_probe_reads_its_level_and_learns_separable_features(make) -> None:
    """Three classes told apart by which channel is bright, which every probe must find."""
    torch.manual_seed(0)
    label = torch.arange(24) % 3
    maps = 0.3 * torch.randn(24, 8, 6, 6)
    maps[torch.arange(24), label] += 1.5
    decoy = torch.randn(24, 5, 12, 12)
    probe = make()
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(probe([decoy, maps, decoy]), label).backward()
        optimizer.step()
    assert (probe.eval()([decoy, maps, decoy]).argmax(1) == label).float().mean() > 0.95


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    probe = NonLinearProbe(2000, 10)
    assert probe.mlp[0].weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.02)
    assert probe.fc.weight.std().item() == pytest.approx((2 / 10) ** 0.5, rel=0.1)
    assert not probe.fc.bias.any()
    conv = ConvProbe(192, 10).block[0].conv.weight
    assert conv.std().item() == pytest.approx((2 / (192 * 9)) ** 0.5, rel=0.02)


def test_published_names_of_all_heads_load_without_batch_counts() -> None:
    """The spelling, ``Liniear``, is theirs."""
    multilayer = {
        "mlp.0": "Liniear_1",
        "mlp.1": "BatchNorm_1",
        "mlp.3": "Liniear_2",
        "mlp.4": "BatchNorm2d",
        "fc": "Liniear_F",
    }
    alexnet = {
        "conv.conv": "ConvB5.0",
        "conv.bn": "ConvB5.1",
        "mlp.0": "Linear1",
        "mlp.1": "BatchNorm1",
        "mlp.3": "Liniear2",
        "mlp.4": "BatchNorm2",
        "fc": "LinearF",
    }
    for probe, names in ((NonLinearProbe(12, 3), multilayer), (AlexNetProbe(4, 3, conv=True, width=8), alexnet)):
        state = probe.state_dict()
        official = {}
        for name, tensor in state.items():
            prefix, field = name.rsplit(".", 1)
            if field != "num_batches_tracked":
                official[f"classifier.{names[prefix]}.{field}"] = tensor
        ours = from_official(official)
        assert ours.keys() == state.keys()
        assert all(torch.equal(ours[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="no parameter"):
        from_official({"classifier.other.weight": torch.zeros(1)})
