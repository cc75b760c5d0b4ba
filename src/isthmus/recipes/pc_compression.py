"""Lossless compression with probabilistic circuits (Liu, Mandt, Van den Broeck, arXiv 2111.11632).

The paper's claims: a hidden Chow-Liu tree learnt by expectation maximisation has exact likelihoods and conditionals, so
that an entropy coder driven by it comes within a hair of ``-log2 p``; an order of the variables makes all conditionals
cost O(log D·|p|) instead of O(D·|p|); the rate is that of neural coders, far below that of image formats.

What is measured here. On small images (digits of 17 grey levels): bits per dimension of the circuit beside independent
pixels, LZMA and zlib; what its tree is worth beside a random one and a chain; whether every held-out image comes back
from its bytes, and how many bytes those are; nodes that the partial evaluation computes, and its time beside full
evaluation. On photographs: a circuit of 8×8 patches behind an integer flow, as bits per dimension and megabytes a
second beside PNG, WebP, JPEG 2000, and JPEG XL and zstd where they are installed.

``isthmus apply RUN photo.png`` writes ``photo.pcz``, ``isthmus apply RUN photo.pcz`` writes the same pixels as a PNG.
"""

from __future__ import annotations

import json
import lzma
import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from isthmus.catalog import published
from isthmus.codec import UserError, load_weights, save_weights, write_atomically
from isthmus.data import Dataset, load
from isthmus.engine import Run
from isthmus.priors.circuit import HCLT
from isthmus.priors.circuit_coding import CircuitCoder
from isthmus.priors.circuit_schedule import Schedule
from isthmus.priors.circuit_tree import Tree, chain, chow_liu_tree, mutual_information, random_tree
from isthmus.priors.pictures import from_image, png, read
from isthmus.recipes import _pc_compression_pictures as pictures
from isthmus.report import figures
from isthmus.tasks import applying

