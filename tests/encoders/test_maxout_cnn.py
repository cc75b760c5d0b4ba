"""The number-reading convnets: published map sizes and counts, local weights, options of what the paper leaves open."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.encoders.images.maxout_cnn import ConvUnit, LocallyConnected, MaxoutCNN, Pool, SubtractMean, maxout


@pytest.mark.parametrize(
    ("ceil", "sides"), [(True, [27, 27, 14, 14, 7, 7, 4, 4]), (False, [27, 27, 13, 13, 6, 6, 3, 3])]
)
def test_maps_have_the_published_sides(ceil: bool, sides: list[int]) -> None:
    with torch.device("meta"):
        network, x, found = MaxoutCNN(ceil=ceil), torch.empty(1, 3, 54, 54), []
        for unit in network.features:
            x = unit(x)
            found.append(x.shape[-1])
        features = network(torch.empty(2, 3, 54, 54))
    assert found == sides
    assert features[0].shape == (2, 3072, 1, 1)


def test_local_weights_equal_a_convolution_where_all_places_share_them() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 5, padding=2)
    local = LocallyConnected(3, 4, (4, 6))
    with torch.no_grad():
        local.weight.copy_(conv.weight.flatten(1).expand(24, -1, -1))
        local.bias.copy_(conv.bias.expand(24, -1))
        x = torch.randn(2, 3, 4, 6)
        assert torch.allclose(local(x), conv(x), atol=1e-5)
        local.weight[0] = 0
        assert torch.equal(local(x)[:, :, 0, 0], conv.bias.expand(2, -1))
        assert torch.allclose(local(x)[:, :, 1:], conv(x)[:, :, 1:], atol=1e-5)


def test_maxout_takes_neighbouring_filters() -> None:
    x = torch.tensor([1.0, 5.0, 2.0, -3.0, -1.0, -2.0])[None, :, None, None]
    assert maxout(x, 3).flatten().tolist() == [5.0, -1.0]


def test_subtraction_has_two_borders_and_an_order() -> None:
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(SubtractMean("valid")(x), torch.zeros_like(x))
    assert SubtractMean("zero")(x)[0, 0, 0, 0] == pytest.approx(1 - 4 / 9)
    torch.manual_seed(0)
    late, early = ConvUnit(3, 4), ConvUnit(3, 4, subtract_first=True)
    early.load_state_dict(late.state_dict())
    images = torch.rand(1, 3, 8, 8)
    assert late(images).shape == early(images).shape
    assert not torch.allclose(late(images), early(images))
    assert Pool(1)(torch.full((1, 1, 3, 3), -2.0)).eq(-2).all(), "zeros do not win against negative values"


def test_every_image_loses_its_mean() -> None:
    network = MaxoutCNN(16, (4,), strides=(2,), local=0, dense=(8,), pieces=1).eval()
    images = torch.rand(2, 3, 16, 16)
    assert torch.allclose(network(images)[0], network(images + 0.25)[0], atol=1e-5)


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="every layer has a width and a stride"):
        MaxoutCNN(32, (4, 8), strides=(2,))
    with pytest.raises(ValueError, match="pooled away"):
        MaxoutCNN((1, 8), (4, 4), strides=(2, 2), ceil=False, local=0, dense=())
    with pytest.raises(ValueError, match=r"takes \(B, 3, 16, 16\)"):
        MaxoutCNN(16, (4,), strides=(2,), local=0)(torch.rand(1, 3, 20, 16))
    for wrong in ({"pieces": 0}, {"widths": (0,)}, {"dense": (-1,)}):
        with pytest.raises(ValueError, match=r"(pieces|widths|dense) is at least 1"):
            MaxoutCNN(**{"size": 16, "widths": (4,), "strides": (2,), **wrong})
    with pytest.raises(ValueError, match="odd"):
        MaxoutCNN(16, (4,), kernel=4, strides=(2,))
    with pytest.raises(ValueError, match="stride by 1 or 2"):
        Pool(3)
    with pytest.raises(ValueError, match="valid or zero"):
        SubtractMean("wrap")  # type: ignore[arg-type]
