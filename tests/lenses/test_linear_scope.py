"""LinearScopes: exact on many architectures, adjoint and impulses agree, residual by layer, refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers our architectures
from isthmus.codec import Codec
from isthmus.decoders.digit_sequence import DigitSequence
from isthmus.encoders.backbone import Backbone
from isthmus.lenses.interception import intercept
from isthmus.lenses.linear_scope import LinearScope


def _net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers).double().eval()


def _x(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


_UNITS: dict[str, Any] = {
    "relu in place": nn.ReLU(inplace=True),
    "leaky": nn.LeakyReLU(0.3),
    "prelu": nn.PReLU(4),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.2, 0.4),
    "hardswish": nn.Hardswish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
    "silu in place": nn.SiLU(inplace=True),
    "softplus": nn.Softplus(),
    "elu": nn.ELU(),
    "mish": nn.Mish(),
    "max pool": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "adaptive max pool": nn.AdaptiveMaxPool2d(3),
    "instance norm": nn.InstanceNorm2d(4, affine=True),
    "group norm": nn.GroupNorm(2, 4),
    "batch norm": nn.BatchNorm2d(4),
    "local response": nn.LocalResponseNorm(3),
}


@pytest.mark.parametrize("name", _UNITS)
def test_every_unit_gives_its_output_back(name: str) -> None:
    network = _net(nn.Conv2d(2, 4, 3, padding=1), _UNITS[name], nn.Conv2d(4, 3, 3, padding=1))
    if isinstance(network[1], nn.BatchNorm2d):
        network[1].running_mean.uniform_(-1, 1)
        network[1].running_var.uniform_(0.5, 2)
    for how in ("ratio", "split"):
        scope = LinearScope(network, _x(2, 7, 6), smooth=how, tolerance=1e-10)
        matrix = scope.matrix()
        assert torch.allclose(matrix @ scope.x.flatten() + scope.residual.flatten(), scope.y.flatten(), atol=1e-10)
        assert torch.allclose(scope.rows([5])[0].flatten(), matrix[5], atol=1e-10)
        parts = scope.residual_by_layer(5)
        assert float(sum(parts.values())) == pytest.approx(float(scope.residual.flatten()[5]), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "gates", "options"),
    [
        ("resnet10t", "refuse", {}),
        ("convnext_atto", "refuse", {"depths": (1, 1, 1, 1)}),
        ("inception_next_atto", "refuse", {"depths": (1, 1, 1, 1)}),
        ("mobilenetv3_small_050", "freeze", {}),
        ("vit_tiny_patch16_224", "freeze", {"depth": 2, "img_size": 64}),
        ("unireplknet_a", "freeze", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    ],
)
def test_timm_models_are_exact_and_left_as_they_were(name: str, gates: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scope = LinearScope(model, torch.randn(1, 3, 64, 64), gates=gates)
    assert scope.fidelity.relative < 1e-5
    z, u = torch.randn(2, 3, 64, 64), torch.randn(2, 5)
    forwards, backwards = (scope.product(z) * u).sum(), (scope.adjoint(u) * z).sum()
    assert float(forwards) == pytest.approx(float(backwards), rel=1e-3, abs=1e-5)
    assert float(scope.contribution(2).sum()) == pytest.approx(
        float((scope.y - scope.residual)[0, 2]), rel=1e-3, abs=1e-5
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_codec_and_a_chosen_output() -> None:
    torch.manual_seed(0)
    encoder = Backbone("resnet10t")
    codec = Codec(encoder, decoder=DigitSequence(encoder.feature_info[-1].channels, grid=1)).eval()
    scope = LinearScope(codec, torch.rand(1, 3, 64, 64), output=lambda out: out.prediction.digits[:, 0])
    assert scope.y.shape == (1, 10)
    with pytest.raises(ValueError, match=r"returns a Output; say with output="):
        LinearScope(codec, torch.rand(1, 3, 64, 64))


def test_both_storages_and_the_singular_vectors_agree_with_dense() -> None:
    network = _net(nn.Conv2d(2, 6, 3), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 9))
    x = _x(2, 6, 6)
    kept, fresh = LinearScope(network, x), LinearScope(network, x, storage="batch")
    matrix = kept.matrix()
    assert torch.allclose(matrix, fresh.matrix(), atol=1e-12)
    assert torch.allclose(fresh.adjoint(torch.ones(1, 9, dtype=torch.float64)).flatten(), matrix.sum(0), atol=1e-12)
    u, s, vh = torch.linalg.svd(matrix)
    found = kept.svd(4, sweeps=100)
    assert torch.allclose(found.s, s[:4], rtol=1e-5)
    first = found.s[0] * torch.outer(found.u[0].flatten(), found.v[0].flatten())
    assert torch.allclose(first, s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-4)
    whole = kept.svd(9, sweeps=200)
    assert torch.allclose(kept.components(whole).sum(0) + kept.residual[0], kept.y[0], atol=1e-8)


def test_derivatives_do_not_give_the_output_back() -> None:
    network = _net(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3))
    assert LinearScope(network, _x(2, 7, 7), smooth="derivative", tolerance=None).fidelity.relative > 1e-2


def test_near_zero_ratios_are_limits_or_constants() -> None:
    for unit, limit in ((nn.Tanh(), 1.0), (nn.SiLU(), 0.5), (nn.GELU(), 0.5)):
        scope = LinearScope(unit, torch.zeros(1, 3, dtype=torch.float64))
        assert torch.allclose(scope.matrix(), limit * torch.eye(3, dtype=torch.float64))
    scope = LinearScope(nn.Sigmoid(), torch.zeros(1, 3, dtype=torch.float64))
    assert torch.equal(scope.matrix(), torch.zeros(3, 3, dtype=torch.float64))
    assert torch.allclose(scope.residual, torch.full((1, 3), 0.5, dtype=torch.float64))
    split = LinearScope(nn.Sigmoid(), torch.zeros(1, 3, dtype=torch.float64), smooth="split")
    assert torch.allclose(split.matrix(), 0.25 * torch.eye(3, dtype=torch.float64))


class _Odd(nn.Module):
    """A module used twice, functional and in-place calls, operators, a decision of Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.fc = nn.ReLU(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.fc(x))
        y = self.act(self.fc(y) - 0.3)
        y += x
        F.relu_(y)
        z = torch.where(y > 0.5, y, 2 * x)
        if z.sum() > -1e9:
            z = torch.maximum(z, -z) + z.max(1, keepdim=True).values
        return torch.cat([z, 1 - z], 1)


