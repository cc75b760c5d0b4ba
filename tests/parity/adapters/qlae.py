"""The reference implementation of QLAE, QLInfoWGAN-GP and InfoMEC: models, losses, gradients, decay groups, scores."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.bottlenecks.latent_quantization import LatentQuantization
from isthmus.bottlenecks.latent_quantization import from_official as tables_from_official
from isthmus.codec import Codec
from isthmus.decoders.style_decoder import StyleDecoder
from isthmus.decoders.style_decoder import from_official as decoder_from_official
from isthmus.encoders.images.qlae import QLAEEncoder
from isthmus.encoders.images.qlae import from_official as encoder_from_official
from isthmus.metrics import infomec
from isthmus.objectives.latent_quantization import Autoencoding, InfoWGAN, decay_groups
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    objects = {
        "compute_infomec": scores,
        "score reductions": reductions,
        "QuantizedAE(ImageEncoder, QuantizedLatent, StyleImageDecoder)": autoencoder,
        "QuantizedInfoGAN": infogan,
    }
    if case.object not in objects:
        raise UnknownCase(f"{case.name}: {case.object}")
    torch.manual_seed(0)
    return objects[case.object](case)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    c = entry["config"]
    sizes = c["num_latents"], c["image"]
    parts = QLAEEncoder(*sizes), StyleDecoder(*sizes), LatentQuantization(sizes[0], c["num_values_per_latent"])
    encoder, decoder, tables = (sum(p.numel() for p in part.parameters()) for part in parts)
    # The entry's config calls the kinds of network "encoder" and "decoder" too, so these two are compared here.
    assert (encoder, decoder) == (entry["encoder"], entry["decoder"])
    return {"params": encoder + decoder + tables}


# ------------------------------------------------------------------------------------------------------------- models


def below(params: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {n.removeprefix(p): x for p in prefixes for n, x in params.items() if n.startswith(p)}


def parts(case: Case, decoder: str) -> tuple[QLAEEncoder, LatentQuantization, StyleDecoder]:
    c = case.config
    encoder = QLAEEncoder(
        c["L"],
        c["image_size"],
        widths=c["conv"]["widths"],
        kernels=c["conv"]["kernel_sizes"],
        strides=c["conv"]["strides"],
        dense=c["dense"]["widths"],
    )
    reader = {n: x for n, x in below(case.params, "encoder.").items() if not n.startswith("critic.")}
    encoder.load_state_dict(encoder_from_official(reader))
    weights = c["lambdas"]
    tables = below(case.params, "latent.")
    values = [len(tables[f"_values_per_latent.{i}"]) for i in range(c["L"])]
    bottleneck = LatentQuantization(
        c["L"], values, quantization=weights["quantization"], commitment=weights["commitment"]
    )
    bottleneck.load_state_dict(tables_from_official(tables))
    style = StyleDecoder(
        c["L"],
        c["image_size"],
        widths=c["style"]["widths"],
        kernels=c["style"]["kernel_sizes"],
        strides=c["style"]["strides"],
        dense=c["dense"]["widths"],
        start=c["deco"],
    )
    style.load_state_dict(decoder_from_official(below(case.params, decoder)))
    return encoder, bottleneck, style


def autoencoder(case: Case) -> dict[str, Tensor]:
    encoder, bottleneck, decoder = parts(case, "decoder.")
    x = case.inputs["x"]
    objective = Autoencoding(Codec(encoder, bottleneck, decoder))
    loss = objective({"image": x}, torch.Generator()).loss
    loss.backward()
    features = encoder.features(x)
    z = encoder.head(features)
    index, quantised = bottleneck.nearest(z)
    logits = decoder([quantised])
    pulls = bottleneck.pulls(z, quantised)
    groups(case, objective)
    tables: Any = bottleneck.tables.grad  # shorter tables are filled up
    names = [f"latent._values_per_latent.{i}" for i in range(case.config["L"])]
    return {
        "features": features,
        "pre_z": z,
        "z_quantized": quantised,
        "z_indices": index,
        "x_hat_logits": logits,
        "loss": loss[None],
        "bce_per_sample": F.binary_cross_entropy_with_logits(logits, x, reduction="none").mean((1, 2, 3)),
        "quantization_per_sample": pulls[0],
        "commitment_per_sample": pulls[1],
        "grad_decoder.input_map": decoder.input_map.grad,
        "grad_encoder.conv.layers.0.layers.0.weight": encoder.conv[0][0].weight.grad,  # type: ignore[index]
        "grad_encoder.head.weight": encoder.head.weight.grad,
        **{f"grad_{name}": row[: len(case.params[name])] for name, row in zip(names, tables, strict=True)},
    }  # type: ignore[return-value]


def groups(case: Case, objective: Autoencoding) -> None:
    """The decayed parameters are those that the case lists; what it lists beyond that are biases that do not exist."""
    ours = decay_groups(objective, case.config["lambdas"]["l2"])
    decayed = {name.removeprefix("codec.") for name in ours[0]["names"]}
    listed = case.meta["weight_decayed"]
    encoder = encoder_from_official(dict.fromkeys(below(dict.fromkeys(listed), "encoder."), torch.zeros(1, 1, 1, 1)))  # type: ignore[arg-type]
    decoder = decoder_from_official(dict.fromkeys(below(dict.fromkeys(listed), "decoder."), torch.zeros(1, 1, 1, 1)))  # type: ignore[arg-type]
    assert decayed == {f"encoder.{n}" for n in encoder} | {f"decoder.{n}" for n in decoder}
    assert ours[0]["clip_value"] == 1
    assert ours[1]["weight_decay"] == 0


def infogan(case: Case) -> dict[str, Tensor]:
    encoder, bottleneck, generator = parts(case, "generator.")
    weights = case.config["lambdas"]
    objective = InfoWGAN(encoder, bottleneck, generator, weights["gradient"], weights["latent"])
    objective.critic.load_state_dict(below(case.params, "encoder.critic."))
    z, x, epsilon = (case.inputs[name] for name in ("z_fake", "x", "epsilon"))
    made = objective.generator_terms(z)
    judged = objective.critic_terms(z, x, epsilon)
    return {
        "generator_loss": made["total"].mean()[None],
        "encoder_loss": judged["total"].mean()[None],
        "x_fake": made["fake"],
        "value_loss": judged["value"],
        "gradient_loss": judged["penalty"],
        "latent_loss": judged["latent"],
        "quantization_loss": judged["quantization"],
        "commitment_loss": judged["commitment"],
    }


# ------------------------------------------------------------------------------------------------------------- scores


def tensor(value: Any, *shape: int) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).reshape(shape)


def scores(case: Case) -> dict[str, Tensor]:
    sources, neighbours = case.inputs["sources"], case.config["n_neighbors"]
    found: dict[str, Tensor] = {}
    for kind in ("discrete", "continuous"):
        latents, discrete = case.inputs[f"z_{kind}"], kind == "discrete"
        steps = case.config["logistic"]["max_iter"]
        official = infomec.infomec(sources, latents, discrete=discrete, neighbours=neighbours, steps=steps)
        later = infomec.infomec(sources, latents, discrete=discrete, rule="iqr", neighbours=neighbours, steps=None)
        eighth = infomec.active_latents(latents, discrete, "range8")
        # The older module measures both kinds in twenty bins, and its matrix has sources in columns.
        binned = infomec.nmi_discrete(sources, infomec.binned(latents, 20))
        reduced = {
            f"{form}_{name}": tensor(function(binned, eighth, form), 1)
            for form in ("ratio", "gap")
            for name, function in (("modularity", infomec.modularity), ("compactness", infomec.compactness))
        }
        found |= {
            f"{kind}_infom": tensor(official.infom, 1),
            f"{kind}_infoe": tensor(official.infoe, 1),
            f"{kind}_infoc": tensor(official.infoc, 1),
            f"{kind}_nmi": tensor(official.nmi, *official.nmi.shape),
            f"{kind}_active_latents": torch.as_tensor(official.active),
            f"{kind}_active_iqr": torch.as_tensor(later.active),
            f"{kind}_infom_iqr": tensor(later.infom, 1),
            f"{kind}_infoc_iqr": tensor(later.infoc, 1),
            f"{kind}_infoe_converged": tensor(infomec.explicitness(sources, latents, discrete, steps=None), 1),
            f"{kind}_binned20_nmi_latents_by_sources": tensor(binned.T, *binned.T.shape),
            f"{kind}_mask_range8": torch.as_tensor(eighth),
            f"{kind}_explicitness_regression": tensor(infomec.explained_variance(sources, latents), 1),
        }
        found |= {f"{kind}_binned20_{name}": value for name, value in reduced.items()}
    return found


def reductions(case: Case) -> dict[str, Tensor]:
    nmi, active = case.inputs["nmi"].numpy(), case.inputs["active"].bool().numpy()
    importance = case.inputs["importance"].numpy()
    return {
        "infom": tensor(infomec.modularity(nmi, active)),
        "infoc": tensor(infomec.compactness(nmi, active)),
        "dci_disentanglement": tensor(infomec.dci_disentanglement(importance)),
        "dci_completeness": tensor(infomec.dci_completeness(importance)),
        "gini_rows": tensor(infomec.gini(nmi), len(nmi)),
    }
