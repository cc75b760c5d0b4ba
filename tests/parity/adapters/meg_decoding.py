"""02-meg-decoding: the trunk with all its switches, dropout of sensors, contrastive losses, aggregation over time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.codec import Codec
from isthmus.decoders.latent_heads import LatentHeads, TimeAttention
from isthmus.encoders.signals.meg_conv import MEGConv, from_official, official_arguments
from isthmus.encoders.signals.sensor_attention import SpatialAttention, drop_channels, fourier, usage_penalty
from isthmus.objectives.contrastive import contrastive_loss, sigmoid_loss, similarity
from tests.parity.case import Case, UnknownCase

SIDES = {"None": None, "x": "estimates", "y": "candidates", "xy": "both"}


@torch.no_grad()
def outputs(case: Case) -> dict[str, Tensor]:
    known = {
        "SimpleConv": trunk,
        "ChannelMerger, ChannelDropout": dropout,
        "ClipLoss": speech_loss,
        "ClipLoss, SigLipLoss, BahdanauAttention, linear time aggregation": losses,
    }
    if case.object not in known:
        raise UnknownCase(case.object)
    return known[case.object](case)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    trunk = entry["config"].get("trunk")
    with torch.device("meta"):
        if trunk is None:
            config = {"in_channels": {"meg": 272}, **entry["config"]}
            model: Any = MEGConv(**official_arguments(config))
        else:  # the whole paper model; its trunk has our defaults
            assert (trunk, entry["config"]["head"]) == ("meg_decoding_trunk_4subj", "Linear(2048,768)"), name
            model = Codec(MEGConv(subjects=4), decoder=LatentHeads(2048, 768, length=181))
    return {"params": sum(p.numel() for p in model.parameters())}


def trunk(case: Case) -> dict[str, Tensor]:
    model = MEGConv(**official_arguments(case.config))
    model.load_state_dict(from_official(case.params))
    model.eval()
    assert sum(p.numel() for p in model.parameters()) == case.meta["official_param_count"]
    x, positions = case.inputs["meg"], case.inputs["positions"]
    condition = {"positions": positions, "subject": case.inputs["subject_index"]}
    assert model.attention is not None
    tokens = model(x, condition)[0]
    return {
        "fourier": fourier(positions, model.attention.dim),
        "merger": model.attention(x, condition),
        "y": tokens.mT,
    }


def dropout(case: Case) -> dict[str, Tensor]:
    config, x = case.config, case.inputs["meg"]
    positions, centre = case.inputs["positions"], case.inputs["banned_centre"]
    attention = SpatialAttention(config["chout"], config["pos_dim"], config["dropout"])
    attention.load_state_dict(case.params)
    weights = attention.train().weights(positions, centre=centre)
    return {
        "y": attention(x, {"positions": positions, "centre": centre}),
        "usage_penalty": usage_penalty(weights, config["usage_penalty"]).view(1),
        "channel_dropout": drop_channels(x, positions, centre, config["dropout"]),
    }


def speech_loss(case: Case) -> dict[str, Tensor]:
    a, b, trim = case.inputs["estimate"], case.inputs["candidate"], case.config["trim"]
    scores = similarity(a, b, normalize="candidates")

    def centred(x: Tensor) -> Tensor:
        pooled = x.mean(2, keepdim=True)
        return pooled - pooled.mean((1, 2), keepdim=True)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return contrastive_loss(a, b, normalize="candidates", symmetric=False).view(1)

    begin, end = (round((trim[t] - trim["dset_tmin"]) * trim["sample_rate"]) for t in ("tmin", "tmax"))
    return {
        "scores": scores,
        "probabilities": scores.softmax(1),
        "loss": loss(a, b),
        "scores_pool_center": similarity(centred(a), centred(b), normalize="candidates"),
        "loss_pool_center": loss(centred(a), centred(b)),
        "scores_trim": similarity(a[..., begin:end], b[..., begin:end], normalize="candidates"),
    }


def losses(case: Case) -> dict[str, Tensor]:
    a, b, more = (case.inputs[n] for n in ("estimate", "candidate", "candidate_with_negatives"))
    found: dict[str, Tensor] = {}
    for name, side in SIDES.items():
        found[f"loss_sym_{name}"] = contrastive_loss(a, b, 1 / 0.07, side).view(1)
        found[f"loss_asym_negatives_{name}"] = contrastive_loss(a, more, 1.0, side, symmetric=False).view(1)
        found[f"scores_{name}"] = similarity(a, more, 1 / 0.07, side)
    found["siglip"] = sigmoid_loss(a, b).view(1)

    tokens = case.inputs["features"].mT
    attention = TimeAttention(tokens.shape[2], len(case.params["att.Wa.bias"]))
    names = {"att.Wa": "key", "att.Va": "score"}
    attention.load_state_dict(
        {f"{our}.{k}": case.params[f"{their}.{k}"] for their, our in names.items() for k in ("weight", "bias")}
    )
    found["time_attention"] = attention(tokens)[..., None]
    head = LatentHeads(tokens.shape[2], len(case.params["head.bias"]), tokens.shape[1])
    parts = {"agg": "aggregation", "head": "retrieval"}
    head.load_state_dict(
        {f"{our}.{k}": case.params[f"{their}.{k}"] for their, our in parts.items() for k in ("weight", "bias")}
    )
    found["time_linear_head"] = head([tokens]).retrieval
    return found
