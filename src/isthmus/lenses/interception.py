"""Seeing every function that a model calls on tensors, and putting another in its place.

Modules, functional calls, methods, operators, in-place variants and modules that are used twice all come by as calls of
torch functions, so that nothing in the model has to be changed or traced:

    def louder(call):
        return 2 * call.run()

    with intercept({"relu": louder}):          # or {torch.relu: louder}
        y = model(x)

Rules get a :class:`Call` and return what the function would. What happens inside compiled, scripted or custom autograd
functions is not seen; the lens on top has to check its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass
class Call:
    """One call: the function, its name without the marks of in-place and reflected variants, and its arguments."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor | None = None  # what the result is copied into, for calls in place

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself: on its own arguments, or on others in the place of the first ones."""
        return self.function(*args, *self.args[len(args) :], **{**self.kwargs, **kwargs})


Rule = Callable[[Call], Any]


class intercept(TorchFunctionMode):
    """``with intercept(rules):`` sends calls through rules; the rules' own calls are not intercepted.

    A rule works out of place: where the call was in place (``relu_``, ``inplace=True``, ``+=``) the result is copied
    into the first argument afterwards, so that whoever holds that tensor sees it too.

    Args:
        rules: function, or name such as ``"relu"`` for all its variants → rule.
        default: for every other call; without it they run as they are.
    """

    def __init__(self, rules: Mapping[Callable[..., Any] | str, Rule], default: Rule | None = None) -> None:
        super().__init__()
        self.rules, self.default = dict(rules), default

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name, in_place = plain_name(func)
        in_place |= bool(kwargs.get("inplace"))
        rule = self.rules.get(func) or self.rules.get(name) or self.default
        if rule is None:
            return func(*args, **kwargs)
        if kwargs.get("inplace"):
            kwargs["inplace"] = False
        if name in _WRITES:
            return rule(Call(func, name, args, kwargs, args[0]))
        if not in_place:
            return rule(Call(func, name, args, kwargs))
        target: Tensor = args[0] if args else kwargs["input"]
        result = rule(Call(_out_of_place(func), name, args, kwargs, target))
        return target.copy_(result) if isinstance(result, Tensor) and result is not target else result


#: They write into their first argument and have no other form.
_WRITES = frozenset({"copy", "fill", "zero", "setitem", "requires_grad", "normal", "uniform", "resize", "set"})
_REFLECTED = {"radd": "add", "rsub": "rsub", "rmul": "mul", "rmatmul": "rmatmul", "rtruediv": "rtruediv"}
_OPERATORS = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "ipow": "pow",
    "rpow": "rpow",
    **_REFLECTED,
}


def plain_name(function: Callable[..., Any]) -> tuple[str, bool]:
    """The name of a function without underscores, and whether it works in place."""
    name = getattr(function, "__name__", type(function).__name__)
    if name.startswith("__") and name.endswith("__"):
        bare = name.strip("_")
        return _OPERATORS.get(bare, bare), bare.startswith("i") and bare[1:] in ("add", "sub", "mul", "truediv", "pow")
    in_place = name.endswith("_") and not name.endswith("__")
    return name.strip("_"), in_place


def _out_of_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """The variant of an in-place method that leaves its argument alone."""
    name, in_place = plain_name(function)
    if not in_place:
        return function
    for home in (torch.Tensor, torch, nn.functional):
        if callable(found := getattr(home, name, None)):
            return found
    return lambda x, *args, **kwargs: function(x.clone(), *args, **kwargs)


@contextmanager
def module_names(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Inside, ``current()`` tells the name of the innermost module of ``model`` that is running ("" outside of all)."""
    stack: list[str] = []
    handles = []

    def leave(*_: Any) -> None:
        stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for handle in handles:
            handle.remove()
