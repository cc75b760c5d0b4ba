"""UniRepLKNet: one large-kernel convnet for pictures, sound, video, points and series (Ding et al., arXiv 2311.15599).

The paper's claim: a convnet with a few very large kernels is a universal one. Sound, clips, point clouds and series are
laid out as pictures, and the same network, unchanged but for its input channels, learns them all; large kernels help
outside images too. Its training branches merge away without changing what it says.

What is measured here: small networks that differ in their kernels alone, 13x13 or 3x3, learn the same six tasks: which
shape is drawn, how far two clicks are apart, how a square moves, which body points lie on, which period a sum of
sinusoids has, and the next day of the ETTh1 series (of drawn ones where those are not at hand); how far every merged
network is from the trained one.

What comes out: one network does learn all six, and merging is exact. That large kernels help does not show in pictures
this small, whose whole extent the deep stages of the 3x3 network see as well: on periods both are alike. And they learn
more slowly. In the 500 steps of the click distances the 3x3 network has them all and the 13x13 one only on some seeds,
which also costs it the 85 % that every task should reach; in 1,000 steps it has them all too.

    from isthmus.encoders.images.as_image import AsImage, AudioImage
    from isthmus.encoders.backbone import Backbone
    (tokens,) = AsImage(AudioImage(), Backbone("unireplknet_a", in_chans=1))(waveforms)      # (B, L) → (B, N, C)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from isthmus.codec import UserError, load_weights, save_weights, write_atomically
from isthmus.data import Dataset, Memory, class_names, evaluation_batches, load
from isthmus.data.dataset import Unreadable
from isthmus.data.inputs import Inputs
from isthmus.data.readers.local import local
from isthmus.data.readers.sounds import Sounds
from isthmus.data.transforms import Transform
from isthmus.data.transforms.augmentation import Augmentation, training_transform
from isthmus.engine import Run, Training, read_config
from isthmus.engine.fit import fit
from isthmus.recipes._unireplknet_files import SUFFIXES, read_file
from isthmus.recipes._unireplknet_models import make_model, make_objective
from isthmus.recipes._unireplknet_pictures import draw_answer, draw_forecast, draw_inputs
from isthmus.recipes._unireplknet_tasks import (
    COLUMNS,
    AudioTask,
    ForecastTask,
    ImageTask,
    PointsTask,
    SeriesTask,
    VideoTask,
)
from isthmus.report import figures

needs = ("label", "image?", "audio?", "signal?")

#: The tasks that the claims are about.
CLAIMED = ("image", "audio", "points", "series")
_MOST_IN_MEMORY = 4096  # samples of drawn sources, which are then drawn once


def _short(epochs: float = 10, lr: float = 4e-3, batch_size: int = 32) -> Training:
    return Training(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=0.05, warmup_epochs=1)


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about two minutes on one core."""

    tasks: tuple[str, ...] = ("image", "audio", "video", "points", "series", "forecast")
    """Which of the tasks to learn."""
    encoder: str = ""
    """A convnet of timm, such as unireplknet_a or convnext_tiny, in place of the small one of the sizes below."""
    pretrained: bool = False
    """Begin with timm's published weights of that convnet."""
    depths: tuple[int, ...] = (1, 1, 2, 1)
    """Blocks of every stage of the small network."""
    dims: tuple[int, ...] = (16, 24, 32, 48)
    """Width of every stage."""
    kernel: int = 13
    """Side of the kernels of its second and third stage."""
    twin: int = 3
    """Side of those kernels in the network it is compared with; 0 leaves that out."""
    layer_scale: float = 1.0
    """Weight of every block at the start; 1e-6 is published, and takes longer than these short runs."""
    drop_path: float = 0.0
    """Stochastic depth."""
    image: ImageTask = field(
        default_factory=lambda: ImageTask("scenes:32?space=easy&shapes=circle,ring,cross,triangle&count=800", _short())
    )
    """Pictures."""
    audio: AudioTask = field(default_factory=lambda: AudioTask("sounds:clicks?count=800", _short(batch_size=16)))
    """Sounds."""
    video: VideoTask = field(default_factory=lambda: VideoTask("clips:16?frames=9&noise=5&count=800", _short(8)))
    """Clips."""
    points: PointsTask = field(default_factory=lambda: PointsTask("solids:128?count=800", _short(8)))
    """Point clouds."""
    series: SeriesTask = field(default_factory=lambda: SeriesTask("signals:sinusoids?length=96&count=800", _short(8)))
    """Series that are told apart."""
    forecast: ForecastTask = field(default_factory=lambda: ForecastTask("auto", _short(5)))
    """Series whose future is told; auto is ETTh1 where it is at hand, else drawn ones."""
    test_samples: int = 400
    """Held-out samples to measure every task on; 0 is all."""
    train_split: str = "train"
    """Part of the data to train on."""
    eval_split: str = "test"
    """Part of the data to measure on."""

    @classmethod
    def paper(cls) -> Config:
        """The published settings: UniRepLKNet-T, pictures of ImageNet-1k, sounds of Speech Commands' shape.

        The other data sets of the paper have no reader here, so their tasks have its settings and drawn data of its
        sizes. RandAugment, mixing and erasing are left out, and so are the decoders of the weather model.
        """
        step = {"schedule": "multistep", "milestones": tuple(range(10, 100, 5)), "gamma": 0.85}
        return cls(
            encoder="unireplknet_t",
            twin=0,
            drop_path=0.2,
            image=ImageTask(
                "hub:ILSVRC/imagenet-1k",
                Training(epochs=300, batch_size=4096, lr=4e-3, weight_decay=0.05, warmup_epochs=20, workers=8),
                smoothing=0.1,
                size=224,
            ),
            audio=AudioTask(
                "sounds:events?rate=16000&count=10000",
                Training(epochs=100, batch_size=128, optimizer="adam", lr=2.5e-4, **step),
                rate=16000,
                bands=128,
                frames=128,
                hop=0.010,
                mean=-6.845978,
                std=5.5654526,
                binary=True,
            ),
            video=VideoTask(
                "clips:224?frames=16&count=10000",
                Training(epochs=90, batch_size=64, lr=1e-3, weight_decay=0.05, warmup_epochs=5),
                layout="raw",
            ),
            points=PointsTask(
                "solids:1024?count=10000",
                Training(epochs=300, batch_size=32, lr=5e-4, weight_decay=0.05, warmup_epochs=10),
                smoothing=0.2,
                views=4,
                size=224,
                neighbours=32,
                channels=64,
            ),
            series=SeriesTask("signals:sinusoids?length=192&count=10000", _short(90, 1e-3), dim=192),
            forecast=ForecastTask("auto", _short(10, 1e-3), dim=768, length=48, horizon=24, windows=(0, 0)),
            test_samples=0,
            eval_split="test",
        )


