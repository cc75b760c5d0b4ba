"""What one phase of training promises, beyond being resumable."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isthmus.codec import Loss, UserError
from isthmus.engine import Diverged, FitResult, Run, Training
from isthmus.engine.fit import fit
from tests.engine import jobs


def train(tmp_path: Path, objective: nn.Module | None = None, options: Any = None, **settings: Any) -> FitResult:
    fit_arguments = {key: settings.pop(key) for key in ("groups", "evaluate", "batches") if key in settings}
    settings = {"steps": 10, "batch_size": 16, "lr": 0.01, **settings}
    with Run.quick(tmp_path, **(options or {})) as run:
        run.seed_everything("weights")
        objective = jobs.Denoise("group", dropout=0.0) if objective is None else objective
        dataset = None if "batches" in fit_arguments else jobs.pictures()
        return fit(run, "train", objective, dataset, Training(**settings), **fit_arguments)


def weights(result: FitResult) -> torch.Tensor:
    return nn.utils.parameters_to_vector(result.objective.parameters()).detach()


def test_training_makes_the_loss_small(tmp_path: Path) -> None:
    losses = train(tmp_path, steps=150, lr=0.02, optimizer="adamw").curves["loss"]
    assert losses[-1][0] == 150
    assert losses[-1][1] < 0.3 * losses[0][1]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd"])
def test_accumulated_parts_are_the_whole_batch(tmp_path: Path, optimizer: str) -> None:
    whole = train(tmp_path / "1", optimizer=optimizer, clip=0.3)
    parts = train(tmp_path / "4", optimizer=optimizer, clip=0.3, accumulate=4)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)
    losses = [[loss for _, loss in result.curves["loss"]] for result in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_average_is_the_recursion_of_its_definition(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def evaluate(objective: nn.Module) -> dict[str, float]:
        assert not objective.training
        assert not torch.is_grad_enabled()
        seen.append(nn.utils.parameters_to_vector(objective.parameters()).clone())
        return {"norm": seen[-1].norm().item()}

    torch.manual_seed(0)
    objective = jobs.Denoise("group", dropout=0.0)
    expected = nn.utils.parameters_to_vector(objective.parameters()).detach().clone()
    result = train(tmp_path, objective, ema=0.9, evaluate=evaluate, evaluate_every=1)
    for now in seen:
        expected = 0.9 * expected + 0.1 * now
    assert result.ema is not None
    torch.testing.assert_close(nn.utils.parameters_to_vector(result.ema.parameters()), expected)
    assert [step for step, _ in result.curves["evaluate/norm"]] == list(range(1, 11))


def test_rates_follow_the_schedule_and_the_groups(tmp_path: Path) -> None:
    seen: list[tuple[float, float, float]] = []

    class Spy(jobs.Denoise):
        def forward(self, *arguments: Any) -> Loss:
            by_name = {name: group for group in self.optimizer.param_groups for name in group["names"]}
            group = by_name["net.0.weight"]
            seen.append((group["lr"], group["weight_decay"], by_name["mask_token"]["weight_decay"]))
            return super().forward(*arguments)

    class Remembers(torch.optim.SGD):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            object.__setattr__(objective, "optimizer", self)

    objective = Spy("group")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("isthmus.engine.optim.create_optimizer", _creator(Remembers))
        train(tmp_path, objective, steps=5, warmup_steps=2, weight_decay=0.1, weight_decay_end=0.3, final_lr_ratio=0)
    assert [lr for lr, _, _ in seen] == pytest.approx([0.005 * 0.01, 0.5025 * 0.01, 0.01, 0.005, 0.0])
    assert [wd for _, wd, _ in seen][::4] == pytest.approx([0.1, 0.3])
    assert {bare for _, _, bare in seen} == {0.0}


def _creator(optimizer: type[torch.optim.Optimizer]) -> Any:
    return lambda name, groups, *, lr, weight_decay, **_: optimizer(groups, lr=lr, weight_decay=weight_decay)


def test_clipping_bounds_the_step_of_plain_descent(tmp_path: Path) -> None:
    objective = jobs.Denoise("group")
    before = nn.utils.parameters_to_vector(objective.parameters()).detach().clone()
    settings = {"steps": 1, "optimizer": "momentum", "momentum": 0.0, "schedule": "constant", "lr": 1.0}
    result = train(tmp_path, objective, clip=1e-3, **settings)
    assert (weights(result) - before).norm() == pytest.approx(1e-3, rel=1e-3)
    assert result.curves["gradient_norm"][0][1] > 1e-2  # what is logged is the norm before clipping


def test_own_groups_keep_their_own_rates(tmp_path: Path) -> None:
    objective = jobs.Denoise("group")
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    groups = [{"params": list(objective.net[0].parameters()), "lr": 0.0}, {"params": [objective.mask_token]}]
    after = train(tmp_path, objective, groups=groups).objective.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"mask_token"}


def signals(start: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
    while True:
        generator = torch.Generator().manual_seed(start)
        yield {"signal": torch.randn(16, 4, generator=generator)[rank * 16 // world : (rank + 1) * 16 // world]}
        start += 1


def test_alternating_turns_move_their_own_parameters_at_their_own_pace(tmp_path: Path) -> None:
    objective = jobs.Duel()
    moved: list[tuple[bool, bool]] = []
    last = [objective.down.weight.detach().clone(), objective.up.weight.detach().clone()]

    def evaluate(duel: nn.Module) -> dict[str, float]:
        now = [duel.down.weight.detach().clone(), duel.up.weight.detach().clone()]  # type: ignore[union-attr]
        moved.append((not torch.equal(now[0], last[0]), not torch.equal(now[1], last[1])))
        last[:] = now
        return {}

    result = train(tmp_path, objective, steps=4, batches=signals, evaluate=evaluate, evaluate_every=1)
    assert moved == [(True, True), (True, False), (True, True), (True, False)]
    assert {"down/loss", "up/loss"} <= result.curves.keys()
    assert result.curves["down/loss"][0][1] > 0 > result.curves["up/loss"][0][1]
    assert all(p.requires_grad for p in objective.parameters())


def test_turns_take_groups_by_name(tmp_path: Path) -> None:
    objective = jobs.Duel()
    before = objective.up.weight.detach().clone()
    train(tmp_path / "a", objective, batches=signals, groups={"up": [{"params": [objective.up.weight], "lr": 0.0}]})
    assert torch.equal(before, objective.up.weight)
    with pytest.raises(UserError, match="no such turn"):
        train(tmp_path / "b", objective, batches=signals, groups={"left": []})


class Poisoned(jobs.Denoise):
    """Its loss, or its gradient, stops being finite in step 7."""

    def __init__(self, what: str) -> None:
        super().__init__("group", dropout=0.0)
        self.what, self.calls = what, 0

    def forward(self, *arguments: Any) -> Loss:
        out, self.calls = super().forward(*arguments), self.calls + 1
        if self.calls != 8:
            return out
        if self.what == "loss":
            return Loss(out.loss * float("nan"), out.metrics)
        # sqrt has an infinite slope at 0 and a value that is finite.
        return Loss(out.loss + (self.mask_token.sum() * 0).abs().sqrt(), out.metrics)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_with_step_samples_and_checkpoint(tmp_path: Path, what: str) -> None:
    found = rf"the {what}( norm)? is nan at step 7 \(samples (\d+, ){{8}}…\); the last good checkpoint is .*step0{{8}}5"
    with pytest.raises(Diverged, match=found):
        train(tmp_path, Poisoned(what), options={"save_every": 5})
    kept = list((tmp_path / "run/checkpoints").iterdir())
    assert [path.name for path in kept] == ["train.step000000005.pt"]
    state = torch.load(kept[0], weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_late_judgement_still_comes_before_a_checkpoint(tmp_path: Path) -> None:
    from isthmus.engine.guard import Finite

    good, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    finite = Finite("train", lambda: None, lag=True, scaled=False)
    finite.watch(0, torch.arange(2), bad, good)
    with pytest.raises(Diverged, match=r"the loss is inf at step 0 \(samples 0, 1\); this phase has no checkpoint yet"):
        finite.watch(1, None, good, good)
    finite.watch(2, None, good, bad)
    with pytest.raises(Diverged, match="gradient norm is inf at step 2"):
        finite.judge()
    scaled = Finite("train", lambda: None, lag=False, scaled=True)
    scaled.watch(3, None, good, bad)
    with pytest.raises(Diverged, match="the loss is inf"):
        scaled.watch(4, None, bad, good)
    for step in range(5, 104):
        scaled.watch(step, None, good, bad)
    with pytest.raises(Diverged, match="overflowed in 100 steps in a row"):
        scaled.watch(104, None, good, bad)


def test_steps_that_the_fp16_scaler_skips_are_no_failure(tmp_path: Path) -> None:
    class Steep(jobs.Denoise):
        """Gradients overflow at the scaler's first, large scale."""

        def forward(self, *arguments: Any) -> Loss:
            out = super().forward(*arguments)
            return Loss(out.loss * 100, out.metrics)

    result = train(tmp_path, Steep("group"), steps=60, options={"precision": "16-mixed"})
    norms = torch.tensor([norm for _, norm in result.curves["gradient_norm"]])
    losses = [loss for _, loss in result.curves["loss"]]
    assert not torch.isfinite(norms[0])
    assert torch.isfinite(norms[-1])
    assert losses[-1] < losses[0]


