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

import lzma
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from isthmus.bounds import Count, Natural, at_least
from isthmus.catalog import published
from isthmus.codec import UserError, load_weights, save_weights
from isthmus.data import load
from isthmus.engine import Run
from isthmus.priors.circuit import HCLT
from isthmus.priors.circuit_coding import CircuitCoder
from isthmus.priors.circuit_schedule import Schedule
from isthmus.priors.circuit_tree import Tree, chain, chow_liu_tree, mutual_information, random_tree
from isthmus.priors.pcz import PictureCoder
from isthmus.report import figures
from isthmus.tasks import lossless

needs = ("image",)
apply = lossless.apply
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
    latents: Count = 8
    """States of every latent."""
    tree_latents: Count = 16
    """States where trees are compared."""
    epochs: Count = 40
    """Passes of full-batch EM over the small images."""
    stochastic_epochs: Natural = 0
    """Passes of mini-batch EM before those."""
    batch_size: Count = 256
    """Samples of a mini-batch."""
    step: tuple[float, float] = (0.3, 0.03)
    """Step of mini-batch EM, from the first pass to the last."""
    pseudocount: Annotated[float, at_least(0)] = 0.01
    """Added to the flow of every node."""
    timed: Count = 64
    """Images on which full and partial evaluation are timed."""
    photos: str = "photos:128"
    """Pictures for the circuit of patches; none skips that half, and apply with it."""
    photos_train: Count = 2048
    """Pictures to learn from."""
    photos_eval: Count = 48
    """Pictures to compress."""
    patch: Annotated[int, at_least(2)] = 8
    """Pixels a side of a patch."""
    patches: Count = 100000
    """Patches to learn from."""
    patch_latents: Count = 16
    """States of every latent of the patches."""
    patch_epochs: Count = 2
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
    images = lossless.small_images(run, config.data, config.train_split, config.eval_split)
    train, test, levels, _ = images
    run.log(
        f"{config.data}: {len(train)} images to learn from, {len(test)} to compress, {train.shape[1]} variables of "
        f"{len(levels)} values."
    )
    circuit = _compare_circuits(run, config, train, test, len(levels))
    _code(run, circuit, test)
    _time_schedules(run, config, circuit, test)
    lossless.show(run, circuit, images)
    if config.photos != "none":
        _photos(run, config)


# ------------------------------------------------------------------------------------------------------- small images


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


# -------------------------------------------------------------------------------------------------------------- photos


def _photos(run: Run, config: Config) -> None:
    """Learn the circuit of patches; compress held-out pictures with it and with other formats."""
    train, held_out = (load(config.photos, split, needs, run.seed) for split in ("train", "test"))
    if not hasattr(train, "__len__"):
        raise UserError(f"{config.photos} is a stream, of which no part can be held out; use folder: or parquet:.")
    for flag, dataset, asked in (("train", train, config.photos_train), ("eval", held_out, config.photos_eval)):
        if len(dataset) < asked:
            amount = f"{asked} pictures were asked for (--photos-{flag}) and {len(dataset)} are there"
            part = "train" if flag == "train" else "test, the part that is held out"
            run.log(f"{config.photos}: {amount} ({part}); give more pictures to have more.")
    train, held_out = train.spread(config.photos_train), held_out.spread(config.photos_eval)
    count = config.patches
    if run.options.max_steps is not None:
        train, held_out = train.spread(64), held_out.spread(2)
        count = min(count, run.options.max_steps * config.batch_size)
    found, there = lossless.patches(train, config.patch, count, run.generator("patches"))
    number = "1 picture" if len(held_out) == 1 else f"{len(held_out)} pictures"
    cut = "" if run.options.max_steps is None else ", fewer because of --max-steps"
    run.log(f"{config.photos}: {len(found)} patches of {len(train)} pictures, {number} to compress{cut}.")
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
        tell = lambda epoch, value: run.log(f"pass {epoch}: {-value / size:.4f} bits per dimension met")  # noqa: E731
        circuit.fit(batches, run.cap(config.patch_epochs), config.step, tell)
        run.metric("patches_per_second", len(found) * run.cap(config.patch_epochs) / (time.perf_counter() - begin))
        return circuit

    circuit = _learnt(run, "patches", circuit, fit).cpu()
    lossless.keep(run, circuit, config.patch)
    lossless.compare(run, PictureCoder(circuit, config.patch, threads=1), held_out)
