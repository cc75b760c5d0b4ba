"""Relevance: how much of a network's answer came through each of its units (layer-wise relevance propagation).

    from isthmus.lenses.relevance import relevance
    found = relevance(timm.create_model("resnet18", pretrained=True), images, target=labels)
    found["layer4.1.conv2"], found.input, found.figure()

Yeom et al., arXiv 1912.08881, after Bach et al. 2015. The target's output is given one unit of relevance, which every
layer hands back to its inputs by a rule, so that the sums of all layers agree; that makes units of different layers
comparable. Works on convnets, multi-layer perceptrons and vision transformers as they are; see
:mod:`isthmus.lenses.relevance_pass` for what every function does and :mod:`isthmus.lenses.relevance_rules` for the
rules. A composite of the library zennit is taken as well, and then zennit propagates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.codec import UserError
from isthmus.lenses.interception import intercept, module_names
from isthmus.lenses.relevance_pass import RelevancePass, first_tensor
from isthmus.lenses.relevance_rules import (
    AlphaBeta,
    AlphaBetaWeights,
    Box,
    Epsilon,
    Flat,
    Gamma,
    Positive,
    PositiveWeights,
    Rule,
    Simple,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_POSITIVE = Positive()
Reduce = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Composite:
    """Which layer follows which rule.

    Attributes:
        conv: of convolutions.
        linear: of linear layers.
        first: of the layer that sees the input; ``None`` leaves it to the others.
        norm: of norms that cannot be folded into a layer, their statistics taken as constants; with it, constants that
            are added swallow their share too. ``None`` passes relevance on.
    """

    conv: Rule = _POSITIVE
    linear: Rule = _POSITIVE
    first: Rule | None = None
    norm: Rule | None = None

    def rule(self, name: str, kind: str, is_first: bool) -> Rule | None:
        """The rule of one layer, which is a ``"conv"``, a ``"linear"`` or a ``"norm"``."""
        if kind == "norm":
            return self.norm
        if is_first and self.first is not None:
            return self.first
        return self.conv if kind == "conv" else self.linear


def _everywhere(rule: Rule) -> Composite:
    return Composite(rule, rule)


_PIXELS = Box.of_pixels(*IMAGENET, per_channel=True)

#: ``zplus`` is the paper's; ``z`` and ``alphabeta`` are the released VGG path's, ``resnet`` is that of the released
#: ResNet path. ``simple`` and ``epsilon`` are gradient times input in a network of ReLUs. The ``epsilon_…`` ones are
#: zennit's, biases included.
COMPOSITES: Mapping[str, Composite] = {
    "zplus": _everywhere(Positive()),
    "z": _everywhere(PositiveWeights()),
    "simple": Composite(Simple(), Simple(), norm=Simple()),
    "alphabeta": _everywhere(AlphaBetaWeights(1.0)),
    "alpha2beta1": _everywhere(AlphaBeta(2.0)),
    "epsilon": Composite(Epsilon(), Epsilon(), norm=Epsilon()),
    "box": Composite(first=_PIXELS),
    "resnet": Composite(Positive(1e-12), Epsilon(1e-6), Box.of_pixels(*IMAGENET)),
    "epsilon_plus": Composite(Positive(1e-6, bias=True), Epsilon()),
    "epsilon_plus_flat": Composite(Positive(1e-6, bias=True), Epsilon(), Flat()),
    "epsilon_alpha2beta1": Composite(AlphaBeta(2.0, 1e-6, bias=True), Epsilon()),
    "epsilon_alpha2beta1_flat": Composite(AlphaBeta(2.0, 1e-6, bias=True), Epsilon(), Flat()),
    "epsilon_gamma_box": Composite(Gamma(), Epsilon(), _PIXELS),
}


class Relevance(dict[str, Tensor]):
    """Layer's name → relevance of its output, convolutions ``(B, C, H, W)``, in the order of execution.

    A layer that runs several times has the sum of its calls, where they have one shape.

    Attributes:
        input: relevance of the input, of its shape.
        logits: what the network answered.
        start: the relevance that was given to them.
        image: the input.
    """

    input: Tensor
    logits: Tensor
    start: Tensor
    image: Tensor

    def conserved(self) -> dict[str, float]:
        """What share of the start arrived at every layer and at the input; side branches carry their part only."""
        total = float(self.start.sum())
        parts = {**self, "input": self.input}
        return {name: float(found.sum()) / total for name, found in parts.items()}

    def figure(self, columns: int = 4) -> Figure:
        """The pictures, and what in them spoke for the target (red) or against it (blue).

        Raises:
            ValueError: the input is no batch of images.
        """
        if self.input.ndim != 4:
            raise ValueError(f"only images can be drawn, the input is {tuple(self.input.shape)}.")
        count = min(columns, len(self.input))
        figure = Figure(figsize=(2.1 * count, 4.2), layout="constrained")
        for i, pair in enumerate(figure.subplots(2, count, squeeze=False).T):
            heat = self.input[i].sum(0).cpu()
            picture = self.image[i].mean(0) if self.image.shape[1] != 3 else self.image[i].movedim(0, -1)
            low, high = picture.min(), picture.max()
            shown = ((picture - low) / (high - low).clamp_min(1e-9)).cpu().numpy()
            pair[0].imshow(shown, cmap="gray", interpolation="nearest")
            most = max(float(heat.abs().quantile(0.995)), 1e-12)
            pair[1].imshow(heat.numpy(), cmap="seismic", vmin=-most, vmax=most, interpolation="nearest")
            for axis in pair:
                axis.axis("off")
        return figure


def relevance(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None = None,
    composite: str | Composite | Any = "zplus",
    *,
    start: Literal["one", "logit"] = "one",
    reduce: Reduce | None = None,
    strict: bool = True,
) -> Relevance:
    """Relevance of every layer with weights, and of the input.

    The model is used in evaluation mode, without gradients for its parameters, and left as it was, also after errors.

    Args:
        model: input to logits ``(B, K)``; must not end in a softmax.
        x: ``(B, …)``, as the model wants it.
        target: class, or classes ``(B,)``, or the starting relevance itself, of the logits' shape; the likeliest class
            without it.
        composite: a name of :data:`COMPOSITES`, a :class:`Composite`, or a composite of zennit.
        start: one unit at the target (its logit may be negative), or the target's logit.
        reduce: ``(name, relevance)`` → what is kept of a layer, such as a sum over places, instead of its maps.
        strict: raise where a function has no rule, rather than using its gradient there.

    Raises:
        UserError: no layers are seen (a compiled model), the answer is no tensor or ends in a softmax, or a function
            has no rule.
        ValueError: an unknown composite, a target of another shape, or an input that is not finite.
    """
    if not x.is_floating_point() or x.ndim < 2 or not len(x):
        raise ValueError(f"relevance wants a batch of numbers (B, …), got {x.dtype} of {tuple(x.shape)}.")
    if not torch.isfinite(x).all():
        raise ValueError("the input holds infinities or NaN; relevance needs finite numbers.")
    found = Relevance()
    sums: dict[str, list[Tensor | None]] = {}

    def sink(name: str, tensor: Tensor, forwards: bool) -> None:
        if forwards:
            sums.setdefault(name, [None, tensor.detach()])
            return
        tensor = tensor if reduce is None else reduce(name, tensor)
        before = sums[name][0]
        if before is not None and before.shape != tensor.shape:
            raise UserError(f"{name} runs on maps of several sizes; give reduce=, such as a sum over places.")
        sums[name][0] = tensor if before is None else before + tensor

    with resting(model), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        if _is_zennits(composite):
            found.logits, found.start = _zennit(model, leaf, target, start, composite, sink, found)
        else:
            rules = _composite(composite)
            with module_names(model) as current:
                with intercept({}, default=RelevancePass(rules.rule, current, sink, strict)):
                    logits = first_tensor(model(leaf), model)
                _check_seen(model, sums, logits)
                found.logits, found.start = logits.detach(), starting(logits.detach(), target, start)
                found.input = torch.autograd.grad(logits, leaf, found.start)[0]
    found.image = x.detach()
    for name, (tensor, output) in sums.items():
        assert output is not None
        if tensor is None:  # its output has no part in the answer
            tensor = torch.zeros_like(output) if reduce is None else reduce(name, torch.zeros_like(output))
        found[name] = tensor
    return found


def starting(logits: Tensor, target: int | Tensor | None, start: str = "one") -> Tensor:
    """The relevance of the logits: one-hot, or one-hot times logit.

    Raises:
        ValueError: the target has another shape or names no class.
    """
    if start not in ("one", "logit"):
        raise ValueError(f'start is "one" or "logit", got {start!r}.')
    if isinstance(target, Tensor) and target.shape == logits.shape and target.is_floating_point():
        return target.to(logits)
    if logits.ndim != 2:
        raise ValueError(
            f"the model answers {tuple(logits.shape)}; give the starting relevance of that shape as target."
        )
    if target is None:
        target = logits.argmax(1)
    chosen = torch.as_tensor(target, device=logits.device)
    chosen = chosen.expand(len(logits)) if chosen.ndim == 0 else chosen
    if chosen.shape != logits.shape[:1] or chosen.is_floating_point():
        raise ValueError(f"target must be a class or {len(logits)} classes, got {tuple(chosen.shape)} {chosen.dtype}.")
    if int(chosen.min()) < 0 or int(chosen.max()) >= logits.shape[1]:
        raise ValueError(
            f"targets must lie in 0 to {logits.shape[1] - 1}, got {int(chosen.min())} to {int(chosen.max())}."
        )
    hot = torch.zeros_like(logits).scatter(1, chosen[:, None], 1.0)
    return hot if start == "one" else hot * logits


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients of parameters; afterwards every module and parameter is as it was."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)


def _composite(composite: str | Composite | Any) -> Composite:
    if isinstance(composite, Composite):
        return replace(composite)
    if not isinstance(composite, str) or composite not in COMPOSITES:
        raise ValueError(
            f"there is no composite {composite!r}; there are {', '.join(COMPOSITES)}, or give a Composite."
        )
    return COMPOSITES[composite]


def _check_seen(model: nn.Module, sums: Mapping[str, Any], logits: Tensor) -> None:
    if not sums:
        raise UserError(
            f"no layer of {type(model).__name__} is seen while it runs; give the model before torch.compile or "
            "torch.jit, on an input of its own."
        )
    if not logits.requires_grad:
        raise UserError(
            f"what {type(model).__name__} answers does not depend on its input through layers that carry relevance; "
            "if it ends in a softmax, give it without."
        )


def _is_zennits(composite: Any) -> bool:
    return any(cls.__module__.startswith("zennit.") for cls in type(composite).__mro__)


def _zennit(
    model: nn.Module, leaf: Tensor, target: Any, start: str, composite: Any, sink: Callable[..., None], found: Relevance
) -> tuple[Tensor, Tensor]:
    """Zennit's own hooks make the gradient relevance; ours only listen at the layers."""
    handles = []

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            sink(name, output, True)
            if output.requires_grad:
                output.register_hook(lambda relevance: sink(name, relevance, False))

        return hook

    try:
        with composite.context(model) as modified:
            for name, module in model.named_modules():
                if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                    handles.append(module.register_forward_hook(listen(name)))
            logits = first_tensor(modified(leaf), model)
            begin = starting(logits.detach(), target, start)
            found.input = torch.autograd.grad(logits, leaf, begin)[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits.detach(), begin
