"""The sparse operators against the published ones, and the properties that make them sparse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from isthmus.codec import UserError
from isthmus.layers.sparse_conv import (
    sparse_avg_pool2d,
    sparse_batch_norm,
    sparse_conv2d,
    sparse_features,
    sparse_layer_norm,
    sparse_max_pool2d,
    upsample_mask,
)
from tests.conftest import shared

MODES = ["masked", "tiled"]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(shared("parity/01-spark/sparse_layers.safetensors"))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max()))


class TestPublishedLayers:
    """Golden tensors of the official code."""

    def visible(self, golden: dict[str, torch.Tensor]) -> torch.Tensor:
        return golden["in/active"][:, 0].bool()

    @pytest.mark.parametrize(
        ("name", "options"), [("conv", {"padding": 1}), ("conv_s2_g2", {"stride": 2, "padding": 2, "groups": 2})]
    )
    @pytest.mark.parametrize("mode", MODES)
    def test_convolution(self, golden: dict, name: str, options: dict, mode: str) -> None:
        visible = self.visible(golden)
        x = golden["in/x"] * upsample_mask(visible, (24, 24))
        weight, bias = golden[f"param/{name}.weight"], golden[f"param/{name}.bias"]
        close(sparse_conv2d(x, visible, weight, bias, mode=mode, **options), golden[f"out/{name}"])

    def test_convolution_reads_the_map_as_it_is(self, golden: dict) -> None:
        weight, bias = golden["param/conv.weight"], golden["param/conv.bias"]
        ours = sparse_conv2d(golden["in/x"], self.visible(golden), weight, bias, padding=1)
        close(ours, golden["out/conv_dense_input"])

    @pytest.mark.parametrize("mode", MODES)
    def test_pools(self, golden: dict, mode: str) -> None:
        visible = self.visible(golden)
        x = golden["in/x"] * upsample_mask(visible, (24, 24))
        close(sparse_max_pool2d(x, visible, 3, stride=2, padding=1, mode=mode), golden["out/maxpool"])
        close(sparse_avg_pool2d(x, visible, 2, stride=2, mode=mode), golden["out/avgpool2"])
        close(sparse_avg_pool2d(x, visible, 3, stride=2, padding=1, mode=mode), golden["out/avgpool3_pad1"])

    @pytest.mark.parametrize("mode", MODES)
    def test_batch_norm_and_its_statistics(self, golden: dict, mode: str) -> None:
        visible = self.visible(golden)
        mean, var = golden["param/bn.running_mean"].clone(), golden["param/bn.running_var"].clone()
        affine = {"weight": golden["param/bn.weight"], "bias": golden["param/bn.bias"], "mode": mode}
        close(sparse_batch_norm(golden["in/x"], visible, mean, var, training=True, **affine), golden["out/bn_train"])
        close(mean, golden["out/bn_running_mean_after"])
        close(var, golden["out/bn_running_var_after"])
        close(sparse_batch_norm(golden["in/x"], visible, mean, var, **affine), golden["out/bn_eval"])

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", ["ln_first", "ln_last"])
    def test_layer_norm(self, golden: dict, name: str, mode: str) -> None:
        ours = sparse_layer_norm(
            golden["in/x"],
            self.visible(golden),
            golden[f"param/{name}.weight"],
            golden[f"param/{name}.bias"],
            mode=mode,
        )
        close(ours, golden[f"out/{name}"])

    @pytest.mark.parametrize("mode", MODES)
    def test_convnext_block(self, golden: dict, mode: str) -> None:
        """timm's own block, untouched, with the official weights."""
        from timm.models.convnext import ConvNeXtBlock

        block = ConvNeXtBlock(6, 6, kernel_size=7, conv_mlp=False)
        names = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
        state = {"gamma": golden["param/block.gamma"]}
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                state[f"{ours}.{kind}"] = golden[f"param/block.{theirs}.{kind}"]
        block.load_state_dict(state)
        (ours,) = sparse_features(block, golden["in/x"], self.visible(golden), mode)
        close(ours, golden["out/convnext_block"])


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 5, 1, 2),
    )


@pytest.mark.parametrize("mode", MODES)
class TestProperties:
    def test_hidden_pixels_do_not_matter_and_come_out_zero(self, mode: str) -> None:
        net, x = small_net(), torch.randn(2, 3, 32, 48)
        visible = torch.tensor([[[1, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]]).bool()
        hidden = ~upsample_mask(visible, (32, 48))
        other = torch.where(hidden, torch.full_like(x, float("inf")), x)
        (first,), (second,) = sparse_features(net, x, visible, mode), sparse_features(net, other, visible, mode)
        assert torch.equal(first, second)
        assert not first[~upsample_mask(visible, (8, 12)).expand_as(first)].any()

    def test_all_visible_is_the_plain_network(self, mode: str) -> None:
        net, x = small_net().eval(), torch.randn(2, 3, 32, 48)
        (ours,) = sparse_features(net, x, torch.ones(2, 2, 3, dtype=torch.bool), mode)
        close(ours, net(x), 1e-6)

    def test_an_operation_without_a_sparse_form_is_refused_with_its_module(self, mode: str) -> None:
        class Attention(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                tokens = x.flatten(2)
                return (tokens.transpose(1, 2) @ tokens).softmax(-1)

        net = nn.Sequential(small_net(), nn.Sequential(Attention()))
        with pytest.raises(UserError, match=r"flatten.*'1\.0' \(Attention\)"):
            sparse_features(net, torch.randn(2, 3, 32, 32), torch.ones(2, 2, 2, dtype=torch.bool), mode)


def test_masks_are_nearest() -> None:
    visible = torch.tensor([[[True, False, True]]])
    assert upsample_mask(visible, (2, 6)).int().tolist() == [[[[1, 1, 0, 0, 1, 1]] * 2]]
    mask = upsample_mask(visible, (1, 5)).float()
    assert torch.equal(mask, F.interpolate(visible[:, None].float(), (1, 5), mode="nearest"))
    with pytest.raises(UserError, match="smaller than"):
        upsample_mask(visible, (1, 2))
