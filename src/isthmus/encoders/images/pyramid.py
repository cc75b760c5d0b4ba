"""timm's interface for networks of a stem, a few stages and a head: written once, for every such network here.

A network inherits :class:`Pyramid`, builds its modules and hands them over; it then has ``forward_features``,
``forward_head``, ``forward_intermediates``, ``features_only`` of ``timm.create_model``, ``prune_intermediate_layers``,
``get_classifier``, ``reset_classifier``, ``set_grad_checkpointing`` and ``group_matcher``. What is left to its own file
is the architecture, the names of the published checkpoints and the sizes::

    class Net(Pyramid):
        def __init__(self, dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), in_chans=3, num_classes=1000):
            stages = [Stage(down(i), [Block(dim) for _ in range(depth)]) for i, (dim, depth) in ...]
            super().__init__(stages, dims, ClassifierHead(dims[-1], num_classes), stem=..., in_chans=in_chans)

Networks that extend a class of timm, or a chain of named stages (:mod:`isthmus.encoders.images.stages`), need it not;
the functions below serve them too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class Pyramid(nn.Module):
    """Stem, stages, norm, head.

    Args:
        stages: in order; each maps ``(B, C_in, H, W)`` to ``(B, C, H', W')``, and what :meth:`stage_arguments` gives
            comes after the map. A stage with an attribute ``grad_checkpointing`` obeys it (:class:`Stage` does).
        dims: channels after every stage.
        head: pools and classifies, with ``forward(x, pre_logits=False)``, ``reset(num_classes, pool_type=)``, and
            ``fc`` for the last linear layer, as timm's ``ClassifierHead`` and ``NormMlpClassifierHead`` have.
        stem: in front of the first stage.
        norm: on the last map, before the head.
        norms: one for every level that :meth:`forward_intermediates` returns, as checkpoints for dense tasks have.
        reductions: input pixels per cell, each way, after every stage; 4, 8, 16, … by default.
        in_chans: channels of the input.
        num_classes: outputs of the head.
        drop_rate: dropout before the classifier, kept for timm.
        channels_last: on CPUs run in that memory format, where it is the faster one for the network.

    Shapes: ``(B, in_chans, H, W)`` → ``(B, num_classes)``, or pooled features where there are no classes.

    Raises:
        ValueError: in ``forward``, an input that is not ``(B, in_chans, H, W)``.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        head: nn.Module,
        *,
        stem: nn.Module | None = None,
        norm: nn.Module | None = None,
        norms: Sequence[nn.Module] | None = None,
        reductions: Sequence[int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features, self.head_hidden_size = dims[-1], getattr(head, "num_features", dims[-1])
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(
                zip(dims, reductions or [4 * 2**i for i in range(len(dims))], strict=True)
            )
        ]
        self.channels_last = channels_last
        self.stem: Any = nn.Identity() if stem is None else stem
        self.stages: Any = nn.ModuleList(stages)
        self.norms = None if norms is None else nn.ModuleList(norms)
        self.norm: Any = nn.Identity() if norm is None else norm
        self.head: Any = head

    def stage_arguments(self, x: Tensor, last: int) -> Sequence[tuple[Any, ...]]:
        """What stages up to number ``last`` take beside their map, for images ``x``: nothing, unless overridden."""
        return [()] * (last + 1)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's: the maps of the stages asked for, finest first, each through its own of ``norms`` if there are.

        ``norm`` puts the last map through the norm before the head, which is also on the first value returned.

        Raises:
            ValueError: ``output_fmt`` is not ``"NCHW"``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r}: the maps of this network are 'NCHW'.")
        take, last = feature_take_indices(len(self.stages), indices)
        deepest = last if stop_early else len(self.stages) - 1
        whole = deepest + 1 == len(self.feature_info)
        intermediates = []
        y = x
        for i, y in enumerate(self._maps(x, deepest)):
            if i in take:
                level = y if self.norms is None else self.norms[i](y)
                intermediates.append(self.norm(level) if norm and whole and i == deepest else level)
        return intermediates if intermediates_only else (self.norm(y) if whole else y, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: drop the stages after the last one asked for, and the head."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        shorter = last + 1 < len(self.feature_info)
        if self.norms is not None:
            self.norms = self.norms[: last + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.head, self.num_classes = nn.Identity(), 0
        return list(take)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` → the normed map of the last stage, ``(B, C, H / 32, W / 32)`` with four stages."""
        last = deque(self._maps(x, len(self.stages) - 1), maxlen=1)  # the others are not kept
        return self.norm(last.pop())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """That map to logits ``(B, num_classes)``, or to the classifier's input with ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` → ``(B, num_classes)``, or pooled features where there are no classes."""
        return self.forward_head(self.forward_features(x))

    def _maps(self, x: Tensor, last: int) -> Iterator[Tensor]:
        """The maps of the stages up to number ``last``, one after the other."""
        check_images(x, self.in_chans)
        if self.channels_last and type(x) is Tensor and x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        arguments = self.stage_arguments(x, last)
        x = self.stem(x)
        for i, more in enumerate(arguments):
            x = self.stages[i](x, *more)
            yield x

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity where there is none."""
        return getattr(self.head, "fc", self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier (0 classes: none), and pooling where it is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's: parameter names → depth, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm\.", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": blocks}


class Stage(nn.Module):
    """``downsample``, then ``blocks``.

    Shapes: ``(B, C_in, H, W)`` → ``(B, C, H', W')``, as the two make it.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample, self.blocks = downsample, nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` → ``(B, C, H', W')``."""
        x = self.downsample(x)
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
            return cast(Tensor, checkpoint_seq(self.blocks, x))
        return self.blocks(x)


def check_images(x: Tensor, in_chans: int) -> None:
    """Raise ``ValueError`` for an input that is not ``(B, in_chans, H, W)``."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"the input is {tuple(x.shape)}; this network takes (B, {in_chans}, H, W).")


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names under ``backbone.`` without that prefix, where a checkpoint of a detector or segmenter has them.

    ``module.`` in front of all names goes too; a checkpoint without ``backbone.`` keeps the rest as it is.
    """
    bare = {name.removeprefix("module."): value for name, value in state.items()}
    inside = {name.removeprefix("backbone."): value for name, value in bare.items() if name.startswith("backbone.")}
    return inside or bare


def check_settings(counts: Mapping[str, Any] | None = None, rates: Mapping[str, float] | None = None) -> None:
    """Raise ``ValueError`` for a count that is not above 0 and for a rate outside [0, 1); both by their names.

    Args:
        counts: numbers, or sequences of them, one a stage.
        rates: probabilities of dropping something.
    """
    for name, given in (counts or {}).items():
        if not all(value > 0 for value in (given if isinstance(given, Sequence) else (given,))):
            raise ValueError(f"{name} {given}: it must be above 0.")
    for name, rate in (rates or {}).items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} {rate}: a share that is dropped is at least 0 and below 1.")


def imagenet_cfg(first_conv: str, classifier: str, **overrides: Any) -> dict[str, Any]:
    """timm's ``default_cfg`` of a network trained on ImageNet at 224 pixels: what is not usual is given.

    Args:
        first_conv: name of the convolution that reads the image.
        classifier: name of the last linear layer.
        overrides: entries that differ, and those that some networks only have (``hf_hub_id``, ``license``, …).
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
        **overrides,
    }
