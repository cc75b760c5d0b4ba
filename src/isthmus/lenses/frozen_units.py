"""What a non-linear unit does once its decision at one input is frozen (LinearScopes, arXiv 1908.05168, section 3).

Every rule looks at the unit's input a₀ in the analysed pass and returns an affine function of another input a that
gives the unit's own output at a = a₀:

- *pieces* (ReLU and its kin, clamp, abs): the linear piece that a₀ lies on;
- *ratios* (sigmoid, tanh, GELU, SiLU, …): act(a₀) / a₀ times a, which is not the derivative;
- *choices* (max pooling, maximum, top-k, where): the entries that won at a₀;
- *statistics* (instance, layer, group norm, batch norm in training): mean and deviation of a₀;
- *gates* (products of two things that both depend on the input, attention): one factor keeps its value, which is a
  convention and no property of the network. Attention weights and softmax are frozen, of a product the factor that
  came out of a sigmoid or softmax, else the smaller one, else the second; divisors are frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.lenses.interception import Call

Smooth = Literal["ratio", "split", "derivative"]


@dataclass
class Affine:
    """``scale · a + shift``, elementwise; ``None`` is a scale of 0 or no shift."""

    scale: Tensor | None
    shift: Tensor | None = None

    def __call__(self, a: Tensor, constants: Callable[[Tensor], Tensor]) -> Tensor:
        if self.scale is None:
            assert self.shift is not None
            return constants(self.shift).expand(len(a), *self.shift.shape[1:]) if self.shift.ndim else self.shift
        y = a * self.scale
        return y if self.shift is None else y + constants(self.shift)


# --------------------------------------------------------------------------------------------- elementwise functions


def piece(call: Call, a0: Tensor) -> Affine:
    """The linear piece at a₀; on a kink the side that autograd takes (0 for a ReLU)."""
    value, slope = _value_and_slope(call, a0)
    shift = value - slope * a0
    return Affine(slope, None if not bool(shift.any()) else shift)


def smooth(call: Call, a0: Tensor, how: Smooth = "ratio", eps: float = 1e-6) -> Affine:
    """The ratio act(a₀) / a₀.

    Near 0 it is the derivative at 0 where act(0) = 0; elsewhere (sigmoid) there is no finite ratio and the value is
    taken as a constant. ``split`` takes act(0) out as a constant first. ``derivative`` is what automatic
    differentiation would take: it does not give the output back, and serves for comparison.
    """
    value, slope = _value_and_slope(call, a0)
    if how == "derivative":
        return Affine(slope)
    zero = call.run(torch.zeros_like(a0))
    zero = zero.where(zero.isfinite(), 0.0) if how == "split" else torch.zeros_like(zero)
    near = a0.abs() < eps
    scale = ((value - zero) / a0.where(~near, 1.0)).where(~near, 0.0)
    through = call.run(torch.zeros_like(a0)) == 0
    limit = _value_and_slope(call, torch.zeros_like(a0))[1]
    scale = scale.where(~(near & (through | (how == "split"))), limit.nan_to_num(0.0, 0.0, 0.0))
    shift = zero.where(~near, value - scale * a0)
    return Affine(scale, None if not bool(shift.any()) else shift)


def _value_and_slope(call: Call, a0: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        a = a0.detach().clone().requires_grad_()
        value = call.run(a)
        (slope,) = torch.autograd.grad(value.sum(), a)
    return value.detach(), slope


# ---------------------------------------------------------------------------------------------------------- choices


def pooled(call: Call, a0: Tensor) -> Callable[[Tensor], Tensor]:
    """Max pooling by the places that won; the first where several are alike, as in the framework."""
    spatial = int(call.name.split("_with")[0][-2])
    function = getattr(F, f"{call.name.removesuffix('_with_indices')}_with_indices")
    kwargs = {key: value for key, value in call.kwargs.items() if key != "return_indices"}
    _, index = function(a0, *call.args[1:], **kwargs)

    def choose(a: Tensor) -> Tensor:
        where = index.expand(len(a), *index.shape[1:])
        return a.flatten(-spatial).gather(-1, where.flatten(-spatial)).view(where.shape)

    return choose


def largest(call: Call, a0: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """``max`` and ``min`` over one dimension (or ``amax``, ``amin``): the entries that won, and their index."""
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
    keep = call.kwargs.get("keepdim", call.args[2] if len(call.args) > 2 else False)
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int) or dim % a0.ndim == 0:
        raise ValueError(f"{call.name} over {dim}: only one dimension, and not the batch, can be frozen.")
    index = (a0.argmax if call.name.endswith("max") else a0.argmin)(dim, keepdim=True)

    def choose(a: Tensor) -> Tensor:
        found = a.gather(dim, index.expand(len(a), *index.shape[1:]))
        return found if keep else found.squeeze(dim)

    return choose, index if keep else index.squeeze(dim)


# ------------------------------------------------------------------------------------------------------- statistics


def normalised(call: Call, a0: Tensor) -> Affine:
    """Instance, layer, group, batch and RMS norm with the statistics of a₀ (of its training, for batch norm)."""
    read = _arguments(call)
    weight, bias, eps = read("weight"), read("bias"), read("eps", 1e-5)
    if call.name == "batch_norm":
        mean, var = read("running_mean"), read("running_var")
        if read("training", False) or mean is None or var is None:
            dims = [d for d in range(a0.ndim) if d != 1]
            mean, var = a0.mean(dims), a0.var(dims, unbiased=False)
        shape = (1, -1, *[1] * (a0.ndim - 2))
        scale = (var + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        return Affine(scale.view(shape), shift.view(shape))
    if call.name == "instance_norm":
        dims, shape = list(range(2, a0.ndim)), (1, -1, *[1] * (a0.ndim - 2))
        if read("use_input_stats", True) is False:
            return normalised(Call(call.function, "batch_norm", call.args, {**call.kwargs, "training": False}), a0)
    elif call.name == "group_norm":
        groups = read("num_groups")
        folded = a0.reshape(len(a0), groups, -1)
        mean, var = folded.mean(-1), folded.var(-1, unbiased=False)
        each, shape = a0.shape[1] // groups, (1, -1, *[1] * (a0.ndim - 2))
        mean, var = (t.repeat_interleave(each, 1).view(len(a0), *shape[1:]) for t in (mean, var))
        return _standardised(mean, var, eps, weight, bias, shape)
    else:
        dims, shape = list(range(-len(read("normalized_shape")), 0)), None
        if call.name == "rms_norm":
            eps = torch.finfo(a0.dtype).eps if eps is None else eps
            scale = (a0.square().mean(dims, keepdim=True) + eps).rsqrt()
            return Affine(scale if weight is None else scale * weight)
    mean, var = a0.mean(dims, keepdim=True), a0.var(dims, unbiased=False, keepdim=True)
    return _standardised(mean, var, eps, weight, bias, shape)


def _standardised(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...] | None
) -> Affine:
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * (weight if shape is None else weight.view(shape))
    shift = -mean * scale
    if bias is not None:
        shift = shift + (bias if shape is None else bias.view(shape))
    return Affine(scale, shift)


_SIGNATURES = {
    "batch_norm": "input running_mean running_var weight bias training momentum eps",
    "instance_norm": "input running_mean running_var weight bias use_input_stats momentum eps",
    "layer_norm": "input normalized_shape weight bias eps",
    "rms_norm": "input normalized_shape weight eps",
    "group_norm": "input num_groups weight bias eps",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale",
}


def _arguments(call: Call) -> Callable[..., Any]:
    """Arguments of a functional by name, wherever they were given."""
    names = _SIGNATURES[call.name].split()
    if call.function in (torch.batch_norm, torch.instance_norm):  # weights stand before statistics there
        names[1:5] = names[3:5] + names[1:3]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    return lambda name, default=None: given.get(name, default)


# ----------------------------------------------------------------------------------------------------------- gates


def attention_weights(call: Call) -> Tensor:
    """The weights ``(1, heads, T, S)`` of scaled dot-product attention on the analysed queries and keys."""
    read = _arguments(call)
    query, key = read("query"), read("key")
    scale = read("scale") or query.shape[-1] ** -0.5
    scores = query @ key.transpose(-2, -1) * scale
    if read("is_causal", False):
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    mask = read("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)
