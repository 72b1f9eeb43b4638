"""Micro-batch SAM: one part is SAM; each part's own perturbation in numpy; ghost BatchNorm; sizes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from masks import InputError
from sam import SAM, MethodSpec, build_method
from sam.methods.micro_batch_sam import MicroBatches
from tests.sam.methods.oracles import FORMS, Expected, assert_closed_form, micro_batch_gradient
from tests.sam.nets import BASES, Quadratic, batches, build, closure, losses, make, mixed_mask, quadratic_masks
from tests.sam.runs import CASES, assert_passes_as_stated, assert_same_training


@pytest.mark.parametrize(("net", "mask", "base"), CASES)
def test_one_part_is_sam(net, mask, base):
    for spec in ("micro_batch_sam:parts=1", "micro_batch_sam:parts=none:size=8"):
        assert_same_training(MethodSpec.parse(spec).build(), build_method("sam"), net, mask, base)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"parts": 2}, [[0, 1, 2], [3, 4]]),
        ({"parts": 5}, [[0], [1], [2], [3], [4]]),
        ({"parts": 9}, [[0], [1], [2], [3], [4]]),
        ({"parts": None, "size": 2}, [[0, 1], [2, 3], [4]]),
        ({"parts": None, "size": 4}, [[0, 1, 2, 3], [4]]),
    ],
)
def test_closed_form(form, options, parts):
    """Uneven parts count by their size."""

    def step(world, w, t):
        total = 0.0
        for rows in parts:
            eps = world.eps(world.gradient(w, rows))
            total = total + len(rows) / 5 * world.gradient(w + eps, rows)
        return Expected(total)

    assert_closed_form(build_method("micro_batch_sam", **options), form, step)


@pytest.mark.parametrize("mask", ["all", "norm", "mixed"])
def test_equals_the_definition_on_a_net_with_batchnorm(mask):
    """Each part is normalised by its own statistics in both passes: the oracle sees nothing but the parts."""
    model = make("resnet").double()
    chosen = mixed_mask(model) if mask == "mixed" else build(copy.deepcopy(model).float(), mask)
    x, y = batches(1, size=7, dtype=torch.float64)[0]
    parts = [(x[:3], y[:3]), (x[3:5], y[3:5]), (x[5:], y[5:])]
    expected = micro_batch_gradient(
        model, lambda net, part: F.cross_entropy(net(part[0]), part[1], reduction="none"), parts, chosen, 0.3
    )
    optimizer = SAM(
        BASES["sgd"](model.parameters()), model, mask=chosen, rho=0.3, method=build_method("micro_batch_sam", parts=3)
    )
    optimizer.step_on(losses(model), (x, y))
    for p, g in zip(model.parameters(), expected, strict=True):
        np.testing.assert_allclose(p.grad, g, rtol=1e-9, atol=1e-11)


def test_running_statistics_move_once_per_part():
    """They see the clean pass of every part, in order, and no perturbed one."""
    model = make("resnet")
    twin = copy.deepcopy(model)
    x, y = batches(1, size=6)[0]
    method = build_method("micro_batch_sam", parts=2)
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "all"), method=method)
    optimizer.step_on(losses(model), (x, y))
    with torch.no_grad():
        twin(x[:3])
        twin(x[3:])
    for (name, found), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_stats_are_means_over_the_batch():
    model = Quadratic()
    mask = quadratic_masks(model)["mixed"]
    method = build_method("micro_batch_sam", parts=2)
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1), model, mask=mask, rho=0.4, method=method)
    expected = model(model.b).mean().item()
    assert optimizer.step_on(model, model.b).item() == pytest.approx(expected, rel=1e-12)
    assert float(optimizer.stats.radius) == pytest.approx(0.4, rel=1e-12)


@pytest.mark.parametrize(
    ("number", "size", "examples", "expected"),
    [
        (4, None, 8, [2, 2, 2, 2]),
        (4, None, 10, [3, 3, 2, 2]),
        (4, None, 3, [1, 1, 1]),
        (None, 4, 8, [4, 4]),
        (None, 4, 9, [4, 4, 1]),
        (None, 4, 3, [3]),
    ],
)
def test_sizes(number, size, examples, expected):
    assert MicroBatches(number, size).sizes(examples) == expected


def test_passes():
    assert_passes_as_stated("micro_batch_sam:parts=3", steps=2)


def test_refusals():
    for options in ({"size": 2}, {"parts": None}, {"parts": 4, "size": 2}):
        with pytest.raises(InputError, match=r"by number \(parts=4:size=none\) or by size"):
            build_method("micro_batch_sam", **options)
    with pytest.raises(InputError, match="parts of micro_batch_sam must be >= 1, got 0"):
        build_method("micro_batch_sam", parts=0)
    with pytest.raises(InputError, match="size of micro_batch_sam must be >= 1, got -1"):
        build_method("micro_batch_sam", parts=None, size=-1)
    model = nn.Linear(2, 2)
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), 0.1),
        model,
        mask=build(model, "all"),
        method=build_method("micro_batch_sam"),
    )
    batch = (torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InputError, match="use step_on"):
        optimizer.step(closure(optimizer, losses(model), batch))
