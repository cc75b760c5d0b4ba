"""Relevance: conservation, every kind of function, zennit's numbers, and a model that is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import UserError
from isthmus.lenses.relevance import COMPOSITES, Composite, relevance, starting
from isthmus.lenses.relevance_rules import (
    AlphaBeta,
    AlphaBetaWeights,
    Box,
    Epsilon,
    Positive,
    PositiveWeights,
    Simple,
    ratio,
)

CONVNETS: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "regnety_002": {},
    "skresnet18": {},
}


def images(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """Convolutions with biases and pools, written with functions; ``inplace`` overwrites."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head, self.inplace = nn.Linear(6, 4), inplace

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        y = self.conv2(x)
        if self.inplace:
            y.relu_()
            y += x
            x += 1.0
            y.mul_(0.5)
        else:
            y = 0.5 * (F.relu(y) + x)
        y = F.max_pool2d(y, 3, 2, padding=1, ceil_mode=True)
        return self.head(F.avg_pool2d(y, 3, 2, padding=1, ceil_mode=True).mean((2, 3)))


@pytest.mark.parametrize("name", CONVNETS)
def test_relevance_is_conserved_in_convnets_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **CONVNETS[name])
    for module in model.modules():  # last norms may start at zero; what only a shift lights up comes from nowhere
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    found = relevance(model.double().train(), images().double(), torch.tensor([3, 1]))
    assert float(found.input.sum()) == pytest.approx(2.0, abs=0.02)
    assert all(torch.isfinite(r).all() for r in found.values())
    torch.testing.assert_close(found.logits, model.eval()(images().double()))


def test_a_vision_transformers_tokens_carry_relevance() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_classes=5, global_pool="avg"
    )
    nn.init.normal_(model.head.weight, std=0.1)
    found = relevance(model, images(), 2)
    assert found["blocks.0.mlp.fc1"].shape == (2, 5, 192)
    assert found["patch_embed.proj"].shape == (2, 48, 2, 2)
    assert torch.isfinite(found.input).all()
    assert not found["blocks.1.attn.qkv"][..., :96].any()  # attention weights are constants: queries and keys get none


def test_in_place_functions_change_nothing() -> None:
    plain, in_place = relevance(Plain(), images(), 1), relevance(Plain(inplace=True), images(), 1)
    torch.testing.assert_close(in_place.input, plain.input)
    for name in plain:
        torch.testing.assert_close(in_place[name], plain[name])


def test_a_batch_norm_is_folded_into_the_layer_before() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, -0.1]))  # a negative factor turns positive parts to negative
        norm.bias.normal_()
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    tail = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    two = nn.Sequential(conv, norm, tail).eval()
    folded = nn.Sequential(nn.utils.fuse_conv_bn_eval(conv.eval(), norm.eval()), tail).eval()
    x = images(4)
    for name in COMPOSITES:
        torch.testing.assert_close(relevance(two, x, 0, name).input, relevance(folded, x, 0, name).input)


def test_a_batch_norm_without_a_layer_before_passes_relevance_on() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    assert relevance(model, images(4), 0).conserved()["input"] == pytest.approx(1, abs=1e-4)


def test_biases_take_no_part_in_the_positive_rules() -> None:
    model = Plain()
    before = relevance(model, images(), 0).input
    total = relevance(model, images(), 0).conserved()
    assert [total[name] for name in ("head", "conv1", "input")] == pytest.approx([1, 1, 1], abs=1e-3)
    assert 0 < total["conv2"] < 1  # the other branch of the sum has the rest
    swallowing = relevance(model, images(), 0, "epsilon")
    assert abs(swallowing.conserved()["input"] - 1) > 0.05
    nn.init.constant_(model.head.bias, 100.0)
    torch.testing.assert_close(relevance(model, images(), 0).input, before)


