"""Momentum-SAM against its formula; with radius 0 it is the base optimizer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from masks import InputError
from sam import SAM, build_method
from tests.sam.methods.oracles import FORMS, assert_closed_form, perturbed_by
from tests.sam.nets import (
    BASES,
    ENTRIES,
    Quadratic,
    Recorder,
    batches,
    build,
    flat,
    losses,
    make,
    quadratic_masks,
    same_bits,
    snapshot,
    take,
)
from tests.sam.runs import CASES, MASKS, check_moves, everything, go, outcome, passes, resumed_and_uninterrupted, start


def by_the_base_alone(net, base):
    model = make(net, dropout=0.2)
    optimizer = BASES[base](model.parameters())
    torch.manual_seed(5)
    seen = []
    for batch in batches(4):
        optimizer.zero_grad()
        loss = losses(model)(batch).mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return (*everything(model, optimizer), seen)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("net", "mask", "base"), CASES)
def test_with_radius_zero_it_is_the_base(net, mask, base, entry):
    alone = by_the_base_alone(net, base)
    assert same_bits(outcome(net, mask, base, build_method("momentum_sam"), entry, rho=0), alone)
    moved = outcome(net, mask, base, build_method("momentum_sam"), entry, rho=0.3)
    assert not same_bits(moved[0], alone[0])
    assert not same_bits(moved[0], outcome(net, mask, base, build_method("sam"), entry, rho=0.3)[0])


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("scope", ["masked", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_closed_form(form, scope, entry):
    """eps = -rho v / ||v||, v the sum of past gradients before the step; none in the first step."""

    def eps(world, w, g):
        norm = np.linalg.norm(world.velocity[world.over])
        return -world.rho * world.velocity / norm if norm else np.zeros_like(w)

    assert_closed_form(build_method("momentum_sam"), form, perturbed_by(eps), entry=entry, scope=scope)


def test_closed_form_with_adamw():
    """The direction is Adam's running mean of gradients, not its preconditioned step."""
    model = Quadratic()
    base = torch.optim.AdamW(model.parameters(), 0.05, betas=(0.8, 0.9))
    optimizer = SAM(base, model, mask=quadratic_masks(model)["mixed"], rho=0.4, method=build_method("momentum_sam"))
    keep = np.concatenate([part.numpy().reshape(-1) for part in optimizer.mask.dense()])
    recorder, mean = Recorder(model, model), np.zeros(model.NUMEL)
    for _ in range(4):
        w = flat(list(model.parameters())).copy()
        optimizer.step_on(recorder, model.b)
        norm = np.linalg.norm(mean[keep])
        eps = np.where(keep, -0.4 * mean / norm, 0.0) if norm else np.zeros_like(w)
        np.testing.assert_allclose(flat(list(recorder.weights[-1].values())) - w, eps, rtol=1e-11, atol=1e-14)
        mean = 0.8 * mean + 0.2 * (model.A.numpy() @ (w + eps) - model.b.numpy().mean(0))


@pytest.mark.parametrize("rho_in_turns", [0.5, 2.0])
def test_it_ascends_once_the_radius_reaches_past_the_minimum_along_the_momentum(rho_in_turns):
    """L(w - rho u) - L(w) = -rho <g, u> + rho^2/2 u^T A u: below 2 <g, u> / u^T A u a descent, above it an ascent.
    The sign is the published one: ahead of w, where the next momentum step leads."""
    model = Quadratic()
    base = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    optimizer = SAM(base, model, mask=quadratic_masks(model)["all"], rho=1.0, method=build_method("momentum_sam"))
    optimizer.step_on(model, model.b)
    A, b, w = model.A.numpy(), model.b.numpy().mean(0), flat(list(model.parameters()))
    velocity = flat([base.state[p]["momentum_buffer"] for p in model.parameters()])
    u, g = velocity / np.linalg.norm(velocity), A @ w - b
    assert g @ u > 0  # the momentum has not overshot: its direction still falls
    rho = rho_in_turns * 2 * (g @ u) / (u @ A @ u)
    optimizer.param_groups[0]["rho"] = rho
    optimizer.step_on(model, model.b)
    rise = float(optimizer.stats.perturbed_loss) - (0.5 * w @ A @ w - b @ w)
    assert rise == pytest.approx(-rho * (g @ u) + rho**2 / 2 * (u @ A @ u), rel=1e-9)
    assert (rise > 0) == (rho_in_turns > 1)


