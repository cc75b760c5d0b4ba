"""How much every filter matters: five criteria with the same plumbing.

Yeom et al., arXiv 1912.08881, and what it compares with. A filter is an output channel of a convolution, or a unit of a
linear layer; scores are taken at its output, before the activation, on a handful of labelled reference samples:

- ``relevance``: the relevance that flows through it (:mod:`isthmus.lenses.relevance`),
- ``taylor``: activation times gradient of the loss (Molchanov et al. 2017), ``gradient``: the gradient alone,
- ``weight``: the sum of its absolute weights (Li et al. 2017), ``random``: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import UserError
from isthmus.lenses.relevance import Composite, relevance, resting

Batch = tuple[Tensor, Tensor] | Mapping[str, Any]
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_NAMES = ("relevance", "taylor", "gradient", "weight", "random")
_ABSOLUTE = ("none", "total", "sample", "element")
_NORMALIZE = ("none", "sum", "l1", "l2")


@dataclass(frozen=True)
class Criterion:
    """What filters are ranked by.

    Attributes:
        name: relevance, taylor, gradient, weight or random.
        composite: of relevance: a name of ``isthmus.lenses.relevance.COMPOSITES``, or a composite.
        absolute: when signs are dropped: ``none`` keeps them, ``total`` after summing over all samples (opposite signs
            cancel, as in the released code), ``sample`` after each sample's sum (Molchanov et al.), ``element`` at
            every place (the released ResNet path). Empty: none for relevance, total for gradients.
        normalize: of a layer's scores: ``sum`` divides by their sum, ``l1`` and ``l2`` by their norm. Empty: sum for
            relevance, l2 for gradients, l1 for weights.

    Raises:
        ValueError: an unknown word.
    """

    name: Literal["relevance", "taylor", "gradient", "weight", "random"] = "relevance"
    composite: str | Composite | Any = "zplus"
    absolute: Literal["", "none", "total", "sample", "element"] = ""
    normalize: Literal["", "none", "sum", "l1", "l2"] = ""

    def __post_init__(self) -> None:
        for value, known, word in (
            (self.name, _NAMES, "criterion"),
            (self.absolute, ("", *_ABSOLUTE), "way to drop signs"),
            (self.normalize, ("", *_NORMALIZE), "normalisation"),
        ):
            if value not in known:
                raise ValueError(f"there is no {word} {value!r}; there are {', '.join(k for k in known if k)}.")

    @property
    def drops(self) -> str:
        """``absolute``, the default filled in."""
        return self.absolute or ("none" if self.name == "relevance" else "total")

    @property
    def scale(self) -> str:
        """``normalize``, the default filled in."""
        return self.normalize or {"relevance": "sum", "weight": "l1", "random": "none"}.get(self.name, "l2")


def layers_of(model: nn.Module, kinds: str = "auto") -> list[str]:
    """Names of the layers whose outputs are filters.

    Args:
        model: any.
        kinds: ``conv``, ``linear``, ``all``, or ``auto``: convolutions where there are several, else linear layers.

    Raises:
        UserError: there is none.
    """
    convs = [n for n, m in model.named_modules() if isinstance(m, LAYERS) and not isinstance(m, nn.Linear)]
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if kinds not in ("auto", "conv", "linear", "all"):
        raise ValueError(f"kinds of layers are auto, conv, linear and all, got {kinds!r}.")
    both = [n for n, m in model.named_modules() if isinstance(m, LAYERS)]
    found = {"conv": convs, "linear": linears, "all": both, "auto": convs if len(convs) > 1 else linears}[kinds]
    if not found:
        raise UserError(f"{type(model).__name__} has no {'' if kinds in ('auto', 'all') else kinds + ' '}layers.")
    return found


def filter_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: Criterion | str = "relevance",
    layers: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Layer's name → scores ``(filters,)``; small ones matter least.

    Args:
        model: images to logits; left as it was.
        batches: reference samples, ``(images, labels)`` or dictionaries with those keys; ``weight`` and ``random`` do
            not look at them.
        criterion: what to rank by.
        layers: names; those of :func:`layers_of` without it.
        generator: for ``random``.

    Raises:
        UserError: no samples, or a layer never runs.
        ValueError: labels that the model does not have.
    """
    criterion = Criterion(criterion) if isinstance(criterion, str) else criterion  # type: ignore[arg-type]
    names = list(layers_of(model) if layers is None else layers)
    modules = dict(model.named_modules())
    chosen = {name: modules[name] for name in names}
    if criterion.name == "weight":
        found = {name: _by_filter(module).abs().flatten(1).sum(1) for name, module in chosen.items()}
    elif criterion.name == "random":
        found = {
            name: torch.rand(len(_by_filter(module)), generator=generator).to(_weight(module))
            for name, module in chosen.items()
        }
    else:
        sums = _by_relevance if criterion.name == "relevance" else _by_gradient
        found = sums(model, _pairs(batches), criterion, chosen)
        if criterion.drops == "total":
            found = {name: score.abs() for name, score in found.items()}
    found = {name: _normalized(found[name].detach(), criterion.scale) for name in names}
    for name, score in found.items():
        if not torch.isfinite(score).all():
            raise UserError(f"scores of {name} are not finite; look for NaN in the weights or in the samples.")
    return found


