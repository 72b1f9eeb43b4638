"""Metrics that keep curves: against the dense Hessian and losses taken by hand, and read back from plain JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from analysis import evaluate, read_slice, read_spectrum
from analysis.curve_metrics import CURVE, PLANE
from analysis.landscape import random_direction
from masks.errors import InputError


def settings(estimate):
    """As a record keeps them."""
    return json.loads(json.dumps({"name": estimate.name, **estimate.settings}))


def mean_loss(model, batches, move=None, at=0.0):
    """Mean cross-entropy of a float64 model in evaluation mode at w + at * move, by hand."""
    model.eval()
    params = dict(model.named_parameters())
    moved = {name: p + at * move[name] if move and name in move else p for name, p in params.items()}
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(torch.func.functional_call(model, moved, (x,)), y, reduction="sum")
            for x, y in batches
        ]
    return float(sum(losses)) / sum(len(y) for _, y in batches)


def test_the_spectrum_has_the_moments_of_the_dense_hessian(case):
    (found,) = evaluate(case.model, case.batches, ["spectrum"], seed=3).values()
    values = torch.linalg.eigvalsh(case.hessian)
    want = float((values**2).mean().sqrt())
    assert found.value == pytest.approx(want, abs=5 * found.standard_error + 0.25 * want)  # n = 2 vectors
    density = read_spectrum(settings(found))
    assert density.dimension == len(values)
    assert density.moment(2).value ** 0.5 == found.value  # read back bit for bit
    low, high = float(values[0]), float(values[-1])
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        assert low - 1e-4 * high <= nodes.min()
        assert nodes.max() == pytest.approx(high, rel=1e-3)


def test_a_slice_is_the_loss_along_the_direction(case):
    (found,) = evaluate(case.model, case.batches, ["slice_1d"], seed=5).values()
    read = read_slice(settings(found))
    assert read.axes == (CURVE,)
    direction = random_direction(case.model, seed=10, vectors="scaled")
    want = [mean_loss(case.model, case.batches, direction, a) for a in CURVE]
    assert read.values == pytest.approx(want, rel=1e-9)
    assert found.value == pytest.approx(np.mean(want) - mean_loss(case.model, case.batches))


def test_a_plane_holds_its_first_direction_in_its_middle_column(case):
    (found,) = evaluate(case.model, case.batches, ["slice_2d"], seed=5).values()
    read = read_slice(settings(found))
    assert read.axes == (PLANE, PLANE)
    values = np.array(read.values)
    first, second = (random_direction(case.model, seed=10 + i, vectors="scaled") for i in (0, 1))
    middle = len(PLANE) // 2
    assert PLANE[middle] == 0
    assert values[:, middle] == pytest.approx([mean_loss(case.model, case.batches, first, a) for a in PLANE])
    assert values[middle] == pytest.approx([mean_loss(case.model, case.batches, second, a) for a in PLANE])


@pytest.mark.parametrize("read", [read_slice, read_spectrum])
@pytest.mark.parametrize("other", [{}, {"nodes": [[1]], "axes": [[0, 1]], "values": [1.0]}, {"nodes": 1, "axes": 1}])
def test_settings_of_something_else_are_refused(read, other):
    with pytest.raises(InputError, match="not the settings of a"):
        read(other)
