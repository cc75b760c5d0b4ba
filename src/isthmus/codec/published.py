"""Published checkpoints: every architecture's file ends with how those of its authors are read.

``PUBLISHED = Published(of="hornet", marks=…, rename=convert_official, names=[…])`` serves ``isthmus convert`` for all.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import tables
from isthmus.codec.checkpoints import Checkpoint, load_into, read_checkpoint, suited
from isthmus.codec.codec import Codec
from isthmus.codec.errors import UserError
from isthmus.codec.files import misfit, save_weights, write_atomically
from isthmus.codec.parts import build, spec_of
from isthmus.codec.timm_models import create_timm

State = Mapping[str, Tensor]


def classes_in(state: State) -> dict[str, Any]:
    """``num_classes`` of a timm model, read off its classifier under our names; 0 where there is none."""
    head = next((state[name] for name in ("head.fc.weight", "head.fc2.weight", "head.weight") if name in state), None)
    return {"num_classes": 0 if head is None else len(head)}


def with_head_norm(ours: State) -> dict[str, Tensor]:
    """Tensors under our names; backbones for dense tasks lack the norm of the head, and get that of a fresh model."""
    if "norms.0.weight" not in ours or "head.norm.weight" in ours:
        return dict(ours)
    last = ours["norms.3.weight"]
    return {"head.norm.weight": torch.ones_like(last), "head.norm.bias": torch.zeros_like(last), **ours}


@dataclass(frozen=True)
class Published:
    """Checkpoints that the authors of an architecture, or others, have published.

    Attributes:
        of: the system on the command line.
        marks: a regular expression; a file is theirs where it is found in the name of a tensor. Empty is any file, once
            the system is named.
        rename: published names to ours.
        names: timm names of the published sizes; the first that fits is it.
        arguments: of the timm model, read off the tensors under our names.
        make: in place of names: the part with its weights, from a :class:`Checkpoint` and options that the file does
            not tell; or tensors by name, where the file does not tell the part. It raises ValueError for another file.
        write: in place of safetensors whose metadata say how the module is made: writes what ``make`` gave and returns
            the path.
    """

    of: str
    marks: str
    rename: Callable[[State], State] = dict
    names: Sequence[str] = ()
    arguments: Callable[[State], dict[str, Any]] = classes_in
    make: Callable[..., Any] | None = None
    write: Callable[[Any, Checkpoint, Path], Path] | None = None

    def fits(self, found: Checkpoint) -> bool:
        """Whether a tensor of the file is named as in these."""
        return any(re.search(self.marks, name) for name in found.state)

    def read(self, found: Checkpoint, **options: Any) -> Any:
        """The module with the weights of a checkpoint.

        Raises:
            UserError: the file is of none of the published sizes; the sentence says what keeps it from the nearest.
        """
        if self.make is None:
            return self._sized(found)
        try:
            return self.make(found, **options)
        except UserError:
            raise
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{found.path} is no published checkpoint of {self.of}: {reason}") from error

    def save(self, made: Any, found: Checkpoint, out: Path) -> Path:
        """Write what :meth:`read` gave; a Codec becomes a folder."""
        return (self.write or _written)(made, found, out)

    def _sized(self, found: Checkpoint) -> nn.Module:
        ours = self.rename(found.state)
        arguments = self.arguments(ours)
        nearest: tuple[int, str, str] | None = None
        for name in self.names:
            with torch.device("meta"):
                wanted = create_timm(name, **arguments).state_dict()
            state = suited(ours, wanted)
            shapes = sum(n in wanted and wanted[n].shape != t.shape for n, t in state.items())
            distance = len(wanted.keys() ^ state.keys()) + shapes
            if not distance:
                model = create_timm(name, **arguments)
                model.load_state_dict(suited(ours, model.state_dict()))
                return model
            if nearest is None or distance < nearest[0]:
                nearest = distance, name, misfit(state, wanted)
        told = f"; the nearest is {nearest[1]}, but {nearest[2]}" if nearest else ""
        raise UserError(f"{found.path} fits none of {', '.join(self.names)}{told}.")


def published(system: str) -> Iterator[Published]:
    """The published checkpoints of a system, the most particular kind first."""
    for module in tables.PUBLISHED.get(system, ()):
        yield importlib.import_module(module).PUBLISHED


def find(found: Checkpoint, system: str = "") -> Published:
    """Whose checkpoint it is.

    Args:
        found: of :func:`isthmus.codec.checkpoints.read_checkpoint`.
        system: the only one to try.

    Raises:
        UserError: nobody's, or not that system's.
    """
    for name in [system] if system else tables.PUBLISHED:
        for each in published(name):
            if (system or each.marks) and each.fits(found):
                return each
    some = ", ".join(list(found.state)[:3])
    if system:
        raise UserError(f"{found.path} is no published checkpoint of {system}: nothing there is named like {some}.")
    raise UserError(
        f"{found.path} is of no published checkpoint that is known here (it has {some}); name the system with "
        f"--system: {', '.join(tables.PUBLISHED)}."
    )


def convert(path: Path, out: Path, system: str = "", ema: bool = False, **options: Any) -> Path:
    """A published checkpoint as safetensors for timm or for :func:`isthmus.codec.build`, or as the folder of a Codec.

    Args:
        path: the checkpoint.
        out: the file to write.
        system: whose it is; found by the names of its tensors without it.
        ema: take the moving average of the weights.
        options: what the file does not tell; they differ from system to system.

    Raises:
        UserError: it is nobody's, or damaged.
    """
    found = read_checkpoint(path, ema)
    each = find(found, system)
    return each.save(each.read(found, **options), found, out)


def with_encoder(found: Checkpoint, encoder: Mapping[str, Any], decoder: nn.Module) -> Codec:
    """A Codec whose encoder's weights stand in the same file, under the published names of its own architecture.

    Args:
        found: the whole file.
        encoder: description of a ``Backbone`` of a timm model.
        decoder: with its weights.
    """
    made: Any = build(encoder)
    architecture = encoder["kwargs"]["model"]["target"].removeprefix("timm:")
    module = importlib.import_module(str(tables.module_of(architecture)))
    load_into(made.model, found, architecture, module.PUBLISHED.rename)
    return Codec(made, decoder=decoder)


def _written(made: Any, found: Checkpoint, out: Path) -> Path:
    if isinstance(made, Codec):
        return made.save_pretrained(out.with_suffix("") if out.suffix == ".safetensors" else out)
    if isinstance(made, Mapping):
        from safetensors.torch import save

        write_atomically(out, save({name: tensor.contiguous() for name, tensor in made.items()}))
        return out
    spec = spec_of(made)
    if spec["target"].startswith("timm:"):
        name, arguments = spec["target"].removeprefix("timm:"), json.dumps(spec["kwargs"])
        save_weights(made, out, {"timm": name, "arguments": arguments})
    else:
        save_weights(made, out, {"part": json.dumps(spec)})
    return out
