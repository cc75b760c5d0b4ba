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
    assert not embed.train(False).training
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


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    for name, told in (("resnet10t", "write timm:NAME or transformers:NAME"), ("timm:resnet10x", "timm has no model")):
        with pytest.raises(UserError, match=told):
            ImageEmbedding(name, pretrained=False)
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="no vision model"):
        ImageEmbedding(f"transformers:{tmp_path / 'absent'}")