def test_it_ascends_where_the_momentum_has_overshot():
    """In one dimension past the minimum, every radius raises the loss."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 1.0)
    base = torch.optim.SGD(model.parameters(), 1.5, momentum=0.9)
    optimizer = SAM(base, model, mask=build(model, "all"), rho=1e-3, method=build_method("momentum_sam"))

    def half_square(x):
        return 0.5 * model(x)[:, 0] ** 2

    x = torch.ones(1, 1, dtype=torch.float64)
    optimizer.step_on(half_square, x)
    w = model.weight.item()
    assert w == -0.5  # stepped over 0
    optimizer.step_on(half_square, x)
    assert float(optimizer.stats.perturbed_loss) == pytest.approx(0.5 * (abs(w) + 1e-3) ** 2, rel=1e-12)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_statistics_say_that_the_loss_at_w_is_not_known(entry):
    model, optimizer = start("vit", "all", "sgd", build_method("momentum_sam"), rho=0.5)
    first, second = batches(2)
    go(model, optimizer, [first], entry)
    assert optimizer.stats.loss == optimizer.stats.perturbed_loss  # no momentum yet: the base's step
    assert optimizer.stats.radius == 0
    returned = take(optimizer, losses(model), second, entry)
    assert torch.isnan(optimizer.stats.loss)
    assert torch.isnan(optimizer.stats.ascent)
    assert optimizer.stats.perturbed_loss == returned
    assert optimizer.stats.radius == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("base", ["sgd", "sgd_fused", "adamw", "rmsprop"])
def test_the_rest_of_the_contract(base, mask):
    """What it remembers is the base's own state."""
    method = build_method("momentum_sam")
    resumed, uninterrupted = resumed_and_uninterrupted("resnet", mask, base, method, rho=0.5)
    assert same_bits(resumed, uninterrupted)
    check_moves("resnet", mask, base, method, rho=0.5)


@pytest.mark.parametrize("entry", ENTRIES)
def test_one_pass(entry):
    assert passes(build_method("momentum_sam"), entry) == (1, 1)


def test_a_parameter_that_has_had_no_gradient_stays():
    """It counts as zero momentum while others have some."""
    model = make("vit")
    optimizer = SAM(
        BASES["sgd"](model.parameters()), model, mask=build(model, "all"), rho=0.5, method=build_method("momentum_sam")
    )
    optimizer.step_on(lambda batch: model.head.weight.sum() * torch.ones(2), None)  # only the head gets a gradient
    before = snapshot(model)
    recorder = Recorder(model)
    optimizer.step_on(recorder, batches()[0])
    moved = {name for name, w in before.items() if not same_bits(w, recorder.weights[-1][name])}
    assert moved == {"head.weight"}


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), "SGD"),
        (lambda p: torch.optim.Adagrad(p, 0.1), "Adagrad"),
        (lambda p: torch.optim.RMSprop(p, 0.1), "RMSprop"),
        (lambda p: torch.optim.Adam(p, 0.1, betas=(0.0, 0.9)), "Adam"),
        (lambda p: torch.optim.SGD([{"params": list(p)[:1]}, {"params": list(p)[1:]}], 0.1), "SGD"),
    ],
)
def test_a_base_without_momentum_is_refused(base, name):
    model = make("vit")
    with pytest.raises(InputError, match=f"this {name} has none; give it momentum > 0"):
        SAM(base(list(model.parameters())), model, mask=build(model, "all"), method=build_method("momentum_sam"))


class Odd(torch.optim.SGD):
    """Says that it has momentum and keeps it elsewhere."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["velocity"] = torch.zeros_like(p)


def test_a_momentum_that_is_not_found_is_refused():
    model = make("vit")
    base = Odd(model.parameters(), 0.1, momentum=0.9)
    optimizer = SAM(base, model, mask=build(model, "all"), method=build_method("momentum_sam"))
    go(model, optimizer, batches(1))
    with pytest.raises(InputError, match="found no momentum in Odd: its state has velocity, not momentum_buffer"):
        go(model, optimizer, batches(1))


def test_the_first_step_is_the_same_at_any_radius():
    found = []
    for rho in (0.0, math.pi):
        model, optimizer = start("vit", "all", "adamw", build_method("momentum_sam"), rho=rho)
        torch.manual_seed(1)
        go(model, optimizer, batches(1))
        found.append(snapshot(model))
    assert same_bits(*found)
