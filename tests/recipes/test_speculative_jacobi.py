"""The recipe of speculative Jacobi decoding, small: what it measures, what it draws, new pictures, resuming."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.cli.flags import check
from isthmus.codec import UserError
from isthmus.data import Memory
from isthmus.engine import Run, Training
from isthmus.engine.options import RunOptions
from isthmus.recipes import speculative_jacobi
from isthmus.recipes.speculative_jacobi import Config
from isthmus.samplers.ordinary import Sampling
from isthmus.tasks.tokens import foreign
from isthmus.tasks.tokens import pictures as shared
from isthmus.tasks.tokens.pictures import ImageTokens, NextToken, PriorConfig, TokenizerConfig

pytest.importorskip("transformers")

SMALL = Config(
    data="digits",
    tokenizer=TokenizerConfig(size=8, reduction=2, codes=12, dim=4, width=8),
    prior=PriorConfig(layers=1, width=32),
    tokenizer_training=Training(steps=15, batch_size=32, lr=3e-3),
    prior_training=Training(steps=25, batch_size=32, lr=5e-3),
    window=4,
    windows=(2, 6),
    starts=("random", "repeat_vertical"),
    guidance=1.5,
    top_k=9,
    images=4,
    compared=20,
    sequences=5000,
    prompts=3,
    timed=1,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with Run.quick(tmp_path_factory.mktemp("sj"), name="speculative-jacobi", config=SMALL) as run:
        speculative_jacobi.run(SMALL, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def picture(path: Path, height: int = 8, width: int = 8) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(path)
    return path


def test_it_measures_exactness_passes_and_identity(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained[1]["metrics"].items()}
    assert metrics["exactness_p"] > 0.01
    assert metrics["residual_forgotten_p"] < 1e-6
    assert metrics["newest_as_draft_p"] < 1e-6
    assert metrics["greedy_identical"] == 1
    assert 1 / 4 <= metrics["passes_per_token"] < 1
    assert metrics["passes_per_token"] < metrics["matching_passes_per_token"] <= 1
    assert metrics["passes_per_token_random_6"] <= metrics["passes_per_token_random_2"]
    assert metrics["marginals_p"] > 0.001
    assert 0 < metrics["bits_per_token"] < np.log2(12) + 0.5
    assert metrics["seconds_ratio"] == pytest.approx(metrics["seconds_ordinary"] / metrics["seconds_windows"])
    assert {"tokenizer", "passes", "settled", "samples"} <= {figure["name"] for figure in trained[1]["figures"]}


def test_apply_completes_pictures_and_draws_new_ones(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    inputs = [picture(tmp_path / "a.png"), picture(tmp_path / "b.png", 31, 12), tmp_path / "note.txt"]
    inputs[-1].write_text("no picture")
    written = speculative_jacobi.apply(trained[0], inputs, tmp_path / "out")
    assert [path.name for path in written] == ["answers.json", "a-completed.png", "b-completed.png", "new.png"]
    with Image.open(written[1]) as drawn:
        assert drawn.size == (6 * 50 + 2, 52), "the picture, its upper half, four completions"


def test_completions_keep_the_upper_half(trained: tuple[Path, dict[str, Any]]) -> None:
    tokens = ImageTokens.load(trained[0])
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    decoder = speculative_jacobi.SpeculativeJacobi(4, start="repeat_vertical")
    sampling = Sampling(raster=tokens.raster)
    got = []
    original = tokens.pictures

    def spy(codes: torch.Tensor) -> torch.Tensor:
        got.append(codes)
        return original(codes)

    tokens.pictures = spy  # type: ignore[method-assign]
    speculative_jacobi._completions(tokens, image, decoder, sampling, torch.Generator().manual_seed(0))
    assert got[0].shape == (5, 16)
    assert bool((got[0][:, :8] == got[0][:1, :8]).all())
    assert int(got[0].max()) < 12


def test_a_finished_run_is_loaded_and_measures_the_same(trained: tuple[Path, dict[str, Any]]) -> None:
    options = RunOptions(out=trained[0], accelerator="cpu", quiet=True, tensorboard=False, resume=True)
    with Run("speculative-jacobi", SMALL, options) as run:
        speculative_jacobi.run(SMALL, run)
    again = json.loads((run.dir / "report.json").read_text())["metrics"]
    for name, entry in trained[1]["metrics"].items():
        if "seconds" not in name:
            assert again[name]["value"] == entry["value"], name


def test_pictures_without_labels_make_a_prior_without_classes(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (30, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    few = Training(steps=2, batch_size=8)
    with Run.quick(tmp_path, name="speculative-jacobi") as run:
        tokens = shared.train(run, Memory("own", {"image": images}), SMALL.tokenizer, SMALL.prior, few, few)
    assert tokens.classes == []
    assert tokens.guidance(3.0) is None
    assert tokens.prompt(4).tolist() == [[12]] * 4
    assert tokens.prior.config.vocab_size == 13
    again = ImageTokens.load(run.dir)
    codes = tokens.tokens(images[:2].float() / 255)
    assert torch.equal(again.tokens(images[:2].float() / 255), codes)
    assert torch.equal(again.pictures(codes), tokens.pictures(codes))


def test_a_timm_network_serves_as_encoder_of_the_tokenizer() -> None:
    codec = shared.make_codec(TokenizerConfig(size=32, reduction=4, codes=9, width=8, encoder="resnet10t"))
    out = codec.eval()(torch.rand(2, 3, 32, 32))
    assert out.prediction.shape == (2, 3, 32, 32)
    assert out.code.indices.shape == (2, 8, 8)


def test_next_token_hides_classes_and_predicts_what_follows() -> None:
    class Echo(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            self.fed = input_ids
            logits = torch.nn.functional.one_hot(input_ids + 1, 20).float() * 50
            return type("Out", (), {"logits": logits})

    echo = Echo()
    batch = {"tokens": torch.tensor([[11, 12, 13], [10, 11, 12]]), "label": torch.tensor([2, 1])}
    objective = NextToken(echo, codes=8, classes=4)
    assert float(objective(batch, torch.Generator()).loss) == pytest.approx(0, abs=1e-6)
    assert echo.fed.tolist() == [[10, 11, 12], [9, 10, 11]]
    NextToken(echo, 8, 4, drop=1.0)(batch, torch.Generator())
    assert echo.fed[:, 0].tolist() == [12, 12]
    NextToken(echo, 8, 0)({"tokens": batch["tokens"]}, torch.Generator())
    assert echo.fed[:, 0].tolist() == [8, 8]


def test_impossible_settings_and_damaged_files_are_told(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    few, source = Training(steps=1), Memory("own", {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)})
    with (
        Run.quick(tmp_path, name="speculative-jacobi") as run,
        pytest.raises(UserError, match="size 9 must be a multiple of the reduction 2"),
    ):
        shared.train(run, source, TokenizerConfig(size=9), SMALL.prior, few, few)
    shutil.copytree(trained[0] / "kept", tmp_path / "copy" / "kept")
    facts = tmp_path / "copy" / "kept" / "tokenizer" / "saved.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "facts": {}}))
    with pytest.raises(UserError, match="keeps no tokenizer"):
        ImageTokens.load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sequences": 10}, "--sequences is at least 5000"),
        ({"timed": 0}, "timed is at least 1, got 0"),
        ({"prompts": -1}, "prompts is at least 1"),
        ({"compared": 0}, "compared is at least 1"),
        ({"images": 0}, "images is at least 1"),
        ({"windows": ()}, "name at least one of each"),
        ({"windows": (4, 0)}, "--windows is at least 1"),
        ({"window": -2}, "--window is at least 1"),
        ({"temperature": 0.0}, "--temperature is above 0"),
        ({"top_p": 1.5}, "--top-p is above 0 and at most 1"),
        ({"top_p": float("nan")}, "--top-p is above 0 and at most 1"),
        ({"top_k": -3}, "--top-k is at least 0"),
        ({"guidance": float("inf")}, "--guidance is"),
    ],
)
def test_impossible_settings_are_told_before_training(changes: dict[str, Any], told: str) -> None:
    config = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=told):
        check(speculative_jacobi, config)


def test_a_model_of_somebody_else_is_decoded_with_and_without_windows(tmp_path: Path) -> None:
    from isthmus.priors.tiny_lm import tiny_llama

    torch.manual_seed(0)
    tiny_llama(30, 1, 16, length=40).save_pretrained(tmp_path / "model")
    config = dataclasses.replace(SMALL, model=str(tmp_path / "model"), timed=2)
    with Run.quick(tmp_path, name="speculative-jacobi", config=config) as run:
        speculative_jacobi.run(config, run)
    metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert metrics["greedy_identical"]["value"] == 1
    assert 1 / 6 <= metrics["passes_per_token_random_6"]["value"] <= 1
    assert metrics["seconds_generate"]["value"] > 0
    assert "passes_per_token_repeat_vertical_6" not in metrics, "text has no lines"
    with pytest.raises(UserError, match="trained nothing; give a run without --model"):
        speculative_jacobi.apply(run.dir, [picture(tmp_path / "a.png")], tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no causal model that transformers can load"):
        foreign.load(str(tmp_path / "nothing"))
    own, settings = foreign.load(config.model), foreign.Settings()
    with (
        Run.quick(tmp_path / "more", name="speculative-jacobi", config=config) as run,
        pytest.raises(UserError, match="prompts, timed and windows are at least 1"),
    ):
        foreign.compare(run, own, settings, (4,), ("random",), prompts=1, timed=0)


@pytest.mark.parametrize("name", ["chameleon", "emu3", "janus"])
def test_models_of_pictures_draw_their_image_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model FOLDER` of the real classes; their weights are those of the folder, not new ones."""
    from tests.samplers import test_transformers_generate as tiny

    network = {"chameleon": tiny.chameleon, "emu3": tiny.emu3, "janus": tiny.janus}[name]()
    network.save_pretrained(tmp_path / "model")
    again = foreign.load(str(tmp_path / "model"))
    assert type(again) is type(network)
    for key, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    found = foreign.picture_tokens(again)
    assert found is not None
    raster = found[1]
    if name == "emu3":
        assert (raster.width, raster.end_of_line, list(raster.tokens or [])) == (90, 4, list(range(10, 26)))
        monkeypatch.setattr(foreign, "_EMU3_SIDE", 4)
    elif name == "chameleon":
        assert (raster.width, list(raster.tokens or [])) == (8, list(range(4, 20)))
    else:
        assert raster.width == 4
    settings = foreign.Settings(guidance=2.0, top_k=9)
    with Run.quick(tmp_path, name="speculative-jacobi", config=SMALL, max_steps=1) as run:
        foreign.compare(run, again, settings, (1, 4), ("random", "repeat_vertical"), 2, 1)
    metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert metrics["greedy_identical"]["value"] == 1
    assert metrics["passes_per_token_random_1"]["value"] == 1
    assert 1 / 4 <= metrics["passes_per_token_repeat_vertical_4"]["value"] <= 1
    assert metrics["seconds_ordinary"]["value"] > 0


def test_checkpoints_that_lack_weights_and_guidance_of_text(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from isthmus.priors.tiny_lm import tiny_llama

    torch.manual_seed(0)
    tiny_llama(30, 1, 16, length=40).save_pretrained(tmp_path)
    model = foreign.load(str(tmp_path))
    prompt = torch.tensor([[3, 4, 5]])
    draws = [foreign._Text(model, foreign.Settings(guidance=scale), 12) for scale in (1.0, 4.0)]
    plain, guided = (draw(prompt, None, greedy=True)[0] for draw in draws)
    assert not torch.equal(plain, guided)
    decoder = speculative_jacobi.SpeculativeJacobi(4)
    assert torch.equal(draws[1](prompt, decoder, greedy=True)[0], guided)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of LlamaForCausalLM: lm_head\.weight \(and 0 more\)"):
        foreign.load(str(tmp_path))
