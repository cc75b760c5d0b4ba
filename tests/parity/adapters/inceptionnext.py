"""11-inceptionnext: timm's network with our mixers, MetaNeXt of our own, and the mixers alone."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from isthmus.encoders.images.inceptionnext import InceptionDWConv2d, PartialConv2d, accelerate
from isthmus.encoders.images.metanext import MetaNeXt, reparameterize
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    if case.object == "MetaNeXt with InceptionDWConv2d":
        return whole_network(case)
    if case.object == "InceptionDWConv2d, PartialConv2d":
        return mixers(case)
    raise UnknownCase(case.object)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """timm's names have one more underscore; the ablations are registered under the published ones."""
    published = name.replace("inceptionnext_", "inception_next_")
    with torch.device("meta"):
        model = timm.create_model(published)
    return {"params": sum(p.numel() for p in model.parameters())}


def _mixer(channels: int, config: dict[str, Any]) -> InceptionDWConv2d:
    return InceptionDWConv2d(channels, **config)


@torch.no_grad()
def whole_network(case: Case) -> dict[str, Tensor]:
    """Stem, stages and logits of our MetaNeXt; timm's with our mixers, and both merged, have to agree with it."""
    config, x = case.config, case.inputs["x"]
    if not config.get("norm", "BatchNorm2d eps 1e-5").startswith("BatchNorm2d"):
        raise UnknownCase(f"{case.object} with the norm {config['norm']}")
    sizes = {"depths": config["depths"], "dims": config["dims"], "num_classes": config["num_classes"]}
    ours = MetaNeXt(
        **sizes,
        mixer=lambda dim, stage: _mixer(dim, config["mixer"]),
        mlp_ratios=config["mlp_ratios"],
        layer_scale=config["ls_init_value"],
    )
    theirs = timm.create_model(
        "inception_next_tiny",
        **sizes,
        mlp_ratios=config["mlp_ratios"],
        token_mixers=lambda dim, **kw: timm.models.inception_next.InceptionDWConv2d(dim, **config["mixer"], **kw),
    )
    for model in (ours, theirs):
        model.load_state_dict(case.params)
        model.eval()
    accelerate(theirs)
    found = {"stem": ours.stem(x), "logits": ours(x)}
    levels = ours.forward_intermediates(x, intermediates_only=True)
    found |= {f"stage{i + 1}": level for i, level in enumerate(levels)}
    reparameterize(ours)
    for other in (theirs(x), ours(x)):
        torch.testing.assert_close(other, found["logits"], rtol=0, atol=1e-5 * float(found["logits"].abs().max()))
    return found


@torch.no_grad()
def mixers(case: Case) -> dict[str, Tensor]:
    """The mixers alone, and as the one dense depthwise convolution that they are."""
    found = {}
    parts: dict[str, nn.Module] = {
        f"mixer{i}": _mixer(channels, config) for i, (channels, config) in enumerate(case.config["mixers"])
    }
    partial = case.config["partial"]
    parts |= {f"partial{i}": PartialConv2d(partial["channels"], 3, ratio) for i, ratio in enumerate(partial["ratios"])}
    for name, part in parts.items():
        part.load_state_dict(
            {k.removeprefix(f"{name}."): v for k, v in case.params.items() if k.startswith(f"{name}.")}
        )
        x = case.inputs[name]
        found[name] = part(x)
        if isinstance(part, InceptionDWConv2d):
            weight, bias = part.dense_kernel()
            dense = nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
            torch.testing.assert_close(dense, found[name])
    return found
