"""SparK's promises: hidden pixels reach nothing but the target, and the loss is that of the whole batch."""

from __future__ import annotations

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor

from isthmus.codec import build, spec_of
from isthmus.decoders.spark_unet import SparKUNet
from isthmus.encoders.backbone import Backbone
from isthmus.layers.masking import patchify
from isthmus.layers.random import ShardedGenerator
from isthmus.objectives import spark
from isthmus.objectives.spark import SparK, fill_hidden, masked_loss, patch_errors, visible_cells


def _resnet() -> Backbone:
    return Backbone(ResNet(BasicBlock, [1, 1, 1, 1], channels=(16, 32, 64, 128), num_classes=5))


def _spark(encoder: Backbone | None = None, width: int = 32, norm: str = "batch", **kwargs) -> SparK:
    torch.manual_seed(0)
    encoder = _resnet() if encoder is None else encoder
    return SparK(encoder, SparKUNet(encoder.feature_info, width, norm), **kwargs)


def _images(batch: int = 2, height: int = 96, width: int = 96) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def _mask(batch: int = 2) -> Tensor:
    return torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]], dtype=torch.bool).expand(batch, 3, 3)


@pytest.mark.parametrize("mode", ["masked", "tiled"])
def test_hidden_pixels_change_no_feature_and_no_prediction(mode: str) -> None:
    """The sheet's structural claim: bit-identical maps, and 4 of 9 cells non-zero at all four stages."""
    objective = _spark(mode=mode)
    image, visible = _images(), _mask()
    pixels = visible.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    other = torch.where(pixels, image, torch.rand_like(image))
    state = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    one = objective.encode(image, visible)
    first = objective.predict(image, visible)
    objective.load_state_dict(state)
    two = objective.encode(other, visible)
    second = objective.predict(other, visible)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
        assert float((a != 0).any(1).float().mean()) <= 4 / 9 + 1e-6
        assert float((a != 0).any(1).float().mean()) > 0.4
    assert torch.equal(first, second)


def test_the_zeroed_ablation_does_leak_its_borders() -> None:
    """What the method is for: with ordinary convolutions hidden places fill up."""
    features = _spark(mode="zeroed").eval().encode(_images(), _mask())
    assert float((features[0] != 0).any(1).float().mean()) > 0.5


def test_tiles_and_masks_train_alike() -> None:
    found = []
    for mode in ("masked", "tiled"):
        objective = _spark(mode=mode).double()
        result = objective.loss(objective.normalise(_images().double()), _mask())
        result.loss.backward()
        grads = [p.grad for p in objective.parameters() if p.grad is not None]
        found.append([result.loss, *grads, *objective.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_training_lowers_the_loss_on_smooth_pictures() -> None:
    objective = _spark()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    smooth = torch.nn.functional.interpolate(_images(4, 6, 6), (96, 96), mode="bilinear")
    losses = []
    for _ in range(12):
        loss = objective({"image": smooth}, torch.Generator().manual_seed(0)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02


def test_pictures_need_not_be_square() -> None:
    result = _spark()({"image": _images(2, 64, 160)}, torch.Generator().manual_seed(0))
    assert result.outputs["prediction"].shape == (2, 3, 64, 160)
    assert result.outputs["visible"].shape == (2, 2, 5)
    assert torch.isfinite(result.loss)


def test_layer_norm_networks_work_and_other_pyramids_too() -> None:
    convnext = Backbone(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 40), num_classes=0), reductions=(8, 32))
    result = _spark(convnext, norm="layer")({"image": _images()}, torch.Generator().manual_seed(0))
    assert torch.isfinite(result.loss)


def test_loss_reads_hidden_patches_only() -> None:
    image, visible = _images(), _mask()
    prediction = torch.randn_like(image).requires_grad_()
    masked_loss(prediction, image, visible, 32).backward()
    reached = patchify(prediction.grad, 32).abs().sum(2) > 0
    assert torch.equal(reached, ~visible.flatten(1))


def test_loss_weighs_patches_of_the_batch_not_images() -> None:
    """Images with more hidden patches count more: sum over hidden patches by their number, over the whole batch."""
    image, prediction = _images(), torch.randn(2, 3, 96, 96)
    visible = _mask().clone()
    visible[1] = True
    visible[1, 0, 0] = False
    errors = patch_errors(prediction, image, 32)[~visible.flatten(1)]
    assert len(errors) == 6
    torch.testing.assert_close(masked_loss(prediction, image, visible, 32), errors.mean())


def test_predicting_the_patch_mean_has_loss_one() -> None:
    loss = masked_loss(torch.zeros(2, 3, 96, 96), _images(), _mask(), 32)
    assert float(loss) == pytest.approx(1, abs=1e-3)


def test_a_constant_hidden_patch_gives_a_finite_loss_and_gradient() -> None:
    image = torch.full((2, 3, 96, 96), 0.5)
    prediction = torch.randn_like(image).requires_grad_()
    loss = masked_loss(prediction, image, _mask(), 32)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(prediction.grad).all()


def test_the_picture_keeps_visible_patches_and_uses_the_true_scale_of_hidden_ones() -> None:
    objective = _spark()
    image, visible = _images(), _mask()
    target = patchify(objective.normalise(image), 32)
    normal = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    perfect = spark.unpatchify(normal, 32, (3, 3))
    drawn = objective.draw(objective.normalise(image), perfect, visible)
    torch.testing.assert_close(drawn, image, atol=1e-5, rtol=0)
    filled = fill_hidden(torch.zeros_like(image), image, visible, 32)
    rows = patchify(filled, 32)
    assert torch.equal(rows[visible.flatten(1)], patchify(image, 32)[visible.flatten(1)])
    torch.testing.assert_close(rows.mean(2), patchify(image, 32).mean(2))


def test_masks_are_those_of_the_global_batch_on_any_number_of_devices() -> None:
    objective = _spark()
    whole = objective.draw_mask(_images(4), ShardedGenerator("masks"))
    parts = [objective.draw_mask(_images(2), ShardedGenerator("masks", rank=r, world=2)) for r in range(2)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(("cells", "ratio", "keep"), [(49, 0.6, 20), (49, 0.75, 12), (144, 0.75, 36), (49, 0.5, 24)])
def test_visible_patches_are_rounded_as_published(cells: int, ratio: float, keep: int) -> None:
    assert visible_cells(cells, ratio) == keep


def test_objective_is_rebuilt_from_its_description() -> None:
    encoder = Backbone("resnet10t")
    objective = SparK(encoder, SparKUNet(encoder.feature_info, 32, output_stride=4), ratio=0.5)
    again = build(spec_of(objective))
    assert again.ratio == 0.5
    again.load_state_dict(objective.state_dict())


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.2, 60.0])
def test_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        _spark(ratio=ratio)


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_ratio_that_hides_everything_or_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="at least one has to be visible and one hidden"):
        _spark(ratio=ratio)({"image": _images()}, torch.Generator())


