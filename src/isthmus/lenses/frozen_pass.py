"""Running a model with every non-linear unit frozen at one input, see :mod:`isthmus.lenses.linear_scope`.

One pass at x takes the decisions; later passes on any inputs find them again by the order of the calls, so that modules
that are used twice, functional and in-place calls are all frozen call by call. What is already linear runs as it is,
with its biases set apart, and a function that is not known is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from isthmus.lenses import frozen_units as units
from isthmus.lenses.interception import Call, Rule, intercept, module_names

Gates = Literal["refuse", "freeze"]
Storage = Literal["record", "batch"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PIECES = _names(
    """
    relu leaky_relu relu6 hardtanh prelu rrelu threshold abs absolute clamp clamp_min clamp_max hardsigmoid
    hardshrink softshrink
    """
)
_SMOOTH = _names(
    """
    sigmoid tanh gelu silu softplus elu selu celu mish hardswish logsigmoid tanhshrink softsign exp log log1p
    expm1 sqrt rsqrt reciprocal pow square erf sin cos local_response_norm
    """
)
_POOLS = frozenset(
    f"{kind}max_pool{d}d{tail}" for kind in ("", "adaptive_") for d in (1, 2, 3) for tail in ("", "_with_indices")
)
_NORMS = _names("batch_norm instance_norm layer_norm group_norm rms_norm")
_REDUCTIONS = _names("max min amax amin")
_CONSTANTS = _names(
    """
    var std norm var_mean std_mean softmax log_softmax argmax argmin topk sort vector_norm
    """
)
_COMPARISONS = _names("gt lt ge le eq ne __gt__ __lt__ isnan isfinite sign")
_BIASED = _names(
    """
    linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d addmm baddbmm
    """
)
_PRODUCTS = _names(
    """
    mul multiply matmul bmm mm mv rmatmul einsum div divide true_divide rdiv dot inner
    """
)
_LINEAR = _names(
    """
    add sub rsub neg sum mean view reshape permute transpose t swapaxes swapdims movedim moveaxis flatten
    unflatten squeeze unsqueeze cat concat concatenate stack hstack vstack pad getitem narrow select
    index_select gather chunk split tensor_split unbind expand expand_as repeat repeat_interleave tile roll
    flip rot90 clone contiguous to float double type type_as interpolate upsample avg_pool1d avg_pool2d
    avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d pixel_shuffle pixel_unshuffle
    channel_shuffle unfold fold cumsum diff lerp rfft irfft fft ifft rfft2 irfft2 fft2 ifft2 view_as
    reshape_as ravel diagonal tril triu as_strided zeros_like ones_like empty_like full_like new_zeros
    new_ones new_empty new_full identity alias dropout feature_dropout alpha_dropout feature_alpha_dropout
    dropout1d dropout2d dropout3d native_dropout setitem copy affine_grid real imag view_as_real
    view_as_complex conj T mT H data positive take_along_dim get cpu cuda detach requires_grad fill zero
    """
)
_DROPOUTS = frozenset(name for name in _LINEAR if "dropout" in name)


class _Extreme(NamedTuple):
    """What ``x.max(dim)`` returns."""

    values: Tensor
    indices: Tensor


class FrozenPass:
    """``frozen(z)`` is F z + r for a batch z, with the decisions taken at x. Arguments as for LinearScope.

    Attributes:
        y: the model's output at x.
        constants: names of the modules that add something to r, in the order they do.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Any],
        x: Tensor,
        output: Callable[[Any], Tensor] | None,
        smooth: units.Smooth,
        gates: Gates,
        storage: Storage,
        rules: Mapping[Callable[..., Any] | str, Rule] | None,
    ) -> None:
        if smooth not in ("ratio", "split", "derivative"):
            raise ValueError(f"smooth is ratio, split or derivative, got {smooth!r}.")
        if gates not in ("refuse", "freeze") or storage not in ("record", "batch"):
            raise ValueError(f"gates are refused or frozen and storage is record or batch, got {gates!r}, {storage!r}.")
        self.model, self.x, self.output = model, x, output
        self.smooth: units.Smooth = smooth
        self.gates, self.storage, self.rules = gates, storage, dict(rules or {})
        self.constants: list[str] = []
        self._decisions: list[tuple[str, Any]] = []
        self._recording = True
        with torch.no_grad():
            self.y = self._picked(model(x.clone()))
            recorded = self._run(x, None)
        self._recording = False
        if recorded.shape != self.y.shape:
            raise ValueError("the model gives another output each time; it cannot be frozen.")
        if not bool(torch.isfinite(self.y).all()):
            raise ValueError("the model's output at x is NaN or infinite.")

    def __call__(self, z: Tensor, switches: Mapping[str, Any] | None = None) -> Tensor:
        """``(K, *input)`` → ``(K, *output)``. ``switches`` multiply the constants of each module of ``constants``."""
        if self.storage == "record":
            return self._run(z, switches)
        both = self._run(torch.cat([self.x, z]), switches)
        return both[1:]

    def _run(self, z: Tensor, switches: Mapping[str, Any] | None) -> Tensor:
        walk = _Walk(self, switches)
        model = self.model if isinstance(self.model, nn.Module) else nn.Identity()
        rules = {key: walk.custom(rule) for key, rule in self.rules.items()}
        with module_names(model) as current, intercept(rules, walk.visit):
            walk.current = current
            start = z.clone() if z.requires_grad else z.detach().clone()
            _mark(start)
            found = self._picked(self.model(start))
        if not _depends(found):
            raise ValueError("the output does not depend on the input in a way that can be seen from outside.")
        return found.detach() if self._recording else found

    def _picked(self, answer: Any) -> Tensor:
        found = answer if self.output is None else self.output(answer)
        if not isinstance(found, Tensor):
            raise ValueError(f"the model returns a {type(found).__name__}; say with output= which tensor to look at.")
        return found


