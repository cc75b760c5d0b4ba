"""A small convnet for magneto- and electroencephalography (Benchetrit, Banville, King, arXiv 2310.19812, section 2).

Sensors are mixed by attention over their positions, then by one linear layer a person; dilated convolutions over time
follow. The trunk is that of Défossez et al. (arXiv 2208.12266). Three lines::

    encoder = MEGConv(subjects=4)
    tokens = encoder(signal, {"subject": subject, "positions": positions})[0]   # (B, C, T) → (B, T, 2048)
    latents = LatentHeads(2048, 768, length=181)([tokens])                      # decoders/latent_heads.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, NonNegative, Positive, Share, checked
from isthmus.codec import Condition, FeatureInfo, part
from isthmus.codec.checkpoints import Checkpoint
from isthmus.codec.published import Published
from isthmus.encoders.signals.sensor_attention import SpatialAttention
from isthmus.layers.subject import SOMEBODY_ELSE, SubjectLinear

# -------------------------------------------------------------------------------------------------------- convolutions


class LayerScale(nn.Module):
    """A factor for every channel, stored divided by ``boost`` so that it learns faster."""

    def __init__(self, channels: int, start: float = 0.1, boost: float = 5.0) -> None:
        super().__init__()
        self.boost = boost
        self.scale = nn.Parameter(torch.full((channels,), start / boost))

    def forward(self, x: Tensor) -> Tensor:
        return self.boost * self.scale[:, None] * x


class DilatedLayer(nn.Module):
    """Convolution, norm, activation; a skip where shapes match; sometimes a gate behind. Time keeps its length."""

    def __init__(self, body: Sequence[nn.Module], skip: bool, gate: nn.Module | None) -> None:
        super().__init__()
        self.body, self.skip = nn.Sequential(*body), skip
        self.gate = nn.Identity() if gate is None else gate

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return self.gate(out + x if self.skip else out)


@part
@checked
class MEGConv(nn.Module):
    """Sensors ``(B, C, T)`` to one level of tokens ``(B, T, out_channels)``.

    The defaults are the paper's trunk: attention to 270 channels, 1x1 convolution, subject layer, four residual
    convolutions (dilation 1, 2, 4, 8) with a gate after every second, and two 1x1 convolutions.

    Args:
        subjects: people with a layer of their own.
        out_channels: of the tokens.
        in_channels: sensors; needed only without attention.
        attention: outputs of the spatial attention; 0 leaves it out.
        position_dim, position_axes, attention_dropout, attention_per_subject: see :class:`SpatialAttention`.
        layout: positions ``[[x, y], …]`` used where the condition ``positions`` is not given.
        mix: channels of the 1x1 convolution behind the attention; 0 leaves it out.
        mix_depth, mix_activation: how many of them, and whether the last has an activation.
        subject_layer: ``"input"`` keeps the width, ``"hidden"`` maps to ``hidden``, ``None`` leaves it out.
        subject_dropout: see :class:`SubjectLinear`; above 0 the subject -1 stands for anybody.
        subject_embedding: channels that say who it is, beside the signal.
        embedding_scale: the embedding is stored divided by it.
        hidden: channels of the convolutions.
        depth, kernel_size, dilation_growth, dilation_period: their number, size (odd), and dilations; the dilation
            starts at 1 again at every multiple of the period.
        norm: batch norm.
        activation: ``"gelu"`` or ``"relu"``, leaky by ``leak``.
        skip: residual connections where shapes match.
        scale, post_skip: in those layers, a :class:`LayerScale` of this start and a depthwise 1x1 convolution.
        rewrite: one more 1x1 convolution with a (leaky) ReLU in every layer.
        gate_every, gate_context: a gate after so many layers, which sees so many neighbours; 0 has none.
        gate_glu: gated linear units; else the activation.
        head: ``"double"`` (1x1 convolutions over 2·hidden), ``"linear"``, or ``None``: the last convolution gives the
            output itself, without norm and activation.

    Raises:
        ValueError: an even kernel, an impossible size, a signal of the wrong form or with NaN, an unknown subject.
    """

    conditions = frozenset({"subject", "positions", "centre"})

    def __init__(
        self,
        subjects: Count = 1,
        out_channels: Count = 2048,
        in_channels: Count | None = None,
        attention: Natural = 270,
        position_dim: Count = 2048,
        position_axes: Count = 2,
        attention_dropout: NonNegative = 0.2,
        attention_per_subject: bool = False,
        layout: Sequence[Sequence[float]] | None = None,
        mix: Natural = 270,
        mix_depth: Count = 1,
        mix_activation: bool = False,
        subject_layer: Literal["input", "hidden"] | None = "input",
        subject_dropout: Share = 0.0,
        subject_embedding: Natural = 0,
        embedding_scale: Positive = 1.0,
        hidden: Count = 320,
        depth: Count = 4,
        kernel_size: Count = 3,
        dilation_growth: Count = 2,
        dilation_period: Natural | None = 5,
        norm: bool = True,
        activation: Literal["gelu", "relu"] = "gelu",
        leak: float = 0.0,
        skip: bool = True,
        scale: float | None = None,
        post_skip: bool = False,
        rewrite: bool = False,
        gate_every: Natural = 2,
        gate_context: Natural = 1,
        gate_glu: bool = True,
        head: Literal["double", "linear"] | None = "double",
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"kernel_size must be odd, so that a window keeps its length; got {kernel_size}.")
        if depth < 1 or subjects < 1 or not (attention or in_channels):
            raise ValueError(
                f"depth and subjects must be 1 or more, and in_channels given where there is no attention; got "
                f"{depth}, {subjects}, {in_channels}."
            )
        if subject_embedding and subject_dropout:
            raise ValueError("a subject embedding says who it is, so subject_dropout must be 0 with it.")
        act = {"gelu": nn.GELU, "relu": partial(nn.LeakyReLU, leak) if leak else nn.ReLU}[activation]
        self.subjects, self.embedding_scale, self.subject_dropout = subjects, embedding_scale, subject_dropout
        self.layout: Tensor | None
        self.register_buffer("layout", None if layout is None else torch.tensor(layout), persistent=False)

        width = attention or in_channels or 0
        self.in_channels = in_channels
        self.attention = None
        if attention:
            heads = subjects if attention_per_subject else 0
            self.attention = SpatialAttention(attention, position_dim, attention_dropout, heads, position_axes)
        self.mix = None
        if mix:
            steps: list[nn.Module] = [nn.Conv1d(width, mix, 1)]
            for _ in range(mix_depth - 1):
                steps += [act(), nn.Conv1d(mix, mix, 1)]
            self.mix, width = nn.Sequential(*steps, *([act()] if mix_activation else [])), mix
        self.subject = None
        if subject_layer is not None:
            wide = hidden if subject_layer == "hidden" else width
            self.subject, width = SubjectLinear(width, wide, subjects, dropout=subject_dropout), wide
        self.embedding = None
        if subject_embedding:
            self.embedding = nn.Embedding(subjects, subject_embedding)
            self.embedding.weight.data /= embedding_scale
            width += subject_embedding

        layers, dilation = [], 1
        for number in range(depth):
            last = number == depth - 1
            out = out_channels if last and head is None else hidden
            if dilation_period and number % dilation_period == 0:
                dilation = 1
            body: list[nn.Module] = [
                nn.Conv1d(width, out, kernel_size, padding=kernel_size // 2 * dilation, dilation=dilation)
            ]
            dilation *= dilation_growth
            if head is not None or not last:
                body += [*([nn.BatchNorm1d(out)] if norm else []), act()]
                body += [nn.Conv1d(out, out, 1), nn.LeakyReLU(leak)] if rewrite else []
            skipped = skip and width == out
            if skipped:
                body += [LayerScale(out, scale)] if scale is not None else []
                body += [nn.Conv1d(out, out, 1, groups=out, bias=False)] if post_skip else []
            gate = None
            if gate_every and (number + 1) % gate_every == 0:
                wide = 2 * out if gate_glu else out
                conv = nn.Conv1d(out, wide, 1 + 2 * gate_context, padding=gate_context)
                gate = nn.Sequential(conv, nn.GLU(dim=1) if gate_glu else act())
            layers.append(DilatedLayer(body, skipped, gate))
            width = out
        self.layers = nn.Sequential(*layers)
        self.project = {
            "double": lambda: nn.Sequential(
                nn.Conv1d(width, 2 * width, 1), act(), nn.Conv1d(2 * width, out_channels, 1)
            ),
            "linear": lambda: nn.Conv1d(width, out_channels, 1),
            None: nn.Identity,
        }[head]()
        self.feature_info = [FeatureInfo(out_channels, 1, "NTC")]

    def forward(self, x: Tensor, condition: Condition | None = None) -> list[Tensor]:
        """A signal ``(B, C, T)`` to ``[(B, T, out_channels)]``.

        ``condition`` holds ``subject`` ``(B,)``, ``positions`` ``(C, 2)`` or ``(B, C, 2)`` in [0, 1] with (-0.1, -0.1)
        for sensors that are not there, and, in training, may hold ``centre`` ``(2,)`` of the banned disc.
        """
        return [self.trunk(x, condition).mT]

    def trunk(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """The same, channels first: ``(B, out_channels, T)``."""
        self._check(x)
        known = self._known(x, condition or {})
        return self.temporal(self.spatial(x, known), known["subject"])

    def spatial(self, x: Tensor, condition: Condition) -> Tensor:
        """All that mixes sensors and leaves time alone: attention, 1x1 convolutions, subject layer."""
        if self.attention is not None:
            x = self.attention(x, condition)
        if self.mix is not None:
            x = self.mix(x)
        return x if self.subject is None else self.subject(x, condition["subject"])

    def temporal(self, x: Tensor, subject: Tensor) -> Tensor:
        """All behind the subject layer: embedding, dilated convolutions, projection."""
        return self.project(self.layers(self._embedded(x, subject)))

    def summary(self, x: Tensor, subject: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        """``Σ_t weights_t · temporal(x)_t + bias``: ``(B, D, T)`` with weights ``(T,)`` → ``(B, out_channels)``.

        The sum over time and the last 1x1 convolution are both linear, so they change places: the widest product of
        the network is then made once and not for every sample of the window.
        """
        x = self.layers(self._embedded(x, subject))
        parts = list(self.project) if isinstance(self.project, nn.Sequential) else [self.project]
        last = parts.pop()
        for part_ in parts:
            x = part_(x)
        x = x @ weights
        if isinstance(last, nn.Conv1d):
            assert last.bias is not None
            x = x @ last.weight[..., 0].mT + last.bias * weights.sum()
        return x + bias

    def _embedded(self, x: Tensor, subject: Tensor) -> Tensor:
        if self.embedding is None:
            return x
        told = self.embedding(subject) * self.embedding_scale
        return torch.cat([x, told[:, :, None].expand(-1, -1, x.shape[-1])], 1)

    @torch.no_grad()
    def fold(self, positions: Tensor | None = None, subject: int = 0) -> tuple[Tensor, Tensor]:
        """The spatial part for one layout and subject as one matrix: weight ``(D, C)`` and bias ``(D,)``.

        In evaluation it is an affine map of the sensors, so a decoder that meets one person may apply it as such; then
        only :meth:`temporal` is left.

        Raises:
            ValueError: there are activations between the 1x1 convolutions.
        """
        if self.training or (self.mix is not None and any(not isinstance(m, nn.Conv1d) for m in self.mix)):
            raise ValueError("the spatial part folds in evaluation mode and without activations inside of it.")
        if positions is None and self.layout is None and self.attention is not None:
            raise ValueError("fold needs positions, because the encoder has no layout of its own.")
        places = self.layout if positions is None else positions
        sensors = self.in_channels if places is None or self.attention is None else len(places)
        like = next(self.parameters())
        probe = torch.eye(sensors or 0, device=like.device, dtype=like.dtype)[None]
        known = self._known(
            probe, {"subject": torch.tensor([subject]), **({} if places is None else {"positions": places})}
        )
        bias = self.spatial(torch.zeros_like(probe[..., :1]), known)[0, :, 0]
        return self.spatial(probe, known)[0] - bias[:, None], bias

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or (self.attention is None and x.shape[1] != self.in_channels):
            raise ValueError(f"MEGConv reads (B, {self.in_channels or 'C'}, T), got {tuple(x.shape)}.")
        # On a GPU the look would hold up the queue; the training loop stops at a loss that is not finite.
        if x.device.type == "cpu" and not bool(torch.isfinite(x).all()):
            bad = sorted({int(c) for c in (~torch.isfinite(x)).nonzero()[:, 1]})
            raise ValueError(
                f"the signal has NaN or infinite samples in channels {bad[:5]}; interpolate or drop them, or mark the "
                "sensors as missing (position -0.1, signal 0)."
            )

    def _known(self, x: Tensor, condition: Condition) -> dict[str, Tensor]:
        """The condition with what can be filled in: the encoder's own layout, its only subject, or anybody."""
        known = dict(condition)
        if self.attention is not None and "positions" not in known:
            if self.layout is None:
                raise ValueError("MEGConv needs the condition positions, (C, 2) in [0, 1], or a layout of its own.")
            known["positions"] = self.layout
        if "subject" not in known:
            if self.subjects > 1 and not self.subject_dropout and (self.subject or self.embedding) is not None:
                raise ValueError(f"MEGConv has {self.subjects} subjects and needs the condition subject, (B,).")
            who = SOMEBODY_ELSE if self.subject_dropout else 0
            known["subject"] = torch.full((len(x),), who, dtype=torch.int64)
        return {name: value.to(x.device) for name, value in known.items()}


