"""TransNeXt beside the published mathematics written down plainly, with windows copied out by ``unfold``.

``python -m benchmarks.transnext_speed`` times a forward pass and a training step with the same weights, after checking
that the same numbers come out, beside timm's ConvNeXt-T and ResNet-50; and aggregated attention alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from benchmarks.transcription import Case, Settings, familiar, run, warmed
from isthmus.encoders.images.aggregated_attention import AggregatedAttention, Grid
from isthmus.encoders.images.transnext import TransNeXt
from isthmus.layers.neighbourhood import visible_neighbours


class PlainBias(nn.Module):
    """The bias of every distinct pair of coordinate differences, then looked up for every query and key.

    The coordinates of a size are computed once, as the published code does when it makes the network.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 512), nn.Linear(512, heads)
        self.coordinates = functools.lru_cache(self._coordinates)

    def forward(self, size: tuple[int, int], keys: tuple[int, int], side: int) -> Tensor:
        distinct, of = self.coordinates(size, keys, side)
        return self.fc2(F.relu(self.fc1(distinct))).t()[:, of]

    def _coordinates(self, size: tuple[int, int], keys: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
        axes = [torch.arange(n, dtype=torch.float32, device=self.fc1.weight.device) for n in size]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        centres = F.adaptive_avg_pool2d(places.permute(2, 0, 1)[None], keys)[0].permute(1, 2, 0)
        delta = (places.view(-1, 1, 2) - centres.view(1, -1, 2)) * 8 / (side - 1)
        delta = delta.sign() * delta.abs().add(1).log2() / math.log2(8)
        distinct, of = delta.reshape(-1, 2).unique(dim=0, return_inverse=True)
        return distinct, of.view(size[0] * size[1], -1)


class PlainAggregated(nn.Module):
    """Aggregated attention on ``(B, N, C)``: k·k copies of keys and values, in the published layout of names."""

    def __init__(self, dim: int, heads: int, ratio: int, side: int, window: int = 3) -> None:
        super().__init__()
        self.heads, self.ratio, self.side, self.window = heads, ratio, side, window
        head, cells = dim // heads, window * window
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.query_embedding = nn.Parameter(torch.zeros(heads, 1, head))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr, self.norm, self.cpb = nn.Conv2d(dim, dim, 1), nn.LayerNorm(dim), PlainBias(heads)
        self.local_bias = nn.Parameter(torch.zeros(heads, cells))
        self.learnable_tokens = nn.Parameter(torch.zeros(heads, head, cells))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, cells))

    def windows(self, x: Tensor, height: int, width: int) -> Tensor:
        """``(B, N, C)`` → ``(B, h, N, d, k·k)``."""
        b, n, c = x.shape
        copies = F.unfold(x.transpose(1, 2).reshape(b, c, height, width), self.window, padding=self.window // 2)
        return copies.view(b, self.heads, c // self.heads, -1, n).permute(0, 1, 4, 2, 3)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        b, n, c = x.shape
        keys = (height // self.ratio, width // self.ratio)
        ones = torch.ones(1, 1, height, width, device=x.device)
        inside = F.unfold(ones, self.window, padding=self.window // 2)[0].t() > 0  # (N, k·k)
        count = inside.sum(1) + keys[0] * keys[1]
        heads = lambda t: t.view(b, -1, self.heads, c // self.heads).transpose(1, 2)  # noqa: E731
        q = F.normalize(heads(self.q(x)), dim=-1)
        scaled = (q + self.query_embedding) * F.softplus(self.temperature) * count.log()[:, None]
        k, v = self.kv(x).chunk(2, -1)
        k = F.normalize(heads(k), dim=-1).transpose(1, 2).reshape(b, n, c)
        local = (scaled.unsqueeze(-2) @ self.windows(k, height, width)).squeeze(-2) + self.local_bias[:, None]
        local = local.masked_fill(~inside, -math.inf)
        pooled = F.gelu(self.sr(x.transpose(1, 2).reshape(b, c, height, width)))
        pooled = self.norm(F.adaptive_avg_pool2d(pooled, keys).flatten(2).transpose(1, 2))
        coarse_k, coarse_v = self.kv(pooled).chunk(2, -1)
        coarse = scaled @ F.normalize(heads(coarse_k), dim=-1).transpose(-2, -1)
        coarse = coarse + self.cpb((height, width), keys, self.side)
        a = torch.cat([local, coarse], -1).softmax(-1)
        local, coarse = a.split([self.window**2, keys[0] * keys[1]], -1)
        weights = q @ self.learnable_tokens + self.learnable_bias + local
        y = (weights.unsqueeze(-2) @ self.windows(v, height, width).transpose(-2, -1)).squeeze(-2)
        y = y + coarse @ heads(coarse_v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class PlainAttention(nn.Module):
    """Cosine attention on ``(B, N, C)``."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.query_embedding = nn.Parameter(torch.zeros(heads, 1, dim // heads))
        self.qkv, self.proj, self.cpb = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), PlainBias(heads)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3 * self.heads, -1).transpose(1, 2).chunk(3, 1)
        q = (F.normalize(q, dim=-1) + self.query_embedding) * F.softplus(self.temperature) * math.log(n)
        size = (height, width)
        a = (q @ F.normalize(k, dim=-1).transpose(-2, -1) + self.cpb(size, size, self.side)).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(b, n, c))


class PlainUnit(nn.Module):
    """The gated linear unit on ``(B, N, C)``, the two halves cut from one product."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        hidden = int(2 * ratio * dim / 3)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        b, _, c = gate.shape
        gate = self.dwconv(gate.transpose(1, 2).view(b, c, height, width).contiguous()).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(gate) * value)


class PlainBlock(nn.Module):
    """One block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, ratio: int, side: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn = PlainAttention(dim, heads, side) if ratio == 1 else PlainAggregated(dim, heads, ratio, side)
        self.mlp = PlainUnit(dim, mlp_ratio)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.attn(self.norm1(x), height, width)
        return x + self.mlp(self.norm2(x), height, width)


class PlainStage(nn.Module):
    """Patches, blocks, norm."""

    def __init__(self, in_chans: int, dim: int, stride: int, blocks: list[PlainBlock]) -> None:
        super().__init__()
        proj = nn.Conv2d(in_chans, dim, 2 * stride - 1, stride, stride - 1)
        self.embed = nn.ModuleDict({"proj": proj, "norm": nn.LayerNorm(dim)})
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(dim, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed["proj"](x)
        b, c, height, width = x.shape
        x = self.embed["norm"](x.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, height, width)
        return self.norm(x).transpose(1, 2).reshape(b, c, height, width)


class PlainTransNeXt(nn.Module):
    """The network written down from the published equations, with the names of ours."""

    def __init__(self, like: TransNeXt, dims: list[int], depths: list[int], heads: list[int]) -> None:
        super().__init__()
        settings = zip(dims, depths, heads, (8, 8, 4, 4), like.sr_ratios, strict=True)
        self.stages = nn.ModuleList()
        for i, (dim, depth, h, mlp, ratio) in enumerate(settings):
            blocks = [PlainBlock(dim, h, mlp, ratio, like.pretrain_size[0] // 2 ** (i + 2)) for _ in range(depth)]
            self.stages.append(PlainStage(dims[i - 1] if i else 3, dim, 2 if i else 4, blocks))
        self.head = nn.ModuleDict({"fc": nn.Linear(dims[-1], like.num_classes)})

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head["fc"](x.mean((2, 3)))


class OnTokens(nn.Module):
    """A plain layer for maps ``(B, H, W, C)``."""

    def __init__(self, layer: PlainAggregated) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.layer(x.flatten(1, 2), *grid.size).view(x.shape)


def attention(batch: int, settings: Settings) -> Iterator[Case]:
    """Aggregated attention of the first three stages of TransNeXt-T at 224 pixels, alone."""
    for dim, heads, side, ratio in ((72, 3, 56, 8), (144, 6, 28, 4), (288, 12, 14, 2)):
        plain = PlainAggregated(dim, heads, ratio, side)
        warmed(plain)
        ours = AggregatedAttention(dim, heads)
        ours.load_state_dict(plain.state_dict())
        size, keys = (side, side), (side // ratio, side // ratio)
        grid = Grid(size, keys, size, keys, size, visible_neighbours(side, side, 3, settings.device))
        x = torch.randn(batch, side, side, dim, device=settings.device, requires_grad=True)
        yield Case(f"{side}x{side}, {dim} channels", {"plain": OnTokens(plain), "ours": ours}, (x, grid))


def networks(batch: int, settings: Settings) -> Iterator[Case]:
    """TransNeXt-T."""
    ours = timm.create_model("transnext_tiny")
    assert isinstance(ours, TransNeXt)
    warmed(ours)
    dims, depths = [level["num_chs"] for level in ours.feature_info], [len(stage.blocks) for stage in ours.stages]
    plain = PlainTransNeXt(ours, dims, depths, [dim // 24 for dim in dims])
    plain.load_state_dict(ours.state_dict())
    yield Case("transnext_tiny", {"plain": plain, "ours": ours}, settings.images(batch), familiar())


if __name__ == "__main__":
    run("transnext_speed", __doc__, {"attention": attention, "networks": networks})
