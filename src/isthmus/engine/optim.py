"""Optimisers, their parameter groups and their schedules.

Groups carry two factors of their own, ``lr_scale`` and ``wd_scale``; at every step the loop sets
``lr = schedule_lr * lr_scale`` and ``weight_decay = schedule_wd * wd_scale``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from isthmus.codec import UserError

NO_DECAY = ("mask_token", "gamma", "cls_token", "pos_embed")
"""Parameters whose names contain one of these get no weight decay, like norms and biases (SparK, arXiv 2301.03580)."""


# --------------------------------------------------------------------------------------------------------- schedules


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay as a function of the step alone.

    The learning rate climbs linearly from ``warmup_from * lr`` to ``lr`` within ``warmup_steps`` and then follows
    ``shape`` so that the last step, ``steps - 1``, has ``final_lr_ratio * lr`` (cosine, linear), or drops by ``gamma``
    at every milestone (multistep), or stays (constant). The weight decay follows a half cosine from ``weight_decay`` to
    ``weight_decay_end`` over all steps, the warm-up included.

    Args:
        lr: peak learning rate.
        steps: number of optimiser steps.
        weight_decay, weight_decay_end: at the first and the last step; ``None`` keeps the first.
        shape: ``cosine``, ``linear``, ``multistep`` or ``constant``.
        warmup_steps, warmup_from: length of the warm-up and its start as a share of ``lr``.
        final_lr_ratio: end of the cosine and linear shapes as a share of ``lr``.
        milestones, gamma: steps of the multistep shape and the factor applied at each.
    """

    lr: float
    steps: int
    weight_decay: float = 0.0
    weight_decay_end: float | None = None
    shape: str = "cosine"
    warmup_steps: int = 0
    warmup_from: float = 0.005
    final_lr_ratio: float = 0.001
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def at(self, step: int) -> tuple[float, float]:
        """Learning rate and weight decay of one step, counted from 0."""
        wd, wd_end = self.weight_decay, self.weight_decay_end
        if wd_end is not None:
            wd = wd_end + (wd - wd_end) * _half_cosine(step / max(1, self.steps - 1))
        if step < self.warmup_steps:
            return self.lr * (self.warmup_from + (1 - self.warmup_from) * step / self.warmup_steps), wd
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        if self.shape == "cosine":
            share = self.final_lr_ratio + (1 - self.final_lr_ratio) * _half_cosine(progress)
        elif self.shape == "linear":
            share = 1 + (self.final_lr_ratio - 1) * progress
        elif self.shape == "multistep":
            share = self.gamma ** sum(step >= milestone for milestone in self.milestones)
        elif self.shape == "constant":
            share = 1.0
        else:
            raise ValueError(f"shape must be cosine, linear, multistep or constant, got {self.shape!r}.")
        return self.lr * share, wd


def _half_cosine(progress: float) -> float:
    """1 at 0, 0 at 1."""
    return 0.5 + 0.5 * math.cos(math.pi * progress)


# ------------------------------------------------------------------------------------------------- parameter groups