def test_reused_functional_and_in_place_calls_are_frozen_one_by_one() -> None:
    torch.manual_seed(3)
    model = _Odd().double()
    scope = LinearScope(model, _x(6), tolerance=1e-12)
    assert torch.allclose(scope.matrix() @ scope.x[0] + scope.residual[0], scope.y[0])
    step = 1e-6 * torch.eye(6, dtype=torch.float64)
    with torch.no_grad():
        slopes = torch.stack([(model(scope.x + e) - model(scope.x - e))[0] / 2e-6 for e in step], 1)
    assert torch.allclose(scope.matrix(), slopes, atol=1e-6), "piecewise linear: F is the slope"


def test_says_what_cannot_be_frozen_and_where() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(x).sigmoid()

    with pytest.raises(ValueError, match=r'mul in the model combines two things .* gates="freeze"'):
        LinearScope(Gated(), torch.randn(1, 4))
    assert LinearScope(Gated(), torch.randn(1, 4), gates="freeze").fidelity.relative < 1e-6
    with pytest.raises(ValueError, match=r"softmax in module '1' is no affine function"):
        LinearScope(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"cumprod in the model .* rules=\{'cumprod': rule\}"):
        LinearScope(lambda x: x.cumprod(1), torch.randn(1, 4))
    own = LinearScope(lambda x: x.cumprod(1), torch.ones(1, 4), rules={"cumprod": lambda call: call.args[0]})
    assert torch.equal(own.matrix(), torch.eye(4))
    with pytest.raises(ValueError, match=r"drops units at random"):
        LinearScope(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.randn(1, 4))


def test_a_mistake_of_a_rule_is_found_by_the_check() -> None:
    with pytest.raises(ValueError, match="misses the output"):
        LinearScope(lambda x: x.cumprod(1), torch.full((1, 4), 2.0), rules={"cumprod": lambda call: call.args[0]})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 4), "one sample"),
        (torch.randn(1, 4).half(), "float32 or float64"),
        (torch.full((1, 4), float("nan")), "NaN or infinite"),
    ],
)
def test_refuses_inputs_it_cannot_look_at(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearScope(nn.Linear(4, 4), x)


def test_refuses_wrong_places_and_sizes() -> None:
    scope = LinearScope(nn.Linear(4, 3), torch.zeros(1, 4))
    assert torch.equal(scope.y, scope.residual), "at zero, y is r"
    with pytest.raises(ValueError, match="from 0 to 2"):
        scope.rows([3])
    with pytest.raises(ValueError, match=r"z is \(1, 5\)"):
        scope.product(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="1 to 3 triplets"):
        scope.svd(4)
    with pytest.raises(ValueError, match="smooth is ratio"):
        LinearScope(nn.Linear(4, 3), torch.zeros(1, 4), smooth="slope")  # type: ignore[arg-type]


def test_interception_sees_all_variants_and_restores_on_errors() -> None:
    seen = []

    def note(call: Any) -> Any:
        seen.append(call.name)
        return 2 * call.run()

    x = torch.tensor([-1.0, 3.0])
    with intercept({"relu": note}):
        held = x.clone()
        assert torch.equal(nn.ReLU(inplace=True)(held), torch.tensor([0.0, 6.0]))
        assert torch.equal(held, torch.tensor([0.0, 6.0])), "in place, for whoever holds it"
        assert torch.equal(x.relu(), F.relu(x))
        x.clone().relu_()
    assert seen == ["relu"] * 4
    with (
        pytest.raises(RuntimeError, match="stop"),
        intercept({torch.relu: lambda call: (_ for _ in ()).throw(RuntimeError("stop"))}),
    ):
        torch.relu(x)
    assert torch.equal(torch.relu(x), torch.tensor([0.0, 3.0]))


def test_draws_classifiers_and_images() -> None:
    assert LinearScope(_net(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()), _x(3, 6, 6)).figure(2, 2).axes
    assert LinearScope(_net(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)), _x(3, 6, 6)).figure().axes
