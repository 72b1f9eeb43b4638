"""VaSSO against its recursion; at theta = 1 it is SAM."""

from __future__ import annotations

import math

import numpy as np
import pytest

from masks import InputError
from sam import build_method
from tests.sam.methods.oracles import FORMS, assert_closed_form, perturbed_by
from tests.sam.nets import ENTRIES, batches, losses, same_bits, take
from tests.sam.runs import CASES, MASKS, check_moves, go, outcome, passes, resumed_and_uninterrupted, start


@pytest.mark.parametrize(("net", "mask", "base"), CASES)
@pytest.mark.parametrize("scope", ["masked", pytest.param("full", marks=pytest.mark.slow)])
def test_at_theta_one_it_is_sam(scope, net, mask, base):
    options = {"rho": 0.2, "norm_scope": scope, "entry": "step" if scope == "full" else "step_on"}
    sam = outcome(net, mask, base, build_method("sam"), **options)
    assert same_bits(outcome(net, mask, base, build_method("vasso", theta=1), **options), sam)
    assert not same_bits(outcome(net, mask, base, build_method("vasso"), **options)[0], sam[0])


def geometric(theta):
    """The recursion unrolled: d_t = sum_k theta (1 - theta)^(t - k) g_k, of g_0 (1 - theta)^t."""
    seen = []

    def eps(world, w, g):
        seen.append(g)
        t = len(seen) - 1
        weights = [(1 - theta) ** t, *(theta * (1 - theta) ** (t - k) for k in range(1, t + 1))]
        d = sum(c * g for c, g in zip(weights, seen, strict=True))
        return world.rho * d / np.linalg.norm(d[world.over])

    return eps


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("scope", ["masked", "full"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("theta", [0.9, 0.2])
def test_closed_form(theta, form, scope, entry):
    method = build_method("vasso", theta=theta)
    assert_closed_form(method, form, perturbed_by(geometric(theta)), entry=entry, scope=scope)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_rest_of_the_contract(mask, base):
    method = build_method("vasso", theta=0.4)
    resumed, uninterrupted = resumed_and_uninterrupted("resnet", mask, base, method, rho=0.2)
    assert same_bits(resumed, uninterrupted)
    check_moves("resnet", mask, base, method, rho=0.2)


@pytest.mark.parametrize("scope", ["masked", "full"])
@pytest.mark.parametrize("mask", ["norm", "all"])
def test_the_mean_covers_what_the_norm_covers(mask, scope):
    model, optimizer = start("resnet", mask, "sgd", build_method("vasso"), norm_scope=scope)
    go(model, optimizer, batches(2))
    counted = optimizer.mask.num_kept if scope == "masked" else optimizer.mask.numel
    assert optimizer.memory.nbytes == 4 * counted


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_mean_is_a_copy(entry):
    """Gradients may be views of buffers that the next pass fills anew (DistributedDataParallel)."""
    model, optimizer = start("vit", "all", "sgd", build_method("vasso"))
    seen = []
    for param in model.parameters():
        param.register_hook(seen.append)
    take(optimizer, losses(model), batches(1)[0], entry)
    assert seen
    assert not {t.data_ptr() for t in optimizer.memory.get("direction")} & {g.data_ptr() for g in seen}


@pytest.mark.parametrize("entry", ENTRIES)
def test_two_passes(entry):
    assert passes(build_method("vasso"), entry) == (2, 2)


@pytest.mark.parametrize("theta", [0.0, 1.1, -1.0, math.nan])
def test_bad_options(theta):
    with pytest.raises(InputError, match="theta of vasso must be greater than 0 and at most 1, got"):
        build_method("vasso", theta=theta)
