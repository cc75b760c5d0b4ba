"""Networks that are one chain of named stages, with the habits that timm's own models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

from isthmus.encoders.images.pyramid import check_images


class NamedStages(nn.Module):
    """A chain of stages and a head of stages; the last stage of the head is ``classifier``.

    Every stage can be asked for by name (:meth:`named_features`), and timm's interface stands on top:
    ``forward_features``, ``forward_head``, ``forward_intermediates``, ``reset_classifier``, ``feature_info``.

    Args:
        stages: name → module, in order; together they are ``forward_features``.
        head: name → module, in order, without the classifier; together with it they are ``forward_head``.
        feature_info: for every level of the pyramid its ``num_chs``, its ``reduction`` (input pixels per cell) and the
            name of the stage that makes it (``stage``).
        num_features: channels after the last stage.
        head_hidden_size: inputs of the classifier.
        num_classes: its outputs; 0 leaves it out.
        in_chans: channels of the input.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        stages: dict[str, nn.Module],
        head: dict[str, nn.Module],
        feature_info: Sequence[dict[str, Any]],
        num_features: int,
        head_hidden_size: int,
        num_classes: int,
        in_chans: int,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.head = nn.ModuleDict({**head, "classifier": _classifier(head_hidden_size, num_classes)})
        self.feature_info = [{**level, "module": f"stages.{level['stage']}"} for level in feature_info]
        self.num_features = num_features
        self.head_hidden_size = head_hidden_size
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Every name that :meth:`named_features` knows, in the order of the forward pass."""
        return (*self.stages, *self.head)

    def named_features(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of the named stages, in the order asked for; nothing deeper than the deepest of them is run.

        Args:
            x: images ``(B, in_chans, H, W)``.
            names: some of :attr:`stage_names`.

        Raises:
            ValueError: no name, a repeated name, or one that the network does not have.
        """
        if isinstance(names, str):
            raise ValueError(f"names is a list of stages; write [{names!r}] for one.")
        if not names:
            raise ValueError(f"name at least one stage: {', '.join(self.stage_names)}.")
        if len(set(names)) != len(names):
            raise ValueError(f"every stage can be asked for once; {list(names)} repeats one.")
        unknown = [name for name in names if name not in self.stage_names]
        if unknown:
            raise ValueError(f"no stage {', '.join(map(repr, unknown))}; there are {', '.join(self.stage_names)}.")
        found: dict[str, Tensor] = {}
        for name in self.stage_names:
            x = self._stage(name, x) if name in self.stages else self.head[name](x)
            if name in names:
                found[name] = x
            if len(found) == len(names):
                break
        return {name: found[name] for name in names}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` to the map of the last stage ``(B, num_features, h, w)``."""
        for name in self.stages:
            x = self._stage(name, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """That map to logits ``(B, num_classes)``, or to the classifier's input with ``pre_logits``."""
        for name, module in self.head.items():
            if name == "classifier":
                x = dropout(x, self.drop_rate, self.training)
            if not (pre_logits and name == "classifier"):
                x = module(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's interface to the levels of ``feature_info``: all, the last n, or those of the given indices."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}.")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        level_of = {level["stage"]: i for i, level in enumerate(self.feature_info)}
        found: dict[int, Tensor] = {}
        for name in self.stages:
            x = self._stage(name, x)
            if name in level_of:
                found[level_of[name]] = x
                if level_of[name] == last and (stop_early or intermediates_only):
                    break
        intermediates = [found[i] for i in wanted]
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: drop the stages after the last level asked for, and the head."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        names = list(self.stages)
        deeper = names[names.index(self.feature_info[last]["stage"]) + 1 :]
        for name in deeper:
            del self.stages[name]
        if prune_head or deeper:
            self.head, self.num_classes = nn.ModuleDict({"classifier": nn.Identity()}), 0
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        return list(take)

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity where there is none."""
        return self.head["classifier"]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for ``num_classes`` (0: none), and another global pooling where one is given.

        Raises:
            ValueError: a pooling, for a network whose head has none that could be another.
        """
        if global_pool is not None and "pool" in self.head:
            self.head["pool"] = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        elif global_pool is not None:
            raise ValueError(f"{type(self).__name__} has a fixed head; it takes no global_pool={global_pool!r}.")
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head["classifier"] = _classifier(self.head_hidden_size, num_classes).to(like.device, like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every stage in the backward pass instead of keeping its insides."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's pattern for layer-wise learning rates: a group for every convolutional stage."""
        return {"stem": r"^stages\.conv1\.", "blocks": r"^stages\.conv(\d+)"}

    def _stage(self, name: str, x: Tensor) -> Tensor:
        if name == self.stage_names[0]:
            check_images(x, self.in_chans)
        if self.grad_checkpointing and self.training:
            return checkpoint(self.stages[name], x, use_reentrant=False)  # type: ignore[return-value]
        return self.stages[name](x)


def _classifier(features: int, classes: int) -> nn.Module:
    return nn.Linear(features, classes) if classes > 0 else nn.Identity()
