"""InfoMEC: what is exact, what scikit-learn says, and every case that the formulas leave open."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss

from isthmus.metrics.explicitness import explained_variance, explicitness, log_loss
from isthmus.metrics.infomec import active_latents, compactness, dci_completeness, gini, infomec, modularity
from isthmus.metrics.mutual_information import binned, codes, entropies, nmi_continuous, nmi_discrete

GRID = torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(5))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_permuted_causes_are_perfect_and_a_rotation_is_not() -> None:
    exact = infomec(GRID, 9.5 - GRID[:, [2, 0, 1]], discrete=True)
    assert exact.infom == pytest.approx(1)
    assert exact.infoc == pytest.approx(1)
    assert exact.infoe > 0.999
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    turned = infomec(GRID.repeat(5, 1), GRID.repeat(5, 1).float() @ turn, discrete=False)
    assert max(turned.infom, turned.infoc) < 0.8


@pytest.mark.parametrize("rare", [False, True])
def test_neighbours_give_scikit_learns_estimate(rng: np.random.Generator, rare: bool) -> None:
    """Also where a category has fewer samples than there are neighbours, or a single one."""
    label = rng.integers(0, 4, 300)
    if rare:
        label[:7], label[7] = 8, 9
    x = np.stack([label + rng.normal(size=300), rng.normal(size=300), np.round(rng.normal(size=300))], 1)
    standard = (x - x.mean(0)) / x.std(0)
    options = {"discrete_features": False, "n_neighbors": 10, "random_state": 0}
    theirs = mutual_info_classif(standard, label, **options)  # type: ignore[arg-type]
    ours = nmi_continuous(label[:, None], x)[0] * entropies(codes(label[:, None]))[0]
    # Among few samples scikit-learn finds neighbours by a dot product, and rounding counts the last one in or out.
    np.testing.assert_allclose(ours[:2], theirs[:2], atol=2e-3 if rare else 1e-9)
    np.testing.assert_allclose(ours[2], theirs[2], atol=0.05)  # ties are parted by another noise


def test_counts_give_mutual_information_by_hand() -> None:
    source, latent = np.array([[0], [0], [1], [1]]), np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    np.testing.assert_allclose(nmi_discrete(source, latent), [[1, 0]], atol=1e-12)


def test_reader_has_scikit_learns_loss(rng: np.random.Generator) -> None:
    label = rng.choice(3, 400, p=(0.7, 0.2, 0.1))
    x = rng.normal(size=(400, 2)) + label[:, None]
    theirs = LogisticRegression(C=np.inf, class_weight="balanced", tol=1e-8, max_iter=1000).fit(x, label)
    assert log_loss(x, label, None) == pytest.approx(sklearn_log_loss(label, theirs.predict_proba(x)), abs=1e-5)


def test_nothing_read_is_no_explicitness_even_where_classes_are_uneven(rng: np.random.Generator) -> None:
    """The reference is the even guess that balanced classes make, not the entropy."""
    label = rng.choice(3, 500, p=(0.8, 0.1, 0.1))[:, None]
    assert explicitness(label, np.zeros((500, 1)), discrete=False) == pytest.approx(0, abs=1e-9)


def test_inactive_latents_do_not_count(rng: np.random.Generator) -> None:
    z = np.concatenate([GRID.numpy() * 1.0, rng.normal(size=(60, 1)) * 1e-3], 1)
    assert active_latents(z, discrete=False).tolist() == [True] * 3 + [False]
    quiet = np.concatenate([GRID.numpy(), np.full((60, 2), 3)], 1)
    assert infomec(GRID, quiet, discrete=True).infoc == pytest.approx(1)
    assert active_latents(np.array([[0, 0], [1, 10], [1, 10], [1, 10]]), True, "range8").tolist() == [False, True]
    assert active_latents(np.array([[0, 0], [0, 1], [0, 0], [0, 1], [9, 1]]), True, "iqr").tolist() == [False, True]
    with pytest.raises(ValueError, match="range, range8 or iqr"):
        active_latents(z, False, "all")  # type: ignore[arg-type]


def test_forms_of_the_scores() -> None:
    nmi, on = np.array([[0.8, 0.1], [0.2, 0.5]]), np.array([True, True])
    assert modularity(nmi, on) == pytest.approx(((0.8 + 0.5 / 0.6) / 2 - 0.5) / 0.5)
    assert modularity(nmi, on, "gap") == pytest.approx((0.6 + 0.4) / 2)
    assert compactness(nmi, on, "gap") == pytest.approx((0.7 + 0.3) / 2)
    assert dci_completeness(np.eye(3)) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(gini(np.array([[1.0, 0, 0], [1, 1, 1]])), [1, 0], atol=1e-12)


def test_rounding_does_not_split_a_value_and_bins_are_even() -> None:
    x = torch.tensor([[0.1 + 0.2], [0.3], [0.5]], dtype=torch.float64)
    assert codes(x)[:, 0].tolist() == [0, 0, 1]
    assert binned(np.array([[0.0], [0.5], [0.99], [1.0]]), 2)[:, 0].tolist() == [0, 1, 1, 1]
    assert binned(np.ones((3, 1)), 4)[:, 0].tolist() == [0, 0, 0]


def test_a_latent_that_rounding_alone_moves_is_inactive() -> None:
    """As straight-through values of a collapsed latent are: z + (z_q - z) is z_q but for the last bit."""
    z = torch.linspace(-3, 3, 60)[:, None]
    still = z + (0.3 - z)
    assert len(still.unique()) > 1
    assert codes(still).max() == 0
    assert active_latents(torch.cat([GRID, still], 1), discrete=True).tolist() == [True] * 3 + [False]
    assert codes(torch.tensor([[1_700_000_000], [1_700_000_001]])).max() == 1, "whole numbers are exact"


def test_open_cases_have_a_value_and_a_warning() -> None:
    constant = torch.cat([GRID, torch.ones(60, 1)], 1)
    with pytest.warns(UserWarning, match="constant"):
        scores = infomec(constant, GRID, discrete=True)
    assert scores.infom == pytest.approx(1)
    assert np.isnan(scores.nmi[3]).all()
    with pytest.warns(UserWarning, match="no latent is active"):
        dead = infomec(GRID, torch.ones(60, 2), discrete=True)
    assert (dead.infom, dead.infoe, dead.infoc) == (0, 0, 0)
    with pytest.warns(UserWarning, match="InfoC is undefined"):
        assert np.isnan(infomec(GRID[:, :2], GRID[:, :1] * 10 + GRID[:, 1:2], discrete=True).infoc)
    with pytest.warns(UserWarning, match="InfoM is undefined"):
        assert np.isnan(infomec(GRID[:, :1], GRID[:, [0, 0]], discrete=True).infom)
    source, mute = GRID[:, :2], torch.stack([GRID[:, 0], GRID[:, 1], GRID[:, 2]], 1)
    with pytest.warns(UserWarning, match="tell of no source"):
        assert infomec(source, mute, discrete=True).infom == pytest.approx(2 / 3, abs=1e-6)


def test_wrong_input_is_refused_in_a_sentence(rng: np.random.Generator) -> None:
    noise = rng.normal(size=(60, 2))
    for sources, latents, discrete, told in (
        (GRID, noise, True, "discrete=False"),
        (GRID, noise[:50], False, "same samples"),
        (GRID, np.where(noise > 0, noise, np.nan), False, "NaN"),
        (GRID[:8], noise[:8], False, "10 neighbours"),
        (torch.ones(60, 2), noise, False, "no source varies"),
        (GRID[:, 0], noise, False, "a column each"),
    ):
        with pytest.raises(ValueError, match=told):
            infomec(sources, latents, discrete)
    for setting in ({"neighbours": 0}, {"steps": 0}, {"source_bins": 1}):
        with pytest.raises(ValueError, match="neighbours and steps must be 1 or more, source_bins 2"):
            infomec(GRID, noise, False, **setting)


def test_continuous_sources_are_read_by_regression(rng: np.random.Generator) -> None:
    sources = rng.uniform(size=(500, 2))
    scores = infomec(sources, sources[:, ::-1] * 3 + 1, discrete=False, source_bins=8)
    assert scores.infoe == pytest.approx(1)
    assert scores.infom > 0.9
    assert explained_variance(sources, rng.normal(size=(500, 1))) < 0.05
