"""What sits between seeing and saying: encoder → bottleneck → decoder, and the contracts that cross rooms.

An *encoder* maps an input to a pyramid of features, a *bottleneck* maps features to a :class:`Code`, a *decoder* maps
features to a prediction. :class:`Codec` composes the three and saves and loads them; it knows nothing of training.
Parts are plain ``nn.Module`` objects that meet the protocols below; there is no base class to inherit.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

Condition = Mapping[str, Tensor]


class UserError(ValueError):
    """A mistake the person at the keyboard can mend; the command line prints it as one sentence, no traceback."""


# ------------------------------------------------------------------------------------------------------- contracts


class FeatureInfo(NamedTuple):
    """One level of a pyramid: its channels, its reduction (input pixels or samples per cell) and its layout."""

    channels: int
    reduction: int
    format: str = "NCHW"  # or "NTC": (batch, tokens, channels)


@dataclass
class Code:
    """What a bottleneck lets through.

    Attributes:
        features: the pyramid handed to the decoder, finest level first.
        indices: int64, batch first, where the code is discrete; ``None`` otherwise.
        loss: scalar that training adds (commitment, rate, sparsity…).
        bits: ``(B,)`` cost of every sample where it is known; ``None`` otherwise.
    """

    features: list[Tensor]
    indices: Tensor | None = None
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    bits: Tensor | None = None


@runtime_checkable
class Encoder(Protocol):
    """``encoder(x) -> list[Tensor]``, finest level first, described level by level in ``feature_info``."""

    feature_info: Sequence[FeatureInfo]

    def __call__(self, x: Tensor, /) -> list[Tensor]: ...


@runtime_checkable
class Bottleneck(Protocol):
    """``bottleneck(features) -> Code``; ``num_codes`` tells the alphabet where codes are discrete."""

    def __call__(self, features: list[Tensor], /) -> Code: ...


@runtime_checkable
class Decoder(Protocol):
    """``decoder(features) -> prediction``, a tensor or a small named tuple."""

    def __call__(self, features: list[Tensor], /) -> Any: ...


@runtime_checkable
class Neck(Protocol):
    """``neck(features) -> features`` with a ``feature_info`` of its own; decoders take one as ``neck=``."""

    feature_info: Sequence[FeatureInfo]

    def __call__(self, features: list[Tensor], /) -> list[Tensor]: ...


@runtime_checkable
class Fitted(Protocol):
    """Learns without gradients (k-means, ridge, EM, coding tables); using it before ``fit`` raises."""

    fitted: bool

    def fit(self, batches: Iterable[Any], /) -> Self: ...


class Loss(NamedTuple):
    """What an objective returns: the scalar to minimise, scalars to log, and anything worth drawing."""

    loss: Tensor
    metrics: dict[str, Tensor] = {}  # noqa: RUF012 - a tuple's default; nobody writes to it
    outputs: Mapping[str, Any] = {}


class Turn(NamedTuple):
    """One optimiser of an alternating objective: who moves, and every how many steps."""

    name: str
    parameters: list[nn.Parameter]
    every: int = 1


@runtime_checkable
class Objective(Protocol):
    """``objective(batch, generator, turn=None) -> Loss``: what to learn. It holds the modules that it trains.

    Alternating objectives also have ``turns -> list[Turn]``; without it all parameters share one optimiser.
    """

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None, /) -> Loss: ...


def conditions_of(part: object) -> frozenset[str]:
    """The extra inputs (subject, positions, hole, class, text…) that a part declares in ``conditions``."""
    return frozenset(getattr(part, "conditions", frozenset()))


def call_part(part: Callable[..., Any], x: Any, condition: Condition | None = None) -> Any:
    """Call a part with the share of ``condition`` that it declares; parts that declare none see only ``x``."""
    names = conditions_of(part)
    if not names:
        return part(x)
    return part(x, {name: value for name, value in (condition or {}).items() if name in names})


def extra(module: str, name: str) -> ModuleType:
    """Import an optional package that comes with the extra ``name``: ``extra("constriction", "coding")``.

    Raises:
        UserError: it is not installed; the sentence says what to type.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        package = module.partition(".")[0]
        raise UserError(f"this needs the package {package}: pip install 'isthmus[{name}]'.") from error


# --------------------------------------------------------------------------------- how a part remembers its making

_Class = TypeVar("_Class", bound=type)


