"""Sparse execution where training really runs: checkpointing, threads, several processes, compile, mixed precision."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.multiprocessing as mp
from torch import nn

from isthmus.codec import UserError
from isthmus.encoders.backbone import Backbone
from isthmus.layers.sparse_conv import check_leaks, sparse_features, sparse_form, upsample_mask
from isthmus.layers.sparse_conv.tensor import FORMS, SparseTensor

MODES = ["masked", "tiled"]


def resnet(**options: Any) -> Backbone:
    from timm.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    return Backbone(ResNet(BasicBlock, [1, 1, 2, 1], channels=(4, 6, 8, 10), zero_init_last=False, **options)).double()


def images(batch: int = 2, side: int = 96, grid: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64)
    visible = torch.rand(batch, grid, grid, generator=generator) < 0.5
    visible[:, 0, 0] = True
    return x, visible


def learn(net: nn.Module, x: torch.Tensor, visible: torch.Tensor, mode: str, **options: Any) -> dict[str, torch.Tensor]:
    outputs = sparse_features(net, x, visible, mode, **options)
    torch.stack([(o**2).sum() for o in outputs]).sum().backward()
    result = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {**result, **dict(net.named_buffers()), **{str(k): o.detach() for k, o in enumerate(outputs)}}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        scale = max(float(value.abs().max()), 1.0) if value.numel() else 1.0
        torch.testing.assert_close(
            second[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_changes_nothing(mode: str) -> None:
    x, visible = images()
    net = resnet().train()
    other = copy.deepcopy(net)
    other.model.set_grad_checkpointing(True)  # type: ignore[operator]
    plain, checkpointed = learn(net, x, visible, mode), learn(other, x, visible, mode)
    counters = [name for name in plain if name.endswith("num_batches_tracked")]  # torch counts recomputations too
    for name in counters:
        del plain[name], checkpointed[name]
    assert_same(plain, checkpointed)


def test_reentrant_checkpointing_is_refused_because_gradients_would_be_lost() -> None:
    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dummy = torch.zeros((), requires_grad=True)
            return torch.utils.checkpoint.checkpoint(lambda a, _: self.conv(a), x, dummy, use_reentrant=True)

    with pytest.raises(UserError, match="use_reentrant=False"):
        sparse_features(Reentrant(), torch.randn(1, 3, 8, 8), torch.ones(1, 2, 2, dtype=torch.bool))


def test_two_threads_do_not_disturb_each_other() -> None:
    x, visible = images()
    nets = [resnet().eval() for _ in range(2)]
    masks = [visible, ~visible]
    alone = [sparse_features(net, x, mask, "tiled") for net, mask in zip(nets, masks, strict=True)]
    wrong: list[str] = []

    def work(which: int) -> None:
        for _ in range(4):
            for mode in MODES:
                outputs = sparse_features(nets[which], x, masks[which], mode)
                for ours, theirs in zip(outputs, alone[which], strict=True):
                    if not torch.allclose(ours, theirs, rtol=0, atol=1e-9):
                        wrong.append(f"thread {which}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it, not we
def test_compiled_training_step_gives_the_right_answer() -> None:
    class Step(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.scale = net, nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            maps = sparse_features(self.net, x * self.scale, visible, "tiled")
            return torch.stack([(m.sin() ** 2).mean() for m in maps]).sum()

    x, visible = images()
    step = Step(resnet().eval())
    compiled = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(compiled(x, visible), step(x, visible))
    also = torch.compile(step.net, backend="aot_eager")  # a compiled encoder is run in its Python form
    torch.testing.assert_close(sparse_features(also, x, visible)[-1], sparse_features(step.net, x, visible)[-1])


def test_mixed_precision() -> None:
    x, visible = images()
    net = resnet().float().train()
    reference = sparse_features(net, x.float(), visible, "tiled")
    for mode in MODES:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = sparse_features(net, x.float(), visible, mode)
        torch.stack([o.float().mean() for o in outputs]).sum().backward()
        error = (outputs[0].float() - reference[0]).abs().max() / reference[0].abs().max()
        assert error < 0.05
    assert all(p.grad is not None for n, p in net.named_parameters() if ".fc" not in n)


# ------------------------------------------------------------------------------------------------ several processes


def _worker(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, visible = images(4)
    mine = slice(0, 1) if rank == 0 else slice(1, 4)  # ranks of different size

    class Step(nn.Module):
        """Sums over ranks what DDP averages."""

        def __init__(self, net: nn.Module, **options: Any) -> None:
            super().__init__()
            self.net, self.options = net, options

        def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            outputs = sparse_features(self.net, x, visible, **self.options)
            return 2 * torch.stack([(o**2).sum() for o in outputs]).sum()

    flagged = Step(resnet().train(), mode="masked", sync=True)
    parallel = nn.parallel.DistributedDataParallel(flagged, find_unused_parameters=True)
    parallel(x[mine], visible[mine]).backward()
    converted = Step(nn.SyncBatchNorm.convert_sync_batchnorm(resnet().train()), mode="tiled")
    converted(x[mine], visible[mine]).backward()  # DDP itself refuses SyncBatchNorm on CPUs
    for parameter in converted.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
    for name, step in (("flagged", flagged), ("converted", converted)):
        state = {n: p.grad for n, p in step.net.named_parameters() if p.grad is not None}
        torch.save({**state, **dict(step.net.named_buffers())}, Path(folder) / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_and_statistics_of_one(tmp_path: Path) -> None:
    mp.start_processes(_worker, (str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="spawn")
    x, visible = images(4)
    alone = learn(resnet().train(), x, visible, "masked")
    alone = {name: value for name, value in alone.items() if not name.isdigit()}
    for name in ("flagged-0", "flagged-1", "converted-0", "converted-1"):
        assert_same(alone, torch.load(tmp_path / f"{name}.pt"))


# -------------------------------------------------------------------------------------------------------- leak check


def test_a_clean_encoder_passes_and_is_left_alone() -> None:
    net = resnet().float().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert check_leaks(net, 64, 32) == []
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Peek(nn.Module):
    """Reads the mean of the held canvas, hidden places included."""

    def forward(self, x: Any) -> torch.Tensor:
        return x + x.values.detach().mean() if isinstance(x, SparseTensor) else x + x.mean()


def test_a_module_that_reads_hidden_places_is_caught_and_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Peek())
    with pytest.raises(UserError, match=r"reads hidden places.*'1' \(Peek\)"):
        check_leaks(net, 32, 8)


def blur(x: torch.Tensor) -> torch.Tensor:
    """A function of somebody's own, that torch functions can override."""
    if torch.overrides.has_torch_function_unary(x):
        return torch.overrides.handle_torch_function(blur, (x,), x)
    return torch.fft.ifft2(torch.fft.fft2(x)[..., :1, :1], x.shape[-2:]).real