# -------------------------------------------------------------------------------------------------------------- parts


def _by_relevance(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], criterion: Criterion, chosen: dict[str, nn.Module]
) -> dict[str, Tensor]:
    def reduce(name: str, tensor: Tensor) -> Tensor:
        return _summed(tensor, chosen[name], criterion.drops) if name in chosen else tensor.new_zeros(())

    sums: dict[str, Tensor] = {}
    for x, label in batches:
        found = relevance(model, x, label, criterion.composite, reduce=reduce)
        for name in chosen:
            if name not in found:
                raise UserError(f"the layer {name!r} does not run when the model answers; leave it out of layers.")
            sums[name] = sums[name] + found[name] if name in sums else found[name]
    return sums


def _by_gradient(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], criterion: Criterion, chosen: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """Means over samples and places of the gradient, or of activation times gradient, of the cross-entropy."""
    outputs: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            outputs.setdefault(name, []).append(output)
            return output.clone()  # what follows may work in place

        return hook

    sums: dict[str, Tensor] = {}
    with resting(model), torch.enable_grad():
        handles = [module.register_forward_hook(listen(name)) for name, module in chosen.items()]
        try:
            for x, label in batches:
                outputs.clear()
                logits = model(x.detach().clone().requires_grad_())
                if int(label.min()) < 0 or int(label.max()) >= logits.shape[1]:
                    raise ValueError(f"labels must lie in 0 to {logits.shape[1] - 1}, got up to {int(label.max())}.")
                flat = [(name, one) for name, several in outputs.items() for one in several]
                grads = torch.autograd.grad(F.cross_entropy(logits, label), [one for _, one in flat], allow_unused=True)
                for (name, output), grad in zip(flat, grads, strict=True):
                    if grad is None:
                        grad = torch.zeros_like(output)
                    effect = grad * output.detach() if criterion.name == "taylor" else grad
                    places = output.numel() // output.shape[_axis(chosen[name], output)]
                    summed = _summed(effect.detach(), chosen[name], criterion.drops) / places
                    sums[name] = sums[name] + summed if name in sums else summed
        finally:
            for handle in handles:
                handle.remove()
    for name in chosen:
        if name not in sums:
            raise UserError(f"the layer {name!r} does not run when the model answers; leave it out of layers.")
    return sums


def _pairs(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    seen = False
    for batch in batches:
        x, label = (batch["image"], batch["label"]) if isinstance(batch, Mapping) else batch
        if not len(x) or len(x) != len(label):
            raise UserError(f"a batch of reference samples has {len(x)} samples and {len(label)} labels.")
        seen = True
        yield x, label
    if not seen:
        raise UserError("there are no reference samples; this criterion needs one a class at least.")


def _axis(module: nn.Module, output: Tensor) -> int:
    return output.ndim - 1 if isinstance(module, nn.Linear) else 1


def _summed(tensor: Tensor, module: nn.Module, drops: str) -> Tensor:
    """``(B, C, …)``, or ``(B, …, C)`` of a linear layer → ``(C,)``."""
    rows = tensor.movedim(_axis(module, tensor), 1).flatten(2) if tensor.ndim > 2 else tensor[..., None]
    if drops == "element":
        return rows.abs().sum((0, 2))
    return rows.sum(2).abs().sum(0) if drops == "sample" else rows.sum((0, 2))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _by_filter(module: nn.Module) -> Tensor:
    """Weights, filters first."""
    weight = _weight(module)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        inputs, outputs = weight.shape[:2]
        grouped = weight.view(module.groups, inputs // module.groups, outputs, *weight.shape[2:])
        return grouped.transpose(1, 2).flatten(0, 1)
    return weight


def _normalized(score: Tensor, scale: str) -> Tensor:
    if scale == "none":
        return score
    size = {"sum": score.sum, "l1": lambda: score.abs().sum(), "l2": lambda: score.norm()}[scale]()
    return score / size if float(size) != 0 else score
