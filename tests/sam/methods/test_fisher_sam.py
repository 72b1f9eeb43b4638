"""Fisher SAM against its formula; at eta = 0 it is SAM."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from analysis import gradient_norm
from masks import InputError
from sam import SAM, build_method
from tests.sam.methods.oracles import FORMS, assert_closed_form, perturbed_by
from tests.sam.nets import ENTRIES, Quadratic, Recorder, flat, quadratic_masks, same_bits
from tests.sam.runs import CASES, MASKS, check_moves, outcome, passes, resumed_and_uninterrupted


@pytest.mark.parametrize(("net", "mask", "base"), CASES)
def test_without_fisher_it_is_sam(net, mask, base):
    found = outcome(net, mask, base, build_method("fisher_sam", eta=0), rho=0.2)
    sam = outcome(net, mask, base, build_method("sam"), rho=0.2)
    for name, weight in sam[0].items():
        torch.testing.assert_close(found[0][name], weight, rtol=1e-6, atol=1e-7)
    assert not same_bits(outcome(net, mask, base, build_method("fisher_sam"), rho=0.2)[0], sam[0])


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("scope", ["masked", "full"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eta", [0.3, 5.0])
def test_closed_form(eta, form, scope, entry):
    def eps(world, w, g):
        inverse = 1 / (1 + eta * g**2)
        return world.rho * inverse * g / math.sqrt((g * inverse * g)[world.over].sum())

    method = build_method("fisher_sam", eta=eta)
    assert_closed_form(method, form, perturbed_by(eps), entry=entry, scope=scope)


def test_the_move_is_the_best_in_its_ellipsoid():
    """Its Fisher length is rho, and no other step of that length gains more to first order."""
    model = Quadratic()
    base = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = SAM(
        base, model, mask=quadratic_masks(model)["all"], rho=0.4, method=build_method("fisher_sam", eta=2.0)
    )
    w = flat(list(model.parameters())).copy()
    recorder = Recorder(model, model)
    optimizer.step_on(recorder, model.b)
    eps = flat(list(recorder.eps().values()))
    g = model.A.numpy() @ w - model.b.numpy().mean(0)
    fisher = 1 + 2.0 * g**2
    assert math.sqrt((fisher * eps**2).sum()) == pytest.approx(0.4, rel=1e-12)
    others = eps + 0.05 * np.random.default_rng(0).normal(size=(2000, len(g)))
    others *= 0.4 / np.sqrt((fisher * others**2).sum(1, keepdims=True))
    assert (others @ g).max() < g @ eps


def test_metrics_without_a_gradient_refuse_it():
    model = Quadratic()
    metric = build_method("fisher_sam").rule.metric
    with pytest.raises(InputError, match=r"Fisher metric needs the gradient at one\.weight.*use the identity"):
        gradient_norm(model, [(model.b, torch.zeros(5))], loss=lambda x, y: x, metric=metric)


@pytest.mark.parametrize("mask", MASKS)
def test_the_rest_of_the_contract(mask):
    method = build_method("fisher_sam", eta=3.0)
    resumed, uninterrupted = resumed_and_uninterrupted("resnet", mask, "sgd", method, rho=0.2)
    assert same_bits(resumed, uninterrupted)
    check_moves("resnet", mask, "sgd", method, rho=0.2)


@pytest.mark.parametrize("entry", ENTRIES)
def test_two_passes(entry):
    assert passes(build_method("fisher_sam"), entry) == (2, 2)


@pytest.mark.parametrize("eta", [-0.1, math.inf, math.nan])
def test_bad_options(eta):
    with pytest.raises(InputError, match="eta of fisher_sam must be a finite number >= 0, got"):
        build_method("fisher_sam", eta=eta)
