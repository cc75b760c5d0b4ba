"""FFNet's up-head: a small top-down branch and two convolutions on any pyramid (Mehta et al., arXiv 2206.08236).

    head = FFNetHead([level.channels for level in encoder.feature_info], classes=12)
    logits = head(encoder(images))                 # at the resolution of the finest level
    masks = F.interpolate(logits, images.shape[2:], mode="bilinear").argmax(1)

``branch`` A, B, C says how wide the top-down branch is, ``segmentation`` A, B, C how wide the last two layers are and
whether the very last is 1×1 (A, C) or 3×3 (B). Maps are brought to the size of the finer one, whatever that is, so that
images of any size will do: bilinearly with aligned corners, or by the nearest value in the mobile variants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, Share, checked
from isthmus.codec import Codec, UserError, build, part, spec_of
from isthmus.codec.checkpoints import Checkpoint, load_into
from isthmus.codec.published import Published, with_encoder

#: Widths of the adapters, and of what goes on from every level, finest first.
BRANCHES = {
    "A": ((64, 128, 256, 512), (128, 128, 128, 128)),
    "B": ((64, 128, 128, 256), (96, 96, 64, 32)),
    "C": ((128, 128, 128, 128), (128, 16, 16, 16)),
}
#: Width between the last two layers, and kernel of the last.
SEGMENTATIONS = {"A": (512, 1), "B": (256, 3), "C": (128, 1)}
_CLASSIFIER = (128, 256, 512, 1024, 2048)


class ConvUnit(nn.Sequential):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        )


class UpBranch(nn.Module):
    """Levels to levels, coarse to fine: each is smoothed for output and, widened to the next, added to it.

    Args:
        channels: of the levels, finest first; any number of them.
        adapter: widths they are brought to.
        out: widths of the outputs.
        nearest: the mobile variants' resizing.
    """

    def __init__(
        self, channels: Sequence[int], adapter: Sequence[int], out: Sequence[int], nearest: bool = False
    ) -> None:
        super().__init__()
        self.nearest = nearest
        self.adapters = nn.ModuleList(ConvUnit(a, b, 1) for a, b in zip(channels, adapter, strict=True))
        self.smooth = nn.ModuleList(ConvUnit(a, b, 3) for a, b in zip(adapter, out, strict=True))
        self.up = nn.ModuleList(ConvUnit(adapter[i + 1], adapter[i], 1) for i in range(len(adapter) - 1))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """``[(B, channels_l, H_l, W_l)]`` → ``[(B, out_l, H_l, W_l)]``."""
        adapted = [adapter(level) for adapter, level in zip(self.adapters, features, strict=True)]
        x, found = adapted[-1], [self.smooth[-1](adapted[-1])]
        for i in reversed(range(len(adapted) - 1)):
            x = resized(self.up[i](x), adapted[i], self.nearest) + adapted[i]
            found.insert(0, self.smooth[i](x))
        return found


def resized(x: Tensor, like: Tensor, nearest: bool) -> Tensor:
    """``x`` at the size of ``like``."""
    if x.shape[2:] == like.shape[2:]:
        return x
    if nearest:
        return F.interpolate(x, like.shape[2:], mode="nearest")
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


class _Head(nn.Module):
    """What both heads share: the choice of the branch and the check of the levels."""

    def __init__(self, channels: Sequence[int], branch: str, mobile: bool, divisor: int) -> None:
        super().__init__()
        if branch not in BRANCHES:
            raise ValueError(f"branch is A, B or C, got {branch!r}.")
        if not 1 <= len(channels) <= 4:
            raise ValueError(f"the head takes one to four levels, got {len(channels)}.")
        narrowest = min(*BRANCHES[branch][0], *BRANCHES[branch][1])
        if not 1 <= divisor <= narrowest:
            raise ValueError(f"divisor must be 1 to {narrowest} for branch {branch}, got {divisor}.")
        adapter, out = ([w // divisor for w in widths[-len(channels) :]] for widths in BRANCHES[branch])
        if len(channels) < 4:  # fewer levels keep the width of the finest
            out = [w // divisor for w in BRANCHES[branch][1][: len(channels)]]
        self.channels, self.mobile, self.widths = tuple(channels), mobile, out
        self.branch = UpBranch(channels, adapter, out, mobile)

    def levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The branch's outputs.

        Raises:
            ValueError: other levels than the head was made for.
        """
        for level in features:
            if level.ndim != 4:
                raise ValueError(
                    f"masks need maps (B, C, H, W); the encoder gives {level.ndim - 2}-dimensional tokens."
                )
        given = tuple(level.shape[1] for level in features)
        if given != self.channels:
            raise ValueError(f"the levels have channels {given}; this head was made for {self.channels}.")
        return self.branch(features)


