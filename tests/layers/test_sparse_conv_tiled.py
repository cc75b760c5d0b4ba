"""Tiles against masked-dense: values, gradients and running statistics, for every way a convolution can take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.layers.sparse_conv import SparseContext, run_sparse, sparse_features

VISIBLE = torch.tensor(
    [[[1, 0, 1], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[1, 1, 1], [0, 1, 0], [0, 0, 1]]]
).bool()  # a different number in every image


def both(net: nn.Module, x: torch.Tensor, visible: torch.Tensor = VISIBLE) -> list[dict[str, torch.Tensor]]:
    """Values, gradients and buffers of the two modes, from the same start."""
    results = []
    start = {name: value.clone() for name, value in net.state_dict().items()}
    for mode in ("masked", "tiled"):
        net.load_state_dict(start)
        net.zero_grad()
        image = x.clone().requires_grad_()
        torch.manual_seed(0)
        outputs = sparse_features(net, image, visible, mode)
        generator = torch.Generator().manual_seed(1)
        loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        result = {f"output {k}": o.detach() for k, o in enumerate(outputs)}
        result |= {f"gradient of {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        result |= {name: b.clone() for name, b in net.named_buffers()}
        assert image.grad is not None
        result["gradient of the image"] = image.grad
        results.append(result)
    assert results[0].keys() == results[1].keys()
    return results


def same(net: nn.Module, x: torch.Tensor, tolerance: float = 1e-10) -> None:
    masked, tiled = both(net, x)
    for name, value in masked.items():
        scale = max(float(value.abs().max()), 1.0)  # some gradients are zero but for rounding
        torch.testing.assert_close(
            tiled[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


CONVOLUTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    # name: (pixels a cell, options); 8 and 4 take windows, 2 and 1 take taps, depthwise ones the canvas below 8
    "3x3 on large tiles": (8, {"kernel_size": 3, "padding": 1}),
    "3x3 on small tiles": (2, {"kernel_size": 3, "padding": 1}),
    "3x3 on single pixels": (1, {"kernel_size": 3, "padding": 1}),
    "7x7 reaches over several cells": (1, {"kernel_size": 7, "padding": 3}),
    "3x3 stride 2": (8, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "3x3 stride 2 to single pixels": (2, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "7x7 stride 2": (8, {"kernel_size": 7, "stride": 2, "padding": 3}),
    "1x1": (4, {"kernel_size": 1}),
    "1x1 stride 2": (4, {"kernel_size": 1, "stride": 2}),
    "patches": (4, {"kernel_size": 2, "stride": 2}),
    "patches in groups": (4, {"kernel_size": 2, "stride": 2, "groups": 2}),
    "without bias": (4, {"kernel_size": 3, "padding": 1, "bias": False}),
    "even kernel, same": (4, {"kernel_size": 4, "padding": "same"}),
    "dilated": (4, {"kernel_size": 3, "padding": 2, "dilation": 2}),
    "dilated taps": (1, {"kernel_size": 3, "padding": 2, "dilation": 2}),
    "groups on large tiles": (8, {"kernel_size": 3, "padding": 1, "groups": 2}),
    "groups on small tiles": (2, {"kernel_size": 3, "padding": 1, "groups": 2}),
    "depthwise on large tiles": (8, {"kernel_size": 7, "padding": 3, "groups": 4}),
    "depthwise on small tiles": (2, {"kernel_size": 7, "padding": 3, "groups": 4}),
    "depthwise, even, same": (2, {"kernel_size": 4, "padding": "same", "groups": 4}),
    "depthwise, dilated": (4, {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4}),
    "depthwise stride 2": (8, {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 4}),
    "a strip": (4, {"kernel_size": (1, 5), "padding": (0, 2)}),
    "stride 3": (6, {"kernel_size": 5, "stride": 3, "padding": 1}),
    "unpadded": (4, {"kernel_size": 3}),
    "wider padding": (4, {"kernel_size": 3, "padding": 2}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution(name: str, channels_last: bool) -> None:
    cell, options = CONVOLUTIONS[name]
    torch.manual_seed(0)
    if options.get("padding") == "same" and options["kernel_size"] == 4:
        options = {**options, "padding": 0}
        pad: nn.Module = nn.ZeroPad2d((1, 2, 1, 2))
    else:
        pad = nn.Identity()
    net = nn.Sequential(pad, nn.Conv2d(4, 4, **options)).double()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    same(net, torch.randn(3, 4, 3 * cell, 3 * cell, dtype=torch.float64))


POOLS = [
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), float("-inf")), nn.MaxPool2d(3, 2)),
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    nn.AvgPool2d(2),
    nn.Upsample(scale_factor=2, mode="nearest"),
    nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.AdaptiveAvgPool2d(3),
    nn.PixelUnshuffle(2),
]


@pytest.mark.parametrize("pool", POOLS, ids=[str(k) for k in range(len(POOLS))])
def test_pool(pool: nn.Module) -> None:
    same(nn.Sequential(nn.Conv2d(2, 3, 1), pool).double(), torch.randn(3, 2, 24, 24, dtype=torch.float64))


class SqueezeExcite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid() + x.amax((2, 3), keepdim=True)


class ChannelAttention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.adaptive_avg_pool2d(x, 1).view(x.shape[0], 1, -1)
        return x * F.conv1d(y, y.new_ones(1, 1, 3), padding=1).view(x.shape[0], -1, 1, 1).expand_as(x)


class SpatialAttention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(F.conv2d(pooled, pooled.new_ones(1, 2, 3, 3), padding=1))


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.norm(x.permute(0, 2, 3, 1)))
        y = y + y * (y.norm(2, (1, 2), keepdim=True) / y.std((1, 2), keepdim=True))
        return y.permute(0, 3, 1, 2).contiguous()


class Groups(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        y = x.reshape(batch, 2, channels // 2, height, width)
        weight = y.sum(1).mean((2, 3)).view(batch, 1, -1, 1, 1)
        first, second = torch.chunk((y * weight).transpose(1, 2).flatten(1, 2), 2, dim=1)
        first = first + 1
        return torch.cat(
            [first[:, ::2], second, torch.stack([first, second], 1).sum(1), (first * first + 0.1).sqrt()], 1
        )


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y += x
        y.mul_(0.5).relu_()
        return F.hardsigmoid(F.silu(y - x, inplace=True), inplace=True)


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.PReLU(4), SqueezeExcite(),
        ChannelAttention(), SpatialAttention(), ChannelsLast(), Groups(), InPlace(),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_module(module: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), module).double()
    same(net, torch.randn(3, 3, 12, 24, dtype=torch.float64))


def test_statistics_are_those_of_visible_pixels_only() -> None:
    """Group norm and squeeze-excite of an image equal those of its visible pixels laid out as an image of their own."""
    torch.manual_seed(0)
    visible = torch.tensor([[[True, False], [False, True]]])
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    seen = torch.cat([x[:, :, :2, :2], x[:, :, 2:, 2:]], 3)
    for module in (nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), SqueezeExcite()):
        (ours,) = sparse_features(module.double(), x, visible)
        theirs = module(seen)
        torch.testing.assert_close(torch.cat([ours[:, :, :2, :2], ours[:, :, 2:, 2:]], 3), theirs)


def test_an_image_of_which_nothing_is_visible_is_legal() -> None:
    visible = VISIBLE.clone()
    visible[1] = False
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), SqueezeExcite(), nn.GroupNorm(2, 4)).double()
    masked, tiled = both(net, torch.randn(3, 3, 12, 12, dtype=torch.float64), visible)
    for name, value in masked.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(tiled[name], value, rtol=0, atol=1e-10)
    assert not tiled["output 0"][1].any()


def test_maps_without_tiles_come_back_to_tiles() -> None:
    """An unpadded stem makes maps of odd size, which have no tiles; once sizes divide again, tiles go on."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 2), nn.Conv2d(4, 4, 3, 1, 1)).double()
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    same(net, x)
    context = SparseContext(VISIBLE, "tiled")
    (out,) = run_sparse(net, x, context)
    assert out.tiled
    assert context.work["tiles"] == 3 * 12 * 12 * net[3].weight.numel()  # the last convolution


def test_hidden_cells_are_not_computed() -> None:
    """Tiles hold exactly the visible cells at every stage, through an unmodified network."""
    seen: list[tuple[int, ...]] = []

    class Spy(nn.Module):
        def forward(self, x: Any) -> Any:
            seen.append(tuple(x.values.shape))
            return x

    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Spy(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, 2, 1), nn.ReLU(), Spy())
    run_sparse(net, torch.randn(3, 3, 24, 24), SparseContext(VISIBLE, "tiled"))
    count = int(VISIBLE.sum())
    assert seen == [(count, 8, 4, 4), (count, 4, 2, 2)]


def test_a_whole_resnet_in_single_precision() -> None:
    from timm.models.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    net = ResNet(
        Bottleneck, [1, 1, 1, 1], channels=(8, 12, 16, 24), num_classes=0, global_pool="", zero_init_last=False
    )
    same(net, torch.randn(3, 3, 96, 96), 1e-4)
    same(net.double(), torch.randn(3, 3, 96, 96, dtype=torch.float64))
