"""InfoMEC beside scikit-learn called plainly; a step of QLAE beside LatentQuantize of vector-quantize-pytorch.

Metric: 10,000 samples, 10 latents, 6 sources of 8 values. scikit-learn is called as the published code calls it: one
``mutual_info_score`` or ``mutual_info_classif`` a pair, one ``LogisticRegression`` a source. The limit of the
continuous estimate is sorting: 10 sorts, and for each of the 60 pairs two look-ups a sample in a sorted row. That of
InfoE is 100 L-BFGS steps of two matrix products ``(n, F) × (F, C)``: 4·n·F·C·100 FLOP a source, F the inputs.

Step: the same dense encoder and decoder, batch of 128; forward, backward, AdamW. A quantiser's own work is L·V
differences a sample, nothing beside the 0.5 million weights of the networks, so that both are bounded by those.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mutual_info_score
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import nn
from vector_quantize_pytorch import LatentQuantize

from benchmarks.common import compare, record, table
from isthmus.bottlenecks.latent_quantization import LatentQuantization
from isthmus.codec import Codec
from isthmus.decoders.style_decoder import DenseDecoder
from isthmus.encoders.images.qlae import DenseEncoder
from isthmus.metrics.infomec import active_latents, compactness, infomec, modularity
from isthmus.objectives.latent_quantization import Autoencoding, decay_groups

SAMPLES, LATENTS, SOURCES, VALUES = 10_000, 10, 6, 8


def data(discrete: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sources, and latents that tell of them with errors."""
    rng = np.random.default_rng(0)
    sources = rng.integers(0, VALUES, (SAMPLES, SOURCES))
    latents = np.concatenate([sources, rng.integers(0, VALUES, (SAMPLES, LATENTS - SOURCES))], 1)
    latents = np.where(rng.random(latents.shape) < 0.3, rng.integers(0, VALUES, latents.shape), latents)
    return sources, latents if discrete else latents + 0.3 * rng.standard_normal(latents.shape)


def plainly(sources: np.ndarray, latents: np.ndarray, discrete: bool) -> tuple[float, float, float]:
    """InfoM, InfoE, InfoC by scikit-learn."""
    nmi = np.zeros((sources.shape[1], latents.shape[1]))
    losses = []
    scaled = StandardScaler().fit_transform(latents)
    inputs = OneHotEncoder(sparse_output=False).fit_transform(latents) if discrete else scaled
    for i, source in enumerate(sources.T):
        share = np.bincount(source) / len(source)
        entropy = -(share * np.log(share)).sum()
        for j in range(latents.shape[1]):
            if discrete:
                nmi[i, j] = mutual_info_score(source, latents[:, j]) / entropy
            else:
                found = mutual_info_classif(
                    scaled[:, j : j + 1],
                    source,
                    discrete_features=False,
                    n_neighbors=10,
                    random_state=0,  # type: ignore[arg-type]
                )
                nmi[i, j] = found[0] / entropy
        reader = LogisticRegression(C=np.inf, class_weight="balanced", tol=1e-4, max_iter=100)
        null = np.log(len(share))
        losses.append((null - log_loss(source, reader.fit(inputs, source).predict_proba(inputs))) / null)
    active = active_latents(latents, discrete)
    return modularity(nmi, active), float(np.mean(losses)), compactness(nmi, active)


class Peer(nn.Module):
    """The same networks around the published package's quantiser, with the same loss weights."""

    def __init__(self, latents: int, values: int) -> None:
        super().__init__()
        self.encoder, self.decoder = DenseEncoder(latents), DenseDecoder(latents)
        self.quantiser = LatentQuantize(
            levels=[values] * latents, dim=latents, commitment_loss_weight=0.01, quantization_loss_weight=0.01
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        z, _, loss = self.quantiser(self.encoder(image)[0].flatten(1))  # it wants (B, latents)
        return nn.functional.binary_cross_entropy_with_logits(self.decoder([z]), image) + loss


def steps(latents: int = 8, values: int = 6) -> dict[str, Callable[[], Any]]:
    """A training step of both."""
    torch.manual_seed(0)
    image = torch.rand(128, 3, 16, 16)
    ours = Autoencoding(Codec(DenseEncoder(latents), LatentQuantization(latents, values), DenseDecoder(latents)))
    peer = Peer(latents, values)
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in decay_groups(ours, 0.1)]
    optimizers = (
        torch.optim.AdamW(groups, lr=1e-3, fused=True),
        torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1, fused=True),
    )

    def step(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        for _ in range(20):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    generator = torch.Generator()
    return {
        "isthmus, 20 steps": lambda: step(lambda: ours({"image": image}, generator).loss, optimizers[0]),
        "vector-quantize-pytorch, 20 steps": lambda: step(lambda: peer(image), optimizers[1]),
    }


def main() -> None:
    """Compare, print, record."""
    warnings.simplefilter("ignore")  # steps that end L-BFGS early, as published
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    differences: dict[str, float] = {}
    for kind, discrete in (("discrete", True), ("continuous", False)):
        sources, latents = data(discrete)
        ours, theirs = infomec(sources, latents, discrete), plainly(sources, latents, discrete)
        scores = (ours.infom, ours.infoe, ours.infoc)
        differences[kind] = max(abs(a - b) for a, b in zip(scores, theirs, strict=True))
        cases: dict[str, Callable[[], Any]] = {
            f"InfoMEC {kind}, isthmus": lambda s=sources, z=latents, d=discrete: infomec(s, z, d),
            f"InfoMEC {kind}, scikit-learn": lambda s=sources, z=latents, d=discrete: plainly(s, z, d),
        }
        rows |= compare(cases, rounds=3, warmup=0)
    rows |= compare(steps(), rounds=5)
    names = list(rows)
    pairs = zip(names[::2], names[1::2], strict=True)
    ratios = {ours.partition(",")[0]: rows[theirs]["seconds"] / rows[ours]["seconds"] for ours, theirs in pairs}
    print(table(rows))
    print(f"times faster: {ratios}; largest difference of scores: {differences}")
    told = " ".join(str(__doc__).split("Metric: ")[1].split())
    record("qlae_speed", rows, times_faster=ratios, difference=differences, limit=told)


if __name__ == "__main__":
    main()
