"""52-street-numbers: likelihood and joint MAP, coverage with ties, a maxout layer, counts of the described networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.decoders.digit_sequence import DigitSequence, NumberScores, negative_log_likelihood, read, right
from isthmus.encoders.images.maxout_cnn import ConvUnit, MaxoutCNN, Pool, SubtractMean, maxout, street_view
from isthmus.metrics.coverage import coverage
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    if case.object == "sequence log-likelihood and joint MAP transcription":
        return _sequence(case)
    if case.object == "coverage at a required accuracy":
        return _coverage(case)
    if case.object.startswith("first hidden layer"):
        return _layer(case)
    raise UnknownCase(case.object)


def _sequence(case: Case) -> dict[str, Tensor]:
    scores = NumberScores(case.inputs["length_logits"].requires_grad_(), case.inputs["digit_logits"].requires_grad_())
    length, digits = case.inputs["length_target"], case.inputs["digit_target"]
    nll = negative_log_likelihood(scores, length, digits)
    nll.mean().backward()
    reading = read(scores)
    return {
        "nll": nll,
        "loss": nll.mean(),
        "grad_length": scores.length.grad,
        "grad_digits": scores.digits.grad,
        "map_length": reading.length,
        "map_digits": reading.digits,
        "map_log_prob": reading.log_prob,
        "exact_match": right(reading, length, digits).float(),
    }  # type: ignore[dict-item]


def _coverage(case: Case) -> dict[str, Tensor]:
    confidence, correct = case.inputs["confidence"], case.inputs["correct"]
    found = {"accuracy_full": correct.double().mean().float()}
    for target in case.config["targets"]:
        result = coverage(confidence, correct, target)
        found[f"coverage@{target}"] = torch.tensor(result.coverage)
        found[f"threshold@{target}"] = torch.tensor(min(result.threshold, 2.0))  # 2 stands for none
    return found


def _layer(case: Case) -> dict[str, Tensor]:
    pieces = case.config["filters_per_unit"]
    unit = ConvUnit(case.config["in_channels"], case.config["units"], pieces=pieces)
    unit.conv.load_state_dict({name.removeprefix("conv."): tensor for name, tensor in case.params.items()})
    large = maxout(unit.conv(case.inputs["x"]), pieces)
    halved = Pool(2)(large)
    assert torch.equal(unit(case.inputs["x"]), SubtractMean("valid")(halved)), "the unit is made of these"
    return {
        "maxout": large,
        "pool_stride1": Pool(1)(large),
        "pool_stride2": halved,
        "subnorm_valid_mean": SubtractMean("valid")(halved),
        "subnorm_zero_padded_mean": SubtractMean("zero")(halved),
    }


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    with torch.device("meta"):
        if name.startswith("public"):
            encoder = MaxoutCNN(ceil="ceil" in name)
        else:
            encoder = street_view()
        decoder = DigitSequence(encoder.feature_info[0].channels, max_digits=5, grid=1)
    return {"params": sum(p.numel() for part in (encoder, decoder) for p in part.parameters())}
