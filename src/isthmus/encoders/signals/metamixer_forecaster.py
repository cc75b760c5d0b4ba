"""FFNet for time series: large depthwise kernels in time in MetaMixer's frame (arXiv 2406.02021).

Every variable is cut into patches of its own; blocks on ``(B, M, D, N)``, M variables of D features at N times, mix
times, features and variables by turns: the query of the token mixer mixes variables and then features, its key and
value are 51-tap depthwise convolutions; the channel mixer is a re-parameterised 51-tap convolution and grouped 1x1
convolutions across the features of a variable and across the variables of a feature. A series is standardised before,
and the forecast put back after (RevIN)::

    model = MetaMixerForecaster(variables=7, length=96, horizon=96)
    forecast = model(history)                          # (B, 7, 96) → (B, 7, 96)
    model.eval().reparameterize()                      # one convolution for the branches

Calendar features, which the published code takes and never uses, are not taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Share, checked
from isthmus.codec import FeatureInfo, part
from isthmus.layers.large_kernel import DepthwiseConv
from isthmus.layers.metamixer import MetaMixer
from isthmus.layers.reparam import ReparamConv, check_mergeable

# ------------------------------------------------------------------------------------------------------------- layers


class Statistics(NamedTuple):
    """What :class:`RevIN` took away: centre and standard deviation of every series, ``(B, M, 1)``."""

    centre: Tensor
    deviation: Tensor


class RevIN(nn.Module):
    """Reversible instance normalisation: standardise every series, and put forecasts back.

    Args:
        variables: M.
        eps: added to the variance, so that constant series are no exception.
        affine: a scale and a shift for every variable.
        subtract_last: centre at the last value and not at the mean.
    """

    def __init__(self, variables: int, eps: float = 1e-5, affine: bool = True, subtract_last: bool = False) -> None:
        super().__init__()
        self.eps, self.subtract_last = eps, subtract_last
        self.weight = nn.Parameter(torch.ones(variables, 1)) if affine else None
        self.bias = nn.Parameter(torch.zeros(variables, 1)) if affine else None

    def forward(self, x: Tensor) -> tuple[Tensor, Statistics]:
        """``(B, M, L)`` → the same, and what was taken away."""
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        told = Statistics((x[..., -1:] if self.subtract_last else mean).detach(), (variance + self.eps).sqrt().detach())
        x = (x - told.centre) / told.deviation
        return (x if self.weight is None or self.bias is None else x * self.weight + self.bias), told

    def inverse(self, y: Tensor, told: Statistics) -> Tensor:
        """Forecasts ``(B, M, H)`` of standardised series → of the series themselves."""
        if self.weight is not None and self.bias is not None:
            y = (y - self.bias) / (self.weight + self.eps**2)
        return y * told.deviation + told.centre


class GroupedPointwise(nn.Module):
    """A 1x1 convolution in groups: across the features of a variable, or across the variables of a feature.

    Args:
        by: ``"variable"`` or ``"feature"``: what every group is of.
        inputs: (variables, features) before.
        outputs: (variables, features) after; a group is a variable of the output or a feature of it.

    Shapes: ``(B, M, D, N)`` → ``(B, M', D', N)``.
    """

    def __init__(self, by: Literal["variable", "feature"], inputs: tuple[int, int], outputs: tuple[int, int]) -> None:
        super().__init__()
        self.by, self.outputs = by, outputs
        groups = outputs[0] if by == "variable" else outputs[1]
        self.conv = nn.Conv1d(inputs[0] * inputs[1], outputs[0] * outputs[1], 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, M, D, N)`` → ``(B, M', D', N)``."""
        if self.by == "variable":
            return self.conv(x.flatten(1, 2)).unflatten(1, self.outputs)
        return self.conv(x.transpose(1, 2).flatten(1, 2)).unflatten(1, self.outputs[::-1]).transpose(1, 2)


