"""ConViT: a vision transformer whose attention starts as a convolution (arXiv 2103.10697).

The first layers have gated positional self-attention: every head mixes content attention with attention by relative
position, and starts out looking at one offset of a small square. A gate a head lets training leave that. The class
token enters after these layers.

timm has the named sizes (``convit_tiny``, ``convit_small``, ``convit_base``). This file adds

* :class:`GPSA` for any transformer, on grids of any shape, several times faster and without a (B, N, N, 3) tensor;
* :class:`ConViT`, timm's network with it: images of any size, gradient checkpointing, attention maps on request;
  ``ConViT.from_timm(timm.create_model("convit_small", pretrained=True))`` takes a network of timm over, as recipes and
  ``Backbone("convit_small")`` do by themselves;
* the sizes with heads of 64 that timm lacks: ``convit_tiny_plus``, ``convit_small_plus``, ``convit_base_plus``;
* what the paper measures: :func:`nonlocality`, the mean distance of attention, and :func:`locality` of every layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, resample_abs_pos_embed
from timm.layers import trunc_normal_ as trunc_normal
from timm.models import build_model_with_cfg, convit, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isthmus.bounds import Count, Natural, Positive, Share, checked, one_of
from isthmus.codec import part, replaces
from isthmus.codec.published import Published
from isthmus.encoders.images.pyramid import check_images, check_settings, imagenet_cfg

Grid = tuple[int, int]


@checked
class GPSA(nn.Module):
    """Gated positional self-attention: A = (1 - g) softmax(q·k/√d) + g softmax(W_pos·r), g = σ(λ) (section 3.2).

    r = (δx, δy, ‖δ‖²) is the offset of a key from its query in patches. The positional score is a sum of a term in δx
    and one in δy, so its softmax over a grid is the product of two small softmaxes, one along columns and one along
    rows, and A_p·V takes O(N(H + W)) operations; A itself is built for :meth:`attention` only.

    Args:
        dim: D.
        num_heads: h.
        qkv_bias: biases of queries, keys and values.
        attn_drop: dropout of attention.
        proj_drop: dropout of the output.
        locality_strength: α of the convolutional initialisation; larger is sharper.

    Shapes: ``(B, N, D)`` → ``(B, N, D)`` with N = H · W tokens in row-major order.

    Raises:
        ValueError: heads that do not divide the width, α that is not above 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: Positive = 1.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the width {dim}.")
        self.dim, self.num_heads, self.locality_strength = dim, num_heads, locality_strength
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)  # its bias is the same for every key and has no effect
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        if not self.gating_param.is_meta:
            for layer in (self.qk, self.v, self.proj, self.pos_proj):
                trunc_normal(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            self.local_init()

    @torch.no_grad()
    def local_init(self) -> None:
        """Start as a convolution (section 3.3): values pass as they are, and head h1 + m·h2 of the m·m first looks h2
        columns and h1 rows from the corner of an m x m square around its query, m = ⌊√h⌋.

        Heads beyond m·m keep their random row; there is a warning.
        """
        nn.init.eye_(self.v.weight)
        side = math.isqrt(self.num_heads)
        if side**2 != self.num_heads:
            warnings.warn(
                f"{self.num_heads} heads are no square number: {self.num_heads - side**2} of them start at random.",
                stacklevel=2,
            )
        offset = torch.arange(side) - (side - 1) / 2
        columns, rows = offset.repeat_interleave(side), offset.repeat(side)
        weight = torch.stack([2 * columns, 2 * rows, -torch.ones(side**2)], 1)
        self.pos_proj.weight[: side**2] = weight.to(self.pos_proj.weight)
        self.pos_proj.weight *= self.locality_strength

    @property
    def gates(self) -> Tensor:
        """g ``(h,)``: the weight of position against content."""
        return torch.sigmoid(self.gating_param)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``(B, N, D)``.
            grid: (H, W) of the tokens; a square where it is left out.

        Raises:
            ValueError: the grid does not have N places, or N is no square number.
        """
        batch, count, dim = x.shape
        grid = _grid(count, grid)
        q, k, v = self._projected(x)
        if self.training and self.attn_drop.p:
            y = self.attn_drop(self._attention(q, k, grid)).to(v.dtype) @ v
        else:
            content = F.scaled_dot_product_attention(q, k, v)
            position = self._look_around(v, grid).to(content.dtype)
            y = torch.lerp(content, position, self.gates.view(-1, 1, 1).to(content.dtype))
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(batch, count, dim)))

    def attention(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """A ``(B, h, N, N)``: how much every query (third axis) looks at every key."""
        q, k, _ = self._projected(x)
        return self._attention(q, k, _grid(x.shape[1], grid))

    def positional(self, grid: Grid) -> Tensor:
        """softmax(W_pos·r) ``(h, N, N)``, the same for every input."""
        rows, columns = self._axes(grid)
        count = grid[0] * grid[1]
        return (rows[:, :, None, :, None] * columns[:, None, :, None, :]).reshape(self.num_heads, count, count)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, count, dim = x.shape
        if dim != self.dim:
            raise ValueError(f"the tokens are {dim} wide; this layer is for {self.dim}.")
        q, k = self.qk(x).view(batch, count, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, self.v(x).view(batch, count, self.num_heads, -1).transpose(1, 2)

    def _attention(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        content = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return torch.lerp(content, self.positional(grid).to(content), self.gates.view(-1, 1, 1).to(content))

    def _axes(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The two factors of the positional attention, ``(h, H, H)`` and ``(h, W, W)``, in float32 at least."""
        weight = torch.cat([self.pos_proj.weight, self.pos_proj.bias[:, None]], 1)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)).view(-1, 4, 1, 1)
        found = []
        for linear, side in ((1, grid[0]), (0, grid[1])):
            places = torch.arange(side, device=weight.device, dtype=weight.dtype)
            delta = places - places.view(-1, 1)  # key minus query
            # The bias cancels, but a parameter without a gradient stops training on several devices.
            found.append((weight[:, linear] * delta + weight[:, 2] * delta.square() + weight[:, 3]).softmax(-1))
        return found[0], found[1]

    def _look_around(self, v: Tensor, grid: Grid) -> Tensor:
        """A_p·V, one axis after the other, as two batched products over heads: ``(B, h, N, d)`` → the same."""
        batch, heads, _, dim = v.shape
        rows, columns = (axis.to(v.dtype) for axis in self._axes(grid))
        height, width = grid
        v = v.view(batch, heads, height, width, dim).permute(1, 2, 3, 0, 4)
        v = (rows @ v.reshape(heads, height, -1)).view(heads, height, width, -1)
        v = (columns @ v.transpose(1, 2).reshape(heads, width, -1)).view(heads, width, height, batch, dim)
        return v.permute(3, 0, 2, 1, 4).reshape(batch, heads, -1, dim)


