"""How QLAE and its GAN are trained: groups, clipping, turns, penalty."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from isthmus.bottlenecks.latent_quantization import LatentQuantization
from isthmus.codec import Codec
from isthmus.data import Memory
from isthmus.decoders.style_decoder import DenseDecoder, StyleDecoder
from isthmus.encoders.images.qlae import DenseEncoder, QLAEEncoder
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.objectives.adversarial import wgan_gp
from isthmus.objectives.latent_quantization import Autoencoding, InfoWGAN, decay_groups

TINY = {"widths": (4, 6), "kernels": (3, 4), "strides": (1, 2), "dense": (8,)}


def convolutional() -> Codec:
    return Codec(QLAEEncoder(3, 8, **TINY), LatentQuantization(3, 4), StyleDecoder(3, 8, **TINY, start=5))


def test_scales_and_the_constant_map_decay_biases_and_tables_do_not() -> None:
    decayed, others = decay_groups(Autoencoding(convolutional()), 0.1)
    assert "codec.encoder.conv.0.1.weight" in decayed["names"]
    assert "codec.decoder.input_map" in decayed["names"]
    assert {name.rpartition(".")[2] for name in others["names"]} == {"bias", "tables"}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert decayed["clip_value"] == 1
    assert others.get("clip_value") is None


class Steep(nn.Module):
    """A loss whose gradient is 50 in one element and 0.5 in the other, for a clipped weight and a free bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, batch: object, generator: torch.Generator, turn: str | None = None) -> object:
        from isthmus.codec import Loss

        slope = torch.tensor([50.0, 0.5])
        return Loss(((self.weight + self.bias) * slope).sum())


def test_clipping_is_element_by_element_and_in_the_decayed_group_only(tmp_path: Path) -> None:
    objective = Steep()
    training = Training(steps=1, batch_size=1, optimizer="momentum", momentum=0.0, lr=1.0, schedule="constant")
    with Run.quick(tmp_path) as run:
        fit(
            run,
            "steep",
            objective,
            Memory("x", {"image": torch.zeros(4, 1)}),
            training,
            None,
            decay_groups(objective, 0.0),
        )
    assert objective.weight.tolist() == [-1.0, -0.5]
    assert objective.bias.tolist() == [-50.0, -0.5]


def test_style_decoder_is_split_anywhere() -> None:
    decoder, z = StyleDecoder(3, 8, **TINY, start=5), torch.randn(2, 3)
    whole = decoder([z])
    for layer in range(3):
        front, back = decoder.split(layer)
        torch.testing.assert_close(back(front(z)), whole)
    with pytest.raises(ValueError, match="split at 0 to 2"):
        decoder.split(3)
    with pytest.raises(ValueError, match="3 latents"):
        decoder(torch.randn(2, 4))
    with pytest.raises(ValueError, match="no map grows"):
        StyleDecoder(3, 9, **TINY)


def test_style_normalises_after_the_activation_and_never_scales_below_zero() -> None:
    block = StyleDecoder(3, 8, **TINY, start=5).blocks[0]
    x, w = torch.randn(2, 5, 4, 4), torch.randn(2, 8)
    styled = block(x, w)
    scale, shift = torch.relu(block.style(w)).chunk(2, 1)  # type: ignore[operator]
    torch.testing.assert_close(styled.mean((2, 3)), shift)
    torch.testing.assert_close(styled.var((2, 3), unbiased=False).sqrt(), scale, atol=1e-3, rtol=1e-3)


def test_penalty_is_how_far_the_slope_is_from_one() -> None:
    real, fake = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    direction = torch.randn(2, 3)
    found = wgan_gp(lambda x: (x * direction).sum((1, 2)), real, fake, torch.rand(5, 1, 1))
    torch.testing.assert_close(found.penalty, (direction.norm() - 1).square().expand(5))
    torch.testing.assert_close(found.value, ((fake - real) * direction).sum((1, 2)))
    flat = nn.Parameter(torch.zeros(2, 3))
    wgan_gp(lambda x: (x * flat).sum((1, 2)), real, fake, torch.rand(5, 1, 1)).penalty.mean().backward()
    assert flat.grad is not None
    assert torch.isfinite(flat.grad).all()
    with pytest.raises(ValueError, match="must be alike"):
        wgan_gp(lambda x: x.sum(), real, fake[:3], torch.rand(5, 1, 1))


def test_gan_takes_turns_and_tables_move_with_the_generator(tmp_path: Path) -> None:
    game = InfoWGAN(DenseEncoder(3, 8, widths=(16,)), LatentQuantization(3, 4), DenseDecoder(3, 8, widths=(16,)))
    assert [(turn.name, turn.every) for turn in game.turns] == [("critic", 1), ("generator", 5)]
    before = {name: value.clone() for name, value in game.state_dict().items()}
    data = Memory("x", {"image": torch.rand(32, 3, 8, 8)})
    training = Training(steps=1, batch_size=8, lr=1e-2, betas=(0.0, 0.9), schedule="constant")
    with Run.quick(tmp_path) as run:
        groups = {turn.name: decay_groups(game, 1e-3, None, turn.parameters) for turn in game.turns}
        fit(run, "game", game, data, training, None, groups)
    moved = {name for name, value in game.state_dict().items() if not torch.equal(value, before[name])}
    assert "bottleneck.tables" in moved
    assert {"critic.weight", "encoder.head.weight", "generator.layers.0.weight"} <= moved
    grads = torch.autograd.grad(
        game({"image": data.data["image"][:8]}, torch.Generator(), "critic").loss,  # type: ignore[index]
        list(game.generator.parameters()),
        allow_unused=True,
    )
    assert all(g is None for g in grads)
