"""Taking filters out of a network for good: whatever is joined to them shrinks with them.

Residual sums, concatenations, norms and flattened heads tie the channels of several layers together; the dependency
graph of torch-pruning (Fang et al., arXiv 2301.12900) finds those groups. What is ours is what users of such tools
stumble over: groups that cannot be cut are found out on a copy and named instead of breaking the network, grouped
convolutions lose the same channels of every group, and original indices are remembered.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import UserError, extra
from isthmus.compression.filter_scores import LAYERS


@dataclass(frozen=True)
class Group:
    """Channels that have to go together.

    Attributes:
        root: the layer that names the group.
        members: layer → its filter for each of the root's channels, ``(channels,)``.
        units: ``(U, G)`` channels of the root that go at once; G is 1 but for grouped convolutions.
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
            place = next((i for i, g in enumerate(self.groups) if name in g.members), None)
            if place is None:
                raise ValueError(f"filters of {name} cannot go: {self.excluded.get(name, 'it is no layer of these')}.")
            group = self.groups[place]
            channel = {int(f): c for c, f in enumerate(group.members[name])}
            unit_of = {int(c): u for u, row in enumerate(group.units) for c in row}
            for index in wanted:
                if int(index) not in channel:
                    raise ValueError(f"{name} has filters 0 to {len(channel) - 1}, asked to remove {index}.")
                units.append((place, unit_of[channel[int(index)]]))
        self.remove_units(units)

    def remove_units(self, units: Sequence[tuple[int, int]]) -> None:
        """Take units out: ``(number of the group, number of the unit)``. See :meth:`remove`."""
        chosen: dict[int, set[int]] = {}
        for place, unit in units:
            chosen.setdefault(place, set()).add(unit)
        for place, gone in chosen.items():
            if len(gone) >= len(self.groups[place].units):
                raise ValueError(f"{self.groups[place].root} would lose all its filters; leave one at least.")
        frozen = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        for place, gone in chosen.items():
            group = self.groups[place]
            channels = group.units[sorted(gone)].flatten().sort().values
            _cut(self._graph, dict(self.model.named_modules())[group.root], channels.tolist())
            self.groups[place] = self._shrunk(group, channels)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(frozen[name])
        _tell_timm(self.model)
        try:
            with _still(self.model), torch.no_grad():
                self.model(self.example)
        except Exception as error:
            cut = ", ".join(self.groups[place].root for place in chosen)
            raise UserError(
                f"{type(self.model).__name__} does not run any more after {cut} were cut ({_brief(error)}); leave "
                "those layers out."
            ) from error

    # -------------------------------------------------------------------------------------------------------- parts

    def _find(self, answering: set[str]) -> list[Group]:
        """Every group of layers that may go and whose channels match one to one."""
        asked, found = set(self.layers), []
        with _quiet():
            described = list(self._graph.get_all_groups(root_module_types=LAYERS))
        for parts in described:
            members: dict[str, Tensor] = {}
            shared, problem = 1, ""
            root = self._names[parts[0].dep.target.module]
            count = len(parts[0].idxs)
            for part in parts:
                dep, module = part.dep, part.dep.target.module
                shared = math.lcm(shared, _shared(module, count))
                if not isinstance(module, LAYERS) or not self._graph.is_out_channel_pruning_fn(dep.handler):
                    continue
                name, index = self._names[module], torch.full((count,), -1)
                for own, of_root in zip(part.idxs, part.root_idxs, strict=True):
                    index[of_root] = own
                if _width(module) != count or not torch.equal(index.sort().values, torch.arange(count)):
                    problem = f"{name} has {_width(module)} filters, {root}, which it is added to, {count}"
                members[name] = index
            if answering & members.keys():
                problem = "it makes the answer"
            if shared > 1 and count % shared == 0 and count // shared < 2:
                problem = f"a convolution in {count} groups has one channel of each"
            if problem or count % shared:
                for name in members:
                    self.excluded[name] = problem or f"{count} filters do not divide into {shared} groups"
            elif asked & members.keys():
                units = torch.arange(count).view(shared, count // shared).T
                found.append(Group(root, members, units))
        return found

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
                    _cut(graph, modules[group.root], group.units[-1].tolist())
                after = trial(self.example)
        except Exception as error:
            return f"the network does not run without one of its filters ({_brief(error)})"
        return "" if _shape(before) == _shape(after) else "the answer would have another shape"

    def _shrunk(self, group: Group, channels: Tensor) -> Group:
        stays = torch.ones(group.units.numel(), dtype=torch.bool)
        stays[channels] = False
        members = {}
        for name, index in group.members.items():
            gone = torch.zeros(len(stays), dtype=torch.bool)
            gone[index[channels]] = True
            self.left[name] = self.left[name][~gone]
            members[name] = (torch.cumsum(~gone, 0) - 1)[index[stays]]
        count, shared = int(stays.sum()), group.units.shape[1]
        return Group(group.root, members, torch.arange(count).view(shared, count // shared).T)


def _graph(model: nn.Module, example: Tensor) -> Any:
    pruning = extra("torch_pruning", "relevance")
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        with _still(model), torch.enable_grad(), _quiet():
            model.requires_grad_(True)
            return pruning.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)
    except Exception as error:
        raise UserError(f"the layers of {type(model).__name__} cannot be traced ({_brief(error)}).") from error
    finally:
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)


def _cut(graph: Any, module: nn.Module, channels: list[int]) -> None:
    with _quiet():
        graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, channels).prune()


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


def _tell_timm(model: Any) -> None:
    """Models of timm state the width of what their classifier sees."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(head, nn.Linear):
        for name in ("num_features", "head_hidden_size"):
            if isinstance(getattr(model, name, None), int):
                setattr(model, name, head.in_features)


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