def test_bf16_leaves_the_batch_in_32_bits(tmp_path: Path) -> None:
    class Looks(jobs.Denoise):
        def forward(self, batch: Any, *arguments: Any) -> Loss:
            assert batch["image"].dtype == torch.float32
            assert self.net[0](batch["image"]).dtype == torch.bfloat16
            return super().forward(batch, *arguments)

    result = train(tmp_path, Looks("group"), options={"precision": "bf16-mixed"})
    assert {p.dtype for p in result.objective.parameters()} == {torch.float32}


def test_compiled_objectives_train_to_the_same_weights(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        # The eager backend exercises the tracing without needing a C++ compiler.
        compile_module = nn.Module.compile
        patched.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
        compiled = train(tmp_path / "a", steps=3, compile=True)
    plain = train(tmp_path / "b", steps=3)
    torch.testing.assert_close(weights(compiled), weights(plain))
    assert set(compiled.objective.state_dict()) == set(plain.objective.state_dict())


def test_max_steps_caps_the_phase_and_its_schedule(tmp_path: Path) -> None:
    result = train(tmp_path, options={"max_steps": 3, "log_every": 1}, epochs=50, steps=None)
    assert result.steps == 3
    assert result.curves["lr"][-1] == (3, pytest.approx(0.01 * 0.001))


def test_scalars_are_written_for_spreadsheets_and_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tmp_path, options={"tensorboard": True, "log_every": 2})
    with open(tmp_path / "run/scalars/train.csv", newline="") as file:
        rows = [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["name"] == "loss"]
    assert rows == result.curves["loss"]
    board = EventAccumulator(str(tmp_path / "run/tensorboard/train"))
    board.Reload()
    events = board.Scalars("loss")
    assert [event.step for event in events] == [2, 4, 6, 8, 10]
    assert [event.value for event in events] == pytest.approx([loss for _, loss in rows])


