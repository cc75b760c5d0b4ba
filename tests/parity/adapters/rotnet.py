"""RotNet: networks with rotated batches, AlexNet's named features, classifier heads, parameter counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isthmus.decoders import probes
from isthmus.decoders.probes import ConvProbe, NonLinearProbe, PooledProbe
from isthmus.encoders.images import alexnet, nin
from isthmus.encoders.images.alexnet import AlexNet
from isthmus.encoders.images.nin import NetworkInNetwork
from isthmus.objectives.rotation import Rotation
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    """Every tensor of ``case.expected``, from ours."""
    if case.object.startswith("NetworkInNetwork"):
        return _network_in_network(case)
    if case.object == "AlexNet":
        images = case.inputs["img"]
        network = AlexNet(case.config.get("num_classes", 4), images.shape[1], **_given("widths", case.config))
        network.load_state_dict(alexnet.from_official(case.params))
        network.train(_training(case))
        with torch.no_grad():
            return network.named_features(images, list(case.expected))
    if case.object.startswith("Classifier heads"):
        return _heads(case)
    raise UnknownCase(f"{case.object}: no such object in RotNet")


def _network_in_network(case: Case) -> dict[str, Tensor]:
    network = NetworkInNetwork(**_nin_arguments(case.config), in_chans=case.inputs["img"].shape[1])
    network.load_state_dict(nin.from_official(case.params))
    network.train(_training(case))
    objective = Rotation(network, head=nn.Identity())
    copies, target = objective.copies(case.inputs["img"])
    if not torch.equal(target, case.inputs["labels"]):
        raise AssertionError("the labels of the copies are not the published ones")
    names = [name for name in case.expected if name in network.stage_names]
    found: dict[str, Tensor] = {"rotated": copies}
    features = network.named_features(copies, names)
    found.update({name: tensor.detach() for name, tensor in features.items()})
    first = network.stages["conv1"][0]
    found["after/first_bn_running_mean"] = first.bn.running_mean.clone()
    found["after/first_bn_running_var"] = first.bn.running_var.clone()
    # The objective runs the network again; in training mode that only moves the running statistics kept above.
    result = objective({"image": case.inputs["img"]}, torch.Generator())
    result.loss.backward()
    found["loss"] = result.loss.detach()
    found["grad/first_conv"] = first.conv.weight.grad
    return found


def _heads(case: Case) -> dict[str, Tensor]:
    features = case.inputs["feat"]
    channels, classes = features.shape[1], case.config["num_classes"]
    found = {}
    for name in case.expected:
        if name == "conv_head":
            head: nn.Module = ConvProbe(channels, classes, width=case.config["conv_head_width"])
        elif name.startswith("linear_"):
            head = PooledProbe(channels, classes, case.config["pool_size"][name], average=name.endswith("avg"))
        else:
            raise UnknownCase(f"{case.name}: no head {name}")
        state = {k.removeprefix(f"{name}."): v for k, v in case.params.items() if k.startswith(f"{name}.")}
        head.load_state_dict(probes.from_official(state))
        with torch.no_grad():
            found[name] = head.eval()([features])
    return found


def _training(case: Case) -> bool:
    return case.meta["description"].lower().startswith("train mode")


def _given(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config's entry whose key starts with ``name`` (its key tells the published widths), as an argument."""
    found = [value for key, value in config.items() if key.split()[0] == name]
    return {name: found[0]} if found else {}


def _nin_arguments(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_classes": config.get("num_classes", 4),
        "depths": (3,) * config.get("num_stages", 3),
        "pool_conv3": config.get("use_avg_on_conv3", True),
        **_given("widths", config),
    }


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """The number of parameters of a published size."""
    config = entry["config"]
    with torch.device("meta"):
        if name.startswith("NIN_ConvBlock3"):
            model: nn.Module = ConvProbe(config["nChannels"], config["num_classes"])
        elif name.startswith("MultLayer"):
            model = NonLinearProbe(config["nChannels"], config["num_classes"])
        elif name.startswith("NIN"):
            model = NetworkInNetwork(**_nin_arguments(config))
        elif name.startswith("AlexNet"):
            model = AlexNet(config["num_classes"])
        else:
            raise UnknownCase(f"{name}: no such network in RotNet")
    return {"params": sum(p.numel() for p in model.parameters())}