def run(config: Config, run: Run) -> None:
    """Learn every task with every network, compare, merge."""
    unknown = [name for name in config.tasks if name not in COLUMNS]
    if unknown or not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise UserError(f"tasks {', '.join(config.tasks) or '()'}: choose each once from {', '.join(COLUMNS)}.")
    if config.test_samples < 0:
        raise UserError(f"test_samples {config.test_samples}: how many to measure on, or 0 for all.")
    sources = {name: _sources(config, name, run.seed) for name in config.tasks}  # what is missing is told at once
    kernels = {"large": config.kernel}
    if config.twin and not config.encoder:
        kernels["small"] = config.twin
    _check(config, sources, kernels.values())
    found: dict[str, dict[str, float]] = {name: {} for name in config.tasks}
    seen: dict[str, Tensor] = {}
    gaps = []
    for name in config.tasks:
        train, held_out = (_prepared(source, name) for source in sources[name])
        if name != "forecast":
            run.log(f"{name}: {train.name}, {len(train)} samples to train on, {len(held_out)} held out.")
        for size, kernel in kernels.items():
            run.seed_everything("network", name)
            classes = _classes(name, train, held_out)
            model = make_model(config, name, _shape(train, name), len(classes), kernel)
            task = getattr(config, name)
            objective = make_objective(config, name, model)
            transforms = (None, None) if name != "image" else _transforms(task.size, len(classes))
            result: Any = fit(run, f"{name}_{size}", objective, train, task.training, transforms[0])
            model = result.objective.model.eval()
            found[name][size] = _measured(run, config, name, model, held_out, transforms[1])
            run.metric(f"{'mse' if name == 'forecast' else 'accuracy'}_{name}_{size}", found[name][size])
            run.metric(f"parameters_{name}_{size}", sum(p.numel() for p in model.parameters()))
            batch = next(evaluation_batches(held_out, min(64, len(held_out)), transform=transforms[1]))
            x = _input(name, run.fabric.to_device(batch), config)
            gaps.append(_merge_gap(model, x))
            if size == "large":
                seen[name] = model.adapter(x[:1])[:1].detach()
                _keep(run, name, model, _shape(train, name), classes)
                if name == "forecast":
                    _report_forecast(run, config, model, held_out)
    _compare(run, found, sources, kernels)
    run.metric("merge_gap", max(gaps))
    run.figure("inputs", draw_inputs(seen), "A held-out sample of every task as the network sees it.")


