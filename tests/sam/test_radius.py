"""The radius that follows the learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from masks import InputError
from sam import SAM, RadiusFollowsLR
from tests.sam.nets import Quadratic, quadratic_masks


def optimizer_of(groups=None, lr=0.1, **options):
    model = Quadratic()
    tensors = list(model.parameters())
    base = torch.optim.SGD(groups(tensors) if groups else tensors, lr)
    return model, SAM(base, model, mask=quadratic_masks(model)["all"], **options)


def test_proportional_to_a_cosine_schedule_and_felt_by_the_step():
    model, optimizer = optimizer_of()
    scheduler = CosineAnnealingLR(optimizer, T_max=10, eta_min=0.02)
    radius = RadiusFollowsLR(optimizer, rho_max=0.4, rho_min=0.1, lr_max=0.1, lr_min=0.02)
    for t in range(11):
        expected = 0.1 + 0.3 * (1 + math.cos(math.pi * t / 10)) / 2
        assert optimizer.param_groups[0]["rho"] == pytest.approx(expected, rel=1e-12)
        optimizer.step_on(model, model.b)
        assert float(optimizer.stats.radius) == pytest.approx(expected, rel=1e-10)
        scheduler.step()
        radius.step()


def test_every_group_follows_its_own_rate_and_the_ends_hold():
    rates = [0.0, 0.02, 0.06, 0.3]
    _, optimizer = optimizer_of(lambda ts: [{"params": [t], "lr": lr} for t, lr in zip(ts, rates, strict=True)])
    RadiusFollowsLR(optimizer, 0.4, 0.1, 0.1, 0.02)
    assert [group["rho"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1, 0.25, 0.4])


def test_a_tensor_radius_is_changed_in_place():
    rho = torch.tensor(0.05, dtype=torch.float64)
    _, optimizer = optimizer_of(lambda ts: [{"params": ts, "rho": rho}], lr=0.05)
    RadiusFollowsLR(optimizer, rho_max=0.4, rho_min=0.0, lr_max=0.1)
    assert optimizer.param_groups[0]["rho"] is rho
    assert float(rho) == pytest.approx(0.2)


@pytest.mark.parametrize("rho", [(0.1, 0.2), (0.1, -0.1), (math.inf, 0.0), (math.nan, 0.0)])
def test_radii_refused(rho):
    with pytest.raises(InputError, match="the radii must satisfy 0 <= rho_min <= rho_max"):
        RadiusFollowsLR(optimizer_of()[1], *rho, 0.1)


@pytest.mark.parametrize("lr", [(0.1, 0.1), (0.1, 0.2), (0.1, -0.1), (math.inf, 0.0)])
def test_rates_refused(lr):
    with pytest.raises(InputError, match="the rates must satisfy 0 <= lr_min < lr_max"):
        RadiusFollowsLR(optimizer_of()[1], 0.1, 0.0, *lr)
