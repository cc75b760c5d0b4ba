"""03-dkvb: lookups with frozen keys, the steps that place keys, and k-means."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.bottlenecks.key_value import KeyValueBottleneck, Lookup, from_official
from isthmus.bottlenecks.splitters import RandomProjection
from isthmus.decoders.voting import Vote
from isthmus.layers.codebook import EMACodebook, kmeans, tally
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    if case.object == "BottleneckedEncoder(Identity)+CodebookVotingLogitsDecoder":
        return lookups(case)
    if case.object == "KeyValueBottleneck":
        return key_steps(case)
    if case.object == "kmeans":
        return clusters(case)
    raise UnknownCase(case.object)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """Learned values, the keys' buffer and the projection's."""
    c = entry["config"]
    with torch.device("meta"):
        splitter = RandomProjection(c["num_channels"], c["num_codebooks"], c["dim_keys"])
    # On meta, where nothing can be drawn or read, a bottleneck cannot be made; its sizes are those of its tensors.
    with torch.device("meta"):
        model = KeyValueBottleneck(splitter, c["key_value_pairs_per_codebook"], c["dim_values"])
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "key_buffer": model.keys.codes.numel(),
        "projection_buffer": splitter.weight.numel(),
    }


def lookups(case: Case) -> dict[str, Tensor]:
    """A training batch, its loss and gradient, then an evaluation without the pairs that were never fetched."""
    config = case.config
    model = from_official(case.params, topk=config["topk"], unused="released")
    x = case.inputs["x"]
    level = x if x.ndim > 3 else x.transpose(1, 2)  # three dimensions are tokens here
    vote = Vote(config["dim_values"])
    found: dict[str, Tensor] = {}
    for mode in ("train", "eval"):
        model.train(mode == "train")
        seen = model.lookup([level])
        found |= {f"{mode}_{name}": t for name, t in published(seen, x.shape[2:]).items()}
        found[f"{mode}_embedding"] = x
        model.used.copy_(case.params["bottleneck.cluster_size_counter"])  # both start from the stored counters
        found[f"{mode}_logits"] = vote(model([level]).features)
        model.used.copy_(case.params["bottleneck.cluster_size_counter"])
    model.train()
    loss = F.cross_entropy(vote(model([level]).features), case.inputs["target"], label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, model.values)
    return {**found, "loss": loss, "grad_values": gradient, "train_counter_after": model.used.float()}


def published(seen: Lookup, spatial: tuple[int, ...]) -> dict[str, Tensor]:
    """In the published order: codebooks, pairs, channels, then places."""

    def shaped(x: Tensor) -> Tensor:
        return x.permute(0, 1, 3, 4, 2).unflatten(4, spatial)

    return {
        "values": shaped(seen.values),
        "keys": shaped(seen.keys),
        "indices": shaped(seen.indices[..., None]),
        "neg_sq_dist": shaped(seen.scores[..., None]),
        "prior_counts": shaped(seen.counts[..., None].float()),
        "split": seen.queries,
    }


def key_steps(case: Case) -> dict[str, Tensor]:
    """Moving averages from the published start, with the stored replacements."""
    c = case.config
    book = EMACodebook(
        c["key_value_pairs_per_codebook"],
        c["dim_keys"],
        c["num_codebooks"],
        c["decay"],
        c["eps"],
        c["threshold_ema_dead_code"],
        revive="released",
    )
    book.codes.copy_(case.params["keys"])
    book.sums.copy_(case.params["keys_avg"])
    book.counts.copy_(case.params["cluster_size"])
    found: dict[str, Tensor] = {}
    for t, x in enumerate(case.inputs["x"]):
        batch, books, tokens, dim = x.shape
        queries = x.transpose(0, 1).reshape(books, batch * tokens, dim)
        # Two replacements of one step are the same vector: between keys that are alike in every bit, rounding chose.
        # There, and there alone, its choice is an input.
        index = book(queries)[0]
        chosen = case.expected[f"indices_{t}"].transpose(0, 1).reshape(index.shape)
        alike = (at(book.codes, index) == at(book.codes, chosen)).all(-1)
        index = torch.where(alike, chosen, index)
        book.update(queries, replacement=case.inputs["replacement_samples"][t], index=index)
        found |= {
            f"indices_{t}": index.view(books, batch, 1, tokens).transpose(0, 1),
            f"keys_{t}": book.codes.clone(),
            f"keys_avg_{t}": book.sums.clone(),
            f"cluster_size_{t}": book.counts.clone(),
        }
    return found


def at(codes: Tensor, index: Tensor) -> Tensor:
    """Codes ``(C, J, K)`` at ``(C, N)``."""
    return codes.gather(1, index[..., None].expand(-1, -1, codes.shape[-1]))


def clusters(case: Case) -> dict[str, Tensor]:
    """Centres, and how many vectors the last averages were taken over."""
    x, start, steps = case.inputs["x"], case.inputs["initial_means"], case.config["num_iters"]
    k = case.config["num_clusters"]
    _, index = kmeans(x, k, steps - 1, start=start)
    return {"means": kmeans(x, k, steps, start=start)[0], "bins": tally(x, index, k)[0].long()}