def _transforms(size: int, num_classes: int) -> tuple[Transform, Transform]:
    """Of pictures: for training and for measuring."""
    inputs = Inputs(size=(size, size))
    train = training_transform((size, size), size, num_classes, Augmentation(), inputs.mean, inputs.std)
    return train, inputs.transform()


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Answer files with the merged networks of a run, each file by the task that reads its kind.

    Pictures, WAV sounds, NumPy arrays (points ``(P, 3)``, clips ``(T, H, W, 3)``, series ``(C, L)``) and CSV tables.
    Writes ``answers.json``, ``NAME-answer.png`` (what the network saw, and its answer), and ``NAME-forecast.csv`` for
    tables whose future is told.

    Raises:
        UserError: the run kept no network, or no file could be read by any of its tasks.
    """
    config = _restored(run_dir)
    models = {name: _kept(run_dir, config, name) for name in config.tasks}
    out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {}
    written: list[Path] = [out / "answers.json"]
    for path in inputs:
        answers, reasons = {}, []
        for name, (model, shape, classes) in models.items():
            if path.suffix.lower() not in SUFFIXES[name]:
                continue
            try:
                x = read_file(name, getattr(config, name), shape, path)
            except Unreadable as error:
                reasons.append(f"{name}: {error}")
                continue
            stem = f"{path.stem}-{len(written)}" if out / f"{path.stem}-{name}.png" in written else path.stem
            target = out / f"{stem}-{name}.png"
            with torch.no_grad():
                answer = model(x)[0]
                picture = model.adapter(x)[:1]
            if name == "forecast":
                table = out / f"{stem}-forecast.csv"
                lines = [",".join(classes), *(",".join(f"{v:.6g}" for v in row) for row in answer.T.tolist())]
                write_atomically(table, ("\n".join(lines) + "\n").encode())
                draw_forecast(x[0], answer, classes).savefig(target)
                answers[name] = {"steps": answer.shape[1], "table": table.name, "picture": target.name}
                written += [table, target]
                continue
            probability = answer.softmax(0)
            best = probability.topk(min(5, len(classes)))
            likely = {classes[int(i)]: round(float(p), 4) for p, i in zip(*best, strict=True)}
            answers[name] = {"class": next(iter(likely)), "probability": likely, "picture": target.name}
            draw_answer(picture, name, f"{next(iter(likely))} ({float(best.values[0]):.0%})").savefig(target)
            written.append(target)
        told[str(path)] = answers or {"skipped": "; ".join(reasons) or _no_task(config)}
    if len(written) == 1:
        reasons = "; ".join(f"{name}: {entry['skipped']}" for name, entry in told.items())
        raise UserError(f"none of the inputs can be answered ({reasons}).")
    write_atomically(written[0], (json.dumps(told, indent=1) + "\n").encode())
    return written


# ---------------------------------------------------------------------------------------------------------------- data


def _sources(config: Config, name: str, seed: int) -> tuple[Dataset, Dataset]:
    """What to train and to measure a task on."""
    task: Any = getattr(config, name)
    if name == "forecast":
        address = task.data
        if address == "auto":
            here = local("ett/ETTh1.csv")
            address = f"series:{here}" if here else "series"
        length = task.length + task.horizon
        both = zip((config.train_split, config.eval_split), task.windows, strict=True)
        train, held_out = (load(address, part, ("signal",), seed, length=length, count=count) for part, count in both)
        return train, held_out
    columns = (COLUMNS[name], "label")
    train, held_out = (load(task.data, part, columns, seed) for part in (config.train_split, config.eval_split))
    if config.test_samples and config.test_samples < len(held_out):
        held_out = held_out.select(range(config.test_samples))  # type: ignore[arg-type]
    if name == "audio" and isinstance(train[0]["audio"], bytes):
        length = int(task.rate * task.window) + (task.frames - 1) * int(task.rate * task.hop)
        return Sounds(train, task.rate, length), Sounds(held_out, task.rate, length)
    return train, held_out


def _check(config: Config, sources: Mapping[str, tuple[Dataset, Dataset]], kernels: Iterable[int]) -> None:
    """Refuse, before anything is trained, a task whose network cannot be built."""
    for name, (train, _) in sources.items():
        sample = train[0][COLUMNS[name]]
        if not isinstance(sample, Tensor):
            continue  # _prepared says so
        outputs = len(sample) if name == "forecast" else 2
        with torch.device("meta"):
            for kernel in kernels:
                make_model(replace(config, pretrained=False), name, list(sample.shape), outputs, kernel)


def _prepared(dataset: Dataset, name: str) -> Dataset:
    """Drawn samples are drawn once, where they fit."""
    if dataset.in_memory or name == "image" or len(dataset) > _MOST_IN_MEMORY:
        return dataset
    batch = dataset.fetch(range(len(dataset)), replace=False)  # type: ignore[arg-type]
    if not isinstance(batch[COLUMNS[name]], Tensor):
        raise UserError(
            f"{dataset.name}: {COLUMNS[name]} of different lengths or in files; arrays of one size are needed."
        )
    data = {column: batch[column] for column in (COLUMNS[name], "label") if column in batch}
    return Memory(dataset.name, data, dataset.columns, dataset.classes)


def _shape(dataset: Dataset, name: str) -> list[int]:
    return list(dataset[0][COLUMNS[name]].shape)


def _classes(name: str, train: Any, held_out: Dataset) -> list[str]:
    """Names of the classes, or of the series whose future is told."""
    if name == "forecast":
        return list(train.channels)
    return class_names(train, held_out)


def _input(name: str, batch: Mapping[str, Any], config: Config) -> Tensor:
    x = batch[COLUMNS[name]]
    return x[..., : config.forecast.length] if name == "forecast" else x


# -------------------------------------------------------------------------------------------------------------- models


@torch.no_grad()
def _measured(run: Run, config: Config, name: str, model: Any, held_out: Dataset, transform: Any) -> float:
    """Accuracy, or the mean squared error of what is foretold, on standardised series."""
    total = count = 0.0
    for batch in evaluation_batches(held_out, 128, transform=transform):
        batch = run.fabric.to_device(batch)
        told = model(_input(name, batch, config))
        if name == "forecast":
            total += float((told - batch["signal"][..., config.forecast.length :]).square().mean((1, 2)).sum())
        else:
            total += int((told.argmax(1) == batch["label"]).sum())
        count += len(told)
    return total / count


@torch.no_grad()
def _merge_gap(model: Any, x: Tensor) -> float:
    """Largest change of an output by merging the branches."""
    merged = copy.deepcopy(model)
    merged.reparameterize()
    return float((merged(x) - model(x)).abs().max())


def _keep(run: Run, name: str, model: nn.Module, shape: Sequence[int], classes: Sequence[str]) -> None:
    path = run.dir / f"{name}.safetensors"
    if run.is_first:
        save_weights(model, path, {"shape": json.dumps(list(shape)), "classes": json.dumps(list(classes))})
    run.artifact(name, path, f"the large-kernel network of the {name} task, with its adapter and head")


def _restored(run_dir: Path) -> Config:
    """The settings of a finished run that its networks depend on."""
    saved, like = read_config(run_dir)["config"], Config()
    tasks = {}
    for name in saved["tasks"]:
        ours = getattr(like, name)
        kept = {key: value for key, value in saved[name].items() if isinstance(value, (int, float, str))}
        tasks[name] = replace(ours, **{key: value for key, value in kept.items() if hasattr(ours, key)})
    sizes = {key: tuple(saved[key]) for key in ("tasks", "depths", "dims")}
    return replace(like, **sizes, **tasks, encoder=saved["encoder"], kernel=saved["kernel"])


def _kept(run_dir: Path, config: Config, name: str) -> tuple[Any, list[int], list[str]]:
    """A kept model, merged, the shape of its samples, and the names of what it tells."""
    path = run_dir / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(f"{run_dir} has no {path.name}; run the recipe to its end first.")
    with safe_open(path, "pt") as file:
        told = file.metadata() or {}
    shape, classes = json.loads(told["shape"]), json.loads(told["classes"])
    model = make_model(config, name, shape, len(classes), config.kernel)
    load_weights(model, path)
    model.eval().reparameterize()
    return model, shape, classes


def _no_task(config: Config) -> str:
    return "no task of this run reads such a file: " + ", ".join(
        f"{name} reads {', '.join(SUFFIXES[name])}" for name in config.tasks
    )


# ----------------------------------------------------------------------------------------------------------- reporting


def _report_forecast(run: Run, config: Config, model: Any, held_out: Any) -> None:
    """What repeating the last value, and the last day, would have said; and one window drawn."""
    length, horizon = config.forecast.length, config.forecast.horizon
    windows = held_out.fetch(range(len(held_out)))["signal"]
    past, future = windows[..., :length], windows[..., length:]
    run.metric("mse_forecast_repeating_last", float((past[..., -1:] - future).square().mean()))
    if length >= 24:
        day = past[..., -24:].repeat(1, 1, -(-horizon // 24))[..., :horizon]
        run.metric("mse_forecast_repeating_day", float((day - future).square().mean()))
    middle = len(windows) // 2
    with torch.no_grad():
        told = model(run.fabric.to_device(past[middle : middle + 1]))[0].cpu()
    figure = draw_forecast(past[middle], told, held_out.channels, future[middle])
    run.figure("forecast", figure, "A held-out window: what was seen, what came, and what was foretold.")


def _compare(run: Run, found: Mapping[str, Mapping[str, float]], sources: Any, kernels: Mapping[str, int]) -> None:
    """Shares of the range above chance, and what large kernels add."""
    shares, bars = {}, {}
    for name, values in found.items():
        if name == "forecast":
            continue
        chance = 1 / len(class_names(*sources[name]))
        shares[name] = (values["large"] - chance) / (1 - chance)
        run.metric(f"share_above_chance_{name}", shares[name])
        bars[name] = values["large"]
        if "small" in values:
            run.metric(f"gain_{name}", values["large"] - values["small"])
            bars[f"{name} with 3x3"] = values["small"]
    if shares.keys() >= set(CLAIMED):
        run.metric("least_share_above_chance", min(shares[name] for name in CLAIMED))
    if bars:
        run.figure("accuracies", figures.bars(bars, grey="with 3x3"), "Held-out accuracy of every task.")
