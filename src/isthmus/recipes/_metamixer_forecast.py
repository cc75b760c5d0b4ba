"""The forecasting half of MetaMixer's recipe: train on windows of series, compare with repeating, tell what follows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import Tensor, nn

from isthmus.codec import UserError, load_weights, save_weights, write_atomically
from isthmus.data import Dataset, evaluation_batches, load
from isthmus.data.builtin.series import read_csv
from isthmus.encoders.signals.metamixer_forecaster import MetaMixerForecaster
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.objectives.forecasting import Forecasting

FORECASTER = "forecaster.safetensors"


def train_forecaster(run: Run, source: str, history: int, horizon: int, training: Training) -> None:
    """Train the ETTh1 network on windows of ``source``; metrics, a figure and the file that :func:`forecast` reads."""
    windows = f"{source}{'&' if '?' in source else '?'}length={history + horizon}"
    training_part, held_out = (load(windows, split, ("signal",), run.seed) for split in ("train", "test"))
    variables = len(training_part[0]["signal"])
    names = list(getattr(training_part, "channels", [f"series {i}" for i in range(variables)]))
    run.seed_everything("forecaster")
    arguments = {"variables": variables, "length": history, "horizon": horizon, "dropout": 0.7}
    result: Any = fit(
        run, "forecaster", Forecasting(MetaMixerForecaster(**arguments), history), training_part, training
    )
    objective: Any = result.objective if result.ema is None else result.ema
    objective.eval()
    errors, repeated = _errors(run, objective, held_out)
    run.metric("forecast_mse", errors[0])
    run.metric("forecast_mae", errors[1])
    run.metric("forecast_mse_of_repeating", repeated)
    past, future = objective.split(held_out[len(held_out) // 2]["signal"][None])
    with torch.no_grad():
        told = objective.model(run.fabric.to_device(past)).cpu()
    run.figure(
        "forecast", _draw(past[0], told[0], names, future[0]), "A held-out window: what followed, and the forecast."
    )
    told_with = {"arguments": json.dumps(arguments), "series": json.dumps(names)}
    if run.is_first:
        save_weights(objective.model, run.dir / FORECASTER, told_with)
    run.artifact("forecaster", run.dir / FORECASTER, f"the forecaster of {', '.join(names)}")


@torch.no_grad()
def _errors(run: Run, objective: Any, held_out: Dataset) -> tuple[tuple[float, float], float]:
    """Mean squared and absolute error, and the squared error of telling the last value again."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in evaluation_batches(held_out, 256):
        past, future = objective.split(run.fabric.to_device(batch["signal"]))
        error, still = objective.model(past) - future, past[..., -1:] - future
        sums += torch.stack([error.square().sum(), error.abs().sum(), still.square().sum()]).double().cpu()
        count += future.numel()
    squared, absolute, repeated = (sums / count).tolist()
    return (squared, absolute), repeated


@torch.no_grad()
def forecast(run_dir: Path, table: Path, out: Path) -> list[Path]:
    """What follows the last rows of a table: ``NAME-forecast.csv`` and ``NAME-forecast.png``.

    Raises:
        UserError: the run kept no forecaster; the table has other columns or too few rows.
    """
    path = run_dir / FORECASTER
    if not path.is_file():
        raise UserError(f"{run_dir} has no {FORECASTER}; run the recipe with --series SOURCE first.")
    with safe_open(path, "pt") as file:
        told_with = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    names, arguments = told_with["series"], told_with["arguments"]
    model: nn.Module = MetaMixerForecaster(**arguments)
    load_weights(model, path)
    values, heads = read_csv(table)
    missing = [name for name in names if name not in heads]
    if missing or len(values) < arguments["length"]:
        raise UserError(
            f"{table} has {len(values)} rows of {', '.join(heads)}; the forecaster reads the last "
            f"{arguments['length']} of {', '.join(names)}."
        )
    # Every series is standardised inside the network, so its unit does not matter.
    chosen = values[-arguments["length"] :, [heads.index(name) for name in names]]
    past = torch.from_numpy(chosen.T.copy()).float()
    told = model.eval()(past[None])[0]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([f"{value:.6g}" for value in row] for row in told.T.tolist())
    out.mkdir(parents=True, exist_ok=True)
    written = [out / f"{table.stem}-forecast.csv", out / f"{table.stem}-forecast.png"]
    write_atomically(written[0], text.getvalue().encode())
    _draw(past, told, names).savefig(written[1])
    return written


def _draw(past: Tensor, told: Tensor, names: Sequence[str], future: Tensor | None = None) -> Figure:
    """The first few series: past, what followed where it is known, forecast."""
    shown = min(4, len(names))
    figure = Figure(figsize=(6.5, 1.4 * shown + 0.5), layout="constrained")
    for i, axis in enumerate(figure.subplots(shown, sharex=True, squeeze=False)[:, 0]):
        after = range(past.shape[1], past.shape[1] + told.shape[1])
        axis.plot(past[i].tolist(), color="tab:gray", label="past")
        if future is not None:
            axis.plot(after, future[i].tolist(), color="tab:gray", linestyle=":", label="followed")
        axis.plot(after, told[i].tolist(), color="tab:blue", label="forecast")
        axis.set_ylabel(names[i], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8, ncols=3)
    return figure
