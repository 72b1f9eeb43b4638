"""LookSAM: k = 1 is SAM; the reused component in numpy; when it is remembered, and when not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from masks import InputError
from sam import SAM, build_method
from tests.sam.methods.oracles import FORMS, Expected, assert_closed_form, perpendicular
from tests.sam.nets import BASES, ENTRIES, Quadratic, batches, build, losses, make, quadratic_masks, same_bits
from tests.sam.runs import CASES, assert_passes_as_stated, assert_same_training


@pytest.mark.parametrize(("net", "mask", "base"), CASES)
def test_every_step_is_sam(net, mask, base):
    assert_same_training(build_method("looksam", k=1), build_method("sam"), net, mask, base)


def vertical_step(k, alpha):
    kept = {}

    def step(world, w, t):
        g = world.gradient(w)
        if t % k == 0:
            eps = world.eps(g)
            g_adv = world.gradient(w + eps)
            kept["v"] = perpendicular(g_adv, g)
            return Expected(g_adv, eps)
        v = kept["v"]
        return Expected(g + alpha * np.linalg.norm(g) / np.linalg.norm(v) * v, np.zeros_like(w))

    return step


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [2, 3])
def test_closed_form(k, form, entry):
    method = build_method("looksam", k=k, alpha=0.6)
    assert_closed_form(method, form, vertical_step(k, 0.6), entry=entry, steps=7)


def quadratic_run(method, steps, scale=lambda t: 1.0, mask="mixed", then=None):
    model = Quadratic()
    masks = quadratic_masks(model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.05), model, mask=masks[mask], rho=0.4, method=method)
    for t in range(steps):
        if t == then:
            optimizer.set_mask(masks["dense"])
        optimizer.step_on(lambda b, t=t: model(b) * scale(t), model.b)
    return model, optimizer


def test_a_skipped_step_leaves_what_was_remembered():
    """Step 2 perturbs and is not finite: step 3 goes on with what step 0 left."""
    method = build_method("looksam", k=2)
    _, before = quadratic_run(method, 2)
    kept = [t.clone() for t in before.memory.get("vertical")]
    _, after = quadratic_run(method, 4, lambda t: math.nan if t == 2 else 1.0)
    assert int(after.skipped_steps) == 1
    assert same_bits(after.memory.get("vertical"), kept)


def test_a_new_mask_keeps_what_is_remembered_of_all_parameters():
    """A step in between does not look at the mask."""
    model, optimizer = quadratic_run(build_method("looksam", k=3), 3, then=1)
    same, _ = quadratic_run(build_method("looksam", k=3), 3)
    assert optimizer.memory.resets == 0
    assert same_bits(list(model.parameters()), list(same.parameters()))


def test_parallel_gradients_leave_nothing_to_reuse():
    """On L = |w|^2 / 2 the gradient at w + eps is parallel to that at w: steps in between are plain ones, not NaN."""

    class Bowl(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([2.0, 0.0], dtype=torch.float64))

        def forward(self, batch):
            return 0.5 * self.w.square().sum() + 0 * batch

    model = Bowl()
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), 0.5), model, mask=build(model, "all"), method=build_method("looksam", k=2)
    )
    for _ in range(2):
        optimizer.step_on(model, torch.zeros(1, dtype=torch.float64))
    assert float(optimizer.memory.get("vertical")[0].norm()) == 0
    assert model.w.tolist() == [pytest.approx((2 - 0.5 * 2.05) * 0.5), 0.0]


def test_weights_are_moved_in_due_steps_only():
    model = make("resnet")
    method = build_method("looksam", k=3)
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), method=method)
    radii = []
    for batch in batches(6):
        optimizer.step_on(losses(model), batch)
        radii.append(float(optimizer.stats.radius) > 0)
    assert radii == [True, False, False, True, False, False]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_passes(k):
    assert_passes_as_stated(f"looksam:k={k}", steps=2 * k)


def test_refusals():
    with pytest.raises(InputError, match="k must be a whole number >= 1, got 0"):
        build_method("looksam", k=0)
    for alpha in (-0.1, math.inf, math.nan):
        with pytest.raises(InputError, match="alpha of looksam must be a finite number >= 0"):
            build_method("looksam", alpha=alpha)
