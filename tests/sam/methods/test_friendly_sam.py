"""Friendly SAM against its recursion; at sigma = 0 it is SAM."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from masks import InputError
from sam import build_method
from sam.memory import Memory
from tests.sam.methods.oracles import FORMS, assert_closed_form, perturbed_by
from tests.sam.nets import ENTRIES, Recorder, batches, losses, same_bits, take
from tests.sam.runs import CASES, MASKS, check_moves, go, mask_of, outcome, passes, resumed_and_uninterrupted, start


@pytest.mark.parametrize(("net", "mask", "base"), CASES)
@pytest.mark.parametrize("scope", ["masked", pytest.param("full", marks=pytest.mark.slow)])
def test_without_sigma_it_is_sam(scope, net, mask, base):
    options = {"rho": 0.2, "norm_scope": scope, "entry": "step" if scope == "full" else "step_on"}
    sam = outcome(net, mask, base, build_method("sam"), **options)
    assert same_bits(outcome(net, mask, base, build_method("friendly_sam", sigma=0), **options), sam)
    assert not same_bits(outcome(net, mask, base, build_method("friendly_sam"), **options)[0], sam[0])


def recursion(sigma, decay):
    """From the definition; the reference of a step is the mean before that step."""
    means = []

    def eps(world, w, g):
        d = g - sigma * means[-1] if means else g
        means.append(decay * means[-1] + (1 - decay) * g if means else g)
        return world.rho * d / np.linalg.norm(d[world.over])

    return eps


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("scope", ["masked", "full"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("sigma", "decay"), [(1.0, 0.95), (0.5, 0.3), (2.0, 0.0)])
def test_closed_form(sigma, decay, form, scope, entry):
    method = build_method("friendly_sam", sigma=sigma, decay=decay)
    assert_closed_form(method, form, perturbed_by(recursion(sigma, decay)), entry=entry, scope=scope)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_rest_of_the_contract(mask, base):
    method = build_method("friendly_sam")
    resumed, uninterrupted = resumed_and_uninterrupted("resnet", mask, base, method, rho=0.2)
    assert same_bits(resumed, uninterrupted)
    check_moves("resnet", mask, base, method, rho=0.2)


@pytest.mark.parametrize("scope", ["masked", "full"])
@pytest.mark.parametrize("mask", ["norm", "all"])
def test_the_mean_covers_what_the_norm_covers(mask, scope):
    model, optimizer = start("resnet", mask, "sgd", build_method("friendly_sam"), norm_scope=scope)
    go(model, optimizer, batches(2))
    counted = optimizer.mask.num_kept if scope == "masked" else optimizer.mask.numel
    assert optimizer.memory.nbytes == 4 * counted


def test_a_new_mask_starts_a_new_mean():
    """The first step after it is SAM's, bit for bit."""
    found = {}
    for name in ("friendly_sam", "sam"):
        model, optimizer = start("vit", "mixed", "sgd", build_method(name), rho=0.3)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        go(model, optimizer, batches(2))
        optimizer.set_mask(mask_of(model, "norm"))
        torch.manual_seed(2)
        recorder = Recorder(model)
        take(optimizer, recorder, batches(3)[2], "step_on")
        found[name] = recorder.eps()
        take(optimizer, recorder, batches(4)[3], "step_on")
        found[name, "next"] = recorder.eps()
    assert same_bits(found["friendly_sam"], found["sam"])
    assert not same_bits(found["friendly_sam", "next"], found["sam", "next"])


def test_a_step_with_an_infinite_gradient_is_not_remembered():
    model, optimizer = start("vit", "norm", "sgd", build_method("friendly_sam"), rho=0.3)
    go(model, optimizer, batches(2))
    before = [t.clone() for t in optimizer.memory.get("mean_gradient")]
    optimizer.step_on(lambda batch: losses(model)(batch) * math.inf, batches(1)[0])
    assert not optimizer.stats.finite
    assert same_bits(optimizer.memory.get("mean_gradient"), before)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_mean_is_a_copy(entry):
    """Gradients may be views of buffers that the next pass fills anew (DistributedDataParallel)."""
    model, optimizer = start("vit", "all", "sgd", build_method("friendly_sam"))
    seen = []
    for param in model.parameters():
        param.register_hook(seen.append)
    take(optimizer, losses(model), batches(1)[0], entry)
    kept = {t.data_ptr() for t in optimizer.memory.get("mean_gradient")}
    assert seen
    assert not kept & {g.data_ptr() for g in seen}


@pytest.mark.parametrize("entry", ENTRIES)
def test_two_passes(entry):
    assert passes(build_method("friendly_sam"), entry) == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -1.0}, "sigma of friendly_sam must be a finite number >= 0, got -1.0"),
        ({"sigma": math.nan}, "sigma of friendly_sam must be a finite number >= 0, got nan"),
        ({"decay": 1.0}, "decay of friendly_sam must be at least 0 and less than 1, got 1.0"),
        ({"decay": -0.1}, "decay of friendly_sam must be at least 0 and less than 1, got -0.1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build_method("friendly_sam", **options)


def test_the_mean_settles_at_the_mean_gradient():
    """Not at half of it, as where the average is of what was subtracted from already."""
    memory, direction = Memory(0), build_method("friendly_sam", decay=0.5).direction
    for _ in range(60):
        direction([torch.ones(3)], memory)
        memory.commit(torch.tensor(True))
    torch.testing.assert_close(memory.get("mean_gradient")[0], torch.ones(3))
