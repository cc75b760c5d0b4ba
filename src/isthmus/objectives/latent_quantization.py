"""What QLAE and QLInfoWGAN-GP are trained by (Hsu et al., arXiv 2305.18378, section 3 and appendix).

objective = Autoencoding(Codec(encoder, LatentQuantization(12), decoder))
fit(run, "qlae", objective, dataset, training, groups=decay_groups(objective, weight_decay=0.1))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import Codec, Loss, Turn
from isthmus.layers.random import rows
from isthmus.layers.straight_through import straight_through
from isthmus.objectives.adversarial import Critique, wgan_gp


class Autoencoding(nn.Module):
    """The picture back from its code: binary cross entropy, a mean over pixels, plus the bottleneck's own loss.

    QLAE with a latent quantisation, AE without a bottleneck, VAE with Gaussian latents.

    Args:
        codec: its decoder gives logits ``(B, C, H, W)``.
    """

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """``image`` ``(B, C, H, W)`` in [0, 1] to the loss."""
        out = self.codec(batch["image"])
        error = F.binary_cross_entropy_with_logits(out.prediction, batch["image"])
        return Loss(error + out.code.loss, {"bce": error.detach(), "bottleneck": out.code.loss.detach()})


class InfoWGAN(nn.Module):
    """QLInfoWGAN-GP: a generator fed with table values, and an encoder that is its critic and reads them back.

    In the generator's turn, x_f = σ(G(z)) is to please the critic and to be read as the z that it was drawn from; in
    the critic's, values are told apart with a gradient penalty, and z is read back too. Drawn codes are constants, so
    that tables move by the quantisation loss alone, in the generator's turn.

    Args:
        encoder: pictures to latents, with ``features`` and ``num_features`` (:class:`QLAEEncoder`).
        bottleneck: a latent quantisation of those latents.
        generator: latents to logits of pictures.
        penalty: weight of the gradient penalty.
        latent: weight of the squared error of the latents.
        every: steps of the critic for one of the generator.
    """

    def __init__(
        self,
        encoder: nn.Module,
        bottleneck: nn.Module,
        generator: nn.Module,
        penalty: float = 10.0,
        latent: float = 200.0,
        every: int = 5,
    ) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.bottleneck: Any = bottleneck
        self.generator: Any = generator
        self.critic = nn.Linear(self.encoder.num_features, 1)
        self.penalty, self.latent, self.every = penalty, latent, every

    @property
    def turns(self) -> list[Turn]:
        """Critic and encoder at every step, generator and tables at every few."""
        tables = [p for p in self.bottleneck.parameters() if p.requires_grad]
        reading = [*self.encoder.parameters(), *self.critic.parameters()]
        return [Turn("critic", reading), Turn("generator", [*self.generator.parameters(), *tables], self.every)]

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """One turn's loss on ``image`` ``(B, C, H, W)`` in [0, 1]."""
        real = batch["image"]
        index = rows(lambda n: self.bottleneck.draw(n, generator), len(real), generator)
        z = self.bottleneck.look_up(index.to(real.device)).detach()
        if turn == "generator":
            terms = self.generator_terms(z)
        else:
            shape = (-1, *(1,) * (real.ndim - 1))
            epsilon = rows(lambda n: torch.rand(n, generator=generator), len(real), generator)
            terms = self.critic_terms(z, real, epsilon.to(real).view(shape))
        total = terms.pop("total").mean()
        return Loss(total, {name: term.detach().mean() for name, term in terms.items() if name != "fake"})

    def value(self, x: Tensor) -> Tensor:
        """The critic's value of pictures, ``(B, 1)``."""
        return self.critic(self.encoder.features(x))

    def generator_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Loss and its terms, a sample each, for codes ``(B, L)``; ``fake`` are the pictures."""
        fake = self.generator([z]).sigmoid()
        features = self.encoder.features(fake)
        value = -self.critic(features)
        return {"value": value, **self._read(features, z, value[:, 0]), "fake": fake}

    def critic_terms(self, z: Tensor, real: Tensor, epsilon: Tensor) -> dict[str, Tensor]:
        """Loss and its terms, a sample each; ``epsilon`` ``(B, 1, 1, 1)`` places the gradient penalty."""
        with torch.no_grad():
            fake = self.generator([z]).sigmoid()
        found: Critique = wgan_gp(self.value, real, fake, epsilon)
        play = found.value[:, 0] + self.penalty * found.penalty
        read = self._read(self.encoder.features(fake), z, play)
        return {"value": found.value, "penalty": found.penalty, **read, "fake": fake}

    def _read(self, features: Tensor, z: Tensor, play: Tensor) -> dict[str, Tensor]:
        continuous = self.encoder.head(features)
        _, quantised = self.bottleneck.nearest(continuous)
        quantization, commitment = self.bottleneck.pulls(continuous, quantised)
        latent = (straight_through(continuous, quantised) - z).square().mean(-1)
        weights = self.bottleneck.quantization, self.bottleneck.commitment
        total = play + self.latent * latent + weights[0] * quantization + weights[1] * commitment
        return {"latent": latent, "quantization": quantization, "commitment": commitment, "total": total}


def decay_groups(
    objective: nn.Module, weight_decay: float, clip: float | None = 1.0, only: list[nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups as QLAE trains them: decoupled decay of everything but biases and tables.

    Scales of norms and the decoder's constant map do decay. The gradients of the decayed group are clipped element by
    element, before the optimiser sees them.

    Args:
        objective: whose parameters are grouped.
        weight_decay: of the decayed group.
        clip: largest magnitude of an element of its gradients; ``None`` clips nothing.
        only: parameters of one turn; all by default.
    """
    mine = None if only is None else {id(p) for p in only}
    decayed: dict[str, Any] = {"params": [], "names": [], "weight_decay": weight_decay, "clip_value": clip}
    others: dict[str, Any] = {"params": [], "names": [], "weight_decay": 0.0, "wd_scale": 0.0}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and (mine is None or id(parameter) in mine):
            bare = name.rpartition(".")[2] in ("bias", "tables")
            group = others if bare else decayed
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in (decayed, others) if group["params"]]