class _Walk:
    """One pass through the model: what happens at every call."""

    def __init__(self, frozen: FrozenPass, switches: Mapping[str, Any] | None) -> None:
        self.frozen, self.switches = frozen, switches
        self.number = 0
        self.current: Callable[[], str] = str

    # ---------------------------------------------------------------------------------------------- bookkeeping

    def visit(self, call: Call) -> Any:
        """The rule for every function that the person gave no rule for."""
        if not _any_depends((call.args, call.kwargs)):
            return call.run()
        result = self._result(call)
        if call.name in _CONSTANTS | _COMPARISONS:
            return result  # what it is at x, whatever z is
        _mark(result)
        if call.target is not None:
            _mark(call.target)
        if call.name in ("sigmoid", "hardsigmoid", "softmax", "tanh"):
            _mark(result, gate=True)
        return result

    def custom(self, rule: Rule) -> Rule:
        """A person's rule; what it returns depends on the input."""

        def run(call: Call) -> Any:
            result = rule(call)
            if _any_depends((call.args, call.kwargs)):
                _mark(result)
            return result

        return run

    def decide(self, call: Call, make: Callable[[], Any]) -> Any:
        """The decision of this call: taken now, or found again."""
        if self.frozen.storage == "batch" and not self.frozen._recording:
            return make()
        if self.frozen._recording:
            made = _detached(make())
            if self.frozen.storage == "record":
                self.frozen._decisions.append((call.name, made))
            return made
        if self.number >= len(self.frozen._decisions) or self.frozen._decisions[self.number][0] != call.name:
            raise ValueError(
                f"the model takes another way for other inputs ({call.name} in {self._where()}); it cannot be frozen."
            )
        self.number += 1
        return self.frozen._decisions[self.number - 1][1]

    def constant(self, value: Tensor) -> Tensor:
        """A constant on its way into the residual: counted for the module that is running, and switched."""
        name = self.current()
        if self.frozen._recording and name not in self.frozen.constants:
            self.frozen.constants.append(name)
        return value if self.switches is None else value * self.switches[name]

    def analysed(self, a: Tensor) -> Tensor:
        """The share of a tensor that belongs to x."""
        return a[:1] if self.frozen.storage == "batch" else a

    def _where(self) -> str:
        return f"module {self.current()!r}" if self.current() else "the model"

    # ---------------------------------------------------------------------------------------------------- calls

    def _result(self, call: Call) -> Any:
        name, args = call.name, cast(Any, call.args)
        if name in _PIECES and not (name == "hardsigmoid" and self.frozen.smooth == "derivative"):
            return self._unary(call, units.piece)
        if name in _SMOOTH and not (name == "pow" and _any_depends(args[1:])):
            return self._unary(call, lambda c, a: units.smooth(c, a, self.frozen.smooth))
        if name in _POOLS:
            choose = self._choice(call, units.pooled)
            return choose(args[0])
        if name in _NORMS:
            return self._unary(call, units.normalised)
        if name in _REDUCTIONS:
            return self._reduction(call)
        if name in ("maximum", "minimum"):
            return self._larger(call)
        if name in _BIASED:
            return self._biased(call)
        if name in _PRODUCTS:
            return self._product(call)
        if name == "addcmul":
            value = call.kwargs.get("value", 1)
            return args[0] + value * self._product(Call(torch.mul, "mul", args[1:3], {}))
        if name == "glu":
            dim = call.kwargs.get("dim", args[1] if len(args) > 1 else -1)
            a, b = args[0].chunk(2, dim)
            return a * self._kept(call, self.analysed(b).sigmoid, gate=True)
        if name == "where":
            return self._where_call(call)
        if name == "scaled_dot_product_attention":
            return self._attention(call)
        if name == "normalize":
            p, dim, eps = (call.kwargs.get(key, usual) for key, usual in (("p", 2.0), ("dim", 1), ("eps", 1e-12)))
            length = self.decide(
                call, lambda: torch.linalg.vector_norm(self.analysed(args[0]), p, dim, True).clamp_min(eps)
            )
            return args[0] / length
        if name in _COMPARISONS:
            return self._frozen_value(call)
        if name in _CONSTANTS:
            return self._gate_value(call)
        if name in _DROPOUTS and call.kwargs.get("training", args[2] if len(args) > 2 else False):
            raise ValueError(f"{self._where()} drops units at random; call model.eval() first.")
        if name in _LINEAR or name.strip("_") in _LINEAR:
            return self._linear(call)
        result = call.run()
        if _tensors(result):
            raise ValueError(
                f"{name} in {self._where()} is no function that can be frozen here; give rules={{{name!r}: rule}}."
            )
        if name in ("item", "bool", "float", "int", "tolist", "index"):  # decisions of Python code
            return self.decide(call, lambda: result)
        return result

    def _unary(self, call: Call, make: Callable[[Call, Tensor], units.Affine]) -> Tensor:
        a: Tensor = call.args[0] if call.args else call.kwargs["input"]
        if not call.args:
            call = Call(call.function, call.name, (a,), {k: v for k, v in call.kwargs.items() if k != "input"})
        return self.decide(call, lambda: make(call, self.analysed(a)))(a, self.constant)

    def _choice(self, call: Call, make: Callable[[Call, Tensor], Any]) -> Any:
        return self.decide(call, lambda: make(call, self.analysed(call.args[0])))

    def _reduction(self, call: Call) -> Any:
        if len(call.args) > 1 and isinstance(call.args[1], Tensor):
            return self._larger(call)
        a = cast(Any, call.args)[0]
        choose, index = self._choice(call, units.largest)
        value = choose(a)
        if call.name.startswith("a"):
            return value
        return _Extreme(value, index)

    def _larger(self, call: Call) -> Tensor:
        a, b = cast(Any, call.args)[:2]
        first = call.name.startswith("max")
        mask = self.decide(
            call, lambda: self.analysed(a) >= self.analysed(b) if first else self.analysed(a) <= self.analysed(b)
        )
        return torch.where(mask, a, b)

    def _biased(self, call: Call) -> Tensor:
        """Linear but for a bias, which is added apart."""
        if call.name in ("addmm", "baddbmm"):
            if _any_depends(call.args[1:2]) and _any_depends(call.args[2:3]):
                raise ValueError(f"{call.name} in {self._where()} multiplies two things that depend on the input.")
            return call.run()
        args, kwargs = list(call.args), dict(call.kwargs)
        if _any_depends((args[1:], {k: v for k, v in kwargs.items() if k != "input"})):
            raise ValueError(f"the weights of {call.name} in {self._where()} depend on the input; give a rule for it.")
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        if len(args) > 2:
            args[2] = None
        kwargs.pop("bias", None)
        y = call.function(*args, **kwargs)
        if bias is None:
            return y
        shape = (
            (-1,) if call.name == "linear" else (-1, *[1] * (y.ndim - (2 if y.ndim > int(call.name[-2]) + 1 else 1)))
        )
        return y + self.constant(bias.view(shape))

    def _product(self, call: Call) -> Any:
        name, args = call.name, cast(Any, call.args)
        if name == "einsum":
            operands = [a for a in (args[1:] if isinstance(args[0], str) else args) if isinstance(a, Tensor)]
        else:
            operands = [a for a in (*args, *call.kwargs.values()) if isinstance(a, Tensor)]
        depending = [a for a in operands if _depends(a)]
        divides = name in ("div", "divide", "true_divide")
        if divides and isinstance(args[1], Tensor) and _depends(args[1]):
            divisor = self._kept(call, lambda: self.analysed(args[1]))
            return args[0] / divisor
        if name == "rdiv":
            return self._unary(Call(torch.reciprocal, "reciprocal", (args[0],), {}), units.smooth) * args[1]
        if len(depending) < 2:
            return call.run()
        first, second = depending[0], depending[1]
        if len(depending) > 2 or name == "einsum":
            raise ValueError(
                f"{name} of several things that depend on the input, in {self._where()}; give a rule for it."
            )
        gate = _the_gate(first, second)
        kept = self._kept(call, lambda: self.analysed(gate))
        other = second if gate is first else first
        if name in ("mul", "multiply"):
            return other * kept
        if name == "rmatmul":
            first, second = second, first
        return torch.matmul(kept, second) if gate is first else torch.matmul(first, kept)

    def _kept(self, call: Call, make: Callable[[], Tensor], gate: bool = True) -> Tensor:
        if gate and self.frozen.gates == "refuse":
            raise ValueError(
                f"{call.name} in {self._where()} combines two things that both depend on the input; no one affine map "
                'follows from that. Say gates="freeze" to keep one factor as it is.'
            )
        return self.decide(call, make)

    def _where_call(self, call: Call) -> Tensor:
        mask, a, b = cast(Any, call.args)[:3]
        mask = self.decide(call, lambda: self.analysed(mask)) if _depends(mask) else mask
        return torch.where(mask, a, b)

    def _attention(self, call: Call) -> Tensor:
        read = units._arguments(call)
        if self.frozen.gates == "refuse":
            self._kept(call, lambda: read("query"))
        if read("dropout_p", 0.0):
            raise ValueError(f"attention in {self._where()} drops weights at random; call model.eval() first.")
        arguments = {
            name: self.analysed(value) if isinstance(value := read(name), Tensor) and _depends(value) else value
            for name in ("query", "key", "attn_mask", "is_causal", "scale")
        }
        weights = self.decide(call, lambda: units.attention_weights(Call(call.function, call.name, (), arguments)))
        return weights @ read("value")

    def _frozen_value(self, call: Call) -> Any:
        """Something that is no affine function and only steers others."""
        return self.decide(call, lambda: self._analysed_call(call))

    def _gate_value(self, call: Call) -> Any:
        if self.frozen.gates == "refuse" and call.name not in ("argmax", "argmin"):
            raise ValueError(
                f"{call.name} in {self._where()} is no affine function and has no frozen form of its own; leave it out "
                '(look at logits), or say gates="freeze" to take its value at x as a constant.'
            )
        return self._frozen_value(call)

    def _linear(self, call: Call) -> Any:
        """Runs as it is; what is added or put beside and does not depend on the input is a constant."""
        if call.name == "detach":  # a cut of gradients is no cut of values
            return call.args[0].view_as(call.args[0])
        if call.name in ("add", "sub", "rsub") and not call.kwargs:
            a, b = (self._apart(each, call.args[:2]) for each in call.args[:2])
            return call.function(a, b)
        if call.name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack") and call.args:
            return call.run(type(call.args[0])(self._apart(each, call.args[0]) for each in call.args[0]))
        return call.run()

    def _apart(self, value: Any, among: Any) -> Any:
        """A number or tensor that stands beside others that depend on the input, as a constant."""
        if _depends(value) or isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            return value
        like = next(each for each in among if _depends(each))
        return self.constant(torch.as_tensor(value, dtype=like.dtype, device=like.device))

    def _analysed_call(self, call: Call) -> Any:
        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.analysed(value) if _depends(value) else value
            if isinstance(value, (list, tuple)):
                return type(value)(cut(each) for each in value)
            return value

        return call.function(*cut(call.args), **{key: cut(value) for key, value in call.kwargs.items()})


# --------------------------------------------------------------------------------------- which tensors depend on z


def _mark(value: Any, gate: bool = False) -> None:
    for tensor in _tensors(value):
        tensor._isthmus_depends = True  # type: ignore[attr-defined]
        if gate:
            tensor._isthmus_gate = True  # type: ignore[attr-defined]


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value, "_isthmus_depends", False)


def _any_depends(value: Any) -> bool:
    return any(_depends(tensor) for tensor in _tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for each in value.values() for t in _tensors(each)]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in _tensors(each)]
    return []


def _the_gate(first: Tensor, second: Tensor) -> Tensor:
    """The factor that is kept: the output of a gate, else the smaller, else the second."""
    gates = [getattr(tensor, "_isthmus_gate", False) for tensor in (first, second)]
    if gates[0] != gates[1]:
        return first if gates[0] else second
    return first if first.numel() < second.numel() else second


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, units.Affine):
        scale = None if value.scale is None else value.scale.detach()
        return units.Affine(scale, None if value.shift is None else value.shift.detach())
    if isinstance(value, tuple) and not hasattr(value, "_fields") and type(value) is tuple:
        return tuple(_detached(each) for each in value)
    return value