def _grid(count: int, grid: Grid | None) -> Grid:
    side = math.isqrt(count)
    height, width = grid or (side, side)
    if height * width != count:
        wanted = f"a grid of {height}x{width}" if grid else "a square; give the grid as (rows, columns)"
        raise ValueError(f"{count} tokens are not {wanted}.")
    return height, width


class Block(nn.Module):
    """x + DropPath(Attention(Norm(x))), then the same with an MLP; built from the parts of a block of timm.

    Shapes: ``(B, N, D)`` → the same.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        old: Any = block.attn
        kind: Any = GPSA if hasattr(old, "gating_param") else Attention
        arguments = {"num_heads": old.num_heads, "attn_drop": old.attn_drop.p, "proj_drop": old.proj_drop.p}
        if kind is GPSA:
            arguments["locality_strength"] = old.locality_strength
        with torch.device("meta"), warnings.catch_warnings():
            attn: Any = kind(old.proj.in_features, **arguments)
        for name, child in old.named_children():
            if name in dict(attn.named_children()):
                setattr(attn, name, child)
        if kind is GPSA:
            attn.gating_param = old.gating_param
        self.norm1, self.attn, self.drop_path = block.norm1, attn.train(old.training), block.drop_path
        self.norm2, self.mlp = block.norm2, block.mlp

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, N, D)``, and the grid of the patches among them."""
        y = self.norm1(x)
        x = x + self.drop_path(self.attn(y, grid) if isinstance(self.attn, GPSA) else self.attn(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attention(self, x: Tensor, grid: Grid) -> Tensor:
        """The block's attention ``(B, h, N, N)`` for its input."""
        y = self.norm1(x)
        if isinstance(self.attn, GPSA):
            return self.attn.attention(y, grid)
        q, k, _ = self.attn.qkv(y).unflatten(2, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


@part
@checked
class ConViT(convit.ConVit):
    """timm's ConViT for images of any size: position embeddings are resampled, borders padded to whole patches.

    Args:
        img_size: pixels a side, or (height, width), that the position embedding is made for.
        patch_size: side of a patch in pixels.
        in_chans: channels of the input.
        num_classes: 0 leaves the classifier out.
        global_pool: "token", "avg" or "".
        embed_dim: D, of all heads together.
        depth: number of blocks.
        num_heads: h; a square number, for the convolutional initialisation.
        mlp_ratio: hidden width of the MLPs over D.
        qkv_bias: biases of queries, keys and values.
        drop_rate: dropout before the classifier; ``pos_drop_rate``, ``proj_drop_rate``, ``attn_drop_rate`` and
            ``drop_path_rate`` are timm's.
        local_up_to_layer: how many of the blocks, from the first, have gated positional attention; the class token
            enters behind them. 0 makes a plain vision transformer.
        locality_strength: α.
        use_pos_embed: add a learnt embedding of positions to the patches.

    Shapes: ``(B, in_chans, H, W)`` → ``(B, num_classes)``.

    Raises:
        ValueError: heads that do not divide the width; a side, width, depth or rate that is out of range; no block is
            left for a class token that is to be read.
    """

    def __init__(
        self,
        img_size: Count | Grid = 224,
        patch_size: Count = 16,
        in_chans: Count = 3,
        num_classes: Natural = 1000,
        global_pool: Annotated[str, one_of(("token", "avg", ""))] = "token",
        embed_dim: Count = 432,
        depth: Count = 12,
        num_heads: Count = 9,
        mlp_ratio: Positive = 4.0,
        qkv_bias: bool = False,
        drop_rate: Share = 0.0,
        pos_drop_rate: Share = 0.0,
        proj_drop_rate: Share = 0.0,
        attn_drop_rate: Share = 0.0,
        drop_path_rate: Share = 0.0,
        local_up_to_layer: Natural = 10,
        locality_strength: Positive = 1.0,
        use_pos_embed: bool = True,
    ) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the width {embed_dim}.")
        check_settings(
            {
                "img_size": img_size,
                "patch_size": patch_size,
                "in_chans": in_chans,
                "embed_dim": embed_dim,
                "depth": depth,
                "mlp_ratio": mlp_ratio,
            },
            {
                "drop_rate": drop_rate,
                "pos_drop_rate": pos_drop_rate,
                "proj_drop_rate": proj_drop_rate,
                "attn_drop_rate": attn_drop_rate,
                "drop_path_rate": drop_path_rate,
            },
        )
        if min(img_size if isinstance(img_size, Sequence) else (img_size,)) < patch_size:
            raise ValueError(f"img_size {img_size} is smaller than a patch of {patch_size} pixels.")
        if local_up_to_layer < 0:
            raise ValueError(f"local_up_to_layer {local_up_to_layer} counts blocks; 0 is a plain vision transformer.")
        if local_up_to_layer >= depth and global_pool == "token":
            raise ValueError(
                f"local_up_to_layer {local_up_to_layer} of {depth} blocks: a class token enters behind the local ones "
                'and would see no patch. Leave it a block, or use global_pool="avg".'
            )
        super().__init__(
            img_size,  # type: ignore[arg-type]
            patch_size,
            in_chans,
            num_classes,
            global_pool,
            embed_dim // num_heads,
            depth,
            num_heads,
            mlp_ratio,
            qkv_bias,
            drop_rate,
            pos_drop_rate,
            proj_drop_rate,
            attn_drop_rate,
            drop_path_rate,
            local_up_to_layer=local_up_to_layer,
            locality_strength=locality_strength,
            use_pos_embed=use_pos_embed,
        )
        self._take_over()

    @classmethod
    def from_timm(cls, model: convit.ConVit) -> Self:
        """The same network with what this class adds: around the same parameters, which both then share.

        Raises:
            ValueError: the model is not timm's ConViT.
        """
        if not isinstance(model, convit.ConVit):
            raise ValueError(f"{type(model).__name__} is not timm's ConViT.")
        ours = cls.__new__(cls)
        nn.Module.__init__(ours)
        ours.__dict__.update({k: dict(v) if isinstance(v, dict) else v for k, v in model.__dict__.items()})
        ours.patch_embed = type(model.patch_embed).__new__(type(model.patch_embed))
        ours.patch_embed.__dict__.update(model.patch_embed.__dict__)
        ours._take_over()
        return ours

    def _take_over(self) -> None:
        """Our blocks around timm's parts."""
        self.blocks: Any = nn.ModuleList(Block(block) for block in self.blocks)
        embed: Any = self.patch_embed
        embed.strict_img_size, embed.dynamic_img_pad = False, True
        self.grad_checkpointing = False
        if self.local_up_to_layer >= len(self.blocks):
            self.cls_token: Any = None
            self.num_prefix_tokens = 0

    def tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Images to patches with their positions ``(B, N, D)``, and their grid.

        Raises:
            ValueError: images with other channels.
        """
        check_images(x, self.in_chans)
        embed: Any = self.patch_embed
        height, width = embed.dynamic_feat_size(x.shape[-2:])
        tokens = embed(x)
        if self.use_pos_embed:
            old: Any = embed.grid_size
            same = tuple(old) == (height, width)
            tokens = tokens + (
                self.pos_embed if same else resample_abs_pos_embed(self.pos_embed, [height, width], list(old), 0)
            )
        return self.pos_drop(tokens), (height, width)

    def enter(self, index: int, x: Tensor) -> Tensor:
        """The input of block ``index``: with the class token in front where it is this block's turn."""
        if index == self.local_up_to_layer and self.cls_token is not None:
            return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        return x

    def _block(self, index: int, x: Tensor, grid: Grid) -> Tensor:
        x = self.enter(index, x)
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return cast(Tensor, checkpoint(self.blocks[index], x, grid, use_reentrant=False))
        return self.blocks[index](x, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` → normed tokens ``(B, 1 + N, D)``, the class token first."""
        x, grid = self.tokens(x)
        for index in range(len(self.blocks)):
            x = self._block(index, x, grid)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's: the patches after the blocks asked for, as maps or tokens.

        Raises:
            ValueError: ``output_fmt`` is neither "NCHW" nor "NLC".
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is neither 'NCHW' nor 'NLC'.")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self.tokens(x)
        found = []
        for index in range(last + 1 if stop_early else len(self.blocks)):
            x = self._block(index, x, grid)
            if index in take:
                patches = (self.norm(x) if norm else x)[:, x.shape[1] - grid[0] * grid[1] :]
                found.append(
                    patches.transpose(1, 2).unflatten(2, grid).contiguous() if output_fmt == "NCHW" else patches
                )
        return found if intermediates_only else (self.norm(x), found)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.no_grad()
    def set_input_size(self, img_size: int | Grid) -> None:
        """Resample the position embedding for good, for images of another size."""
        embed: Any = self.patch_embed
        old = list(embed.grid_size)
        embed.set_input_size(img_size=img_size)
        self.num_patches = embed.num_patches
        if self.use_pos_embed:
            self.pos_embed = nn.Parameter(resample_abs_pos_embed(self.pos_embed, list(embed.grid_size), old, 0))


replaces(convit.ConVit, ConViT.from_timm)  # timm's network takes images of one size only


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook at loading: published names are ours; the position embedding is resampled to the model's grid.

    Raises:
        ValueError: the embedding of a checkpoint of another size is of no square grid.
    """
    ours: Any = model
    found = dict(state.get("model", state))
    embedding = found.get("pos_embed")
    if embedding is not None and ours.use_pos_embed and embedding.shape[1] != ours.pos_embed.shape[1]:
        grid = ours.patch_embed.grid_size
        if math.isqrt(embedding.shape[1]) ** 2 != embedding.shape[1]:
            raise ValueError(
                f"the checkpoint has {embedding.shape[1]} positions, no square number, and the model "
                f"{grid[0]}x{grid[1]}; load it into a model of its own size and call set_input_size."
            )
        found["pos_embed"] = resample_abs_pos_embed(embedding, list(grid), num_prefix_tokens=0)
    return found


# ----------------------------------------------------------------------------------------------------------- locality


def relative_offsets(grid: Grid, device: torch.device | None = None) -> Tensor:
    """r_ij = (δx, δy, ‖δ‖²) ``(N, N, 3)`` of key j from query i, in patches."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in grid)
    y, x = rows.repeat_interleave(grid[1]), columns.repeat(grid[0])
    delta = torch.stack([x - x.view(-1, 1), y - y.view(-1, 1)], -1)
    return torch.cat([delta, delta.square().sum(-1, keepdim=True)], -1)


def nonlocality(attention: Tensor, grid: Grid) -> Tensor:
    """D_h = (1/N) Σ_ij A_h,ij ‖δ_ij‖: the mean distance, in patches, that a head looks (section 4).

    Args:
        attention: ``(h, N, N)``, or ``(B, h, N, N)``, which is averaged over the batch.
        grid: (H, W), of N places.

    Returns:
        ``(h,)``.
    """
    _grid(attention.shape[-1], grid)
    mean = attention.mean(0) if attention.ndim == 4 else attention
    distance = relative_offsets(grid, attention.device)[..., 2].sqrt().to(attention.dtype)
    return (mean * distance).sum((-2, -1)) / len(distance)


class Locality(NamedTuple):
    """Of one layer: the mean distance that every head looks, in patches, and the gates where it has them."""

    distance: Tensor
    gates: Tensor | None


@torch.no_grad()
def locality(model: convit.ConVit, images: Tensor) -> list[Locality]:
    """What the paper plots over training: distance and gate of every head of every layer, averaged over images.

    In layers with a class token the distance is that of the attention from patches to patches.

    Args:
        model: a ConViT, timm's or ours; with ``local_up_to_layer=0`` a plain vision transformer.
        images: ``(B, C, H, W)``, normalised as for the model.
    """
    network = model if isinstance(model, ConViT) else ConViT.from_timm(model)
    x, grid = network.tokens(images)
    count = grid[0] * grid[1]
    found = []
    for index, block in enumerate(network.blocks):
        x = network.enter(index, x)
        attention = block.attention(x, grid)[..., -count:, -count:]
        attention = attention / attention.sum(-1, keepdim=True)
        gates = block.attn.gates.detach().clone() if isinstance(block.attn, GPSA) else None
        found.append(Locality(nonlocality(attention, grid), gates))
        x = block(x, grid)
    return found


# --------------------------------------------------------------------------------------------------------------- sizes


#: Heads of width 64 (table 1); no weights were published.
_HEADS = {"convit_tiny_plus": 4, "convit_small_plus": 9, "convit_base_plus": 16}
default_cfgs = generate_default_cfgs(
    {name: imagenet_cfg("patch_embed.proj", "head", pool_size=None) for name in _HEADS}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ConViT:
    heads = kwargs.pop("num_heads", _HEADS[variant])
    sizes = {"num_heads": heads, "embed_dim": 64 * heads}
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        ConViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **{**sizes, **kwargs},
    )


@register_model
def convit_tiny_plus(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """10 M parameters, ImageNet 76.7."""
    return _create("convit_tiny_plus", pretrained, **kwargs)


@register_model
def convit_small_plus(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """48 M parameters, ImageNet 82.2."""
    return _create("convit_small_plus", pretrained, **kwargs)


@register_model
def convit_base_plus(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """152 M parameters, ImageNet 82.5."""
    return _create("convit_base_plus", pretrained, **kwargs)


PUBLISHED = Published(
    of="convit",
    marks=r"\.attn\.gating_param$",
    names=[f"convit_{size}{plus}" for plus in ("", "_plus") for size in ("tiny", "small", "base")],
)