@pytest.mark.parametrize(
    ("objective", "settings", "sentence"),
    [
        (jobs.Denoise().requires_grad_(False), {}, "no parameters to train"),
        (lambda batch, generator: None, {}, "an objective is a module"),
        (None, {"batch_size": 97}, "96 samples, fewer than one batch of 97"),
        (None, {"optimizer": "adamv"}, "there is no optimiser 'adamv'"),
        (None, {"layer_decay": 0.5}, "layer decay needs a timm model"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(
    tmp_path: Path, objective: Any, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        train(tmp_path, objective, **settings)


def test_losses_that_cannot_be_minimised_are_refused(tmp_path: Path) -> None:
    class Wrong(jobs.Denoise):
        def forward(self, *arguments: Any) -> Loss:
            loss = super().forward(*arguments).loss
            return Loss(loss.expand(2) if self.norms else loss.detach())

    for norms, sentence in ((True, r"shape \(2,\)"), (False, "no trained parameter behind it")):
        objective = Wrong()
        objective.norms = norms
        with pytest.raises(UserError, match=sentence):
            train(tmp_path / str(norms), objective)


def test_data_that_ends_early_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data ended after 0 of 10 steps"):
        train(tmp_path, jobs.Duel(), batches=lambda start, rank, world: iter(()))


def test_phases_have_plain_names(tmp_path: Path) -> None:
    with Run.quick(tmp_path) as run, pytest.raises(UserError, match="letters, digits"):
        fit(run, "../up", jobs.Denoise(), jobs.pictures(), Training(steps=1))


def stopped(tmp_path: Path, losses: list[float], options: Any = None, **settings: Any) -> tuple[FitResult, list[Any]]:
    """Train with a validation loss that is written down beforehand; also the weights at every evaluation."""
    seen: list[torch.Tensor] = []

    def evaluate(objective: nn.Module) -> dict[str, float]:
        seen.append(nn.utils.parameters_to_vector(objective.parameters()).clone())
        if len(seen) > len(losses):
            raise KeyboardInterrupt
        return {"loss": losses[len(seen) - 1]}

    return train(tmp_path, evaluate=evaluate, evaluate_every=1, options=options, **settings), seen


def test_patience_ends_training_with_the_weights_of_the_lowest_loss(tmp_path: Path) -> None:
    result, seen = stopped(tmp_path, [3.0, 1.0, 2.0, float("nan"), 1.5, 0.0], patience=3)
    assert result.steps == len(seen) == 5
    assert torch.equal(weights(result), seen[1])
    whole, seen = stopped(tmp_path / "whole", [float(10 - i) for i in range(10)], patience=3)
    assert whole.steps == len(seen) == 10
    assert torch.equal(weights(whole), seen[-1])
    with pytest.raises(UserError, match="patience needs an evaluation"):
        train(tmp_path / "none", patience=3)
    with pytest.raises(UserError, match="patience watches loss; evaluate gives accuracy"):
        train(tmp_path / "other", evaluate=lambda _: {"accuracy": 1.0}, evaluate_every=1, patience=3)
    with pytest.raises(UserError, match="patience is at least 1, got 0"):
        Training(steps=1, patience=0)


def test_patience_survives_an_interruption(tmp_path: Path) -> None:
    losses = [3.0, 1.0, 2.0, 2.5, 1.5, 0.0]
    expected, _ = stopped(tmp_path / "whole", losses, patience=3)
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "cut", losses[:3], patience=3, options={"save_every": 1})
    result, seen = stopped(tmp_path / "cut", losses[3:], patience=3, options={"save_every": 1, "resume": True})
    assert len(seen) == 2
    assert result.steps == expected.steps
    assert torch.equal(weights(result), weights(expected))
    again, seen = stopped(tmp_path / "cut", [], patience=3, options={"resume": True})
    assert not seen
    assert again.steps == 5