needs = ("image",)
_LN2 = math.log(2)


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about a minute and a half on one core."""

    data: str = "digits"
    """Small images, every pixel a variable; any source whose images are of one size and up to 4,096 values will do."""
    train_split: str = "train+val"
    """Part of the data to learn from."""
    eval_split: str = "test"
    """Part of the data to compress."""
    latents: int = 8
    """States of every latent."""
    tree_latents: int = 16
    """States where trees are compared."""
    epochs: int = 40
    """Passes of full-batch EM over the small images."""
    stochastic_epochs: int = 0
    """Passes of mini-batch EM before those."""
    batch_size: int = 256
    """Samples of a mini-batch."""
    step: tuple[float, float] = (0.3, 0.03)
    """Step of mini-batch EM, from the first pass to the last."""
    pseudocount: float = 0.01
    """Added to the flow of every node."""
    timed: int = 64
    """Images on which full and partial evaluation are timed."""
    photos: str = "photos:128"
    """Pictures for the circuit of patches; none skips that half, and apply with it."""
    photos_train: int = 2048
    """Pictures to learn from."""
    photos_eval: int = 48
    """Pictures to compress."""
    patch: int = 8
    """Pixels a side of a patch."""
    patches: int = 100000
    """Patches to learn from."""
    patch_latents: int = 16
    """States of every latent of the patches."""
    patch_epochs: int = 2
    """Passes of mini-batch EM over the patches."""

    @classmethod
    def paper(cls) -> Config:
        """MNIST with mini-batch EM, then full-batch EM; CIFAR-10 behind the fixed flow, where the paper trains one."""
        return cls(
            data="hub:ylecun/mnist",
            latents=32,
            tree_latents=32,
            train_split="train",
            stochastic_epochs=200,
            epochs=20,
            batch_size=1024,
            step=(0.1, 0.01),
            photos="hub:uoft-cs/cifar10?image=img",
            photos_train=50000,
            photos_eval=10000,
            patches=50000 * 16,
            patch_latents=32,
            patch_epochs=20,
        )


def run(config: Config, run: Run) -> None:
    """Learn circuits of small images and of patches; compress, decompress, compare and draw."""
    counts = ("latents", "tree_latents", "epochs", "batch_size", "timed", "photos_train", "photos_eval", "patches")
    for name in (*counts, "patch_latents", "patch_epochs"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is at least 1, got {getattr(config, name)}.")
    if config.patch < 2 or config.stochastic_epochs < 0:
        told = f"{config.patch} and {config.stochastic_epochs}"
        raise UserError(f"patch is at least 2 and stochastic_epochs is not negative, got {told}.")
    train, test, levels, shape = _small_images(run, config)
    run.log(
        f"{config.data}: {len(train)} images to learn from, {len(test)} to compress, {train.shape[1]} variables of "
        f"{len(levels)} values."
    )
    circuit = _compare_circuits(run, config, train, test, len(levels))
    _code(run, circuit, test)
    _time_schedules(run, config, circuit, test)
    _draw_images(run, circuit, test, levels, shape)
    if config.photos != "none":
        _photos(run, config)


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Compress pictures to ``NAME.pcz``, and turn ``NAME.pcz`` back into ``NAME.png``.

    Inputs of the same name become ``NAME-2``, ``NAME-3`` and so on. A file that is there already is left alone where it
    holds the same picture, and never replaced by another one. ``answers.json`` says for every input how many pixels and
    bytes there are, or why it was skipped.

    Raises:
        UserError: the run has no circuit of pictures, or none of the inputs could be used: a picture has more than 8
            bits a channel, a ``.pcz`` is damaged or of another run, or a file that holds something else is in the way.
            No file is written in part.
    """
    coder = pictures.load(run_dir / pictures.MODEL)
    written: list[Path] = []
    found: dict[str, Any] = {}
    for path in inputs:
        try:
            found[str(path)] = _answer(coder, path, out, written)
        except UserError as error:
            found[str(path)] = {"skipped": str(error)}
    if not written:
        raise UserError(" ".join(entry["skipped"] for entry in found.values()) or "there are no inputs.")
    write_atomically(out / applying.ANSWERS, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    return [out / applying.ANSWERS, *written]


def _answer(coder: pictures.PictureCoder, path: Path, out: Path, written: list[Path]) -> dict[str, Any]:
    """Write the other form of one picture beside those that are written, and tell what it came to."""
    back = path.suffix.lower() == ".pcz"
    image = coder.decompress(path.read_bytes(), str(path)) if back else read(path)
    data = png(image) if back else coder.compress(image, str(path))
    stem, number = out / path.stem, 1
    while (target := Path(f"{stem}{f'-{number}' if number > 1 else ''}{'.png' if back else '.pcz'}")) in written:
        number += 1  # another folder's picture of the same name
    if not target.exists():
        write_atomically(target, data)
    elif not target.is_file() or (target.read_bytes() != data and not (back and _shows(target, image))):
        raise UserError(f"{target} is there already and holds something else; move it, or give another --out.")
    written.append(target)
    before, after, values = path.stat().st_size, len(data), image.width * image.height * len(image.getbands())
    return {
        "file": target.name,
        "pixels": f"{image.width} x {image.height}, {image.mode}",
        "bytes": after,
        "bytes_before": before,
        "share_of_bytes_before": round(after / before, 3),
        "bits_per_dimension": round(8 * (before if back else after) / values, 3),
    }


def _shows(path: Path, image: Image.Image) -> bool:
    """Whether a file holds exactly this picture."""
    try:
        return from_image(read(path)).digest == from_image(image).digest
    except (UserError, OSError):
        return False


# ------------------------------------------------------------------------------------------------------- small images


def _small_images(run: Run, config: Config) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Training and held-out samples ``(N, D)`` of category numbers, the grey levels those stand for, and the shape."""
    found = []
    for split in (config.train_split, config.eval_split):
        dataset = load(config.data, split, needs, run.seed)
        if not hasattr(dataset, "__len__"):
            raise UserError(f"{config.data} is a stream, of which no part can be held out; use folder: or parquet:.")
        count = len(dataset) if run.options.max_steps is None else min(len(dataset), 512)
        images = [dataset[i]["image"] for i in range(count)]
        if len({tuple(image.shape) for image in images}) != 1:
            raise UserError(
                f"{config.data}: the {split} images have several sizes, or there are none; pixels are variables."
            )
        found.append(torch.stack(images))
    if found[0].shape[1:] != found[1].shape[1:]:
        raise UserError(f"{config.data}: training and held-out images differ in size; pixels are variables.")
    if all((images == images[:, :1]).all() for images in found):
        found = [images[:, :1] for images in found]
    shape = tuple(found[0].shape[1:])
    if math.prod(shape) > 4096:
        raise UserError(
            f"{config.data}: {shape} are {math.prod(shape)} variables, the most is 4096; give smaller images."
        )
    flat = [images.permute(0, 2, 3, 1).flatten(1).long() for images in found]
    levels = torch.cat([f.flatten() for f in flat]).unique()
    if len(levels) > 64:
        levels = torch.arange(256)
    train, test = (torch.searchsorted(levels, f) for f in flat)
    return train, test, levels, shape


def _compare_circuits(run: Run, config: Config, train: Tensor, test: Tensor, categories: int) -> HCLT:
    """Bits per dimension with several numbers of states and several trees; returns the circuit of the claim."""
    begin = time.perf_counter()
    information = mutual_information(train[:: -(-len(train) // 4096)], categories)
    tree, variables = chow_liu_tree(information), train.shape[1]
    run.log(f"mutual information and tree in {time.perf_counter() - begin:.1f} s")
    trees: dict[str, tuple[Tree, int]] = {
        "independent": (tree, 1),
        "chow_liu": (tree, config.latents),
        "chow_liu_wide": (tree, config.tree_latents),
        "random_tree": (random_tree(variables, run.generator("tree")), config.tree_latents),
        "chain": (chain(variables), config.tree_latents),
    }
    bits, curves, circuits = {}, {}, {}
    for name, (parents, latents) in trees.items():
        made = HCLT.from_data(
            train, categories, latents, config.pseudocount, generator=run.generator("circuit", name), tree=parents
        )
        circuits[name] = made = _learnt(run, name, made, lambda c: _fit_small(run, config, c, train))
        bits[name] = -float(made.log_prob(run.fabric.to_device(test)).mean()) / variables / _LN2
        curves[name] = [(i + 1, -value / variables / _LN2) for i, value in enumerate(made.history)]
        run.log(f"{name}, {latents} states: {bits[name]:.4f} bits per dimension")
    reported = published("pc-compression").get("bpd") if variables == 784 else None
    run.metric("bpd", bits["chow_liu"], published=reported, unit="bits per dimension")
    for name in ("independent", "chow_liu_wide", "random_tree", "chain"):
        run.metric(f"bpd_{name}", bits[name], unit="bits per dimension")
    run.metric("ratio_to_independent", bits["chow_liu"] / bits["independent"])
    run.metric("tree_gain", bits["random_tree"] - bits["chow_liu_wide"], unit="bits per dimension")
    made = circuits["chow_liu"]
    run.metric("parameters", sum(t.numel() for t in (made.inputs, made.sums, made.root)))
    run.curves("em", curves)
    named = {f"{name} ({trees[name][1]} states)": value for name, value in bits.items()}
    run.figure("circuits", figures.bars(named, "bits per dimension", "independent"), "Held-out images, in theory.")
    return made


def _fit_small(run: Run, config: Config, circuit: HCLT, train: Tensor) -> HCLT:
    data = run.fabric.to_device(train)
    if config.stochastic_epochs:
        order = torch.randperm(len(train), generator=run.generator("order"))
        batches = list(run.fabric.to_device(train[order]).split(config.batch_size))
        if run.options.max_steps is not None:
            batches = batches[: run.options.max_steps]
        circuit.fit(batches, run.cap(config.stochastic_epochs), config.step)
    return circuit.fit([data], run.cap(config.epochs))


def _learnt(run: Run, name: str, circuit: HCLT, fit: Callable[[HCLT], HCLT]) -> HCLT:
    """The circuit fitted, or as an earlier part of this run left it."""
    path = run.dir / "circuits" / f"{name}.safetensors"
    circuit = circuit.to(run.fabric.device)
    if run.resumed and path.is_file():
        load_weights(circuit, path)
        return circuit
    fit(circuit)
    if run.is_first:
        save_weights(circuit, path)
    return circuit


def _code(run: Run, circuit: HCLT, test: Tensor) -> None:
    """Every held-out image to bytes and back; the bytes beside the likelihood, LZMA and zlib."""
    coder = CircuitCoder(circuit)
    begin = time.perf_counter()
    files = coder.compress(test)
    middle = time.perf_counter()
    code = coder.decompress(files)
    seconds = time.perf_counter() - middle
    assert code.indices is not None
    assert code.bits is not None
    right = (code.indices == test).all(1)
    run.metric("exact_share", float(right.double().mean()))
    ideal = -circuit.double().log_prob(run.fabric.to_device(test)).cpu() / _LN2
    # A range coder ends on a whole 32-bit word; the bound is 1 % and 64 bits an image.
    run.metric("worst_excess_bits", float((code.bits - 1.01 * ideal - 64).max()), unit="bits an image over the bound")
    stream = coder.encode(test)
    begin_decode = time.perf_counter()
    together = bool(torch.equal(coder.decode(stream, len(test)), test))
    values = test.numel()
    raw = test.to(torch.uint8).numpy()  # category numbers, which suit LZMA better than the grey levels
    run.metric("exact_in_one_stream", float(together))
    run.metric("bpd_each_file", 8 * sum(map(len, files)) / values, unit="bits per dimension")
    run.metric("bpd_one_stream", 8 * len(stream) / values, unit="bits per dimension")
    lzma_bits = 8 * len(lzma.compress(raw.tobytes())) / values
    run.metric("bpd_lzma", lzma_bits, unit="bits per dimension")
    run.metric("bpd_zlib_each", 8 * sum(len(zlib.compress(row.tobytes(), 9)) for row in raw) / values)
    run.metric("saved_to_lzma", lzma_bits - float(ideal.sum()) / values, unit="bits per dimension")
    run.metric("images_per_second_encode", len(test) / (middle - begin))
    run.metric("images_per_second_decode", len(test) / seconds)
    run.metric("values_per_second_decode", values / (time.perf_counter() - begin_decode))


def _time_schedules(run: Run, config: Config, circuit: HCLT, test: Tensor) -> None:
    """Nodes and seconds of full, partial and carried evaluation of all prefixes."""
    schedule, some = Schedule(circuit), test[: config.timed]
    variables = test.shape[1]
    ways = {"partial": schedule.partial, "carried": schedule.carried}
    if run.options.max_steps is None:
        ways = {"from_scratch": schedule.from_scratch, **ways}
    seconds, found = {}, {}
    for name, way in ways.items():
        rounds = 1 if name == "from_scratch" else 3
        for _ in range(rounds):
            begin = time.perf_counter()
            found[name] = way(some)
            seconds[name] = min(seconds.get(name, math.inf), time.perf_counter() - begin)
    share = found["partial"].evaluated / (variables * schedule.nodes)
    bound = 4 * math.log2(variables) / variables if variables > 1 else 1.0
    run.metric("partial_share_of_nodes", share)
    run.metric("partial_share_over_bound", share / bound)
    run.metric("carried_share_of_nodes", found["carried"].evaluated / (variables * schedule.nodes))
    apart = max(float(abs(f.log_prob - found["partial"].log_prob).max()) for f in found.values())
    run.metric("schedules_differ", apart, unit="nats")
    if "from_scratch" in seconds:
        for name in ("partial", "carried"):
            run.metric(f"{name}_speedup", seconds["from_scratch"] / seconds[name], unit="times full evaluation")


def _draw_images(run: Run, circuit: HCLT, test: Tensor, levels: Tensor, shape: tuple[int, ...]) -> None:
    """Images drawn from the circuit, and lower halves drawn given the upper ones."""
    channels, height, width = shape
    generator = run.generator("samples")
    shown = test[:10].to(run.fabric.device)
    upper = torch.zeros(height, width, channels, dtype=torch.bool)
    upper[: height // 2] = True
    completed = circuit.sample(len(shown), generator, shown, upper.flatten())
    rows = torch.cat([circuit.sample(10, generator), shown, completed]).cpu()
    images = levels[rows].view(-1, height, width, channels).permute(0, 3, 1, 2).float() / 255
    images = images.expand(-1, 3, -1, -1)
    names = ["drawn"] * 10 + ["held out"] * len(shown) + ["completed"] * len(shown)
    figure = figures.captioned(images, names, [True] * len(names), columns=10)
    run.figure("images", figure, "Drawn from the circuit; held-out images; their lower halves drawn given the upper.")


# -------------------------------------------------------------------------------------------------------------- photos


def _photos(run: Run, config: Config) -> None:
    """Learn the circuit of patches; compress held-out pictures with it and with other formats."""
    train, held_out = (load(config.photos, split, needs, run.seed) for split in ("train", "test"))
    if not hasattr(train, "__len__"):
        raise UserError(f"{config.photos} is a stream, of which no part can be held out; use folder: or parquet:.")
    for flag, dataset, asked in (("train", train, config.photos_train), ("eval", held_out, config.photos_eval)):
        if len(dataset) < asked:
            told = f"{asked} pictures were asked for (--photos-{flag}) and {len(dataset)} are there"
            part = "train" if flag == "train" else "test, the part that is held out"
            run.log(f"{config.photos}: {told} ({part}); give more pictures to have more.")
    train, held_out = _some(train, config.photos_train), _some(held_out, config.photos_eval)
    count = config.patches
    if run.options.max_steps is not None:
        train, held_out = _some(train, 64), _some(held_out, 2)
        count = min(count, run.options.max_steps * config.batch_size)
    found, there = pictures.patches(train, config.patch, count, run.generator("patches"))
    told = "1 picture" if len(held_out) == 1 else f"{len(held_out)} pictures"
    cut = "" if run.options.max_steps is None else ", fewer because of --max-steps"
    run.log(f"{config.photos}: {len(found)} patches of {len(train)} pictures, {told} to compress{cut}.")
    whole = found[there.all(1)] if there.all(1).any() else found
    circuit = HCLT.from_data(
        whole, 256, config.patch_latents, config.pseudocount, generator=run.generator("circuit", "patches")
    )
    batches = [
        (run.fabric.to_device(x), run.fabric.to_device(o))
        for x, o in zip(found.split(config.batch_size), there.split(config.batch_size), strict=True)
    ]
    size = float(there.sum()) / len(there) * _LN2

    def fit(circuit: HCLT) -> HCLT:
        begin = time.perf_counter()
        told = lambda epoch, value: run.log(f"pass {epoch}: {-value / size:.4f} bits per dimension met")  # noqa: E731
        circuit.fit(batches, run.cap(config.patch_epochs), config.step, told)
        run.metric("patches_per_second", len(found) * run.cap(config.patch_epochs) / (time.perf_counter() - begin))
        return circuit

    circuit = _learnt(run, "patches", circuit, fit).cpu()
    if run.is_first:
        pictures.save(circuit, config.patch, run.dir / pictures.MODEL)
    run.artifact("pictures", run.dir / pictures.MODEL, "the circuit that isthmus apply compresses pictures with")
    _compare_formats(run, pictures.load(run.dir / pictures.MODEL, threads=1), held_out)


def _compare_formats(run: Run, coder: pictures.PictureCoder, held_out: Dataset) -> None:
    shown = [Image.fromarray(held_out[i]["image"].permute(1, 2, 0).numpy()) for i in range(len(held_out))]
    formats = {"pcz": pictures.Format(coder.compress, coder.decompress), **pictures.others()}
    found = {name: pictures.measure(shown, fmt) for name, fmt in formats.items()}
    for name, measured in found.items():
        run.metric(f"photos_bpd_{name}", float(np.mean(measured.bits)), unit="bits per dimension")
        run.metric(f"photos_encode_{name}", measured.encode, unit="MB/s, one thread")
        run.metric(f"photos_decode_{name}", measured.decode, unit="MB/s, one thread")
    ours = found["pcz"]
    run.metric("photos_exact_share", ours.exact / len(shown))
    for name in found:
        if name != "pcz":
            run.metric(f"photos_ratio_to_{name}", float(np.mean(ours.bits) / np.mean(found[name].bits)))
    means = {name: float(np.mean(measured.bits)) for name, measured in found.items()}
    run.figure("formats", figures.bars(means, "bits per dimension", " "), "Held-out photographs, whole files.")
    run.figure("each_photo", _scatter(found), "Every photograph: our file beside those of PNG and WebP.")


def _scatter(found: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axis = figure.subplots()
    for name in ("png", "webp"):
        axis.scatter(found[name].bits, found["pcz"].bits, s=14, label=f"against {name}")
    top = max(max(found[name].bits) for name in ("png", "webp"))
    axis.plot([0, top], [0, top], color="tab:gray", linewidth=1)
    axis.set_xlabel("bits per dimension of the other format")
    axis.set_ylabel("bits per dimension of .pcz")
    axis.legend(frameon=False)
    return figure


def _some(dataset: Dataset, count: int) -> Dataset:
    """``count`` samples, evenly spaced, or all."""
    return dataset if count >= len(dataset) else dataset.select(np.arange(count) * len(dataset) // count)
