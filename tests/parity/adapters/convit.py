"""44-convit: whole networks block by block, taken over from timm's, and gated positional attention alone."""

from __future__ import annotations

import warnings
from typing import Any

import timm
import torch
from torch import Tensor

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from isthmus.encoders.images.convit import GPSA, ConViT, locality, nonlocality, relative_offsets
from tests.parity.case import Case, UnknownCase

Grid = tuple[int, int]


def outputs(case: Case) -> dict[str, Tensor]:
    if case.object == "VisionTransformer (ConViT)":
        return whole_network(case)
    if case.object.startswith("GPSA"):
        return layers(case)
    raise UnknownCase(case.object)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """Of timm's network, and of ours around it."""
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    theirs = sum(p.numel() for p in model.parameters())
    ours = sum(p.numel() for p in ConViT.from_timm(model).parameters())
    assert ours == theirs
    return {"params": ours}


@torch.no_grad()
def whole_network(case: Case) -> dict[str, Tensor]:
    """Every block, the attention maps of the local ones, and logits; timm's network has to agree when taken over."""
    config, x = case.config, case.inputs["x"]
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "local_up_to_layer", "num_classes")
    optional = ("qkv_bias", "mlp_ratio", "use_pos_embed", "locality_strength", "in_chans")
    arguments = {**{k: config[k] for k in names}, **{k: config[k] for k in optional if k in config}}
    model = ConViT(**arguments)
    model.load_state_dict(case.params)
    model.eval()

    theirs: Any = timm.create_model(
        "convit_tiny", **{**arguments, "embed_dim": config["embed_dim"] // config["num_heads"]}
    )
    theirs.load_state_dict(case.params)
    logits = model(x)
    torch.testing.assert_close(ConViT.from_timm(theirs).eval()(x), logits)

    found = {"patch_tokens": model.patch_embed(x), "logits": logits}
    tokens, grid = model.tokens(x)
    measured = locality(model, x)
    for index, block in enumerate(model.blocks):
        tokens = model.enter(index, tokens)
        if isinstance(block.attn, GPSA):
            found[f"gpsa{index}.attention"] = block.attention(tokens, grid).mean(0)
            found[f"gpsa{index}.nonlocality"] = measured[index].distance
        tokens = block(tokens, grid)
        found[f"block{index}"] = tokens
    return found


@torch.no_grad()
def layers(case: Case) -> dict[str, Tensor]:
    """Initialisation, offsets, attention, output and distance of single layers."""
    found: dict[str, Tensor] = {}
    for i, config in enumerate(case.config["layers"]):
        x, grid = case.inputs[f"{i}.x"], _grid(config["grid"])
        with warnings.catch_warnings():  # numbers of heads that are no squares warn
            warnings.simplefilter("ignore")
            layer = GPSA(
                config["dim"],
                config["num_heads"],
                config["qkv_bias"],
                locality_strength=config["locality_strength"],
            )
            # The published rows of left-over heads are random; the strength multiplies them on the way.
            layer.pos_proj.weight.copy_(case.expected[f"{i}.init_pos_proj_weight"] / config["locality_strength"])
            layer.local_init()
        found[f"{i}.init_pos_proj_weight"] = layer.pos_proj.weight.clone()
        found[f"{i}.init_v_weight"] = layer.v.weight.clone()
        found[f"{i}.rel_indices"] = relative_offsets(grid)
        layer.load_state_dict({k.removeprefix(f"{i}."): v for k, v in case.params.items() if k.startswith(f"{i}.")})
        attention = layer.attention(x, grid)
        found[f"{i}.attention"], found[f"{i}.nonlocality"] = attention, nonlocality(attention, grid)
        found[f"{i}.out"] = layer.eval()(x, grid)
    return found


def _grid(side: int | list[int]) -> Grid:
    return (side, side) if isinstance(side, int) else (side[0], side[1])