@pytest.mark.parametrize(("height", "width"), [(100, 96), (96, 16)])
def test_picture_that_is_no_multiple_of_the_stride_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=r"no whole number of 32-pixel patches.*multiples of 32, for example 96x"):
        _spark()({"image": _images(2, height, width)}, torch.Generator())


def test_batch_too_small_for_batch_norm_is_refused_before_training_and_fine_for_looking() -> None:
    objective = _spark(ratio=0.75)
    batch = {"image": _images(1, 64, 64)}
    with pytest.raises(ValueError, match="larger batch, larger images or a smaller mask ratio"):
        objective(batch, torch.Generator())
    assert torch.isfinite(objective.eval()(batch, torch.Generator()).loss)


def test_mask_of_the_wrong_kind_is_refused() -> None:
    objective = _spark()
    with pytest.raises(ValueError, match=r"torch.bool \(2, 3, 3\)"):
        objective.loss(_images(), _mask().float())
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) was given"):
        objective.loss(_images(), torch.ones(2, 4, 4, dtype=torch.bool))


def test_decoder_for_another_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the decoder was made for .*\(16, 4\)"):
        SparK(Backbone("resnet10t"), SparKUNet(_resnet().feature_info, 32))
    with pytest.raises(ValueError, match="mode is 'dense'"):
        _spark(mode="dense")


# --------------------------------------------------------------------------------------------- published checkpoints


@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_names_of_published_files_go_both_ways(family: str) -> None:
    if family == "resnet":
        objective = _spark()
    else:
        encoder = Backbone(ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=5))
        objective = _spark(encoder, norm="layer")
    state = objective.state_dict()
    official = spark.to_official(state)
    assert {name.split(".")[0] for name in official} == {
        "sparse_encoder",
        "dense_decoder",
        "densify_norms",
        "densify_projs",
        "mask_tokens",
    }
    assert not any(name.startswith(("sparse_encoder.sp_cnn.fc", "sparse_encoder.sp_cnn.head")) for name in official)
    assert ("sparse_encoder.sp_cnn.downsample_layers.0.0.weight" in official) == (family == "convnext")
    # the smallest map is number 0 there and the last here
    coarsest = state["decoder.densify.mask_tokens.3"]
    assert torch.equal(official["mask_tokens.0"], coarsest)
    extras = {"imn_m": torch.zeros(1, 3, 1, 1), "norm_black": torch.zeros(1), "config": {"sbn": True}}
    back = spark.from_official({**official, **extras})
    head = {n for n in state if n.startswith(("encoder.model.fc.", "encoder.model.head.")) or n in ("mean", "std")}
    assert back.keys() == state.keys() - head
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


def _two_processes(rank: int, address: str, expected: float) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    image, prediction, visible = _sharded_case()
    rows = slice(0, 1) if rank == 0 else slice(1, 4)  # unequal shares of images and of hidden patches
    loss = masked_loss(prediction[rows], image[rows], visible[rows], 32)
    dist.all_reduce(loss)
    assert abs(float(loss) / 2 - expected) < 1e-6
    dist.destroy_process_group()


def _sharded_case() -> tuple[Tensor, Tensor, Tensor]:
    visible = _mask(4).clone()
    visible[2] = True
    return _images(4), torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(3)), visible


def test_mean_of_the_losses_of_two_processes_is_the_loss_of_the_whole_batch(tmp_path) -> None:
    image, prediction, visible = _sharded_case()
    expected = float(masked_loss(prediction, image, visible, 32))
    torch.multiprocessing.spawn(_two_processes, (f"file://{tmp_path}/meeting", expected), nprocs=2)