def test_a_wrong_sparse_form_is_caught() -> None:
    """A form that declares a global function pointwise."""

    class Blur(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return blur(x)

    with pytest.raises(UserError, match=r"blur.*\(Blur\) has no sparse form"):
        check_leaks(nn.Sequential(Blur()), 32, 8)
    try:
        sparse_form(blur)(lambda function, x: x.finish(blur(x.values)))
        with pytest.raises(UserError, match="reads hidden places"):
            check_leaks(nn.Sequential(Blur()), 32, 8)
    finally:
        del FORMS[blur]


def test_an_output_that_is_no_map_is_refused() -> None:
    with pytest.raises(UserError, match="no sparse map"):
        check_leaks(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)), 32, 8)


@pytest.mark.parametrize("mode", MODES)
def test_odd_maps_have_a_mask_of_their_size(mode: str) -> None:
    """Unpadded convolutions make maps whose size is no multiple of the grid; they are masked by the nearest cell."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.AvgPool2d(3, 2)).double()
    x, visible = images(2, 48, 3)
    (ours,) = sparse_features(net, x, visible, mode)
    assert ours.shape[-1] == 10
    mask = upsample_mask(visible, (10, 10)).expand_as(ours)
    assert not ours[~mask].any()
    assert (ours[mask] != 0).all()
    (masked,) = sparse_features(net, x, visible, "masked")
    torch.testing.assert_close(ours, masked)


def test_bad_input_is_answered_in_one_sentence() -> None:
    net, x = nn.Conv2d(3, 4, 1), torch.randn(2, 3, 32, 32)
    good = torch.ones(2, 4, 4, dtype=torch.bool)
    for visible, mode, told in [
        (good.float(), "auto", "bool"),
        (good[:1], "auto", "B = 2"),
        (good[:, None], "auto", "drop the channel axis"),
        (torch.zeros_like(good), "auto", "hidden"),
        (torch.ones(2, 40, 40, dtype=torch.bool), "auto", "more cells"),
        (torch.ones(2, 5, 5, dtype=torch.bool), "tiled", "cannot be cut"),
        (good, "fast", "mode must be"),
    ]:
        with pytest.raises(UserError, match=told):
            sparse_features(net, x, visible, mode)
    with pytest.raises(UserError, match="smaller than the 4x4 grid"):
        sparse_features(nn.Conv2d(3, 4, 16, 16), x, good)
    one = torch.zeros(1, 2, 2, dtype=torch.bool)
    one[0, 0, 0] = True
    with pytest.raises(UserError, match=r"'1' \(BatchNorm2d\) has a single visible pixel"):
        sparse_features(nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.BatchNorm2d(4)), x[:1], one)


def test_attention_is_refused_by_name() -> None:
    model = timm.create_model("edgenext_xx_small", num_classes=0)
    with pytest.raises(UserError, match=r"reshape.*'stages\.1\.blocks\.1\.\w+|SplitTransposeBlock"):
        sparse_features(lambda x: model.forward_features(x), torch.randn(1, 3, 64, 64), torch.ones(1, 2, 2).bool())