class InTime(nn.Module):
    """A depthwise convolution over the N times of ``(B, M, D, N)``, a kernel for every variable and feature.

    ``conv`` maps ``(B, M·D, 1, N)``: kernels of one row run on the routines of two-dimensional convolutions.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """``(B, M, D, N)`` → the same."""
        return self.conv(x.flatten(1, 2).unsqueeze(2)).squeeze(2).unflatten(1, x.shape[1:3])


class FeatureNorm(nn.BatchNorm1d):
    """Batch norm of every feature, over samples, variables and times.

    Shapes: ``(B, M, D, N)`` → the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(B, M, D, N)`` → the same."""
        return super().forward(input.flatten(0, 1)).unflatten(0, input.shape[:2])


class ForecastBlock(nn.Module):
    """x + token mixer, then + channel mixer, both :class:`~isthmus.layers.metamixer.MetaMixer`.

    Args:
        variables: M.
        dim: D.
        kernel: odd taps of the large convolutions.
        small: odd taps of the branch beside the channel mixer's; 0 leaves it out.
        ratio: hidden width of the channel mixer over D.
        dropout: after the channel mixer's key. Inside the token mixer 0.3 and 0.15, and 0.15 after the channel mixer's
            value, are fixed, as published.

    Shapes: ``(B, M, D, N)`` → the same.
    """

    def __init__(self, variables: int, dim: int, kernel: int, small: int, ratio: int, dropout: float) -> None:
        super().__init__()
        here, twice, wide = (variables, dim), (2 * variables, dim), (variables, ratio * dim)
        query = nn.Sequential(
            GroupedPointwise("feature", here, twice),
            nn.Dropout(0.3),
            nn.GELU(),
            GroupedPointwise("variable", twice, here),
            nn.Dropout(0.15),
            FeatureNorm(dim),
        )
        taps = (1, kernel)
        key, value = (InTime(DepthwiseConv(variables * dim, taps)) for _ in range(2))
        self.token_mixer = MetaMixer(query, key, nn.GELU(), value)
        branches = [((1, small), 1)] if small else []
        self.channel_mixer = MetaMixer(
            nn.Sequential(InTime(ReparamConv(variables * dim, taps, branches)), FeatureNorm(dim)),
            nn.Sequential(GroupedPointwise("variable", here, wide), nn.Dropout(dropout)),
            nn.GELU(),
            nn.Sequential(GroupedPointwise("feature", wide, here), nn.Dropout(0.15)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, M, D, N)`` → the same."""
        x = x + self.token_mixer(x)
        return x + self.channel_mixer(x)


# ------------------------------------------------------------------------------------------------------------ networks


