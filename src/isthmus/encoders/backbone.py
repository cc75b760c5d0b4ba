"""Any timm model as an encoder: a pyramid of maps, asked for by reduction and never by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import FeatureInfo, UserError, create_timm, part


@part
@checked
class Backbone(nn.Module):
    """A timm model whose ``forward`` returns maps ``(B, C, H, W)``, finest first.

    ``Backbone("resnet50")(images)`` returns four maps of reduction 4, 8, 16 and 32. The whole model, head included,
    stays in ``model``: save its ``state_dict`` and timm loads it.

    Args:
        model: a timm model or a timm name; keyword arguments go to ``timm.create_model``.
        reductions: the levels wanted, as input pixels per cell, ascending. Default: 4, 8, 16, 32 as far as the model
            has them, or its only level (plain ViTs). Where several stages share a reduction the deepest is taken.

    Raises:
        UserError: an unknown timm name, or a reduction that the model does not have.
    """

    def __init__(self, model: nn.Module | str, reductions: Sequence[Count] | None = None, **timm_kwargs: Any) -> None:
        super().__init__()
        if isinstance(model, str):
            model = create_timm(model.removeprefix("timm:"), **timm_kwargs)
        elif timm_kwargs:
            raise UserError(f"{', '.join(timm_kwargs)}: timm arguments are for a model given by name.")
        self.model = model
        levels = _levels(model)
        wanted = list(reductions) if reductions is not None else [r for r in levels if r >= 4] or list(levels)
        missing = [r for r in wanted if r not in levels]
        if missing or wanted != sorted(set(wanted)) or not wanted:
            raise UserError(
                f"{type(model).__name__} has levels of reduction {sorted(levels)}; {wanted} was asked for "
                "(ascending, without repeats)."
            )
        self._chosen = [levels[r] for r in wanted]
        self.feature_info = [FeatureInfo(level["num_chs"], level["reduction"]) for level in self._chosen]

    def part_arguments(self) -> dict[str, Any]:
        """What a file has to say to make this again: the model as it is now, merged branches included."""
        return {"model": self.model, "reductions": [level.reduction for level in self.feature_info]}

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images ``(B, C, H, W)`` to maps ``(B, C_l, H / r_l, W / r_l)``, one for every reduction asked for."""
        if hasattr(self.model, "forward_intermediates"):
            indices = [level["index"] for level in self._chosen]
            model = cast(Any, self.model)
            return list(
                model.forward_intermediates(
                    x, indices=indices, output_fmt="NCHW", intermediates_only=True, stop_early=True
                )
            )
        return self._hooked(x)

    def _hooked(self, x: Tensor) -> list[Tensor]:
        """For the few timm models without ``forward_intermediates``: listen at the modules of ``feature_info``."""
        caught: dict[str, Tensor] = {}
        handles = []
        for level in self._chosen:
            name = level["module"]

            def keep(_module: nn.Module, _inputs: Any, output: Tensor, name: str = name) -> None:
                caught[name] = output

            handles.append(self.model.get_submodule(name).register_forward_hook(keep))
        try:
            cast(Any, self.model).forward_features(x)
        finally:
            for handle in handles:
                handle.remove()
        return [caught[level["module"]] for level in self._chosen]


def made_for(name: str, size: int | None) -> dict[str, Any]:
    """What ``timm.create_model(name)`` needs for pictures of ``size`` pixels a side, if they are no other than its own.

    Most convolutional networks take any size; plain ViTs and window attention are made for one, set by ``img_size``.
    """
    import timm

    name = name.removeprefix("timm:")
    wanted = timm.get_pretrained_cfg(name) if size is not None and timm.is_model(name) else None
    if size is None or wanted is None or not wanted.fixed_input_size or wanted.input_size[1:] == (size, size):
        return {}
    return {"img_size": size}


def reductions_within(name: str, size: int, cells: int = 4) -> tuple[int, ...]:
    """The reductions of a timm model at which pictures of ``size`` pixels have at least ``cells`` cells a side.

    Raises:
        UserError: there is none.
    """
    with torch.device("meta"):
        known = [info.reduction for info in Backbone(name).feature_info]
    levels = tuple(level for level in known if level * cells <= size)
    if not levels:
        raise UserError(
            f"images of {size} pixels leave no scale of {name} ({known}) with {cells} patches a side; use larger "
            f"images (--size {cells * known[0]}), or name the scales with --levels."
        )
    return levels


def _levels(model: nn.Module) -> dict[int, dict[str, Any]]:
    """Reduction → the deepest level of that reduction, from timm's own ``feature_info``."""
    info = getattr(model, "feature_info", None)
    if not info:
        raise UserError(
            f"{type(model).__name__} does not describe its features (no feature_info), so it is no backbone."
        )
    entries = list(info.info) if hasattr(info, "info") else list(info)
    levels: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        levels[int(entry["reduction"])] = {**entry, "index": index}
    return dict(sorted(levels.items()))
