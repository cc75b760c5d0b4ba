"""23-lrp-pruning: relevance by every rule, all criteria, plans and the pruned network of the released code."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.compression.filter_scores import Criterion, filter_scores
from isthmus.compression.ranking import lowest, one_at_a_time
from isthmus.compression.surgery import Surgery
from isthmus.lenses.relevance import COMPOSITES, Composite, relevance
from isthmus.lenses.relevance_rules import AlphaBetaWeights, Box, PositiveWeights, Rule, Simple
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    if case.object.startswith("FilterPrunner"):
        return vgg(case)
    if case.object.startswith("ResNet_kuangliu"):
        return resnet(case)
    raise UnknownCase(case.object)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """The four networks of the paper; our parts work on anybody's."""
    with torch.device("meta"):
        if name == "vgg16_10cls":
            model: nn.Module = timm.create_model("vgg16", num_classes=10)
        elif name == "alexnet_10cls":
            from torchvision.models import alexnet

            model = alexnet(num_classes=10)
        else:
            c = entry["config"]
            model = SmallResNet(c["block"], c["num_blocks"], c["planes"], c["num_classes"])
    return {"params": sum(p.numel() for p in model.parameters())}


def vgg(case: Case) -> dict[str, Tensor]:
    config, x, label = case.config, case.inputs["x"], case.inputs["label"]
    w1, w2, w3 = config["widths"]
    features = nn.Sequential(
        *(nn.Conv2d(config["in_channels"], w1, 3, padding=1), nn.ReLU(True)),
        *(nn.Conv2d(w1, w2, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)),
        *(nn.Conv2d(w2, w3, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)),
    )
    cells, hidden = w3 * (config["image"] // 4) ** 2, config["hidden"]
    head = (nn.Dropout(), nn.Linear(cells, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, config["classes"]))
    model = nn.Sequential()
    model.features, model.flatten, model.classifier = features, nn.Flatten(), nn.Sequential(*head)
    names = {"classifier.fc1.": "classifier.1.", "classifier.fc3.": "classifier.4."}
    params = case.params
    for old, new in names.items():
        params = {key.replace(old, new): value for key, value in params.items()}
    model.load_state_dict(params)
    model.eval()
    convs = ["features.0", "features.2", "features.5"]

    found = {"logits": model(x)}
    released: dict[str, Rule] = {
        "z": PositiveWeights(),
        "simple": Simple(bias=False),
        "alphabeta": AlphaBetaWeights(config.get("alpha", 1.0), drop=False),
    }
    for name, rule in released.items():
        composite = Composite(rule, rule)
        r = relevance(model, x, label, composite)
        found |= {f"R_{name}.at_output_of_{layer}": r[layer] for layer in convs} | {f"R_{name}.input": r.input}
        scores = filter_scores(model, [(x, label)], Criterion("relevance", composite=composite, normalize="sum"))
        found |= {f"rank_{name}.conv{i}": scores[layer] for i, layer in enumerate(convs)}
    z = PositiveWeights()
    found["R_first.input"] = relevance(model, x, label, Composite(z, z, Box(-1.0, 1.0))).input
    pairs: tuple[tuple[str, Any], ...] = (("weight", "weight"), ("grad", "gradient"), ("ICLR", "taylor"))
    for theirs, ours in pairs:
        for suffix in ("", "_norm"):
            plain = Criterion(ours, normalize="none")
            scores = filter_scores(model, [(x, label)], Criterion(ours) if suffix else plain)
            found |= {f"rank_{theirs}{suffix}.conv{i}": scores[layer] for i, layer in enumerate(convs)}

    scores = filter_scores(model, [(x, label)], Criterion("relevance", composite="z", normalize="sum"))
    plan = lowest(scores, config["n_prune"], floor=0)
    number = {layer: int(layer.rpartition(".")[2]) for layer in convs}
    found["plan_z.lowest"] = torch.tensor([(number[layer], f) for layer, f in plan])
    found["plan_z.sequential"] = torch.tensor([(number[layer], f) for layer, f in one_at_a_time(plan)])
    surgery = Surgery(model, x)
    removed = {layer: sorted(f for name, f in plan if name == layer) for layer in convs}
    surgery.remove(removed)
    found["pruned_logits"] = model(x)
    return found | {f"pruned.{key}": value for key, value in model.state_dict().items()}


def resnet(case: Case) -> dict[str, Tensor]:
    config, x, label = case.config, case.inputs["x"], case.inputs["label"]
    model = SmallResNet(config["block"], config["num_blocks"], config["planes"], config["classes"], x.shape[1])
    told = model.load_state_dict(case.params, strict=False)
    assert not told.unexpected_keys
    assert all("num_batches" in key for key in told.missing_keys)
    model.eval()
    logits = model(x)
    for norm in model.modules():  # the released code folds norms into layers and leaves others behind, whose ε stays
        if isinstance(norm, nn.BatchNorm2d):
            for parameter in (norm.weight, norm.bias):
                parameter.data.div_((1 + norm.eps) ** 0.5)
    r = relevance(model, x, label, COMPOSITES["resnet"])
    criterion = Criterion("relevance", composite="resnet", absolute="element", normalize="none")
    theirs = config["sorted_conv_names"]
    scores = filter_scores(model, [(x, label)], criterion, theirs)
    plan = lowest(scores, len(case.expected["plan"]), floor=0)
    return {
        "logits": logits,
        "R_input": r.input,
        "anchor_sum": r.start.sum()[None],
        "plan": torch.tensor([(theirs.index(layer), f) for layer, f in plan]),
        **{f"rank.{name}": score for name, score in scores.items()},
    }


class Block(nn.Module):
    """Residual block under the official names; ``kernels`` are those of its convolutions."""

    def __init__(self, channels: int, planes: int, stride: int, kernels: tuple[int, ...], expansion: int) -> None:
        super().__init__()
        out = planes * expansion
        widths = [channels, *[planes] * (len(kernels) - 1), out]
        strided = 0 if len(kernels) == 2 else 1
        self.count = len(kernels)
        for i, kernel in enumerate(kernels):
            step = stride if i == strided else 1
            conv = nn.Conv2d(widths[i], widths[i + 1], kernel, step, padding=kernel // 2, bias=False)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            y = F.relu(y) if i < self.count else y
        y += self.shortcut(x)
        return F.relu(y)


class SmallResNet(nn.Module):
    """A 3x3 stem without a pool, stages of blocks, the mean of all places; activations are plain functions."""

    def __init__(self, block: str, blocks: list[int], planes: list[int], classes: int, channels_in: int = 3) -> None:
        super().__init__()
        kernels, expansion = ((3, 3), 1) if block == "basic" else ((1, 3, 1), 4)
        self.conv1 = nn.Conv2d(channels_in, planes[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.stages, channels = len(blocks), planes[0]
        for i, (number, width) in enumerate(zip(blocks, planes, strict=True)):
            stage = nn.Sequential()
            for j in range(number):
                stage.append(Block(channels, width, 2 if i and not j else 1, kernels, expansion))
                channels = width * expansion
            self.add_module(f"layer{i + 1}", stage)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{i}")(x)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
