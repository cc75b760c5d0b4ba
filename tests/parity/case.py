"""One golden case: tensors that a published implementation computed, and how close ours has to come."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class UnknownCase(Exception):
    """The adapter has no object for this case; the test fails, because a ready system covers all of its cases."""


@dataclass(frozen=True)
class Case:
    """``<slug>/<name>.json`` and ``.safetensors``, split into what goes in and what must come out."""

    path: Path
    meta: dict[str, Any]
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Case:
        """Read the case whose JSON is at ``path``."""
        groups: dict[str, dict[str, Tensor]] = {"param": {}, "in": {}, "out": {}}
        for name, tensor in load_file(path.with_suffix(".safetensors")).items():
            group, _, rest = name.partition("/")
            groups[group][rest] = tensor
        return cls(path, json.loads(path.read_text()), groups["param"], groups["in"], groups["out"])

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def object(self) -> str:
        return str(self.meta["object"])

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    def tolerance(self, output: str) -> float:
        """The bound for one output: its own (``tolerances`` takes patterns) or the case's."""
        for pattern, value in self.meta.get("tolerances", {}).items():
            if fnmatch.fnmatch(output, pattern):
                return float(value)
        return float(self.meta["tolerance"])

    def differences(self, got: dict[str, Tensor]) -> list[str]:
        """A sentence for every output that is missing, misshapen or further off than its tolerance.

        The error is the largest absolute difference over the largest magnitude expected (at least 1e-3, so that a
        tensor of zeros does not ask for the impossible).
        """
        told = []
        for output, want in self.expected.items():
            if output not in got:
                told.append(f"{output}: the adapter did not compute it")
                continue
            have = got[output].detach().cpu()
            if have.shape != want.shape:
                told.append(f"{output}: shape {tuple(have.shape)}, expected {tuple(want.shape)}")
                continue
            if not want.is_floating_point() and not want.is_complex():
                wrong = int((have.to(want.dtype) != want).sum())
                if wrong:
                    told.append(f"{output}: {wrong} of {want.numel()} integers differ")
                continue
            wide = torch.complex128 if want.is_complex() else torch.float64
            a, b = have.to(wide), want.to(wide)
            finite = torch.isfinite(b)
            if not torch.equal(torch.isfinite(a), finite) or not torch.equal(
                a[~finite].nan_to_num(), b[~finite].nan_to_num()
            ):
                told.append(f"{output}: infinities or NaN stand elsewhere")
                continue
            if not finite.any():
                continue
            error = float((a[finite] - b[finite]).abs().max()) / max(float(b[finite].abs().max()), 1e-3)
            if error > self.tolerance(output):
                told.append(f"{output}: relative error {error:.2e}, tolerance {self.tolerance(output):.0e}")
        return told