# ------------------------------------------------------------------------------------------ published checkpoints

_NAMES = (
    (r"merger\.heads", "attention.heads"),
    (r"initial_linear\.(\d+)\.(.+)", r"mix.\1.\2"),
    (r"subject_layers\.weights", "subject.weights"),
    (r"subject_embedding\.embedding\.weight", "embedding.weight"),
    (r"encoders\.\w+\.sequence\.(\d+)\.(.+)", r"layers.\1.body.\2"),
    (r"encoders\.\w+\.glus\.(\d+)\.0\.(.+)", r"layers.\1.gate.0.\2"),
    (r"final\.(.+)", r"project.\1"),
)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published trunk's state under our names.

    Its last layer is a transposed convolution of length one, whose weight is that of a convolution, transposed.

    Raises:
        ValueError: a name that no published trunk has.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = next((re.sub(p, to, name) for p, to in _NAMES if re.fullmatch(p, name)), None)
        if ours is None:
            raise ValueError(
                f"{name} belongs to no published MEG trunk; known are merger, initial_linear, "
                "subject_layers, encoders.meg and final."
            )
        turned = ours in ("project.weight", "project.2.weight")
        found[ours] = tensor.transpose(0, 1).contiguous() if turned else tensor
    return found


def official_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`MEGConv` from the settings of the published trunk (``SimpleConv``)."""
    gelu = config.get("gelu", False)
    layer = config.get("subject_layers_dim", "input") if config.get("subject_layers") else None
    return {
        "subjects": config.get("n_subjects", 200),
        "out_channels": config["out_channels"],
        "in_channels": None if config.get("merger") else next(iter(config["in_channels"].values())),
        "attention": config.get("merger_channels", 270) if config.get("merger") else 0,
        "position_dim": config.get("merger_pos_dim", 256),
        "attention_dropout": config.get("merger_dropout", 0.2),
        "attention_per_subject": config.get("merger_per_subject", False),
        "mix": config.get("initial_linear", 0),
        "mix_depth": config.get("initial_depth", 1),
        "mix_activation": config.get("initial_nonlin", False),
        "subject_layer": layer,
        "subject_embedding": config.get("subject_dim", 64),
        "embedding_scale": config.get("embedding_scale", 1.0),
        "hidden": next(iter(config["hidden"].values())),
        "depth": config.get("depth", 4),
        "kernel_size": config.get("kernel_size", 5),
        "dilation_growth": config.get("dilation_growth", 2),
        "dilation_period": config.get("dilation_period"),
        "norm": config.get("batch_norm", False),
        "activation": "gelu" if gelu else "relu",
        "leak": config.get("relu_leakiness", 0.0),
        "skip": config.get("skip", False),
        "scale": config.get("scale"),
        "post_skip": config.get("post_skip", False),
        "rewrite": config.get("rewrite", False),
        "gate_every": config.get("glu", 0),
        "gate_context": config.get("glu_context", 0),
        "gate_glu": config.get("glu_glu", True),
        "head": "linear" if config.get("linear_out") else "double" if config.get("complex_out") else None,
    }


def _read(found: Checkpoint) -> dict[str, Tensor]:
    """Tensors by name: the file does not tell strides and dilations."""
    return from_official(found.state)


PUBLISHED = Published(
    of="meg-decoding", marks=r"^merger\.heads$|^initial_linear\.\d|^encoders\.\w+\.sequence\.", make=_read
)
