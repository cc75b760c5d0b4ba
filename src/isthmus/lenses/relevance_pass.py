"""The backward pass of relevance: what every function that a model calls does with relevance on its way back.

While a model runs under :class:`RelevancePass`, each function is answered by its own value and a backward step that is
no derivative but a share-out, so that ``torch.autograd.grad(logits, x, start)`` is relevance. It works on functions,
not modules: functional and in-place calls, shared modules and any block of timm come by alike. Kinds of functions:

- layers with weights follow a rule; a batch norm right after one is folded into it (w' = w·γ/σ). Where the composite
  has a rule for norms, other norms are layers too, and constants that are added swallow their share as biases do,
- activations, norms (otherwise), and products with constants pass relevance on unchanged,
- sums, means and average pools share it out by contribution (the ε rule),
- products of two activations: what comes from a sigmoid or is smaller is a gate, the other one the signal; equals take
  half each. Attention weights are constants (Ali et al. 2022), so that all relevance follows the values,
- what only moves numbers (reshapes, slices, maximum pools…) sends it back the way it came.

A function of no kind raises, rather than breaking conservation silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from isthmus.codec import UserError
from isthmus.lenses.interception import Call
from isthmus.lenses.relevance_rules import Rule, ratio
from isthmus.lenses.relevance_steps import Kept, propagate, swapped, tensors_in

RuleFor = Callable[[str, str, bool], Rule | None]
_EPSILON = 1e-6


class Layer(NamedTuple):
    """A call of a layer with weights, remembered in case that a batch norm follows."""

    name: str
    rule: Rule
    linear: Callable[[Tensor, Tensor], Tensor]
    x: Kept
    tracked: Tensor
    weight: Tensor
    bias: Tensor | None
    out_axis: int
    version: int


class RelevancePass:
    """The default rule of :class:`isthmus.lenses.interception.intercept`: dispatches calls to their kinds.

    Args:
        rule_for: ``(layer's name, "conv" or "linear", whether it is the first)`` → rule.
        current: tells the name of the running module.
        sink: called with a layer's name and the relevance of its output, ``None`` while running forwards.
        strict: raise at functions of no kind; else their gradient is used.
    """

    def __init__(
        self, rule_for: RuleFor, current: Callable[[], str], sink: Callable[[str, Tensor, bool], None], strict: bool
    ) -> None:
        self.rule_for, self.current, self.sink, self.strict = rule_for, current, sink, strict
        self.first: str | None = None
        self._kept: dict[int | None, list[Kept]] = {}
        self._overwritten: int | None = None  # memory that the present call writes into

    def __call__(self, call: Call) -> Any:
        self._overwritten = None if call.target is None else call.target.untyped_storage().data_ptr()
        for kept in self._kept.pop(self._overwritten, ()):
            kept.save()
        tracked = [t for t in tensors_in((call.args, call.kwargs)) if t.requires_grad]
        if not tracked or not torch.is_grad_enabled():
            return call.run()
        if call.name in _LAYERS:
            return self._layer(call)
        kind = _KINDS.get(call.name)
        if kind is not None:
            out = kind(self, call, tracked)
            if call.name in _GATES and isinstance(out, Tensor):
                out._relevance_gate = True  # type: ignore[attr-defined]
            return out
        out = call.run()
        if call.name in _MOVES and isinstance(out, Tensor) and _is_gate(tracked[0]):
            out._relevance_gate = True  # type: ignore[attr-defined]
        if self.strict and call.name not in _MOVES and any(t.requires_grad for t in tensors_in(out)):
            where = f" in {self.current()}" if self.current() else ""
            raise UserError(
                f"there is no relevance rule for {call.name}{where}; with strict=False its gradient stands in, and "
                "relevance may not be conserved there."
            )
        return out

    # ------------------------------------------------------------------------------------------------------- kinds

    def _layer(self, call: Call) -> Tensor:
        kind, out_axis = _LAYERS[call.name]
        names = ("input", "weight", "bias")
        given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        x, weight, bias = given["input"], given["weight"].detach(), given.get("bias")
        rest, options = call.args[3:], {k: v for k, v in call.kwargs.items() if k not in names}

        def linear(x: Tensor, weight: Tensor) -> Tensor:
            return call.function(x, weight, None, *rest, **options)

        name = self.current()
        self.first = name if self.first is None else self.first
        if not x.requires_grad:  # only its weights depend on the input; they are a gate
            return call.run().detach()
        rule = self.rule_for(name, kind, name == self.first)
        assert rule is not None
        layer = Layer(name, rule, linear, self.keep(x), x, weight, bias, out_axis, 0)
        out = self._weighted(layer, call.run)
        out._relevance_layer = layer._replace(version=out._version)  # type: ignore[attr-defined]
        return out

    def _weighted(self, layer: Layer, run: Callable[[], Tensor]) -> Tensor:
        def back(relevance: Tensor) -> tuple[Tensor]:
            self.sink(layer.name, relevance, False)
            bias = layer.bias
            if bias is not None:
                bias = bias.detach().view(-1, *[1] * (relevance.ndim - 2)) if layer.out_axis >= 0 else bias.detach()
            return (layer.rule(layer.linear, layer.x.tensor, layer.weight, bias, relevance),)

        out = propagate(run, back, layer.tracked)
        self.sink(layer.name, out, True)
        return out

    def batch_norm(self, call: Call, tracked: list[Tensor]) -> Tensor:
        """Folded into the layer whose output it takes, where there is one; else as every norm."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        layer: Layer | None = getattr(given["input"], "_relevance_layer", None)
        mean, var = given.get("running_mean"), given.get("running_var")
        if mean is None or var is None or given.get("training"):
            return self.identity(call, tracked)
        if layer is not None and (
            layer.version != given["input"]._version
            or (layer.out_axis == 1 and len(mean) != layer.weight.shape[1])
            or (layer.out_axis < 0 and given["input"].ndim != 2)  # it counts another axis than the layer's outputs
        ):
            layer = None
        scale = (var.detach() + given.get("eps", 1e-5)).rsqrt()
        if given.get("weight") is not None:
            scale = scale * given["weight"].detach()
        if layer is None:
            return self._lone_norm(call, given, scale)
        shift = -mean.detach() if layer.bias is None else layer.bias.detach() - mean.detach()
        shift = shift * scale if given.get("bias") is None else shift * scale + given["bias"].detach()
        shape = [1] * layer.weight.ndim
        shape[max(layer.out_axis, 0)] = -1
        folded = layer._replace(weight=layer.weight * scale.view(shape), bias=shift)
        return self._weighted(folded, call.run)

    def _lone_norm(self, call: Call, given: dict[str, Any], scale: Tensor) -> Tensor:
        """A batch norm that follows no layer."""
        shift = -given["running_mean"].detach() * scale
        shift = shift if given.get("bias") is None else shift + given["bias"].detach()
        shape = [1, -1, *[1] * (given["input"].ndim - 2)]
        return self._affine(call, given["input"], lambda _: (scale.view(shape), shift.view(shape)))

    def layer_norm(self, call: Call, tracked: list[Tensor]) -> Tensor:
        """Its statistics are constants."""
        given = {
            **dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), call.args, strict=False)),
            **call.kwargs,
        }
        weight, bias = given.get("weight"), given.get("bias")

        def parts(x: Tensor) -> tuple[Tensor, Tensor]:
            axes = tuple(range(-len(given["normalized_shape"]), 0))
            var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
            scale = (var + given.get("eps", 1e-5)).rsqrt() * (1.0 if weight is None else weight.detach())
            return scale.expand_as(x), -mean * scale + (0.0 if bias is None else bias.detach())

        return self._affine(call, given["input"], parts)

    def group_norm(self, call: Call, tracked: list[Tensor]) -> Tensor:
        """Its statistics are constants."""
        given = {**dict(zip(("input", "num_groups", "weight", "bias", "eps"), call.args, strict=False)), **call.kwargs}
        weight, bias = given.get("weight"), given.get("bias")

        def parts(x: Tensor) -> tuple[Tensor, Tensor]:
            shape = (1, -1, *[1] * (x.ndim - 2))
            groups = x.reshape(len(x), given["num_groups"], -1)
            var, mean = torch.var_mean(groups, -1, correction=0, keepdim=True)
            scale = (var + given.get("eps", 1e-5)).rsqrt().expand_as(groups).reshape(x.shape)
            shift = -mean.expand_as(groups).reshape(x.shape) * scale
            if weight is not None:
                scale, shift = scale * weight.detach().view(shape), shift * weight.detach().view(shape)
            return scale, shift if bias is None else shift + bias.detach().view(shape)

        return self._affine(call, given["input"], parts)

    def _affine(self, call: Call, x: Tensor, parts: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """x · scale + shift under the composite's rule for norms; without one relevance passes unchanged."""
        rule = self.rule_for(self.current(), "norm", False)
        if rule is None or not x.requires_grad:
            return self.identity(call, [x])
        kept = self.keep(x)

        def back(relevance: Tensor) -> tuple[Tensor]:
            scale, shift = parts(kept.tensor)
            return (rule(torch.mul, kept.tensor, scale, shift, relevance),)

        return propagate(call.run, back, x)

    def identity(self, call: Call, tracked: list[Tensor]) -> Any:
        """Relevance passes unchanged to the first argument (activations, norms); other tracked ones are constants."""
        x = call.args[0] if call.args else call.kwargs.get("input")
        if not isinstance(x, Tensor) or not x.requires_grad:
            return call.run()
        return propagate(call.run, lambda relevance: (relevance,), x)

    def sums(self, call: Call, tracked: list[Tensor]) -> Tensor:
        """A sum is shared out by contribution; what is added to a constant passes, where biases swallow nothing."""
        if len(tracked) == 1 and self.rule_for(self.current(), "norm", False) is None:
            x = tracked[0]
            return propagate(call.run, lambda relevance: (relevance.sum_to_size(x.shape),), x)
        return self._by_contribution(call, tracked, 1.0)

    def products(self, call: Call, tracked: list[Tensor]) -> Tensor:
        """Signal and gate; two of one size take half each."""
        pair = list({id(t): t for t in tracked}.values())
        if call.name in _QUOTIENTS:
            pair = pair[:1]
        pair = [t for t in pair if not _is_gate(t)] or pair
        largest = max(t.numel() for t in pair)
        takers = [t for t in pair if t.numel() == largest]
        return propagate(
            call.run, lambda relevance: tuple((relevance / len(takers)).sum_to_size(t.shape) for t in takers), *takers
        )

    def addcmul(self, call: Call, tracked: list[Tensor]) -> Tensor:
        """x + v · a · b, as the sum of a product that it is."""
        x, a, b = cast(Any, call.args)[:3]
        scaled = b * call.kwargs.get("value", 1)
        scaled = propagate(lambda: scaled.detach(), lambda relevance: (relevance,), b) if b.requires_grad else scaled
        factors = [t for t in (a, scaled) if t.requires_grad]
        product = self.products(Call(torch.mul, "mul", (a, scaled), {}), factors) if factors else a * scaled
        terms = [t for t in (x, product) if t.requires_grad]
        return self.sums(Call(torch.add, "add", (x, product), {}), terms)

    def glu(self, call: Call, tracked: list[Tensor]) -> Tensor:
        """The first half is the signal, the second a gate."""
        dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else -1)
        signal, gate = tracked[0].chunk(2, dim)
        return self.products(Call(torch.mul, "mul", (signal, gate.detach().sigmoid()), {}), [signal])

    def averages(self, call: Call, tracked: list[Tensor]) -> Tensor:
        """Linear in one argument: the ε rule."""
        return self._by_contribution(call, tracked[:1], 1.0)

    def bilinear(self, call: Call, tracked: list[Tensor]) -> Tensor:
        """Linear in every argument: the ε rule for each, with equal parts."""
        tracked = list({id(t): t for t in tracked}.values())
        return self._by_contribution(call, tracked, 1.0 / len(tracked))

    def attention(self, call: Call, tracked: list[Tensor]) -> Tensor:
        """softmax(q kᵀ) v: all of it follows v."""
        names = ("query", "key", "value")
        value = {**dict(zip(names, call.args, strict=False)), **call.kwargs}["value"]
        return self._by_contribution(call, [value], 1.0) if value.requires_grad else call.run().detach()

    def constant(self, call: Call, tracked: list[Tensor]) -> Any:
        """Gates and statistics: nothing goes back through them."""
        with torch.no_grad():
            return call.run()

    def _by_contribution(self, call: Call, tracked: list[Tensor], share: float) -> Tensor:
        """Input i gets xᵢ · ∂Z/∂xᵢ · R / Z; the function is linear in each of them."""
        kept = [self.keep(t) for t in tracked]
        others = {
            id(t): self.keep(t)
            for t in tensors_in((call.args, call.kwargs))
            if t.is_floating_point() and all(t is not one for one in tracked)
        }

        def back(relevance: Tensor) -> tuple[Tensor, ...]:
            leaves = [k.tensor.requires_grad_() for k in kept]
            found: dict[int, Tensor] = {key: k.tensor for key, k in others.items()}
            found |= {id(t): leaf for t, leaf in zip(tracked, leaves, strict=True)}
            args, kwargs = swapped((call.args, call.kwargs), found)
            with torch.enable_grad():
                z = call.function(*args, **kwargs)
            s = share * ratio(relevance, z.detach(), _EPSILON)
            grads = torch.autograd.grad(z, leaves, s)
            return tuple(leaf.detach() * g for leaf, g in zip(leaves, grads, strict=True))

        return propagate(call.run, back, *tracked)

    def keep(self, tensor: Tensor) -> Kept:
        """Remember a tensor as it is now."""
        kept, memory = Kept(tensor), tensor.untyped_storage().data_ptr()
        if memory == self._overwritten:
            kept.save()
        else:
            self._kept.setdefault(memory, []).append(kept)
        return kept


