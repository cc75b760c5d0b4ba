"""30-speculative-jacobi: one window judged, first guesses, guided and filtered probabilities, the image's grammar."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.samplers.acceptance import verify
from isthmus.samplers.logits import guide, top_k_top_p
from isthmus.samplers.raster import Raster, starts
from isthmus.samplers.speculative_jacobi import settled
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    known = {
        "SpeculativeSampler.__call__": window,
        "get_multi_token_for_preparation": first_guesses,
        "sampling_logits2tokens": probabilities,
        "MultiTokensVLLogitsProcessor": grammar,
    }
    if case.object not in known:
        raise UnknownCase(case.object)
    return known[case.object](case)


def window(case: Case) -> dict[str, Tensor]:
    """Row 0 of the drafts is the last accepted token; draft i is judged by row i - 1 of the target."""
    x = case.inputs
    drafts, target = x["draft_tokens"][:, 1:], x["target_prob"]
    count, residual = verify(target, x["draft_prob"][:, 1:], drafts, chance=x["uniform"][:, 1:])
    everything = count == drafts.shape[1]  # then ours is the distribution of one token more, theirs zeros
    drawn = x["target_sampled_tokens"]
    following = torch.where(everything, drawn[:, -1], x["residual_token"])
    tokens = settled(drafts, count, following, drawn[:, 1:], count + 1)
    stays = torch.arange(target.shape[1]) < count[:, None]
    return {
        "num_matched": count + 1,
        "residual_prob": residual.masked_fill(everything[:, None], 0),
        "next_tokens": tokens,
        # The released code writes the drafts' rows down where they stayed; ours keeps no record of them.
        "kept_scores": torch.where(stays[..., None], x["draft_prob"].roll(-1, 1), target),
    }


def first_guesses(case: Case) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    vocabulary = case.config["vocab"]
    for i, config in enumerate(case.config["cases"]):
        x = {k.partition("_")[2]: v for k, v in case.inputs.items() if k.startswith(f"c{i}_")}
        tokens = torch.cat([x["input_ids"], x.get("pending_tokens", x["input_ids"][:, :0])], 1)
        rows = torch.cat([x["scores"], x.get("pending_scores", x["scores"][:, :0])], 1)
        origin = config["prefill_num"] + 3
        known = torch.tensor([tokens.shape[1] - origin])
        place = known[:, None] + torch.arange(config["new_tokens"])
        random = case.inputs["image_vocab"][x["random_index"]]
        line = config["img_width_without_eol"] + 1
        got = starts(config["scheme"], random, place, line, known, tokens[:, origin:], rows.argmax(-1)[:, origin:])
        found[f"c{i}_tokens"] = got
        found[f"c{i}_scores"] = torch.nn.functional.one_hot(got, vocabulary).float()
    return found


def probabilities(case: Case) -> dict[str, Tensor]:
    conditional, unconditional = case.inputs["logits"].chunk(2)
    logits = guide(conditional, unconditional, case.config["guidance_scale"])
    return {
        f"probs_{kind}": top_k_top_p(logits, case.config[f"{kind}_top_k"]).softmax(-1) for kind in ("image", "text")
    }


def grammar(case: Case) -> dict[str, Tensor]:
    config, found = case.config, {}
    height, width = (int(side) for side in config["latent_grid"].split(",")[0].split("x"))
    first, last = config["image_token_range"]
    raster = Raster(
        height, width, range(first, last + 1), config["end_of_line"], config["image_end"], tuple(config["header"])
    )
    for i, each in enumerate(config["cases"]):
        place = len(raster.header) + each["tokens_after_header"] + torch.arange(each["window"])
        found[f"forced_{i}"] = raster.forced(place)
        allowed = raster.constrain(torch.zeros(len(place), config["vocab"]), place) > -torch.inf
        found[f"n_allowed_{i}"] = allowed.sum(-1)
    return found
