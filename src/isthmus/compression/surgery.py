"""Taking filters out of a network for good: whatever is joined to them shrinks with them.

Residual sums, concatenations, norms and flattened heads tie the channels of several layers together; the dependency
graph of torch-pruning (Fang et al., arXiv 2301.12900) finds those groups. What is ours is what users of such tools
stumble over: groups that cannot be cut are found out on a copy and named instead of breaking the network, grouped
convolutions lose the same channels of every group, and original indices are remembered.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import UserError, extra
from isthmus.compression.filter_scores import LAYERS
from isthmus.compression.padding import PaddingPruner, shift_channels
from isthmus.layers.padded_shortcut import PaddedShortcut


@dataclass(frozen=True)
class Group:
    """Channels of several layers, each tied to one of every other.

    Attributes:
        root: the layer that names the group.
        members: layer → its filter for each channel of the group, ``(channels,)``; those may be a part of its filters.
        units: ``(U, G)`` channels that go at once; G is 1 but for grouped convolutions.
    """

    root: str
    members: dict[str, Tensor]
    units: Tensor

    @property
    def cost(self) -> int:
        """Filters that a unit takes with it."""
        return self.units.shape[1] * len(self.members)

    def score(self, scores: Mapping[str, Tensor], join: str = "sum") -> Tensor:
        """``(U,)``: scores of all filters of a unit, joined by ``sum``, ``max`` or ``mean``.

        Raises:
            ValueError: another word, or no member has scores.
        """
        if join not in ("sum", "max", "mean"):
            raise ValueError(f"scores of coupled filters are joined by sum, max or mean, got {join!r}.")
        rows = [scores[name][index][self.units] for name, index in self.members.items() if name in scores]
        if not rows:
            raise ValueError(f"no layer of the group of {self.root} has scores.")
        values = torch.cat(rows, 1)
        return values.amax(1) if join == "max" else values.sum(1) if join == "sum" else values.mean(1)


class Surgery:
    """A network on the table; it is changed in place.

    Args:
        model: as it runs on ``example``; its mode and its frozen parameters stay as they are.
        example: an input, a batch of one will do.
        layers: names of layers whose filters may go; all convolutions and linear layers without it.

    Attributes:
        groups: what can go, in the order of the network.
        excluded: layer → why its filters stay.
        left: layer → original indices of the filters that it still has.

    Raises:
        UserError: torch-pruning is missing, or nothing can be cut.
    """

    def __init__(self, model: nn.Module, example: Tensor, layers: Iterable[str] | None = None) -> None:
        self.model, self.example = model, example[:1]
        self.excluded: dict[str, str] = {}
        self._names = {module: name for name, module in model.named_modules()}
        all_layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
        self.layers = all_layers if layers is None else list(layers)
        self.left = {name: torch.arange(_width(dict(model.named_modules())[name])) for name in all_layers}
        self.groups: list[Group] = []
        self._told = _told(model, self.example)
        self._graph = _graph(model, self.example)
        found = self._find(_answering(model, self.example))
        self.groups = self._tried(found)
        if not self.groups:
            told = "; ".join(f"{name}: {why}" for name, why in list(self.excluded.items())[:3])
            raise UserError(f"no filter of {type(model).__name__} can be taken out ({told or 'no layers'}).")

    @property
    def filters(self) -> int:
        """Filters that could go if there were no floor."""
        return sum(len(group.units) * group.cost for group in self.groups)

    def remove(self, filters: Mapping[str, Sequence[int]]) -> None:
        """Take filters out, given as present indices; what is coupled to them goes too.

        Raises:
            ValueError: a layer that cannot be cut, a filter that is not there, or a layer that would be emptied.
            UserError: the network does not run any more.
        """
        units: list[tuple[int, int]] = []
        for name, wanted in filters.items():
            if not len(wanted):
                continue
            unit_of: dict[int, tuple[int, int]] = {}
            for place, group in enumerate(self.groups):
                if name in group.members:
                    for unit, channels in enumerate(group.units):
                        unit_of |= {int(f): (place, unit) for f in group.members[name][channels]}
            if not unit_of:
                raise ValueError(f"filters of {name} cannot go: {self.excluded.get(name, 'it is no layer of these')}.")
            for index in wanted:
                if not 0 <= int(index) < len(self.left[name]):
                    raise ValueError(f"{name} has filters 0 to {len(self.left[name]) - 1}, asked to remove {index}.")
                if int(index) not in unit_of:
                    raise ValueError(f"filter {index} of {name} cannot go; others of this layer can.")
                units.append(unit_of[int(index)])
        self.remove_units(units)

    def remove_units(self, units: Sequence[tuple[int, int]]) -> None:
        """Take units out: ``(number of the group, number of the unit)``. See :meth:`remove`."""
        chosen: dict[int, set[int]] = {}
        for place, unit in units:
            chosen.setdefault(place, set()).add(unit)
        losses = Counter[str]()
        for place, gone in chosen.items():
            group = self.groups[place]
            losses.update(dict.fromkeys(group.members, len(gone) * group.units.shape[1]))
        for name, lost in losses.items():
            if lost >= len(self.left[name]):
                raise ValueError(f"{name} would lose all its filters; leave one at least.")
        frozen = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        for place, gone in chosen.items():
            group = self.groups[place]
            channels = group.units[sorted(gone)].flatten().sort().values
            _cut(self._graph, dict(self.model.named_modules())[group.root], group.members[group.root][channels])
            self._shrink(place, channels)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(frozen[name])
        try:
            with _still(self.model), torch.no_grad():
                self.model(self.example)
                for (owner, name), width in self._told.items():
                    setattr(owner, name, width())
        except Exception as error:
            cut = ", ".join(self.groups[place].root for place in chosen)
            raise UserError(
                f"{type(self.model).__name__} does not run any more after {cut} were cut ({_brief(error)}); leave "
                "those layers out."
            ) from error

    # -------------------------------------------------------------------------------------------------------- parts

    def _find(self, answering: set[str]) -> list[Group]:
        """Every group of layers that may go and whose channels match one to one."""
        asked, found, seen = set(self.layers), [], set[str]()
        with _quiet():
            described = list(self._graph.get_all_groups(root_module_types=LAYERS))
        for parts in described:
            parts = self._widest(parts)
            members: dict[str, Tensor] = {}
            shared, problem = 1, ""
            root = self._names[parts[0].dep.target.module]
            if root in seen:
                continue
            count = len(parts[0].idxs)
            for part in parts:
                module = part.dep.target.module
                shared = math.lcm(shared, _shared(module, count))
                if not self._loses_filters(part):
                    continue
                name, index = self._names[module], torch.full((count,), -1)
                for own, of_root in zip(part.idxs, part.root_idxs, strict=True):
                    index[of_root] = own
                if not torch.equal(index[index >= 0].sort().values, torch.arange(_width(module))):
                    problem = f"{name} has {_width(module)} filters, {root}, which it is added to, {count}"
                members[name] = index
            seen |= members.keys()
            if answering & members.keys():
                problem = "it makes the answer"
            if shared > 1 and count % shared == 0 and count // shared < 2:
                problem = f"a convolution in {count} groups has one channel of each"
            if shared > 1 and any(bool((index < 0).any()) for index in members.values()):
                problem = f"a part of its filters goes through {shared} groups"
            if problem or count % shared:
                for name in members:
                    self.excluded[name] = problem or f"{count} filters do not divide into {shared} groups"
            elif asked & members.keys():
                found += [group for group in _parted(root, members, shared) if asked & group.members.keys()]
        return found

    def _widest(self, parts: Any) -> Any:
        """The group as its widest layer sees it: where channels are appended, a narrower one does not see them all."""
        root = parts[0].dep.target.module
        widest = max((p.dep.target.module for p in parts if self._loses_filters(p)), key=_width, default=root)
        if _width(widest) <= _width(root):
            return parts
        everything = list(range(_width(widest)))
        return self._graph.get_pruning_group(
            widest, self._graph.get_pruner_of_module(widest).prune_out_channels, everything
        )

    def _loses_filters(self, part: Any) -> bool:
        return isinstance(part.dep.target.module, LAYERS) and self._graph.is_out_channel_pruning_fn(part.dep.handler)

    def _tried(self, groups: list[Group]) -> list[Group]:
        """Those groups that a copy of the network survives losing a unit of."""
        groups = [g for g in groups if len(g.units) > 1]
        if not groups or self._survives(groups) == "":
            return groups
        usable = []
        for group in groups:
            told = self._survives([group])
            if told == "":
                usable.append(group)
            else:
                self.excluded |= dict.fromkeys(group.members, told)
        return usable

    def _survives(self, groups: Sequence[Group]) -> str:
        """Empty, or why not."""
        trial = copy.deepcopy(self.model)
        try:
            graph, modules = _graph(trial, self.example), dict(trial.named_modules())
            with torch.no_grad(), _still(self.model), _still(trial):
                before = self.model(self.example)
                for group in groups:
                    _cut(graph, modules[group.root], group.members[group.root][group.units[-1]])
                after = trial(self.example)
        except Exception as error:
            return f"the network does not run without one of its filters ({_brief(error)})"
        return "" if _shape(before) == _shape(after) else "the answer would have another shape"

    def _shrink(self, place: int, channels: Tensor) -> None:
        """The group without these channels; what is left is numbered anew, also in groups that share a layer."""
        group = self.groups[place]
        stays = torch.ones(group.units.numel(), dtype=torch.bool)
        stays[channels] = False
        for name, index in group.members.items():
            keeps = torch.ones(len(self.left[name]), dtype=torch.bool)
            keeps[index[channels]] = False
            self.left[name] = self.left[name][keeps]
            numbers = torch.cumsum(keeps, 0) - 1
            for other, one in enumerate(self.groups):
                if name in one.members:
                    rest = one.members[name][stays] if other == place else one.members[name]
                    self.groups[other] = replace(one, members={**one.members, name: numbers[rest]})
        count, shared = int(stays.sum()), group.units.shape[1]
        units = torch.arange(count).view(shared, count // shared).T
        self.groups[place] = replace(self.groups[place], units=units)


def _parted(root: str, members: dict[str, Tensor], shared: int) -> list[Group]:
    """One group, or one for every set of layers that share channels, where some layers lack some."""
    count = len(members[root])
    if shared > 1 or all(bool((index >= 0).all()) for index in members.values()):
        return [Group(root, members, torch.arange(count).view(shared, count // shared).T)]
    present: dict[tuple[bool, ...], list[int]] = {}
    for channel, row in enumerate(torch.stack(list(members.values()), 1) >= 0):
        present.setdefault(tuple(row.tolist()), []).append(channel)
    groups = []
    for layers, channels in present.items():
        names = [name for name, there in zip(members, layers, strict=True) if there]
        index = {name: members[name][channels] for name in names}
        groups.append(Group(root, index, torch.arange(len(channels))[:, None]))
    return groups


def _graph(model: nn.Module, example: Tensor) -> Any:
    pruning = extra("torch_pruning", "relevance")
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        with _still(model), torch.enable_grad(), _quiet():
            model.requires_grad_(True)
            known = {PaddedShortcut: PaddingPruner()}
            graph = pruning.DependencyGraph()
            graph.build_dependency(model, example_inputs=example, customized_pruners=known, verbose=False)
            shift_channels(graph)
            return graph
    except Exception as error:
        raise UserError(f"the layers of {type(model).__name__} cannot be traced ({_brief(error)}).") from error
    finally:
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)


def _cut(graph: Any, module: nn.Module, filters: Tensor) -> None:
    with _quiet():
        graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, filters.tolist()).prune()


def _shared(module: Any, count: int) -> int:
    """Groups that channels of a layer are dealt out to, when that ties them to one another."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups if module.num_groups not in (1, count) else 1
    groups = getattr(module, "groups", 1) if isinstance(module, LAYERS) else 1
    depthwise = groups > 1 and groups == module.out_channels == module.in_channels
    return 1 if depthwise else groups


