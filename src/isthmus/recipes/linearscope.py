"""LinearScopes: the exact affine map that a network applies at one image (Navarrete Michelini et al. 2019).

The paper's claims (arXiv 1908.05168): with every non-linear unit frozen at an image, any convnet is y = F x + r,
exactly; classifiers lean heavily on r, what their biases add up to, while super-resolution is almost linear in the
image; and singular vectors of F can be found without forming it.

What is measured here, on digits: a classifier with biases and its twin without, super-resolution by two, and an
autoencoder with instance norm, sigmoid and tanh are trained; then F x + r against the output, rows from backward passes
against rows from impulses, singular values against the dense ones, accuracy from F x alone and from r alone, and the
derivative in the place of the ratio of smooth units. ``--encoder NAME --checkpoint FILE`` looks into a timm model
instead, on any ``--data``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import Tensor, nn

from isthmus.codec import Loss, UserError, load_weights, write_atomically
from isthmus.data import Dataset, evaluation_batches, load
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.transforms import CenterCrop, Compose, Resize
from isthmus.encoders.trained import trained
from isthmus.engine import Run, Training, read_config
from isthmus.engine.fit import fit
from isthmus.lenses.linear_scope import LinearScope
from isthmus.recipes import _image_classification as shared
from isthmus.report import figures

needs = ("image", "label")


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about a minute on two cores."""

    data: str = "digits"
    """Labelled images."""
    encoder: str = ""
    """A timm classifier to look into; small networks that are trained here without it."""
    checkpoint: str = ""
    """Its weights; timm's own pre-trained ones are loaded without it."""
    size: int = 0
    """Pixels a side of what the networks see; 0 is 8 for the small networks, and what a timm model is made for."""
    width: int = 16
    """Channels of the first convolution of the classifiers; twice as many in the others."""
    looked_at: int = 0
    """Held-out images on which accuracy from F x alone is measured; 0 is all."""
    triplets: int = 8
    """Leading singular triplets."""
    gates: str = "refuse"
    """Of a timm model: refuse products of two things that depend on the image, or freeze one of them."""
    training: Training = Training(epochs=12, batch_size=32, optimizer="adam", lr=2e-3)
    """Training of the classifiers and of the autoencoder."""
    super_resolution: Training = Training(epochs=25, batch_size=32, optimizer="adam", lr=2e-3)
    """Training of super-resolution."""

    @classmethod
    def paper(cls) -> Config:
        """VGG-19 with timm's weights on ImageNet pictures; the paper analyses pre-trained networks and trains none."""
        return cls(data="hub:ILSVRC/imagenet-1k", encoder="vgg19", size=224, looked_at=100, triplets=16)