@part
@checked
class SeriesEncoder(nn.Module):
    """Several time series to tokens at a few rates.

    Args:
        variables: M.
        dims: D of every stage.
        depths: blocks of every stage.
        kernels: odd taps of the large convolutions, for every stage.
        small_kernels: odd taps beside them, for every stage; 0 leaves them out.
        patch: values in a patch.
        stride: values between patches, at most ``patch``.
        downsample: tokens that become one between stages.
        ratio: hidden width of the channel mixers over D.
        dropout: of the channel mixers.

    Shapes: ``(B, M, L)`` → for every stage ``(B, N, M·D)``, N = ⌊L / stride⌋ at the first and ⌈N / downsample⌉ from
    stage to stage.

    Raises:
        ValueError: settings of different lengths, even kernels, a patch shorter than the stride; in ``forward``,
            another number of variables, or a series shorter than a patch.
    """

    def __init__(
        self,
        variables: Count,
        dims: Sequence[Count] = (64,),
        depths: Sequence[Count] = (1,),
        kernels: Sequence[Count] = (51,),
        small_kernels: Sequence[Natural] = (5,),
        patch: Count = 4,
        stride: Count = 2,
        downsample: Count = 2,
        ratio: Count = 2,
        dropout: Share = 0.1,
    ) -> None:
        super().__init__()
        per_stage = {"dims": dims, "depths": depths, "kernels": kernels, "small_kernels": small_kernels}
        if len({len(values) for values in per_stage.values()}) > 1 or not dims:
            told = ", ".join(f"{name} {tuple(values)}" for name, values in per_stage.items())
            raise ValueError(f"{told}: one of each a stage.")
        if stride > patch:
            raise ValueError(f"stride {stride} is longer than the patch of {patch} values.")
        self.variables, self.patch, self.stride, self.downsample = variables, patch, stride, downsample
        entries: list[nn.Module] = [nn.Sequential(nn.Conv1d(1, dims[0], patch, stride), nn.BatchNorm1d(dims[0]))]
        for before, after in pairwise(dims):
            entries.append(nn.Sequential(nn.BatchNorm1d(before), nn.Conv1d(before, after, downsample, downsample)))
        self.entries = nn.ModuleList(entries)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ForecastBlock(variables, dim, kernel, small, ratio, dropout) for _ in range(depth)))
            for dim, depth, kernel, small in zip(dims, depths, kernels, small_kernels, strict=True)
        )
        self.feature_info = [FeatureInfo(variables * dim, stride * downsample**i, "NTC") for i, dim in enumerate(dims)]

    def token_counts(self, length: int) -> list[int]:
        """N of every stage for a series of ``length`` values."""
        counts = [length // self.stride]
        for _ in self.stages[1:]:
            counts.append(-(-counts[-1] // self.downsample))
        return counts

    def maps(self, x: Tensor) -> list[Tensor]:
        """``(B, M, L)`` → ``(B, M, D, N)`` after every stage."""
        if x.ndim != 3 or x.shape[1] != self.variables or x.shape[2] < self.patch:
            raise ValueError(
                f"the input is {tuple(x.shape)}; this encoder takes (B, {self.variables}, L), and at least "
                f"{self.patch} values, a patch."
            )
        found = []
        x = x.unsqueeze(2)
        for i, (entry, stage) in enumerate(zip(self.entries, self.stages, strict=True)):
            y = x.flatten(0, 1)
            if i == 0:
                y = F.pad(y, (0, self.patch - self.stride), mode="replicate")
            elif missing := -y.shape[-1] % self.downsample:
                y = torch.cat([y, *[y[..., -missing:]] * -(-missing // y.shape[-1])], -1)[..., : y.shape[-1] + missing]
            x = stage(entry(y).unflatten(0, x.shape[:2]))
            found.append(x)
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, M, L)`` → tokens ``(B, N, M·D)`` after every stage, finest first."""
        return [level.flatten(1, 2).mT for level in self.maps(x)]

    def reparameterize(self) -> None:
        """Merge the branches in place; a second call does nothing.

        Raises:
            ValueError: in training mode.
        """
        check_mergeable(self)
        for module in self.modules():
            if isinstance(module, ReparamConv):
                module.reparameterize()


@part
@checked
class MetaMixerForecaster(nn.Module):
    """The values that follow.

    Args:
        variables: M.
        length: L, values that are read.
        horizon: H, values that are forecast.
        individual: a linear layer for every variable instead of one for all.
        head_dropout: of the forecast, before it is put back.
        affine: of :class:`RevIN`.
        subtract_last: of :class:`RevIN`.
        encoder: what else goes to :class:`SeriesEncoder`.

    Shapes: ``(B, M, L)`` → ``(B, M, H)``.

    Raises:
        ValueError: a length shorter than a patch, a horizon below 1; in ``forward``, an input of another shape.
    """

    def __init__(
        self,
        variables: Count,
        length: Count = 96,
        horizon: Count = 96,
        individual: bool = False,
        head_dropout: Share = 0.0,
        affine: bool = True,
        subtract_last: bool = False,
        **encoder: Any,
    ) -> None:
        super().__init__()
        self.encoder = SeriesEncoder(variables, **encoder)
        if length < self.encoder.patch or horizon < 1:
            raise ValueError(
                f"length {length} and horizon {horizon}: a series is read in patches of {self.encoder.patch} values, "
                "and at least one value is forecast."
            )
        self.variables, self.length, self.horizon = variables, length, horizon
        self.revin = RevIN(variables, affine=affine, subtract_last=subtract_last)
        features = self.encoder.feature_info[-1].channels // variables * self.encoder.token_counts(length)[-1]
        heads = variables if individual else 1
        bound = features**-0.5  # that of nn.Linear
        self.weight = nn.Parameter(torch.empty(heads, horizon, features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, horizon).uniform_(-bound, bound))
        self.drop = nn.Dropout(head_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, M, L)`` → ``(B, M, H)``."""
        if x.ndim != 3 or x.shape[1:] != (self.variables, self.length):
            raise ValueError(
                f"the input is {tuple(x.shape)}; this network takes (B, {self.variables}, {self.length}): samples, "
                "variables, values."
            )
        x, statistics = self.revin(x)
        features = self.encoder.maps(x)[-1].flatten(2)
        weight, bias = (p.expand(self.variables, *p.shape[1:]) for p in (self.weight, self.bias))
        y = torch.einsum("bmf,mhf->bmh", features, weight) + bias
        return self.revin.inverse(self.drop(y), statistics)

    def reparameterize(self) -> None:
        """Merge the branches in place; a second call does nothing.

        Raises:
            ValueError: in training mode.
        """
        self.encoder.reparameterize()


# ------------------------------------------------------------------------------------------------ official checkpoints

_NAMES = [
    (r"^revin_layer\.affine_", "revin."),
    (r"^downsample_layers\.", "encoder.entries."),
    (r"^stages\.(\d+)\.blocks\.", r"encoder.stages.\1."),
    (r"\.token_mixer\.ffnpw1\.", ".token_mixer.query.0.conv."),
    (r"\.token_mixer\.ffnpw2\.", ".token_mixer.query.3.conv."),
    (r"\.token_mixer\.norm\.", ".token_mixer.query.5."),
    (r"\.token_mixer\.dw1\.", ".token_mixer.key.conv."),
    (r"\.token_mixer\.dw2\.", ".token_mixer.value.conv."),
    (r"\.channel_mixer\.dw\.lkb_origin\.conv\.", ".channel_mixer.query.0.conv.main.conv."),
    (r"\.channel_mixer\.dw\.lkb_origin\.bn\.", ".channel_mixer.query.0.conv.main.norm."),
    (r"\.channel_mixer\.dw\.small_conv\.conv\.", ".channel_mixer.query.0.conv.branches.0.conv."),
    (r"\.channel_mixer\.dw\.small_conv\.bn\.", ".channel_mixer.query.0.conv.branches.0.norm."),
    (r"\.channel_mixer\.norm\.", ".channel_mixer.query.1."),
    (r"\.channel_mixer\.ffnpw1\.", ".channel_mixer.key.0.conv."),
    (r"\.channel_mixer\.ffnpw2\.", ".channel_mixer.value.0.conv."),
]
_UNUSED = ("te_patch.", "lat_layer.", "smooth_layer.", "up_sample_conv.")


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published names (ysj9909/FFNet, forecasting) in ours, without the layers that no forward pass reaches.

    Those are the embedding of calendar features, the fusion of scales and the downsampling behind the last stage.
    """
    stages = {int(found[1]) for found in map(re.compile(r"^stages\.(\d+)\.").match, state) if found}
    converted: dict[str, Tensor] = {}
    heads: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for key, value in sorted(
        state.items(), key=lambda item: [int(p) if p.isdigit() else 0 for p in item[0].split(".")]
    ):
        down = re.match(r"^downsample_layers\.(\d+)\.", key)
        if key.startswith(_UNUSED) or (down and int(down[1]) not in stages):
            continue
        if key.startswith("head."):
            heads[key.rpartition(".")[2]].append(value)
            continue
        for pattern, ours in _NAMES:
            key = re.sub(pattern, ours, key)
        in_time = re.search(r"\.(key\.conv|value\.conv|main\.conv|branches\.0\.conv)\.weight$", key)
        value = value.unsqueeze(2) if in_time else value
        converted[key] = value.unsqueeze(1) if key.startswith("revin.") else value
    return converted | {name: torch.stack(values) for name, values in heads.items()}
