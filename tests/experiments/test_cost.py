"""Predicted costs: against operations counted on paper."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import MODELS
from experiments.cost import step_costs
from masks import Mask, ParamTable
from sam import SAM

B, SIZES = 5, (7, 11, 13, 3)


@pytest.fixture
def mlp() -> nn.Sequential:
    a, b, c, d = SIZES
    return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.Tanh(), nn.Linear(c, d))


def products() -> tuple[list[int], int]:
    """Operations of one product per layer (forward, weight gradient and input gradient cost the same), and of a
    full step: all forwards, all weight gradients, and all input gradients but the first layer's."""
    layer = [2 * B * i * o for i, o in itertools.pairwise(SIZES)]
    return layer, 3 * sum(layer) - layer[0]


def test_costs_of_an_mlp_on_paper(mlp: nn.Sequential) -> None:
    layer, full = products()
    forward = sum(layer)
    # Of the final pass: what lies before the touched layer is not computed again, if two weights lie before it.
    one, two = -layer[0], -layer[0] - layer[1]
    wanted = {
        "none": (set(), 0),
        "all": ({"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}, full),
        "last weight": ({"4.weight"}, forward + layer[2] + two),
        "last bias": ({"4.bias"}, forward + two),
        "middle weight": ({"2.weight"}, forward + layer[2] + layer[1]),
        "middle bias": ({"2.bias"}, forward + layer[2] + one),
        "first weight": ({"0.weight"}, forward + layer[2] + layer[1] + layer[0]),
        "first bias": ({"0.bias"}, forward + layer[2] + layer[1]),
        "two": ({"4.weight", "2.bias"}, forward + 2 * layer[2] + one),
    }
    found = step_costs(mlp, torch.zeros(B, SIZES[0]), {name: touched for name, (touched, _) in wanted.items()})
    assert found == {name: pytest.approx(1 + extra / full) for name, (_, extra) in wanted.items()}
    assert found["none"] == 1.0
    assert found["all"] == 2.0


def test_the_full_norm_needs_every_gradient(mlp: nn.Sequential) -> None:
    layer, full = products()
    sets = {"none": set[str](), "last": {"4.bias"}, "first": {"0.bias"}}
    found = step_costs(mlp, torch.zeros(B, SIZES[0]), sets, every_gradient=True)
    assert found == {"none": 1.0, "last": pytest.approx(2 - (layer[0] + layer[1]) / full), "first": 2.0}


def test_what_follows_dropout_is_computed_again() -> None:
    a, b, c, d = SIZES
    model = nn.Sequential(nn.Linear(a, b), nn.Dropout(0.5), nn.Linear(b, c), nn.Linear(c, d))
    layer, full = products()
    found = step_costs(model, torch.zeros(B, a), {"last": {"3.weight"}})
    assert found == {"last": pytest.approx(1 + (sum(layer) + layer[2] - layer[0]) / full)}


def test_too_little_to_reuse_is_computed_again() -> None:
    """One of five products: less than the quarter from which it is worth looking."""
    model = nn.Sequential(nn.Linear(4, 4), *(nn.Linear(4, 4) for _ in range(4)))
    layer, full = 2 * B * 16, 14 * 2 * B * 16
    assert step_costs(model, torch.zeros(B, 4), {"a": {"1.bias"}, "b": {"2.bias"}}) == {
        "a": pytest.approx(1 + (5 + 3) * layer / full),
        "b": pytest.approx(1 + (5 + 2 - 2) * layer / full),
    }


@pytest.mark.parametrize("name", ["resnet20", pytest.param("vit_d128", marks=pytest.mark.slow)])
@sdpa_kernel(SDPBackend.MATH)  # the operations of torch's fused attention for CPUs are not counted
def test_the_prediction_is_what_the_engine_does(name: str) -> None:
    """Counted while SAM steps, from the second step on: after the first it knows whether reuse is worth it."""
    model = MODELS[name]()
    batch = torch.randn(2, 3, 32, 32), torch.tensor([1, 7])
    table = ParamTable.from_model(model)
    names = [row.name for row in table]
    sets = {"all": set(names), "last": set(names[-2:]), "late": set(names[len(names) * 2 // 3 :]), "4": {names[4]}}
    found = step_costs(model, batch[0], sets)

    def losses(b: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(b[0]), b[1], reduction="none")

    def count(optimizer: SAM) -> int:
        optimizer.step_on(losses, batch)
        with FlopCounterMode(display=False) as counter:
            optimizer.step_on(losses, batch)
        return counter.get_total_flops()

    def sam(touched: set[str]) -> SAM:
        mask = Mask(table, tuple(name in touched for name in names))
        return SAM(torch.optim.SGD(model.parameters(), 1e-3), model, mask=mask, rho=0.01)

    base = count(sam(set()))
    assert found == {key: pytest.approx(count(sam(touched)) / base, rel=1e-12) for key, touched in sets.items()}
    assert found["last"] == pytest.approx(1.01, abs=0.01)


def test_frozen_parameters_cost_nothing(mlp: nn.Sequential) -> None:
    mlp[0].requires_grad_(False)
    layer, _ = products()
    full = sum(layer) + 2 * layer[2] + layer[1]  # no gradient of the first layer, nor of the second one's input
    found = step_costs(mlp, torch.zeros(B, SIZES[0]), {"last": {"4.weight"}, "rest": {"2.weight", "4.weight"}})
    assert found == {"last": pytest.approx(1 + (sum(layer) + layer[2]) / full), "rest": pytest.approx(2.0)}


def test_a_convolution_on_paper() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=False))
    first, second = (2 * B * 36 * k for k in (9 * 2 * 4, 4 * 6))
    full = first + second + second + second + first
    found = step_costs(model, torch.zeros(B, 2, 6, 6), {"norm": {"1.weight", "1.bias"}, "last": {"2.weight"}})
    assert found == {
        "norm": pytest.approx(1 + (first + 2 * second) / full),
        "last": pytest.approx(1 + (first + 2 * second) / full),
    }


def test_the_model_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step_costs(model, torch.randn(4, 1, 8, 8), {"a": {"1.weight"}})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_is_not_used_costs_nothing(mlp: nn.Sequential) -> None:
    mlp.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    layer, full = products()
    found = step_costs(mlp, torch.zeros(B, SIZES[0]), {"spare": {"spare"}, "both": {"spare", "4.weight"}})
    assert found == {
        "spare": pytest.approx(1 + sum(layer) / full),
        # Registered first, so that the engine does not look for a prefix.
        "both": pytest.approx(1 + (sum(layer) + layer[2]) / full),
    }


class Looks(nn.Linear):
    """Its work depends on values, which a count of operations does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() >= 0 else x


class Refuses(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        raise KeyError("whatever the user's model does")


@pytest.mark.parametrize("layer", [Looks, Refuses])
def test_a_model_that_cannot_be_counted_has_no_prediction(layer: type[nn.Linear]) -> None:
    assert step_costs(nn.Sequential(layer(3, 3)), torch.zeros(2, 3), {"a": {"0.weight"}, "none": set()}) == {
        "a": None,
        "none": None,
    }


def test_a_model_without_products_has_no_prediction() -> None:
    model = nn.Sequential(nn.LayerNorm(3))
    assert step_costs(model, torch.zeros(2, 3), {"a": {"0.weight"}}) == {"a": None}