def _is_gate(tensor: Tensor) -> bool:
    """Whether it came out of a sigmoid, perhaps moved since."""
    return getattr(tensor, "_relevance_gate", False)


def _named(method: Any, names: str) -> Iterable[tuple[str, Any]]:
    return ((name, method) for name in names.split())


#: name → kind, and which axis of the weights counts outputs; -1 is a layer whose outputs are the last axis.
_LAYERS = {
    "linear": ("linear", -1),
    **{f"conv{n}d": ("conv", 0) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": ("conv", 1) for n in (1, 2, 3)},
}
_GATES = frozenset({"sigmoid", "hardsigmoid"})
_QUOTIENTS = frozenset({"div", "true_divide", "divide", "rtruediv"})
_KINDS: dict[str, Callable[[RelevancePass, Call, list[Tensor]], Any]] = dict(
    (
        ("batch_norm", RelevancePass.batch_norm),
        ("scaled_dot_product_attention", RelevancePass.attention),
        ("layer_norm", RelevancePass.layer_norm),
        ("group_norm", RelevancePass.group_norm),
        ("addcmul", RelevancePass.addcmul),
        ("glu", RelevancePass.glu),
        *_named(
            RelevancePass.identity,
            "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid "
            "logsigmoid log_sigmoid tanh softplus softsign threshold clamp clamp_min clamp_max clip neg abs pow square "
            "sqrt rsqrt exp log reciprocal erf sin cos dropout dropout1d dropout2d dropout3d alpha_dropout "
            "feature_dropout feature_alpha_dropout instance_norm rms_norm normalize "
            "local_response_norm nan_to_num native_batch_norm",
        ),
        *_named(RelevancePass.sums, "add sub rsub subtract"),
        *_named(RelevancePass.products, "mul multiply div divide true_divide rtruediv"),
        *_named(
            RelevancePass.averages,
            "mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
            "interpolate upsample upsample_nearest upsample_bilinear",
        ),
        *_named(RelevancePass.bilinear, "matmul rmatmul bmm mm einsum tensordot"),
        *_named(RelevancePass.constant, "softmax log_softmax softmin var std var_mean std_mean logsumexp norm"),
    )
)
_MOVE_NAMES = """
reshape view permute transpose flatten unflatten ravel squeeze unsqueeze contiguous cat concat concatenate stack hstack
vstack split split_with_sizes chunk tensor_split unbind getitem index_select narrow select gather take take_along_dim
pad constant_pad_nd max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices
adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices amax amin max min maximum minimum topk sort roll flip
rot90 expand expand_as repeat repeat_interleave tile broadcast_to movedim moveaxis swapaxes swapdims t get clone to type
type_as float half double bfloat16 cpu cuda pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold
fold where masked_fill masked_select diagonal setitem copy view_as reshape_as as_strided requires_grad retain_grad zero
fill unsafe_chunk unsafe_split adjoint
"""
_MOVES = frozenset(_MOVE_NAMES.split())


def first_tensor(out: Any, model: nn.Module) -> Tensor:
    """What a model returns, which has to be one tensor."""
    if isinstance(out, Tensor):
        return out
    raise UserError(
        f"{type(model).__name__} returns a {type(out).__name__}; relevance starts at one tensor, such as the logits: "
        "wrap the model so that it returns that."
    )
