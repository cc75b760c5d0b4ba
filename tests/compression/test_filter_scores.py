"""Filter scores: what each criterion sees, when signs are dropped, and references that are not as they should be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import UserError
from isthmus.compression.filter_scores import Criterion, filter_scores, layers_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(8 * 16, 4)),
    )


def samples(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 4


def test_relevance_of_a_layer_adds_up_to_the_number_of_samples() -> None:
    scores = filter_scores(network(), [samples()], Criterion(normalize="none"))
    assert list(scores) == ["0", "3"]
    for score in scores.values():
        assert float(score.sum()) == pytest.approx(6, abs=0.02)


def test_a_filter_that_nobody_reads_has_no_score() -> None:
    model = network().eval()
    with torch.no_grad():
        model[3].weight[:, 2] = 0
    for name in ("relevance", "taylor", "gradient"):
        assert float(filter_scores(model, [samples()], name)["0"][2]) == pytest.approx(0, abs=1e-6)


def test_opposite_signs_cancel_only_where_they_are_dropped_late() -> None:
    model, (x, label) = network(), samples()
    both = {
        a: filter_scores(model, [(x, label)], Criterion("taylor", absolute=a, normalize="none"))
        for a in ("total", "sample", "element")
    }  # type: ignore[arg-type]
    for layer in ("0", "3"):
        assert (both["total"][layer] <= both["sample"][layer] + 1e-9).all()
        assert (both["sample"][layer] <= both["element"][layer] + 1e-9).all()
        assert (both["total"][layer] < 0.9 * both["element"][layer]).any()


def test_taylor_is_the_change_of_the_loss_to_first_order() -> None:
    model, (x, label) = network().eval(), samples()
    scores = filter_scores(model, [(x, label)], Criterion("taylor", absolute="none", normalize="none"))["3"]

    def loss(scale: float) -> Tensor:
        handle = model[3].register_forward_hook(
            lambda m, i, out: out * torch.eye(8)[1].mul(scale).add(1)[:, None, None]
        )
        found = F.cross_entropy(model(x), label)
        handle.remove()
        return found

    with torch.no_grad():
        slope = float(loss(1e-3) - loss(-1e-3)) / 2e-3
    assert slope == pytest.approx(float(scores[1]) * 6 * 8 * 8, rel=0.05, abs=1e-4)


def test_batches_add_up_for_relevance() -> None:
    model, (x, label) = network(), samples()
    whole = filter_scores(model, [(x, label)])
    parts = filter_scores(model, [{"image": x[:2], "label": label[:2]}, {"image": x[2:], "label": label[2:]}])
    for layer in whole:
        torch.testing.assert_close(whole[layer], parts[layer], rtol=1e-4, atol=1e-6)


def test_scoring_leaves_the_model_alone() -> None:
    model = network().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("relevance", "taylor", "gradient", "weight"):
        filter_scores(model, [samples()], name)
        assert model.training
        assert model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # running statistics too
    with pytest.raises(ValueError, match="0 to 3"):
        filter_scores(model, [(samples()[0], torch.full((6,), 4))], "taylor")
    assert not any(m._forward_hooks for m in model.modules())


def test_weights_of_transposed_convolutions_are_taken_by_output() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 9, 2))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].weight[2:, 1] = 0  # second group, its second output: channel 4
    score = filter_scores(model, [], Criterion("weight", normalize="none"), ["0"])["0"]
    assert score.tolist() == [18, 18, 18, 18, 0, 18]


def test_random_scores_come_from_the_generator() -> None:
    draws = [filter_scores(network(), [], "random", generator=torch.Generator().manual_seed(s))["0"] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_bad_references_are_told() -> None:
    with pytest.raises(UserError, match="no reference samples"):
        filter_scores(network(), [])
    with pytest.raises(UserError, match="6 samples and 5 labels"):
        filter_scores(network(), [(samples()[0], samples()[1][:5])])
    with pytest.raises(ValueError, match="no criterion 'magnitude'"):
        Criterion("magnitude")  # type: ignore[arg-type]
    model = network()
    nn.init.constant_(model[0].weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        filter_scores(model, [samples()], "weight")
    with pytest.raises(UserError, match="no layers"):
        layers_of(nn.ReLU())
    assert layers_of(network(), "all") == ["0", "3", "7"]
    assert layers_of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))) == ["0", "1"]