def test_zennit_gives_the_same_numbers() -> None:
    zennit = pytest.importorskip("zennit.composites")
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(72, 10, bias=False), nn.ReLU(), nn.Linear(10, 4, bias=False)),
    )
    x, target = images(10), torch.tensor([2, 0])
    theirs = relevance(model, x, target, zennit.EpsilonPlus(zero_params=["bias"]))
    ours = relevance(model, x, target, Composite(Positive(), Epsilon()))
    torch.testing.assert_close(ours.input, theirs.input, rtol=1e-3, atol=1e-6)
    assert list(theirs) == list(ours)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def with_biases(*norms: nn.Module) -> nn.Sequential:
    """Convolutions, pools and linear layers, all with biases; in double precision."""
    torch.manual_seed(0)
    first, second = norms or (nn.Identity(), nn.Identity())
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), first, nn.ReLU(), nn.Conv2d(6, 8, 3, 2, groups=2), second, nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4)),
    )
    stir(model)
    return model.eval().double()


def stir(model: nn.Module) -> None:
    """Batch norms as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("norm", [False, True])
def test_rules_with_biases_and_norms_are_zennits(norm: bool) -> None:
    composites = pytest.importorskip("zennit.composites")
    from zennit import rules
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.types import Linear

    model = with_biases(*((nn.BatchNorm2d(6), nn.BatchNorm2d(8)) if norm else ()))
    box = COMPOSITES["box"].first
    assert isinstance(box, Box)
    low, high = (torch.tensor(bound).double().view(1, 3, 1, 1) for bound in (box.low, box.high))
    merged = {"canonizers": [SequentialMergeBatchNorm()]}
    theirs = {
        "epsilon": composites.LayerMapComposite([*composites.layer_map_base(), (Linear, rules.Epsilon())], **merged),
        "epsilon_plus": composites.EpsilonPlus(**merged),
        "epsilon_plus_flat": composites.EpsilonPlusFlat(**merged),
        "epsilon_alpha2beta1": composites.EpsilonAlpha2Beta1(**merged),
        "epsilon_alpha2beta1_flat": composites.EpsilonAlpha2Beta1Flat(**merged),
        "epsilon_gamma_box": composites.EpsilonGammaBox(low, high, **merged),
    }
    x = images(12, 3).double()
    for name, composite in theirs.items():
        ours = relevance(model, x, 2, name).input
        want = relevance(model, x, 2, composite).input
        bound = 1e-4 if norm else 1e-6  # its merged norms keep their epsilon
        assert float((ours - want).abs().max() / want.abs().max()) < bound, name


@pytest.mark.parametrize("name", ["plain", "norms", "resnet10t", "resnetv2_18", "densenet121", "vgg11_bn"])
@pytest.mark.parametrize("composite", ["epsilon", "simple"])
def test_epsilon_and_simple_are_gradient_times_input_in_networks_of_relus(name: str, composite: str) -> None:
    if name in ("plain", "norms"):
        model = with_biases(*((nn.BatchNorm2d(6), nn.BatchNorm2d(8)) if name == "norms" else ()))
    else:
        small = {"densenet121": CONVNETS["densenet121"]}.get(name, {})
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=4, **small)
        stir(model)
        model.eval().double()
    rule = Epsilon(1e-14) if composite == "epsilon" else Simple(1e-14)
    x = images(12 if name in ("plain", "norms") else 32).double().requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    want = x.detach() * grad
    found = relevance(model, x, 1, Composite(rule, rule, norm=rule), start="logit").input
    # sums and pools have an ε of their own
    assert float((found - want).abs().max() / want.abs().max()) < (1e-3 if name in ("plain", "norms") else 2e-2)


def test_a_bias_that_cancels_does_not_blow_relevance_up() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -1.0]]))
        model[0].bias.fill_(1.0)
        model[2].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[2].bias.zero_()
    x = torch.tensor([[1.0001, 2.0]])
    for name in ("epsilon", "simple"):
        found = relevance(model, x, 0, name, start="logit").input
        assert found[0].tolist() == pytest.approx([2.0002, -2.0], abs=1e-3)


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "mobilenetv3_small_050", "resnetv2_50d_gn", "convnext_atto", "regnetx_002", "dla46_c"]
)
def test_relevance_stays_finite_and_small_in_families_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    stir(model)
    found = relevance(model, images(64, 1), 3, "epsilon")
    assert max(float(r.abs().max()) for r in (*found.values(), found.input)) < 100


def test_z_b_knows_the_bounds_of_pixels() -> None:
    rule = Box.of_pixels((0.5, 0.4), (0.25, 0.2))
    assert (rule.low, rule.high) == pytest.approx((-2.0, 3.0))
    both = Box.of_pixels((0.5, 0.4), (0.25, 0.2), per_channel=True)
    assert both.low == pytest.approx((-2, -2))
    linear, weight = (lambda x, w: F.linear(x, w)), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    got = both(linear, torch.rand(3, 2), weight, None, torch.ones(3, 5))
    assert (got >= 0).all()
    assert got.sum(1) == pytest.approx(torch.full((3,), 5.0), abs=1e-4)
    with pytest.raises(ValueError, match="2 channels"):
        both(linear, torch.rand(3, 4), torch.randn(5, 4), None, torch.ones(3, 5))


def test_alpha_and_beta_shares_add_up() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    x, r = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)), torch.ones(3, 5)
    linear = F.linear
    assert AlphaBeta(2.0)(linear, x, weight, None, r).sum(1) == pytest.approx(torch.full((3,), 5.0), abs=1e-3)
    torch.testing.assert_close(
        AlphaBetaWeights(1.0)(linear, x, weight, None, r),
        PositiveWeights()(linear, x, weight, None, r),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_released_alpha_beta_divides_by_zero_where_asked() -> None:
    x, r, weight = torch.rand(1, 2), torch.ones(1, 1), torch.tensor([[-1.0, -2.0]])
    assert torch.equal(AlphaBetaWeights(1.0)(F.linear, x, weight, None, r), torch.zeros(1, 2))
    assert not torch.isfinite(AlphaBetaWeights(1.0, drop=False)(F.linear, x, weight, None, r)).any()


def test_nothing_is_handed_on_where_nothing_arrived() -> None:
    assert torch.equal(ratio(torch.ones(2), torch.tensor([0.0, 2.0])), torch.tensor([0.0, 0.5]))
    model = Plain()
    nn.init.zeros_(model.conv1.weight)
    nn.init.zeros_(model.conv1.bias)
    for name in COMPOSITES:
        assert torch.isfinite(relevance(model, images(), 0, name).input).all()


def test_a_negative_logit_still_starts_with_one() -> None:
    logits = torch.tensor([[-3.0, 1.0]])
    assert torch.equal(starting(logits, 0), torch.tensor([[1.0, 0.0]]))
    assert torch.equal(starting(logits, 0, "logit"), torch.tensor([[-3.0, 0.0]]))
    assert torch.equal(starting(logits, None), torch.tensor([[0.0, 1.0]]))


def test_a_layer_that_runs_twice_has_the_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(self.conv(x).relu()).relu().mean((2, 3)))

    found = relevance(Twice(), images(6), 0)
    assert float(found["conv"].sum()) == pytest.approx(4.0, abs=0.01)


def test_the_model_is_as_it_was_also_after_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    for broken in (False, True):
        if broken:
            with pytest.raises(RuntimeError):
                relevance(model, images(7), 0)
        else:
            relevance(model, images(4), 0)
        assert model.training
        assert not model[1].training
        assert not model[0].weight.requires_grad
        assert model[4].weight.requires_grad
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_functions_without_a_rule_are_named() -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.fft.fft2(self.conv(x)).real.mean((2, 3)))

    with pytest.raises(UserError, match="no relevance rule for fft_fft2"):
        relevance(Fourier(), images(6), 0)
    assert torch.isfinite(relevance(Fourier(), images(6), 0, strict=False).input).all()


def test_bad_input_is_told() -> None:
    model, x = Plain(), images()
    with pytest.raises(ValueError, match="infinities or NaN"):
        relevance(model, x * torch.nan, 0)
    with pytest.raises(ValueError, match="0 to 3"):
        relevance(model, x, 4)
    with pytest.raises(ValueError, match="a class or 2 classes"):
        relevance(model, x, torch.tensor([1]))
    with pytest.raises(ValueError, match="no composite 'z\\+'"):
        relevance(model, x, 0, "z+")
    with pytest.raises(UserError, match="ends in a softmax"):
        relevance(nn.Sequential(model, nn.Softmax(1)), x, 0)
    with pytest.raises(ValueError, match="batch of numbers"):
        relevance(model, torch.zeros(2, 3, 8, 8, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="starting relevance"):
        relevance(nn.Conv2d(3, 2, 3), x, 0)


def test_it_is_drawn() -> None:
    assert len(relevance(Plain(), images(), 0).figure().axes) == 4
