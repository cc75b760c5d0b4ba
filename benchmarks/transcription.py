"""Ours beside a plain transcription of the published equations: same weights, same numbers out, forward and training.

A script writes the transcription down, says what is compared, and leaves the rest to this file::

    def networks(batch: int, settings: Settings) -> Iterator[Case]:
        plain = warmed(PlainNet())
        ours = timm.create_model("net")
        ours.load_state_dict(convert_official(plain.state_dict()))
        yield Case("Net", {"plain": plain, "ours": ours}, settings.images(batch), others=familiar())

    if __name__ == "__main__":
        run("net_speed", __doc__, {"networks": networks})

``python -m benchmarks.net_speed`` then measures with batches of 1 and 32 at 224 pixels on one thread, or on the GPU
where there is one, and writes ``results/benchmarks/net_speed.json``; ``--only``, ``--batches``, ``--rounds``,
``--size``, ``--threads`` and ``--no-record`` are for a quick look.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.common import compare, record, table


@dataclass(frozen=True)
class Settings:
    """What the command line says: rounds of timing, side of the images in pixels, device."""

    rounds: int
    size: int
    device: torch.device

    def images(self, batch: int) -> Tensor:
        """Random images ``(batch, 3, size, size)``."""
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(0)).to(self.device)


@dataclass(frozen=True)
class Case:
    """Modules that are timed in turn on the same inputs.

    Args:
        title: what is measured.
        same: name → module; all must give the output of the first, in evaluation mode.
        inputs: of every call, the batch first; a layer whose input ``requires_grad`` gives its gradient too.
        others: more modules, for orientation; their outputs may differ.
        forward_only: names that are not trained, such as merged networks.
        bound: largest difference allowed, over the largest magnitude of the output.
    """

    title: str
    same: Mapping[str, nn.Module]
    inputs: Tensor | tuple[Any, ...]
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    forward_only: Collection[str] = ()
    bound: float = 1e-4


def beside(case: Case, settings: Settings) -> dict[str, Any]:
    """Time a forward pass without a graph, and a training step without the optimiser.

    Returns:
        ``{"forward": rows, "training step": rows, "largest relative difference": gap}``; rows are those of
        :func:`benchmarks.common.compare` with ``images_a_second``.
    """
    inputs = case.inputs if isinstance(case.inputs, tuple) else (case.inputs,)
    modules = {name: module.to(settings.device) for name, module in {**case.same, **case.others}.items()}
    with torch.no_grad():
        (_, wanted), *rest = [(name, modules[name].eval()(*inputs)) for name in case.same]
        gap = max((difference(name, output, wanted) for name, output in rest), default=0.0)
    if gap > case.bound:
        raise SystemExit(f"{case.title}: the outputs differ by {gap:.1e} of the largest, more than {case.bound:.0e}.")
    del wanted, rest
    found: dict[str, Any] = {"largest relative difference": gap}
    evaluated = {name: forward(module.eval(), *inputs) for name, module in modules.items()}
    found["forward"] = compare(evaluated, rounds=settings.rounds)
    trained = {name: module.train() for name, module in modules.items() if name not in case.forward_only}
    found["training step"] = compare({n: step(m, *inputs) for n, m in trained.items()}, rounds=settings.rounds)
    for kind in ("forward", "training step"):
        for row in found[kind].values():
            row["images_a_second"] = len(inputs[0]) / row["seconds"]
        print(f"\n{case.title}, batch {len(inputs[0])}, {kind}\n{table(found[kind])}", flush=True)
    return found


def forward(module: nn.Module, *inputs: Any) -> Callable[[], Tensor]:
    """A forward pass without a graph."""

    def run() -> Tensor:
        with torch.inference_mode():
            return module(*inputs)

    return run


def step(module: nn.Module, *inputs: Any) -> Callable[[], None]:
    """Forward and backward pass; what comes back at the output is the same for every module of that output's shape."""
    with torch.no_grad():
        shape = module(*inputs).shape
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])

    def run() -> None:
        module.zero_grad(set_to_none=True)
        inputs[0].grad = None
        module(*inputs).backward(sent)

    return run


def difference(name: str, output: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest magnitude.

    Raises:
        SystemExit: another shape, or a value that is not finite.
    """
    if output.shape != wanted.shape or not torch.isfinite(output).all():
        raise SystemExit(f"{name}: finite {tuple(wanted.shape)} is wanted; {tuple(output.shape)} came out.")
    return float((output - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def warmed(model: nn.Module) -> nn.Module:
    """Random parameters of ordinary size everywhere, batch statistics included, in place: no branch is asleep."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            low, high = (0.5, 1.5) if tensor.ndim <= 1 or name.endswith("running_var") else (-0.05, 0.05)
            tensor.uniform_(low, high, generator=generator)
    return model


def familiar() -> dict[str, nn.Module]:
    """Two networks of timm that everybody knows, for orientation."""
    return {"ConvNeXt-T (timm)": timm.create_model("convnext_tiny"), "ResNet-50 (timm)": timm.create_model("resnet50")}


def run(name: str, doc: str | None, parts: Mapping[str, Callable[[int, Settings], Iterable[Case]]]) -> None:
    """The command line of a script: measure every part for every batch, print, record.

    Args:
        name: of the file in ``results/benchmarks``.
        doc: of the script, for ``--help``.
        parts: name → function of (batch, settings) → cases.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(parts))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(options.rounds, options.size, device)
    rows: dict[str, dict[str, Any]] = {}
    for batch in options.batches:
        for part, cases in parts.items():
            if part in (options.only or parts):
                for case in cases(batch, settings):
                    rows.setdefault(part, {})[f"{case.title}, batch {batch}"] = beside(case, settings)
    if not options.no_record:
        print(record(name, rows, size=options.size, rounds=options.rounds))