def param_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    lr: float | None = None,
    no_decay: Iterable[str] | None = NO_DECAY,
) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by learning-rate factor and by whether they decay.

    No weight decay: one-dimensional parameters, names that end in ``.bias``, names that contain a word of ``no_decay``,
    and what a timm model lists in ``no_weight_decay()``.

    Args:
        model: whose ``named_parameters`` are grouped; frozen ones are left out.
        weight_decay: of the groups that decay.
        layer_decay: factor a layer, see :func:`layer_ids`; ``lr_scale = layer_decay ** (top - id)``.
        lr: written into the groups as ``lr * lr_scale`` where given.
        no_decay: words as above; ``None`` lets every parameter decay.

    Returns:
        Groups of ``params, names, lr_scale, wd_scale, weight_decay`` (and ``lr``).
    """
    ids, top = _layers(model) if layer_decay != 1.0 else ({}, 0)
    words = None if no_decay is None else (*no_decay, *_listed_by_timm(model))
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = words is not None and (
            parameter.ndim <= 1 or name.endswith(".bias") or any(word in name for word in words)
        )
        lr_scale, wd_scale = layer_decay ** (top - ids.get(name, top)), 0.0 if bare else 1.0
        if (lr_scale, wd_scale) not in groups:
            rates = {} if lr is None else {"lr": lr * lr_scale}
            decay = {"lr_scale": lr_scale, "wd_scale": wd_scale, "weight_decay": weight_decay * wd_scale}
            groups[lr_scale, wd_scale] = {"params": [], "names": [], **decay, **rates}
        groups[lr_scale, wd_scale]["params"].append(parameter)
        groups[lr_scale, wd_scale]["names"].append(name)
    return list(groups.values())


def _listed_by_timm(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        if callable(listed := getattr(module, "no_weight_decay", None)):
            yield from (f"{prefix}.{name}" if prefix else name for name in listed())  # type: ignore[union-attr]


def layer_ids(model: nn.Module | Sequence[str]) -> dict[str, int]:
    """Layer number of every parameter, 0 next to the input; layer decay counts from the highest.

    ResNet-50/101/152/200 and ConvNeXt follow SparK's fine-tuning (arXiv 2301.03580), by timm's or the original names;
    any other timm model follows its own ``group_matcher``. Where the model is only a part of ``model``, parameters
    outside of it (heads, losses) belong to the last layer.

    Args:
        model: a module, or just the names of its parameters.

    Raises:
        UserError: no part of the module tells how its layers are ordered.
    """
    return _layers(model)[0]


def _layers(model: nn.Module | Sequence[str]) -> tuple[dict[str, int], int]:
    """Layer numbers, and the number of the layer that keeps the full learning rate."""
    if not isinstance(model, nn.Module):
        numbered = _resnet_layers(list(model)) or _convnext_layers(list(model))
        if numbered is None:
            raise UserError("these parameter names belong to no ResNet or ConvNeXt; give the module itself.")
        return numbered
    for prefix, module in model.named_modules():
        if not callable(getattr(module, "group_matcher", None)):
            continue
        names = [name for name, _ in module.named_parameters()]
        ids, top = _resnet_layers(names) or _convnext_layers(names) or _timm_layers(module)
        inside = {f"{prefix}.{name}" if prefix else name: number for name, number in ids.items()}
        return {name: inside.get(name, top) for name, _ in model.named_parameters()}, top
    raise UserError(f"layer decay needs a timm model, whose layers are ordered; {type(model).__name__} holds none.")


def _timm_layers(module: nn.Module) -> tuple[dict[str, int], int]:
    from timm.models import group_parameters

    matched: Any = group_parameters(module, module.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    return matched, max(matched.values())


_RESNET_GROUPS: dict[tuple[int, ...], tuple[int, int]] = {
    (3, 4, 6, 3): (2, 3),
    (3, 4, 23, 3): (2, 3),
    (3, 8, 36, 3): (4, 4),
    (3, 24, 36, 3): (4, 4),
}
"""Depths of ResNet-50, 101, 152 and 200: blocks that form one layer in stages 2 and 3."""


def _resnet_layers(names: list[str]) -> tuple[dict[str, int], int] | None:
    """Stem 0, stage 1 one layer, stages 2 and 3 cut into layers of a few blocks, stage 4 one layer, then the head."""
    blocks = [re.match(r"layer([1-4])\.(\d+)\.", name) for name in names]
    depths = [1 + max((int(b[2]) for b in blocks if b and b[1] == str(s)), default=-1) for s in (1, 2, 3, 4)]
    sizes = _RESNET_GROUPS.get(tuple(depths))
    if sizes is None:
        return None
    size2, size3 = sizes
    third = 2 + math.ceil(depths[1] / size2)
    fourth = third + math.ceil(depths[2] / size3)

    def number(name: str, block: re.Match[str] | None) -> int:
        if block is None:
            return fourth + 1 if name.startswith(("fc.", "head.")) else 0
        stage, index = int(block[1]), int(block[2])
        return {1: 1, 2: 2 + index // size2, 3: third + index // size3, 4: fourth}[stage]

    return {name: number(name, block) for name, block in zip(names, blocks, strict=True)}, fourth + 1


def _convnext_layers(names: list[str]) -> tuple[dict[str, int], int] | None:
    """Stem 0, stages 1 and 2 one layer each, stage 3 by threes of blocks, stage 4 one layer, then norm and head."""
    parts = [re.match(r"stages\.(\d)\.(?:blocks\.)?(\d+)\.", name) for name in names]
    is_depthwise = [bool(re.search(r"\.(dwconv|conv_dw)\.weight$", name)) for name in names]
    depth = 1 + max(
        (int(p[2]) for p, d in zip(parts, is_depthwise, strict=True) if p and d and p[1] == "2"), default=-1
    )
    if depth == 0 or not any(name.endswith(".gamma") for name in names) or any(".xca." in name for name in names):
        return None
    last = 12 if depth > 9 else 6

    def number(name: str, block: re.Match[str] | None) -> int:
        if block is not None:
            stage, index = int(block[1]), int(block[2])
            return {0: 1, 1: 2, 2: 3 + index // 3, 3: last}[stage]
        if name.startswith(("stem.", "downsample_layers.0.")):
            return 0
        if between := re.match(r"(?:downsample_layers\.(\d)|stages\.(\d)\.downsample)\.", name):
            return {1: 2, 2: 3, 3: last}[int(between[1] or between[2])]
        return last + 1

    return {name: number(name, block) for name, block in zip(names, parts, strict=True)}, last + 1


# -------------------------------------------------------------------------------------------------------- optimisers


def create_optimizer(
    name: str,
    groups: list[dict[str, Any]] | Iterable[nn.Parameter],
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: Sequence[float] | None = None,
    eps: float | None = None,
    momentum: float = 0.9,
    **arguments: Any,
) -> Optimizer:
    """An optimiser of timm by name (``timm.optim.list_optimizers``).

    Args:
        name: adamw, lamb, sgd (Nesterov), momentum (plain), …
        groups: parameters, or groups of them.
        lr, weight_decay: for groups that have none of their own.
        betas, eps: ``None`` is the optimiser's own.
        momentum: for SGD-like optimisers.
        arguments: anything else that the optimiser takes (``max_grad_norm=5.0`` for LAMB).

    Raises:
        UserError: unknown name (nearest ones told), or an argument that this optimiser does not take.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    known = [str(option) for option in list_optimizers()]
    if name.lower() not in known:
        import difflib

        near = ", ".join(difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)) or "adamw, lamb, sgd"
        raise UserError(f"there is no optimiser {name!r}. Nearest: {near}.")
    info = get_optimizer_info(name.lower().split("_")[-1])
    if betas is not None and not info.has_betas:
        raise UserError(f"optimiser {name!r} takes no betas; leave them out.")
    given = {"betas": None if betas is None else tuple(betas), "eps": eps}
    arguments |= {key: value for key, value in given.items() if value is not None}
    try:
        # timm's annotation leaves lists of groups out; its code takes them.
        return create_optimizer_v2(
            groups if isinstance(groups, list) else list(groups),  # type: ignore[arg-type]
            opt=name,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            **arguments,
        )
    except TypeError as error:
        raise UserError(f"optimiser {name!r} does not take all of {', '.join(sorted(arguments))} ({error}).") from error


def complete_groups(groups: list[dict[str, Any]], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of any making with ``lr_scale`` and ``wd_scale``, worked out from their own lr and weight decay."""
    done = []
    for group in groups:
        own_lr, own_wd = group.get("lr", lr), group.get("weight_decay", weight_decay)
        scales = {"lr_scale": own_lr / lr, "wd_scale": own_wd / weight_decay if weight_decay else 1.0}
        done.append({**scales, **group})
    return done


def set_rates(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Write a step's learning rate and weight decay into the groups, times each group's own factors."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["wd_scale"]


def global_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Norm of all gradients together; 0 where there are none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    return nn.utils.get_total_norm(gradients)
