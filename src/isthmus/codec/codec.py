"""Encoder, bottleneck and decoder as one module, kept as safetensors plus JSON."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from isthmus.codec.contracts import Code, Condition, call_part, conditions_of
from isthmus.codec.errors import UserError
from isthmus.codec.files import load_weights, read_object, save_weights, write_atomically
from isthmus.codec.hub import folder_of
from isthmus.codec.parts import build_or_take, part, spec_or_name


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


@part
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

    def part_arguments(self) -> dict[str, Any]:
        """What a file has to say to make this again: its parts as they are now."""
        return {"encoder": self.encoder, "bottleneck": self.bottleneck, "decoder": self.decoder}

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

        A part of one's own that is no ``@part`` is kept by its weights only: give it to :meth:`from_pretrained`.
        """
        parts = {name: spec_or_name(module) for name, module in self.part_arguments().items()}
        config = {"format": "isthmus-codec", "version": 1, **parts}
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_weights(self, path / self.WEIGHTS)
        write_atomically(path / self.CONFIG, json.dumps(config, indent=1).encode())
        return path

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        encoder: nn.Module | None = None,
        bottleneck: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> Self:
        """Load a folder written by :meth:`save_pretrained`, or a repository of the Hugging Face hub of that layout.

        Args:
            source: the folder, or ``OWNER/NAME`` on the hub.
            revision: of the repository.
            encoder: used in place of the one that the file describes; needed where it describes none.
            bottleneck: likewise.
            decoder: likewise.

        Raises:
            UserError: there is no such folder, the file is no codec, or the weights do not fit the parts.
        """
        path = folder_of(source, (cls.CONFIG, cls.WEIGHTS), revision)
        config = read_object(path / cls.CONFIG, "a folder written by save_pretrained")
        if config.get("format") != "isthmus-codec":
            raise UserError(f"{path / cls.CONFIG} is not an isthmus codec file.")
        if config.get("version") != 1:
            raise UserError(f"{path / cls.CONFIG} has version {config.get('version')}; this isthmus reads version 1.")
        parts = {"encoder": encoder, "bottleneck": bottleneck, "decoder": decoder}
        given = {name: module for name, module in parts.items() if module is not None}
        made = {name: build_or_take(config.get(name), given, name) for name in parts}
        for name, module in made.items():
            if not (isinstance(module, nn.Module) or (module is None and name != "encoder")):
                raise UserError(f"{path / cls.CONFIG} describes no {name}.")
        codec = cls(**made)
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