@part
@checked
class FFNetHead(_Head):
    """Segmentation logits from up to four levels of any encoder.

    Args:
        channels: of the levels, finest first.
        classes: outputs; 1 is a binary mask.
        branch: A, B or C.
        segmentation: A, B or C.
        mobile: nearest resizing.
        divisor: every width over this, for small networks.

    Raises:
        ValueError: an unknown letter, no class, or no level.
    """

    def __init__(
        self,
        channels: Sequence[Count],
        classes: Count,
        branch: str = "B",
        segmentation: str = "B",
        mobile: bool = False,
        divisor: Count = 1,
    ) -> None:
        super().__init__(channels, branch, mobile, divisor)
        if segmentation not in SEGMENTATIONS:
            raise ValueError(f"segmentation is A, B or C, got {segmentation!r}.")
        if classes < 1:
            raise ValueError(f"a mask needs at least one class, got {classes}.")
        middle, kernel = SEGMENTATIONS[segmentation]
        middle //= divisor
        self.last = nn.Sequential(
            nn.Conv2d(sum(self.widths), middle, 3, padding=1),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, classes, kernel, padding=kernel // 2),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Levels to ``(B, classes, H, W)`` of the finest one."""
        levels = self.levels(features)
        return self.last(torch.cat([resized(level, levels[0], self.mobile) for level in levels], 1))


@part
@checked
class FFNetClassifier(_Head):
    """The head that backbones are pre-trained with: up-branch, then down again with a bottleneck for every level.

    Args:
        channels: of the four levels.
        classes: outputs.
        branch: A, B or C.
        mobile: nearest resizing.
        dropout: before the last layer.
        divisor: every width over this.
    """

    def __init__(
        self,
        channels: Sequence[Count],
        classes: Count,
        branch: str = "A",
        mobile: bool = False,
        dropout: Share = 0.0,
        divisor: Count = 1,
    ) -> None:
        super().__init__(channels, branch, mobile, divisor)
        outs = [w // divisor for w in _CLASSIFIER[: len(channels)]]
        last = _CLASSIFIER[-1] // divisor
        self.expand = nn.ModuleList(_Expansion(a, b) for a, b in zip(self.widths, outs, strict=True))
        self.down = nn.ModuleList(_unit(outs[i], outs[i + 1], 3, 2) for i in range(len(outs) - 1))
        self.final = _unit(outs[-1], last, 1, 1)
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(last, classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Levels to ``(B, classes)``."""
        levels = self.levels(features)
        x = self.expand[0](levels[0])
        for down, expand, level in zip(self.down, list(self.expand)[1:], levels[1:], strict=True):
            x = expand(level) + down(x)
        return self.fc(self.dropout(self.final(x).mean((2, 3))))


class _Expansion(nn.Module):
    """A bottleneck block that widens: 1×1, 3×3, 1×1."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        width = out // 4
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = (
            nn.Identity()
            if channels == out
            else nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _unit(channels: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, kernel, stride, kernel // 2), nn.BatchNorm2d(out), nn.ReLU())


# ------------------------------------------------------------------------------------------- published checkpoints

_RENAMES = (
    (r"layers\.0\.adapter_conv\.(\d)\.layers\.(\d)\.(\w+)", r"branch.adapters.\1.\2.\3"),
    (r"layers\.3\.last_layer\.(\d)\.(\w+)", r"last.\1.\2"),
    (r"layers\.2\.expansion_layers\.(\d)\.(.+)", r"expand.\1.\2"),
    (r"layers\.2\.downsampling_layers\.(\d)\.(.+)", r"down.\1.\2"),
    (r"layers\.2\.final_layer\.(.+)", r"final.\1"),
    (r"layers\.2\.classifier\.(.+)", r"fc.\1"),
)


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's share of a published state dict (``head.layers.…``) under our names.

    Raises:
        ValueError: a name that the published heads do not have.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if not name.startswith("head."):
            continue
        bare = name.removeprefix("head.")
        if match := re.fullmatch(r"layers\.1\.fam_(4|8|16|32)(_sm|_up)?\.layers\.(\d)\.(\w+)", bare):
            level = {"4": 0, "8": 1, "16": 2, "32": 3}[match[1]]
            place = f"up.{level - 1}" if match[2] == "_up" else f"smooth.{level}"
            ours[f"branch.{place}.{match[3]}.{match[4]}"] = tensor
            continue
        for pattern, replacement in _RENAMES:
            if re.fullmatch(pattern, bare):
                ours[re.sub(pattern, replacement, bare)] = tensor
                break
        else:
            raise ValueError(f"{name!r} is no parameter of a published FFNet head.")
    return ours


def released(name: str, classes: int | None = None) -> Codec:
    """One of the published networks, such as ``ffnet86S_dBBB_mobile``, ``ffnet46NS_CCC_mobile_pre_down`` or, with its
    pre-training head, ``classification_ffnet50_AAX``.

    Args:
        name: as in the published code.
        classes: 19 (Cityscapes), or 1000 of the pre-training heads, without it.

    Raises:
        UserError: a name that does not follow the pattern, or a depth that was not published.
    """
    pattern = (
        r"(?:(?:segmentation|classification)_)?ffnet(\d+)(NS|N|S)?_(d)?([ABC])([ABC])([ABCX])(_mobile)?(_pre_down)?"
    )
    match = re.fullmatch(pattern, name)
    if match is None or (match[6] == "X") != name.startswith("classification"):
        raise UserError(f"{name!r} is no published FFNet; names are like ffnet86S_dBBB_mobile or ffnet122N_CBB.")
    depth, kind = int(match[1]), match[2] or ""
    if (match[4] == "C") != (kind in ("N", "NS")) or (match[4] == "B") != (kind == "S"):
        raise UserError(f"{name!r}: A bodies have no letter, B bodies an S, C bodies an N or NS.")
    body = {
        "target": f"timm:ffnet{depth}{kind.lower()}" + ("_d" if match[3] else ""),
        "kwargs": {"num_classes": 0, **({"pre_down": True} if match[8] else {})},
    }
    encoder = build({"target": "isthmus:Backbone", "kwargs": {"model": body}})
    channels = [level.channels for level in encoder.feature_info]
    if match[6] == "X":
        return Codec(encoder, decoder=FFNetClassifier(channels, classes or 1000, match[5], bool(match[7])))
    return Codec(encoder, decoder=FFNetHead(channels, classes or 19, match[5], match[6], bool(match[7])))


def _read(found: Checkpoint, name: str = "") -> Codec:
    """Body and head.

    Args:
        found: a state dict of the release "models" of Qualcomm-AI-research/FFNet.
        name: the network, such as ``ffnet86S_dBBB_mobile``.
    """
    if not name:
        raise UserError(f"{found.path} does not tell which network it is; say it: --name ffnet86S_dBBB_mobile.")
    whole: Any = released(name)
    load_into(whole.decoder, found, name, convert_official)
    return with_encoder(found, spec_of(whole.encoder), whole.decoder)


PUBLISHED = Published(of="simple-segmentation", marks=r"^backbone_model\.|^head\.layers\.", make=_read)