def _width(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _answering(model: nn.Module, example: Tensor) -> set[str]:
    """Layers whose output is what the model returns."""
    outputs: list[tuple[str, Tensor]] = []
    handles = [
        m.register_forward_hook(lambda _m, _i, out, name=name: outputs.append((name, out)))  # type: ignore[misc]
        for name, m in model.named_modules()
        if isinstance(m, LAYERS)
    ]
    try:
        with _still(model), torch.no_grad():
            answer = model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(answer, Tensor):
        raise UserError(
            f"{type(model).__name__} returns a {type(answer).__name__}; wrap it so that it returns a tensor."
        )
    memory = answer.untyped_storage().data_ptr()
    return {name for name, out in outputs if out.untyped_storage().data_ptr() == memory}


def _told(model: Any, example: Tensor) -> dict[tuple[Any, str], Callable[[], int]]:
    """Widths that models of timm and their heads state → how to read them off again: of what the head gets, and of its
    classifier."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(head, nn.Linear):
        return {}
    heads = [m for m in model.children() if hasattr(m, "reset") and any(inner is head for inner in m.modules())]
    names = ("num_features", "embed_dim", "head_hidden_size", "in_features")
    found: dict[tuple[Any, str], Callable[[], int]] = {
        (owner, name): lambda: model.get_classifier().in_features
        for owner, name in itertools.product([model, *heads], names)
        if getattr(owner, name, None) == head.in_features
    }
    with _still(model), torch.no_grad():
        maps = model.forward_features(example) if hasattr(model, "forward_features") else None
    axes = (
        [a for a in range(1, maps.ndim) if maps.shape[a] == getattr(model, "num_features", None)]
        if isinstance(maps, Tensor)
        else []
    )
    if len(axes) == 1:
        found[model, "num_features"] = lambda: model.forward_features(example).shape[axes[0]]
    return found


def _shape(out: Any) -> Any:
    return tuple(out.shape) if isinstance(out, Tensor) else type(out)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:140] or type(error).__name__


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """torch-pruning warns of parameters that it has to guess the pruned axis of; trying them out is the answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