def part(cls: _Class) -> _Class:
    """Class decorator: the instance remembers its constructor arguments in ``spec``, so that a Codec can be saved.

    Arguments must be JSON values, parts themselves, or lists and dictionaries of those; anything else is found out
    when the part is saved, not when it is made.
    """
    init = cls.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self) is cls:
            bound = signature.bind(self, *args, **kwargs)
            given = dict(list(bound.arguments.items())[1:])
            for name, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    given.update(given.pop(name, {}))
                elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and name in given:
                    raise TypeError(f"{cls.__name__}: a part takes no *{name}; give its arguments names")
            object.__setattr__(self, "_part_arguments", given)

    cls.__init__ = remembering
    cls._is_isthmus_part = True
    return cls


def spec_of(value: Any) -> Any:
    """The JSON form of a part, or of an argument of one: ``{"target": "isthmus.…:Class", "kwargs": …}`` for modules.

    Raises:
        UserError: a module that was not made by an isthmus part or by ``build("timm:…")`` cannot be described.
    """
    if isinstance(value, nn.Module):
        if "_timm_spec" in value.__dict__:
            return value.__dict__["_timm_spec"]
        if "_part_arguments" in value.__dict__:
            cls = type(value)
            now = getattr(value, "part_arguments", None)
            given: Any = now() if callable(now) else value.__dict__["_part_arguments"]
            kwargs = {name: spec_of(argument) for name, argument in given.items()}
            return {"target": f"{cls.__module__}:{cls.__qualname__}", "kwargs": kwargs}
        raise UserError(
            f"{type(value).__name__} cannot be written to a model file, because only isthmus parts and timm models can "
            'be rebuilt safely; make it with isthmus.codec.build({"target": "timm:NAME", "kwargs": {}}) or from a part.'
        )
    if isinstance(value, Mapping):
        return {str(key): spec_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [spec_of(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"an argument of type {type(value).__name__} cannot be written to a model file: {value!r}")


def build(spec: Any) -> Any:
    """Make a part from its ``spec_of`` form. Only ``isthmus.…`` classes marked as parts and ``timm:`` names are made.

    Raises:
        UserError: for any other target, so that a model file can never run code of its own.
    """
    if isinstance(spec, list):
        return [build(item) for item in spec]
    if not isinstance(spec, Mapping):
        return spec
    if "target" not in spec:
        return {key: build(item) for key, item in spec.items()}
    target = str(spec["target"])
    kwargs = {key: build(item) for key, item in spec.get("kwargs", {}).items()}
    if target.startswith("timm:"):
        return create_timm(target.removeprefix("timm:"), **kwargs)
    module_name, _, class_name = target.partition(":")
    if module_name.split(".")[0] != "isthmus" or not class_name.isidentifier():
        raise UserError(f"target {target!r} is refused: a model file may only name isthmus parts and timm:NAME.")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"this version of isthmus has no part {target!r}; the file may come from a newer one."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and "_is_isthmus_part" in cls.__dict__):
        raise UserError(f"target {target!r} is refused: it is no part.")
    return cls(**kwargs)


def create_timm(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` whose result a Codec can save; an unknown name is answered with the nearest ones.

    ``pretrained=True`` is used while making the model and not recorded, because the weights travel in the file.
    """
    import timm

    encoders: Any = importlib.import_module("isthmus.encoders")  # registers our own architectures with timm
    if not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(f"timm has no model {name!r}." + (f" Nearest: {', '.join(near)}." if near else ""))
    model = encoders.convit.of_any_size(timm.create_model(name, **kwargs))
    kept = {key: value for key, value in kwargs.items() if key not in ("pretrained", "checkpoint_path", "cache_dir")}
    object.__setattr__(model, "_timm_spec", {"target": f"timm:{name}", "kwargs": spec_of(kept)})
    return model


# ----------------------------------------------------------------------------------------------------------- Codec


@part
class PassThrough(nn.Module):
    """The default bottleneck: everything passes, at no cost."""

    def forward(self, features: list[Tensor]) -> Code:
        """Features in, the same features out, with a zero loss on their device."""
        return Code(features, loss=features[0].new_zeros(()))


class Output(NamedTuple):
    """Prediction of the decoder (the features where there is none) and the code it was made from."""

    prediction: Any
    code: Code


class Codec(nn.Module):
    """Encoder, bottleneck and decoder as one module.

    ``Codec(encoder, decoder=head)(images).prediction`` runs it; ``save_pretrained(folder)`` and
    ``Codec.from_pretrained(folder)`` keep it as ``model.safetensors`` plus ``codec.json``.

    Args:
        encoder: maps the input to a pyramid.
        bottleneck: maps the pyramid to a :class:`Code`; everything passes by default.
        decoder: maps the code's features to a prediction; ``None`` predicts the features themselves.
    """

    CONFIG = "codec.json"
    WEIGHTS = "model.safetensors"

    def __init__(
        self, encoder: nn.Module, bottleneck: nn.Module | None = None, decoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.bottleneck = PassThrough() if bottleneck is None else bottleneck
        self.decoder = decoder

    @property
    def conditions(self) -> frozenset[str]:
        """Every extra input that one of the parts takes."""
        return frozenset().union(*(conditions_of(p) for p in (self.encoder, self.bottleneck, self.decoder)))

    def _check(self, condition: Condition | None) -> None:
        unknown = set(condition or {}) - self.conditions
        if unknown:
            known = ", ".join(sorted(self.conditions)) or "none"
            raise ValueError(f"no part takes the condition {', '.join(sorted(unknown))}; the parts take: {known}.")

    def encode(self, x: Tensor, condition: Condition | None = None) -> Code:
        """The code of an input ``(B, …)``."""
        self._check(condition)
        return call_part(self.bottleneck, call_part(self.encoder, x, condition), condition)

    def decode(self, code: Code, condition: Condition | None = None) -> Any:
        """The decoder's prediction from a code; the features themselves where there is no decoder."""
        self._check(condition)
        return code.features if self.decoder is None else call_part(self.decoder, code.features, condition)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Output:
        """Encode, squeeze, decode.

        Raises:
            ValueError: ``condition`` has a key that no part declares.
        """
        code = self.encode(x, condition)
        return Output(self.decode(code, condition), code)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``codec.json`` and ``model.safetensors`` into ``folder``; both are complete or absent.

        Raises:
            UserError: a part cannot be described (see :func:`spec_of`).
        """
        parts = {"encoder": self.encoder, "bottleneck": self.bottleneck, "decoder": self.decoder}
        config = {"format": "isthmus-codec", "version": 1, **{name: spec_of(p) for name, p in parts.items()}}
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_weights(self, path / self.WEIGHTS)
        write_atomically(path / self.CONFIG, json.dumps(config, indent=1).encode())
        return path

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Load a folder written by :meth:`save_pretrained`, or a repository of the Hugging Face hub of that layout.

        Raises:
            UserError: there is no such folder, the file is no codec, or the weights do not fit the parts.
        """
        path = Path(source)
        if not path.is_dir():
            path = _download(str(source), (cls.CONFIG, cls.WEIGHTS), revision)
        try:
            config = json.loads((path / cls.CONFIG).read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} holds no readable {cls.CONFIG}; give a folder written by save_pretrained."
            ) from error
        if not isinstance(config, dict) or config.get("format") != "isthmus-codec":
            raise UserError(f"{path / cls.CONFIG} is not an isthmus codec file.")
        if config.get("version") != 1:
            raise UserError(f"{path / cls.CONFIG} has version {config.get('version')}; this isthmus reads version 1.")
        codec = cls(*(build(config.get(name)) for name in ("encoder", "bottleneck", "decoder")))
        load_weights(codec, path / cls.WEIGHTS)
        return codec.eval()

    def push_to_hub(self, repo_id: str, *, private: bool = False, commit_message: str = "Upload codec") -> str:
        """Upload the saved form to the Hugging Face hub and return its address (needs a logged-in ``hf``)."""
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


# ------------------------------------------------------------------------------------------------- files and weights


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a crash, a kill or a full disk leaves the old file or the new one, never half of either."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_weights(module: nn.Module, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write a module's state to safetensors; tensors that share memory are stored once and tied again on loading."""
    from safetensors.torch import save

    state, tied, seen = {}, {}, {}
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            state[name] = tensor.detach().cpu().contiguous().clone()
    metadata = {**(metadata or {}), **({"tied": json.dumps(tied)} if tied else {})}
    write_atomically(path, save(state, metadata=metadata))


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file of :func:`save_weights` into a module of the same parts.

    Raises:
        UserError: the file is missing, cut short or foreign, or a tensor has another name or shape.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator of its own
            tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); it may be missing or cut short."
        ) from error
    state |= {name: state[other] for name, other in tied.items()}
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    if missing or extra or shapes:
        told = [f"lacks {missing[0]} (and {len(missing) - 1} more)"] if missing else []
        told += [f"has an unknown {extra[0]} (and {len(extra) - 1} more)"] if extra else []
        told += [f"{n} is {tuple(state[n].shape)}, the model's is {tuple(own[n].shape)}" for n in shapes[:1]]
        raise UserError(f"{path} does not fit {type(module).__name__}: it " + "; it ".join(told) + ".")
    module.load_state_dict(state)


def _download(repo_id: str, files: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path([hf_hub_download(repo_id, name, revision=revision) for name in files][-1]).parent
    except Exception as error:
        raise UserError(
            f"{repo_id!r} is neither a folder nor a reachable Hugging Face repository with {files}."
        ) from error
