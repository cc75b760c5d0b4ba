"""The brain simulator: physics, reproducibility, what each network answers to, and both instruments."""

from __future__ import annotations

import pytest
import torch

from isthmus.codec import UserError
from isthmus.data import load
from isthmus.data.builtin.brain import BrainSimulator, FMRISettings, MEGSettings, draw, pictures
from isthmus.data.builtin.brain.cortex import NAMES, NETWORKS, grow, tangents
from isthmus.data.builtin.brain.fmri import haemodynamic
from isthmus.data.builtin.brain.sensors import dipole_field, helmet

QUIET = MEGSettings(sensors=20, evoked=1.0, induced=0.0, background=0.0, rhythm=0.0, noise=0.0, gain=0.0, jitter=0.0,
                    geometry="sphere")  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------------------- fields


def test_radial_dipoles_are_silent_and_fields_are_linear_and_without_divergence() -> None:
    place = torch.tensor([[0.0, 0.03, 0.05]], dtype=torch.float64)
    sensor = torch.randn(30, 3, generator=seeded(), dtype=torch.float64)
    sensor = 0.12 * sensor / sensor.norm(dim=1, keepdim=True)
    moment = torch.tensor([[1.0, 0.4, -0.2]], dtype=torch.float64)
    field = dipole_field(sensor, place, moment)
    assert dipole_field(sensor, place, place).abs().max() < 1e-12 * field.abs().max()
    torch.testing.assert_close(dipole_field(sensor, place, 3 * moment), 3 * field)
    step = 1e-5
    slopes = [
        (dipole_field(sensor + s * step * axis, place, moment) * axis).sum(-1)
        for axis in torch.eye(3, dtype=torch.float64)
        for s in (1, -1)
    ]
    divergence = sum(slopes[2 * i] - slopes[2 * i + 1] for i in range(3)) / (2 * step)
    size = field.norm(dim=-1).max() / 0.12
    assert isinstance(divergence, torch.Tensor)
    assert divergence.abs().max() < 1e-6 * size


