"""Super-resolution with MetaMixer: sizes, the skip, merging, published names, and its objective."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from isthmus.codec import Codec
from isthmus.decoders.metamixer_sr import MetaMixerSR, convert_official
from isthmus.encoders.images.pixels import Pixels
from isthmus.objectives.super_resolution import SuperResolution, fft_loss, shrink
from tests.layers.test_metamixer import close, maps
from tests.layers.test_reparam import trained

TINY: dict[str, Any] = {"dim": 8, "depth": 1}


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_images_of_any_size_are_enlarged(scale: int) -> None:
    model = MetaMixerSR(scale, **TINY)
    assert model([maps(7, 5, 3)]).shape == (2, 3, 7 * scale, 5 * scale)


def test_skip_repeats_every_pixel() -> None:
    model = MetaMixerSR(3, **TINY)
    torch.nn.init.zeros_(model.to_pixels.weight)
    torch.nn.init.zeros_(model.to_pixels.bias)  # type: ignore[arg-type]
    x = maps(4, 5, 3)
    assert torch.equal(model([x]), x.repeat_interleave(3, 2).repeat_interleave(3, 3))


def test_batch_norms_merge_and_the_codec_is_saved_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = trained(MetaMixerSR(2, norm="batch", **TINY))
    x = maps(6, 7, 3)
    with torch.no_grad():
        before = model([x])
        model.reparameterize()
        close(model([x]), before)
        Codec(Pixels(), decoder=model).save_pretrained(tmp_path)
        assert torch.equal(Codec.from_pretrained(tmp_path)(x).prediction, model([x]))
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        MetaMixerSR(2, norm="batch", **TINY).reparameterize()


def official_enlarger(model: MetaMixerSR) -> dict[str, torch.Tensor]:
    """The state under the published names: numbers in two chains, whose places depend on the norm."""
    keys = list(model.state_dict())
    places = ["query.conv", "key", "", "value"]
    if any("query.before" in key for key in keys):
        places.insert(0, "query.before")
    elif any("query.after" in key for key in keys):
        places.insert(1, "query.after")
    official = {}
    for key, value in model.state_dict().items():
        key = key.replace("stem.", "proj.").replace("to_pixels.", "conv_bef_up.")
        for number, place in enumerate(places):
            if place:
                key = re.sub(rf"blocks\.(\d)\.(\w+)_mixer\.main\.{place}\.", rf"body.\1.\2_mixer.{number}.", key)
        official[key] = value
    return official


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_published_names_are_told_apart(norm: str | None) -> None:
    """The place of a layer in the published chain depends on the norm: before the first convolution, or after it."""
    model = MetaMixerSR(2, norm=norm, **TINY)
    official = official_enlarger(model)
    assert not any("main" in key for key in official)
    assert list(convert_official({"params_ema": official})) == list(model.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MetaMixerSR(0), "scale is at least 1, got 0"),
        (lambda: MetaMixerSR(1.5), "scale is a whole number, got 1.5"),  # type: ignore[arg-type]
        (lambda: MetaMixerSR(2, norm="LN"), "norm 'LN': it is 'layer', 'batch' or None"),
        (lambda: MetaMixerSR(2, **TINY)([maps(channels=4)]), "[(2, 4, 6, 9)]; this decoder reads one, (B, 3, H, W)"),
        (lambda: MetaMixerSR(2, **TINY)([maps(channels=3)] * 2), "this decoder reads one"),
        (lambda: SuperResolution(MetaMixerSR(2, **TINY), 0), "scale 0"),
        (lambda: shrink(maps(1, 9, 3), 2), "images of 1x9 pixels cannot be made 2 times smaller"),
        (lambda: fft_loss(maps(4, 4), maps(4, 5)), "the prediction is (2, 8, 4, 4) and the target (2, 8, 4, 5)"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# ----------------------------------------------------------------------------------------------------------- objective


def test_spectral_loss_is_the_mean_over_both_parts_without_normalisation() -> None:
    x = torch.zeros(1, 1, 4, 6)
    x[0, 0, 0, 0] = 2.0
    assert float(fft_loss(x, torch.zeros_like(x))) == pytest.approx(1.0), "real parts are 2 everywhere, imaginary 0"
    spectra = [torch.fft.rfft2(image) for image in (maps(4, 6), maps(4, 6).roll(1, 2))]
    wanted = torch.stack([(spectra[0] - spectra[1]).real, (spectra[0] - spectra[1]).imag], -1).abs().mean()
    close(fft_loss(maps(4, 6), maps(4, 6).roll(1, 2)), wanted)
    assert torch.isfinite(fft_loss(maps(64, 64).half() * 100, maps(64, 64).half()))


def test_objective_learns_to_enlarge() -> None:
    torch.manual_seed(0)
    model = MetaMixerSR(2, **TINY)
    objective = SuperResolution(model, 2)
    image = F.interpolate(torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)), (17, 16), mode="bilinear")
    generator = torch.Generator()
    first = objective({"image": image}, generator)
    assert first.outputs["small"].shape == (4, 3, 8, 8)
    assert first.outputs["true"].shape == (4, 3, 16, 16), "17 rows are cut to a multiple of 2"
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    last = first
    for _ in range(30):
        optimizer.zero_grad()
        last = objective({"image": image}, generator)
        last.loss.backward()
        optimizer.step()
    assert last.metrics["psnr"] > first.metrics["psnr"] + 3
