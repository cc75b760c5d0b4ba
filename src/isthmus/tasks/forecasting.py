"""Forecasting of series: training on windows, errors beside repeating the last value, and what follows in a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isthmus import saved
from isthmus.codec import UserError
from isthmus.data import Dataset, load
from isthmus.data.inputs import Inputs
from isthmus.engine import Run, Training
from isthmus.engine.evaluate import shared_batches
from isthmus.engine.fit import fit
from isthmus.objectives.forecasting import Forecasting
from isthmus.report import figures
from isthmus.saved import Saved
from isthmus.tasks.applying import Answer, Item

#: Name of the kept model.
FORECASTER = "forecaster"
_SHOWN = 4


def forecast(
    run: Run, source: str, history: int, horizon: int, training: Training, make: Callable[[int], nn.Module]
) -> None:
    """Train a forecaster on windows of a source, measure it on others, draw one and keep the model.

    Args:
        run: gets ``forecast_mse``, ``forecast_mae`` and ``forecast_mse_of_repeating``.
        source: of windows, such as ``series:ETTh1.csv``.
        history: values that are read.
        horizon: values that are forecast.
        training: of the forecaster.
        make: the network from the number of variables, ``(B, M, history)`` to ``(B, M, horizon)``.
    """
    windows = f"{source}{'&' if '?' in source else '?'}length={history + horizon}"
    training_part, held_out = (load(windows, split, ("signal",), run.seed) for split in ("train", "test"))
    variables = len(training_part[0]["signal"])
    names = list(getattr(training_part, "channels", [f"series {i}" for i in range(variables)]))
    run.seed_everything("forecaster")
    result: Any = fit(run, FORECASTER, Forecasting(make(variables), history), training_part, training)
    objective: Any = result.objective if result.ema is None else result.ema
    objective.eval()
    squared, absolute, repeated = _errors(run, objective, held_out)
    run.metric("forecast_mse", squared)
    run.metric("forecast_mae", absolute)
    run.metric("forecast_mse_of_repeating", repeated)
    past, future = objective.split(held_out[len(held_out) // 2]["signal"][None])
    with torch.no_grad():
        predicted = objective.model(run.fabric.to_device(past)).cpu()
    drawn = figures.series(past[0], predicted[0], names, future[0], _SHOWN)
    run.figure("forecast", drawn, "A held-out window: what followed, and the forecast.")
    folder = run.dir / saved.KEPT / FORECASTER
    if run.is_first:
        inputs = Inputs("series", mean=(), std=(), channels=variables)
        saved.save(folder, objective.model, inputs, names, {"history": history, "horizon": horizon})
    run.artifact(FORECASTER, folder, f"the forecaster of {', '.join(names)}")


@torch.no_grad()
def _errors(run: Run, objective: Any, held_out: Dataset) -> list[float]:
    """Mean squared and absolute error, and the squared error of forecasting the last value again."""
    sums = torch.zeros(4, dtype=torch.float64, device=run.fabric.device)
    for batch in shared_batches(run, held_out):
        past, future = objective.split(batch["signal"])
        error, still = objective.model(past) - future, past[..., -1:] - future
        found = [error.square().sum(), error.abs().sum(), still.square().sum()]
        sums += torch.stack([*found, found[0].new_tensor(future.numel())]).double()
    if run.world > 1:
        sums: Tensor = run.fabric.all_reduce(sums, reduce_op="sum")  # type: ignore[no-redef]
    return (sums[:3] / sums[3]).tolist()


def answer(kept: Saved, item: Item) -> Answer:
    """What follows the last rows of a table, as a table and drawn behind what was read.

    Raises:
        UserError: the table has other columns or too few rows.
    """
    values, heads = item.table
    names, history = kept.labels or [], int(kept.facts["history"])
    if any(name not in heads for name in names) or len(values) < history:
        raise UserError(
            f"{item.path} has {len(values)} rows of {', '.join(heads)}; the forecaster reads the last {history} of "
            f"{', '.join(names)}."
        )
    # Every series is standardised inside the network, so its unit does not matter.
    past = torch.from_numpy(values[-history:, [heads.index(name) for name in names]].T.copy()).float()
    with torch.no_grad():
        predicted = kept.model(past[None].to(item.device))[0].cpu()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([f"{value:.6g}" for value in row] for row in predicted.T.tolist())
    facts = {"rows_read": history, "rows_forecast": predicted.shape[1]}
    files = {"-forecast.csv": text.getvalue().encode()}
    return Answer(facts, figures.series(past, predicted, names, shown=_SHOWN), files)