def test_our_formula_agrees_with_the_forward_model_of_mne() -> None:
    pytest.importorskip("mne")
    theirs = helmet("ctf275", 40)
    place = torch.nn.functional.normalize(torch.randn(15, 3, generator=seeded()), dim=1) * 0.06
    turn = tangents(place, torch.randn(15, 3, generator=seeded(1)))
    field = theirs.leadfield(place, turn)
    locations = torch.tensor([c["loc"].tolist() for c in theirs.info["chs"]], dtype=torch.float64)  # type: ignore[attr-defined]
    coil, normal = locations[:, :3] - theirs.centre, locations[:, 9:12]  # type: ignore[attr-defined]
    parts = [dipole_field(coil + away * normal, place.double(), turn.double()) for away in (0.0, 0.05)]
    ours = torch.einsum("cjx,cx->cj", parts[0] - parts[1], normal).float()
    both = torch.stack([ours.flatten(), field.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.999
    assert float(ours.norm() / field.norm()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("geometry", ["sphere", "ctf275"])
def test_layouts_fill_the_unit_square_with_the_back_of_the_head_behind(geometry: str) -> None:
    if geometry == "ctf275":
        pytest.importorskip("mne")
    found = helmet(geometry, 274)
    assert found.layout.amin(0).tolist() == [0, 0]
    assert found.layout.amax(0).tolist() == [1, 1]
    back = found.leadfield(torch.tensor([[0.0, -0.06, 0.01]]), torch.tensor([[1.0, 0.0, 0.0]]))[:, 0].abs()
    left = found.leadfield(torch.tensor([[-0.06, 0.0, 0.01]]), torch.tensor([[0.0, 0.0, 1.0]]))[:, 0].abs()
    assert float(found.layout[back.topk(20).indices, 1].mean()) < 0.35
    assert float(found.layout[left.topk(20).indices, 0].mean()) < 0.35


def test_unknown_geometries_are_refused() -> None:
    for arguments, told in ((("cube", 3), "auto, ctf275 or sphere"), (("sphere", 300), "1 to 274 sensors")):
        with pytest.raises(UserError, match=told):
            helmet(*arguments)


# ----------------------------------------------------------------------------------------------------------- simulator


def test_the_same_generator_gives_the_same_brain_and_recording() -> None:
    z = torch.randn(6, 8, generator=seeded())
    subject = torch.tensor([0, 1, 0, 1, 1, 0])
    a, b = (BrainSimulator(2, 8, 0.3, seeded(5), meg=QUIET).meg(z, subject) for _ in range(2))
    assert a.shape == (6, 20, len(QUIET.times))
    assert torch.equal(a, b)
    assert not torch.equal(a, BrainSimulator(2, 8, 0.3, seeded(6), meg=QUIET).meg(z, subject))
    used = BrainSimulator(2, 8, 0.3, seeded(5), meg=QUIET)
    used.fmri(z, generator=seeded())
    assert torch.equal(used.meg(z, subject), a), "one instrument does not change the other"


def test_nothing_happens_before_the_onset_and_low_level_comes_first() -> None:
    simulator = BrainSimulator(1, 8, 0.0, seeded(), meg=QUIET)
    z, low = torch.randn(200, 8, generator=seeded(1)), torch.randn(200, 5, generator=seeded(2))
    still = torch.zeros(200, 5)
    times = QUIET.times
    semantic = simulator.meg(z, low=still, generator=seeded(3)).std(0).norm(dim=0)
    basic = simulator.meg(torch.zeros(200, 8), low=low, generator=seeded(3)).std(0).norm(dim=0)
    before = times < 0
    assert semantic[before].max() < 0.05 * semantic.max()
    assert basic[times < 0.4].argmax() < semantic[times < 0.4].argmax()
    assert abs(float(times[basic.argmax()]) - NETWORKS["V1"].latency) < 0.04


def test_induced_responses_have_no_mean_and_the_control_network_is_silent() -> None:
    settings = MEGSettings(**{**QUIET.__dict__, "evoked": 0.0, "induced": 1.5})
    simulator = BrainSimulator(1, 8, 0.0, seeded(), meg=settings)
    z = torch.randn(1, 8, generator=seeded()).expand(1500, -1)
    trials = simulator.meg(z, low=torch.zeros(1500, 5), generator=seeded(1))
    assert trials.mean(0).abs().max() < 0.12 * trials.std(0).max()
    cortex = simulator.truth.cortex
    silent = cortex.network == NAMES.index("AUD")
    rates = cortex.rates(z[:2], torch.zeros(2, 5), 0)
    assert rates[:, silent].abs().sum() == 0
    assert (rates[:, ~silent] > 0).all()


def test_energy_units_do_not_know_the_sign_and_a_low_rank_brain_sees_a_subspace() -> None:
    half = grow(1, 8, 5, 0.5, seeded())
    z = torch.randn(4, 8, generator=seeded(1))
    low = torch.zeros(4, 5)
    torch.testing.assert_close(half.rates(z, low, 0)[:, half.energy], half.rates(-z, low, 0)[:, half.energy])
    assert float(half.energy.float().mean()) == pytest.approx(0.5, abs=0.02)
    flat = grow(1, 8, 5, 0.0, seeded(), rank=2)
    assert torch.linalg.matrix_rank(flat.weights[0], rtol=1e-4) == 2


def test_subjects_differ_by_the_spread() -> None:
    same, apart = grow(2, 8, 5, 0.0, seeded(), spread=0.0), grow(2, 8, 5, 0.0, seeded(), spread=0.3)
    assert torch.equal(same.weights[0], same.weights[1])
    assert (apart.weights[0] - apart.weights[1]).std() > 0.05


def test_wrong_latents_are_refused() -> None:
    simulator = BrainSimulator(1, 8, meg=QUIET)
    for call, told in (
        (lambda: simulator.meg(torch.zeros(2, 7)), "must have 8 numbers"),
        (lambda: simulator.meg(torch.zeros(2, 8), 1), "subject must be below 1"),
        (lambda: simulator.meg(torch.zeros(2, 8), low=torch.zeros(2, 4)), "low must be"),
        (lambda: simulator.fmri(torch.zeros(2, 8), "eeg"), "fmri mode is beta, bold, parcel"),
        (lambda: simulator.fmri(torch.zeros(2, 8), "parcel"), r"reads \(N, E, F\)"),
        (lambda: BrainSimulator(1, 8, energy=0.7), "energy from 0 to 0.5"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


# ---------------------------------------------------------------------------------------------------------------- fMRI


def test_voxels_are_as_reliable_as_their_ceiling_says() -> None:
    simulator = BrainSimulator(1, 8, 0.0, seeded(), fmri=FMRISettings(voxels=200, ceiling=0.3))
    z = torch.randn(1500, 8, generator=seeded(1))
    z = z / z.norm(dim=1, keepdim=True) * 8**0.5
    low = torch.randn(1500, 5, generator=seeded(2))
    one, two = (simulator.fmri(z, "beta", 0, low, seeded(s)) for s in (3, 4))
    scanner = simulator.truth.scanner
    between = torch.corrcoef(torch.cat([one.mT, two.mT]))[:200, 200:].diagonal()
    torch.testing.assert_close(between, scanner.ceiling[0], atol=0.12, rtol=0)
    control = scanner.network[0] == NAMES.index("AUD")
    assert control.any()
    assert scanner.ceiling[0][control].abs().sum() == 0
    many = BrainSimulator(1, 8, 0.0, seeded(), fmri=FMRISettings(voxels=200, ceiling=0.3, repeats=9))
    clean = scanner.clean(simulator.cortex.rates(z, low, 0), 0)
    error = (many.fmri(z, "beta", 0, low, seeded(3)) - clean)[:, ~control].std()
    assert float((one - clean)[:, ~control].std() / error) == pytest.approx(3, rel=0.15)


def test_a_linear_model_finds_amplitudes_in_the_bold_signal() -> None:
    quiet = FMRISettings(voxels=60, ceiling=0.9, drift=0.2, gap=8.0)
    simulator = BrainSimulator(1, 8, 0.0, seeded(), fmri=quiet)
    z, low = torch.randn(40, 8, generator=seeded(1)), torch.randn(40, 5, generator=seeded(2))
    found = simulator.fmri(z, "bold", 0, low, seeded(3))
    scanner = simulator.truth.scanner
    clean = scanner.clean(simulator.cortex.rates(z, low, 0), 0)
    heard = scanner.ceiling[0] > 0.8
    agreement = torch.corrcoef(torch.cat([found[:, heard].mT, clean[:, heard].mT]))
    count = int(heard.sum())
    assert float(agreement[:count, count:].diagonal().mean()) > 0.7
    runs = simulator.fmri(z.view(2, 20, 8), "parcel", 0, generator=seeded(4))
    assert runs.shape == (2, scanner.volumes(20), len(NAMES))


def test_the_haemodynamic_response_peaks_at_five_seconds_and_dips() -> None:
    seconds = torch.arange(-2, 30, 0.1)
    shape = haemodynamic(seconds)
    assert float(seconds[shape.argmax()]) == pytest.approx(5, abs=0.15)
    assert float(shape.max()) == pytest.approx(1, abs=0.01)
    assert shape[seconds < 0].abs().sum() == 0
    assert 11 < float(seconds[shape.argmin()]) < 17


# ---------------------------------------------------------------------------------------------------------- the source

SIZE = "brain?subjects=2&trials=20&stimuli=5&repeats=2&categories=7&features=6&sensors=9&geometry=sphere"
NEEDS = ("signal", "subject", "label", "latent", "low", "stimulus", "positions", "image")


def test_splits_share_a_brain_and_no_stimulus() -> None:
    parts = {split: load(SIZE, split, NEEDS) for split in ("train", "val", "test")}
    seen = {split: set(part.fetch(range(len(part)))["stimulus"].tolist()) for split, part in parts.items()}
    assert {split: len(part) for split, part in parts.items()} == {"train": 40, "val": 8, "test": 20}
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert len(seen["test"]) == 5
    batch = parts["train"].fetch([3, 30])
    assert batch["signal"].shape == (2, 9, 33)
    assert batch["subject"].tolist() == [0, 1]
    assert batch["positions"].shape == (2, 9, 2)
    assert batch["image"].shape == (2, 3, 24, 24)
    torch.testing.assert_close(batch["latent"].norm(dim=1), torch.full((2,), 6**0.5))


def test_samples_are_a_function_of_the_seed() -> None:
    one, two, other = load(SIZE, "test", NEEDS, 0), load(SIZE, "test", NEEDS, 0), load(SIZE, "test", NEEDS, 1)
    assert all(torch.equal(one[7][k], two[7][k]) for k in NEEDS)
    assert not torch.equal(one[7]["signal"], other[7]["signal"])
    strange = load(SIZE + "&unseen=1", "test", NEEDS).fetch(range(20))
    assert int(strange["label"].min()) >= 7, "categories that training has not"


def test_pictures_follow_latent_and_low_level_features() -> None:
    pool = draw(3, 2, 6, seeded())
    drawn = pictures(pool, 16)
    assert drawn.dtype == torch.uint8
    assert torch.equal(pictures(pool.take(torch.tensor([4])), 16)[0], drawn[4])
    moved = pool._replace(low=pool.low + 1)
    assert not torch.equal(pictures(moved, 16), drawn)


def test_impossible_options_are_told() -> None:
    for source, told in (
        ("brain?subjects=0", "sizes must be 1 or more"),
        ("brain?jitter=much", "could not convert string"),
        ("brain?start=0.2", "window must begin before 0"),
        ("brain?energy=0.9", "energy from 0 to 0.5"),
        ("brain?sensors=999", "1 to 274 sensors"),
    ):
        with pytest.raises(UserError, match=told):
            load(source, "test", ("signal",))
    with pytest.raises(UserError, match="no column audio"):
        load("brain", "test", ("audio",))


def test_nothing_stands_behind_the_colon() -> None:
    with pytest.raises(UserError, match="brain takes nothing after a colon, got '9'"):
        load("brain:9", "test", ("signal",))
