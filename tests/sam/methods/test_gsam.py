"""GSAM: alpha = 0 is SAM; the decomposition in numpy; the step changes the perturbed loss as SAM's does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from masks import InputError
from sam import SAM, Method, build_method
from sam.methods.gsam import SurrogateGap
from tests.sam.methods.oracles import FORMS, Expected, assert_closed_form, perpendicular
from tests.sam.nets import ENTRIES, Quadratic, flat, quadratic_masks
from tests.sam.runs import CASES, assert_passes_as_stated, assert_same_training, outcome


@pytest.mark.parametrize(("net", "mask", "base"), CASES)
def test_alpha_zero_is_sam(net, mask, base):
    assert_same_training(build_method("gsam", alpha=0), build_method("sam"), net, mask, base)


@pytest.mark.parametrize("mask", ["all", "norm", "mixed"])
def test_the_slot_itself_at_alpha_zero_is_sam(mask):
    """Without the shortcut of the registered method; equal as numbers (the sign of a zero may differ)."""
    found, expected = (
        outcome("resnet", mask, "sgd", method)[0] for method in (Method(combine=SurrogateGap(0.0)), Method())
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("form", FORMS)
def test_closed_form(form, entry):
    def step(world, w, t):
        g = world.gradient(w)
        eps = world.eps(g)
        g_adv = world.gradient(w + eps)
        return Expected(g_adv - 0.7 * perpendicular(g, g_adv), eps)

    assert_closed_form(build_method("gsam", alpha=0.7), form, step, entry=entry)


def test_the_perturbed_loss_falls_as_under_sam():
    """To first order: <g_final, g_adv> = ||g_adv||^2, while L itself falls more slowly, so that the gap shrinks."""
    model = Quadratic()
    mask = quadratic_masks(model)["all"]
    w = flat(list(model.parameters()))
    g = model.A.numpy() @ w - model.b.numpy().mean(0)
    g_adv = g + model.A.numpy() @ (0.4 * g / np.linalg.norm(g))
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=0.4, method=build_method("gsam", alpha=2.0)
    )
    optimizer.step_on(model, model.b)
    final = flat([p.grad for p in model.parameters()])
    assert final @ g_adv == pytest.approx(g_adv @ g_adv, rel=1e-12)
    assert final @ g < g_adv @ g


def test_passes():
    assert_passes_as_stated("gsam", steps=2)


@pytest.mark.parametrize("alpha", [-0.1, math.inf, math.nan])
def test_refusals(alpha):
    with pytest.raises(InputError, match="alpha of gsam must be a finite number >= 0"):
        build_method("gsam", alpha=alpha)