class Classifier(nn.Module):
    """Three 3×3 convolutions with ReLU, max pooling after the second, the mean over places, a linear layer."""

    def __init__(self, classes: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=bias)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=bias)
        self.fc = nn.Linear(2 * width, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → ``(B, classes)``."""
        x = F.max_pool2d(self.conv2(self.conv1(x).relu()).relu(), 2)
        return self.fc(self.conv3(x).relu().mean((2, 3)))


class SuperResolution(nn.Module):
    """Three convolutions and a pixel shuffle, LeakyReLU and SiLU, with a skip: twice as many pixels a side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2 * width, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → ``(B, 3, 2 H, 2 W)``."""
        first = F.leaky_relu(self.conv1(x), 0.1)
        return F.pixel_shuffle(self.conv3(first + F.silu(self.conv2(first))), 2)


class Autoencoder(nn.Module):
    """Instance norm, a strided convolution with sigmoid, a transposed one with tanh."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.InstanceNorm2d(width, affine=True)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.up = nn.ConvTranspose2d(2 * width, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → the same, even H and W."""
        return torch.tanh(self.up(torch.sigmoid(self.conv2(self.norm(self.conv1(x)).relu()))))


class Restoration(nn.Module):
    """Mean squared error between what a network makes of ``degrade(image)`` and the image."""

    def __init__(self, network: nn.Module, degrade: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.degrade = network, degrade

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """A batch with ``image`` to the loss."""
        made = self.network(self.degrade(batch["image"]))
        return Loss(F.mse_loss(made, batch["image"]), {}, {"image": made})


def run(config: Config, run: Run) -> None:
    """Train the small networks or take a timm model, and look into them."""
    _check(config)
    held_out = load(config.data, "test", needs, run.seed)
    classes = shared.class_names(held_out)
    if config.encoder:
        network = _timm(config)
        config, outputs = _sized(config, network), _outputs(config, network)
        if outputs != len(classes):
            run.note(f"{config.encoder} has {outputs} outputs, {config.data} {len(classes)} classes: no accuracies.")
            classes = [str(number) for number in range(outputs)]
        _look(run, config, network.to(run.fabric.device), held_out, "classifier", classes)
        shared.keep(run, network, classes, f"{config.encoder}; `isthmus apply` explains its answers on pictures")
        return
    config = _sized(config, None)
    if config.size % 2:
        raise UserError(f"--size must be even, because maps are halved; got {config.size}.")
    train_set = load(config.data, "train+val", needs, run.seed)
    run.log(f"{config.data}: {len(train_set)} images to train on, {len(held_out)} held out.")
    networks: dict[str, nn.Module] = {}
    for name, bias in (("classifier", True), ("bias_free", False)):
        run.seed_everything(name)
        network = Classifier(len(classes), config.width, bias)
        shared.train(run, name, network, train_set, config.training, _raw(config))
        networks[name] = network
    for name, degrade, training in (
        ("super_resolution", lambda x: F.avg_pool2d(x, 2), config.super_resolution),
        ("autoencoder", lambda x: x, config.training),
    ):
        run.seed_everything(name)
        network = SuperResolution(config.width) if name == "super_resolution" else Autoencoder(config.width)
        fit(run, name, Restoration(network, degrade), train_set, training, _raw(config))
        networks[name] = network
    for network in networks.values():
        network.to(run.fabric.device).eval()
    share = _look(run, config, networks["classifier"], held_out, "classifier", classes)
    free = _accuracies(run, config, networks["bias_free"], held_out)
    run.metric("accuracy_bias_free", free["whole"])
    run.metric("accuracy_bias_free_without_r", free["without_r"])
    run.metric("lost_without_biases", share["accuracy"] - free["whole"])
    _exactness(run, config, networks, held_out)
    _restoration(run, config, networks, held_out, share["residual"])
    shared.keep(
        run, networks["classifier"], classes, "the classifier; `isthmus apply` explains its answers on pictures"
    )


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Explain the answers on pictures: ``scopes.json`` and ``NAME-scope.png``.

    For every picture: the class, its logit, how much of it F x and r make up, the layers' parts of r, and the check
    that F x + r is the output. The drawing shows what each pixel adds to the logit and the leading singular vectors.

    Args:
        run_dir: a finished run.
        inputs: image files.
        out: the folder to write to.

    Raises:
        UserError: the run is incomplete, or no input is an image.
    """
    saved = read_config(run_dir)["config"]
    fresh = Config()
    config = Config(**{**saved, "training": fresh.training, "super_resolution": fresh.super_resolution})
    path = run_dir / shared.NETWORK
    if not path.is_file():
        raise UserError(f"{run_dir} has no {shared.NETWORK}; run the recipe to its end first.")
    with safe_open(path, "pt") as file:
        classes = json.loads((file.metadata() or {}).get("classes", "[]"))
    if config.encoder:
        network = trained(config.encoder, str(path))
    else:
        network = Classifier(len(classes), config.width)
        load_weights(network, path)
    network.eval()
    config = _sized(config, network if config.encoder else None)
    found: dict[str, Any] = {}
    drawn: list[tuple[Path, Figure]] = []
    for source in inputs:
        try:
            image = decode_image(source)
        except Unreadable as error:
            found[str(source)] = {"skipped": str(error)}
            continue
        x = _prepared(config, network)({"image": image[None].float() / 255}, torch.Generator())["image"]
        scope = LinearScope(network, x, gates=cast(Any, config.gates))
        best = int(scope.y.argmax())
        target = out / f"{source.stem}-scope.png"
        if any(target == other for other, _ in drawn):
            target = out / f"{source.stem}-{len(drawn)}-scope.png"
        layers = {name: round(float(value), 6) for name, value in scope.residual_by_layer(best).items()}
        found[str(source)] = {
            "class": classes[best],
            "logit": float(scope.y.flatten()[best]),
            "from_pixels": float(scope.contribution(best).sum()),
            "from_constants": float(scope.residual.flatten()[best]),
            "constants_by_layer": layers,
            "relative_error": scope.fidelity.relative,
            "picture": target.name,
        }
        drawn.append((target, scope.figure(best)))
    if not drawn:
        told = "; ".join(f"{name}: {entry['skipped']}" for name, entry in found.items())
        raise UserError(f"none of the inputs is an image ({told}); known are {', '.join(IMAGE_SUFFIXES)}.")
    out.mkdir(parents=True, exist_ok=True)
    for target, figure in drawn:
        figure.savefig(target)
    write_atomically(out / "scopes.json", (json.dumps(found, indent=1) + "\n").encode())
    return [out / "scopes.json", *(target for target, _ in drawn)]


# ---------------------------------------------------------------------------------------------------------- measuring


def _look(
    run: Run, config: Config, network: nn.Module, held_out: Dataset, name: str, classes: list[str]
) -> dict[str, float]:
    """A classifier's accuracy from all, from F x and from r; drawings of what pixels add."""
    network.eval()
    found = _accuracies(run, config, network, held_out)
    if classes == shared.class_names(held_out):
        run.metric("accuracy", found["whole"])
        run.metric("accuracy_without_r", found["without_r"])
        run.metric("accuracy_from_r_alone", found["from_r"])
        run.metric("drop_without_r", found["whole"] - found["without_r"])
    run.metric("residual_share_classifier", found["residual"])
    run.metric("fidelity_classifier", found["error"])
    image = _images(run, config, held_out.select(np.arange(1)), network)[0][0]
    scope = LinearScope(network, image[None], gates=cast(Any, config.gates))
    best = int(scope.y.argmax())
    told = classes[best] if best < len(classes) else str(best)
    run.figure(name, scope.figure(best), f"One image, told {told}: its pixels' votes, singular vectors, layers in r.")
    if scope.y.numel() <= 16:
        rows = scope.rows(range(scope.y.numel())) * scope.x
        figure = Figure(figsize=(1.1 * len(rows), 1.6), layout="constrained")
        bound = float(rows.sum(1).abs().max())
        for axis, row, label in zip(figure.subplots(1, len(rows)), rows.sum(1).cpu(), classes, strict=True):
            axis.imshow(row.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
            axis.set_title(f"{label}: {float(row.sum()):.1f}", fontsize=8)
            axis.axis("off")
        run.figure("votes", figure, "What every pixel adds to every class; the sum is F x of that class.")
    parts = {name or "model": float(value) for name, value in scope.residual_by_layer(best).items()}
    run.figure("layers", figures.bars(dict(list(parts.items())[:24]), "adds to r of the answer"), "r by layer.")
    return {"accuracy": found["whole"], "residual": found["residual"]}


def _accuracies(run: Run, config: Config, network: nn.Module, held_out: Dataset) -> dict[str, float]:
    """Accuracy of y, of F x and of r; mean of ‖r‖ over ‖y‖ around the mean over classes; the largest error."""
    images, labels = _images(run, config, _first(held_out, config.looked_at), network)
    right = {"whole": 0, "without_r": 0, "from_r": 0}
    shares, error = [], 0.0
    for image, label in zip(images, labels.tolist(), strict=True):
        scope = LinearScope(network, image[None], gates=cast(Any, config.gates))
        y, r = scope.y[0], scope.residual[0]
        for name, logits in (("whole", y), ("without_r", y - r), ("from_r", r)):
            right[name] += int(logits.argmax()) == label
        centred = [value - value.mean() for value in (r, y)]
        shares.append(float(centred[0].norm() / centred[1].norm().clamp_min(1e-12)))
        error = max(error, scope.fidelity.relative)
    return {
        **{name: count / len(images) for name, count in right.items()},
        "residual": float(np.mean(shares)),
        "error": error,
    }


def _exactness(run: Run, config: Config, networks: Mapping[str, nn.Module], held_out: Dataset) -> None:
    """Output, rows and singular values against what forming F by brute force gives; the derivative for comparison."""
    images, _ = _images(run, config, held_out.select(np.arange(4)))
    kinds: dict[str, tuple[nn.Module, Tensor]] = {}
    for name in ("classifier", "super_resolution", "autoencoder"):
        x = F.avg_pool2d(images, 2) if name == "super_resolution" else images
        kinds[name] = (networks[name], x)
        run.seed_everything("untrained", name)
        fresh = {
            "classifier": lambda: Classifier(10, config.width),
            "super_resolution": lambda: SuperResolution(config.width),
            "autoencoder": lambda: Autoencoder(config.width),
        }[name]()
        kinds[f"untrained {name}"] = (fresh.to(images.device).eval(), x)
    fidelity = rows_error = svd_error = 0.0
    ratios = []
    for name, (network, x) in kinds.items():
        for each in x:
            scope = LinearScope(network, each[None])
            fidelity = max(fidelity, scope.fidelity.relative)
        dense = scope.columns(range(scope.x.numel())).flatten(1).T
        place = scope.y.numel() // 2
        row = scope.rows([place]).flatten()
        rows_error = max(rows_error, float((row - dense[place]).abs().max() / dense[place].abs().max()))
        count = min(config.triplets, *dense.shape)
        exact = torch.linalg.svdvals(dense)[:count]
        svd_error = max(svd_error, float(((scope.svd(count, sweeps=60).s - exact).abs() / exact[0]).max()))
        if "classifier" not in name:  # these have smooth units
            by_slope = LinearScope(network, x[-1:], smooth="derivative", tolerance=None)
            ratios.append(by_slope.fidelity.relative / max(scope.fidelity.relative, 1e-7))
    run.metric("fidelity", fidelity)
    run.metric("rows_error", rows_error)
    run.metric("svd_error", svd_error)
    run.metric("derivative_over_ratio", min(ratios))


def _restoration(
    run: Run, config: Config, networks: Mapping[str, nn.Module], held_out: Dataset, classifier_share: float
) -> None:
    """How large r is beside y in super-resolution; its filters and singular vectors."""
    network = networks["super_resolution"]
    images, _ = _images(run, config, _first(held_out, 100))
    shares, through = [], []
    for image in images:
        scope = LinearScope(network, F.avg_pool2d(image[None], 2))
        shares.append(float(scope.residual.norm() / scope.y.norm()))
        through.append(float((scope.y - scope.residual).norm() / scope.y.norm()))
    run.metric("residual_share_super_resolution", float(np.mean(shares)))
    run.metric("through_share_super_resolution", float(np.mean(through)))
    run.metric("share_below_classifier", classifier_share - float(np.mean(shares)))
    scope = LinearScope(network, F.avg_pool2d(images[:1], 2))
    side, inside = scope.y.shape[-1], scope.x.shape[-1]
    middle = [(side // 2 + i) * side + side // 2 + j for i in (0, 1) for j in (0, 1)]
    rows = scope.rows(middle)[:, 0]
    figure = Figure(figsize=(6, 1.8), layout="constrained")
    bound = float(rows.abs().max())
    for axis, row in zip(figure.subplots(1, 4), rows.cpu(), strict=True):
        axis.imshow(row.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
        axis.axis("off")
    run.figure("filters", figure, f"Four neighbouring output pixels: how each is interpolated from {inside}² pixels.")
    run.figure("super_resolution", scope.figure(middle[0]), "Super-resolution: one output pixel, singular vectors.")
    auto = LinearScope(networks["autoencoder"], images[:1])
    run.figure("autoencoder", auto.figure(auto.y.numel() // 2), "The autoencoder, frozen at one image.")


# -------------------------------------------------------------------------------------------------------------- parts


def _timm(config: Config) -> nn.Module:
    if config.checkpoint:
        return trained(config.encoder, config.checkpoint)
    from isthmus.codec import create_timm

    try:
        return create_timm(config.encoder, pretrained=True).eval()
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"timm's weights of {config.encoder} cannot be had here ({type(error).__name__}); give --checkpoint FILE."
        ) from error


def _check(config: Config) -> None:
    if config.gates not in ("refuse", "freeze"):
        raise UserError(f"--gates is refuse or freeze, got {config.gates!r}.")
    if config.checkpoint and not config.encoder:
        raise UserError("a checkpoint needs the name of its network: give --encoder too.")
    if config.size < 0 or config.looked_at < 0:
        raise UserError("--size and --looked-at must be 0 or more.")
    if config.width < 1 or config.triplets < 1:
        raise UserError("--width and --triplets must be 1 or more.")


def _sized(config: Config, network: nn.Module | None) -> Config:
    """With the size that was left open."""
    made_for: Any = getattr(network, "pretrained_cfg", None) or {"input_size": (3, 8, 8)}
    return replace(config, size=config.size or int(made_for["input_size"][-1]))


def _outputs(config: Config, network: nn.Module) -> int:
    """How many numbers the network answers; fails where it cannot see pictures of that size."""
    return shared.answers(network, config.encoder, _sized(config, network).size)


def _raw(config: Config) -> Compose:
    return Compose([Resize(config.size), CenterCrop(config.size)])


def _prepared(config: Config, network: nn.Module | None) -> Compose:
    """A timm model's pictures are normalised as it was trained on them, others are not."""
    normalise = [shared.Normalize(*shared.pixels_of(network))] if config.encoder else []
    return Compose([Resize(config.size), CenterCrop(config.size), *normalise])


def _first(dataset: Dataset, count: int) -> Dataset:
    return dataset.select(np.arange(min(count, len(dataset)))) if count else dataset


def _images(run: Run, config: Config, dataset: Dataset, network: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    batches = list(evaluation_batches(dataset, 256, transform=_prepared(config, network)))
    images = torch.cat([batch["image"] for batch in batches])
    return run.fabric.to_device(images), torch.cat([batch["label"] for batch in batches])
