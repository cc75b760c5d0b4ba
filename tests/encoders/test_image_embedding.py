"""Latents of pictures from timm and transformers models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.codec import UserError
from isthmus.encoders.image_embedding import ImageEmbedding


def test_any_timm_model_pictures_of_any_size() -> None:
    torch.manual_seed(0)
    embed = ImageEmbedding("timm:resnet10t", pretrained=False)
    images = torch.rand(2, 3, 24, 30)
    out = embed(images)
    assert out.shape == (2, 512)
    assert not out.requires_grad
    both = embed.embed([(images[:1] * 255).round().byte(), (images[1:] * 255).round().byte()])
    torch.testing.assert_close(both, embed((images * 255).round() / 255), atol=1e-4, rtol=1e-3)
    assert not embed.train().training
    with pytest.raises(UserError, match="no pictures"):
        embed.embed([])


def test_vision_models_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPVisionConfig(**small, image_size=16, patch_size=8, projection_dim=5)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(tmp_path / "clip")
    assert ImageEmbedding(f"transformers:{tmp_path / 'clip'}")(torch.rand(2, 3, 20, 20)).shape == (2, 5)
    dino = transformers.Dinov2Config(**small, image_size=16, patch_size=8)
    transformers.Dinov2Model(dino).save_pretrained(tmp_path / "dino")
    assert ImageEmbedding(f"transformers:{tmp_path / 'dino'}")(torch.rand(2, 3, 20, 20)).shape == (2, 16)
    bert = transformers.BertConfig(vocab_size=10, **small)
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="takes no pictures"):
        ImageEmbedding(f"transformers:{tmp_path / 'bert'}")


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
STAGES = {"depths": [1, 1], "num_stages": 2}
HALVES = {
    "ViT": {**SMALL, "image_size": 16, "patch_size": 8},
    "ViTMAE": {**SMALL, "image_size": 16, "patch_size": 4},
    "Beit": {**SMALL, "image_size": 16, "patch_size": 8, "use_mask_token": False},
    "Swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    },
    "ConvNext": {**STAGES, "hidden_sizes": [8, 16], "image_size": 16, "patch_size": 2},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "Siglip": {
        "vision_config": {**SMALL, "image_size": 16, "patch_size": 8},
        "text_config": {**SMALL, "vocab_size": 9},
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_of_half_precision_give_float32_latents(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    stored = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**HALVES[name])).to(dtype)
    stored.save_pretrained(tmp_path)
    embed, images = ImageEmbedding(f"transformers:{tmp_path}"), torch.rand(2, 3, 20, 20)
    out = embed(images)
    assert out.dtype == torch.float32
    assert {parameter.dtype for parameter in embed.parameters()} == {torch.float32}
    assert torch.equal(out, embed(images)), "nothing is random"
    assert not torch.allclose(out[0], out[1])


def test_a_masked_autoencoder_sees_all_of_a_picture(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.ViTMAEModel(transformers.ViTMAEConfig(**HALVES["ViTMAE"])).save_pretrained(tmp_path)
    embed = ImageEmbedding(f"transformers:{tmp_path}")
    image = torch.rand(1, 3, 16, 16)
    for left in range(0, 16, 4):  # every patch counts
        other = image.clone()
        other[..., left : left + 4, left : left + 4] = 0
        assert not torch.allclose(embed(image), embed(other), atol=1e-5)


def test_a_model_that_draws_at_random_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rand(len(x), 4)

    made = (Noisy(), (8, 8), [0.5] * 3, [0.5] * 3)
    monkeypatch.setattr("isthmus.encoders.image_embedding._timm", lambda *_: made)
    with pytest.raises(UserError, match="another latent every time"):
        ImageEmbedding("timm:noisy")


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    for name, told in (("resnet10t", "write timm:NAME or transformers:NAME"), ("timm:resnet10x", "timm has no model")):
        with pytest.raises(UserError, match=told):
            ImageEmbedding(name, pretrained=False)
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="no vision model"):
        ImageEmbedding(f"transformers:{tmp_path / 'absent'}")
