"""Curves and slices of the loss against plain arithmetic, and the directions against their definitions."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis import HessianOperator, lambda_max
from analysis.landscape import direction_between, gradient_direction, loss_slice, random_direction
from masks.errors import InputError, MaskError
from masks.mask import Mask, Provenance
from masks.params import ParamTable


def norm_mask(model: nn.Module) -> Mask:
    table = ParamTable.from_model(model)
    return Mask(table, tuple(row.is_norm for row in table), Provenance("norm"))


def loss_at(model: nn.Module, x: Tensor, y: Tensor, *moves: tuple[float, dict[str, Tensor]]) -> float:
    twin = copy.deepcopy(model).eval()
    params = dict(twin.named_parameters())
    with torch.no_grad():
        for t, direction in moves:
            for name, d in direction.items():
                params[name] += t * d
        return float(F.cross_entropy(twin(x), y))


def total(direction: dict[str, Tensor]) -> float:
    return float(torch.cat([d.flatten() for d in direction.values()]).norm())


def test_curves_and_slices_against_plain_arithmetic(case):
    one, two = random_direction(case.model, seed=1), gradient_direction(case.model, case.batches)
    ts = (-0.5, 0.0, 0.3, 1.0)
    got = loss_slice(case.model, case.batches, [one], [ts])
    assert got.axes == (ts,)
    assert got.values == pytest.approx([loss_at(case.model, case.x, case.y, (t, one)) for t in ts], rel=1e-10)
    grid = loss_slice(case.model, case.batches, [one, two], [ts, (0.0, 0.7)])
    want = [[loss_at(case.model, case.x, case.y, (a, one), (b, two)) for b in (0.0, 0.7)] for a in ts]
    np.testing.assert_allclose(np.array(grid.values), want, rtol=1e-10)
    assert grid.settings["num_examples"] == 150
    assert "along 2 directions" in grid.name
    assert grid.settings["norms"] == pytest.approx([total(one), 1.0])


def test_gradient_and_eigenvector_have_the_slope_and_the_curvature_that_they_stand_for(case):
    t = 1e-4
    g = gradient_direction(case.model, case.batches)
    assert total(g) == pytest.approx(1.0)
    twin = case.fresh().eval()
    full = torch.autograd.grad(F.cross_entropy(twin(case.x), case.y), list(twin.parameters()))
    norm = float(torch.cat([p.flatten() for p in full]).norm())
    low, high = loss_slice(case.model, case.batches, [g], [(-t, t)]).values
    assert (high - low) / (2 * t) == pytest.approx(norm, rel=1e-3)
    with HessianOperator(case.model, case.batches) as operator:
        top = lambda_max(operator, tol=1e-6, keep_vector=True)
        direction = operator.unflatten(top.vector)
    if case.name == "vit":  # smooth
        low, mid, high = loss_slice(case.model, case.batches, [direction], [(-t, 0.0, t)]).values
        assert (high + low - 2 * mid) / t**2 == pytest.approx(top.value, rel=1e-3)


@pytest.mark.parametrize("vectors", ["fixed", "scaled"])
def test_random_direction_has_the_norms_of_the_filters(conv_case, vectors):
    got = random_direction(conv_case.model, seed=2, vectors=vectors)
    for name, p in conv_case.model.named_parameters():
        if p.dim() < 2:
            assert (name in got) == (vectors == "scaled")
            if name in got:
                assert float(got[name].norm()) == pytest.approx(float(p.detach().norm()))
        else:
            torch.testing.assert_close(got[name].flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
    again, other = (random_direction(conv_case.model, seed=s, vectors=vectors) for s in (2, 3))
    assert all(torch.equal(again[k], got[k]) for k in got)
    assert not torch.equal(other["conv1.weight"], got["conv1.weight"])
    assert len({round(float(v), 12) for v in got["conv1.weight"].flatten()}) == got["conv1.weight"].numel()


def test_masks_restrict_directions(conv_case):
    model, mask = conv_case.fresh(), norm_mask(conv_case.model)
    names = {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}
    target = {k: v + 1 for k, v in model.state_dict().items()}
    for direction in (
        random_direction(model, mask=mask, vectors="scaled"),
        gradient_direction(model, conv_case.batches, mask=mask),
        direction_between(model, target, mask=mask),
    ):
        assert set(direction) == names
        assert set(loss_slice(model, conv_case.batches, [direction], [[0.1]]).settings["moved"][0]) == names
    # The same noise as without the mask.
    assert torch.equal(
        random_direction(model, mask=mask, vectors="scaled")["bn2.bias"],
        random_direction(model, vectors="scaled")["bn2.bias"],
    )
    table = ParamTable.from_model(model)
    keep = torch.rand(model.conv1.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[0] = False  # a whole filter outside
    part = Mask(table, tuple(keep if row.name == "conv1.weight" else False for row in table))
    inside = model.conv1.weight.detach() * keep
    for direction in (
        random_direction(model, mask=part),
        gradient_direction(model, conv_case.batches, mask=part),
        direction_between(model, target, mask=part),
    ):
        (d,) = direction.values()
        assert not d[~keep].any()
        assert (d[keep] != 0).all()
    d = random_direction(model, mask=part)["conv1.weight"]
    torch.testing.assert_close(d.flatten(1).norm(dim=1), inside.flatten(1).norm(dim=1))


def test_between_checkpoints(conv_case):
    model, target = conv_case.fresh(), conv_case.fresh()
    with torch.no_grad():
        for i, p in enumerate(target.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    d = direction_between(model, target.state_dict())
    got = loss_slice(model, conv_case.batches, [d], [(0.0, 1.0)]).values
    assert got == pytest.approx([loss_at(m, conv_case.x, conv_case.y) for m in (model, target)], rel=1e-10)
    # Running statistics stay those of the model, unless they are estimated anew.
    with torch.no_grad():
        target.bn1.running_mean.add_(5.0)
    assert loss_slice(model, conv_case.batches, [d], [[1.0]]).values == got[1:]
    fresh = loss_slice(model, conv_case.batches, [d], [[1.0]], statistics="reestimated")
    twin = copy.deepcopy(target).eval()
    for bn in (twin.bn1, twin.bn2):
        bn.reset_running_stats()
        bn.momentum = None
        bn.train()
    with torch.no_grad():
        for x, _ in conv_case.batches:
            twin(x)
        want = float(F.cross_entropy(twin.eval()(conv_case.x), conv_case.y))
    assert fresh.values == (pytest.approx(want, rel=1e-9),)
    assert "statistics reestimated" in fresh.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("statistics", ["kept", "reestimated"])
def test_model_is_left_untouched(case, dtype, statistics, snapshot):
    model = case.fresh(dtype).train()
    with torch.no_grad():  # values that adding and subtracting would not give back
        first = next(model.parameters()).view(-1)
        first[0], first[1], first[2] = -0.0, 1e-30, 1e6
    for p in list(model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    before = snapshot(model)
    d = random_direction(model, vectors="scaled")
    g = gradient_direction(model, case.batches)
    loss_slice(model, case.batches, [d, g], [(0.0, 0.1), (0.0, 0.1)], statistics=statistics)
    before.check()


def test_weights_come_back_after_an_exception(conv_case, snapshot):
    model, calls = conv_case.fresh().train(), []
    d = random_direction(model)
    before = snapshot(model)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, targets, reduction="none")

    with pytest.raises(KeyboardInterrupt):
        loss_slice(model, conv_case.batches, [d], [(0.1, 0.2, 0.3)], loss=loss)
    before.check()


def test_unusable_input_is_refused(conv_case):
    model, batches = conv_case.fresh(), conv_case.batches
    d = random_direction(model)
    for directions, axes, text in [
        ([], [], "one or two directions and as many axes, got 0 directions"),
        ([d], [[0.1], [0.2]], "got 1 directions and 2 axes"),
        ([d], [[]], "non-empty list of finite numbers"),
        ([d], [[math.nan]], "non-empty list of finite numbers"),
        ([{"conv1.weigth": torch.ones(1)}], [[0.1]], r"did you mean conv1\.weight"),
        ([{"conv1.weight": torch.ones(1)}], [[0.1]], r"has shape \(1,\), the parameter \(6, 1, 3, 3\)"),
        ([{"bn1.bias": torch.full((6,), math.inf)}], [[0.1]], "direction of bn1.bias is not finite"),
        ([{"bn1.bias": torch.zeros(6)}], [[0.1]], "direction is zero"),
        ([{}], [[0.1]], "direction is zero"),
        ([d], [[1e308]], "loss is not finite for .* along the direction"),
    ]:
        with pytest.raises(InputError, match=text) as error:
            loss_slice(model, batches, directions, axes)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="did you mean kept"):
        loss_slice(model, batches, [d], [[0.1]], statistics="keep")
    with pytest.raises(InputError, match="did you mean fixed"):
        random_direction(model, vectors="fixd")
    with pytest.raises(InputError, match='pass vectors="scaled"'):
        random_direction(model, mask=norm_mask(model))
    with pytest.raises(InputError, match="same weights on the mask"):
        direction_between(model, model.state_dict())
    with pytest.raises(InputError, match="unknown parameter of the checkpoint"):
        direction_between(model, {"other": torch.ones(1)})
    with pytest.raises(InputError, match=r"conv1\.weight has shape \(1,\) there, \(6, 1, 3, 3\) here"):
        direction_between(model, {**model.state_dict(), "conv1.weight": torch.ones(1)})
    with pytest.raises(MaskError):
        gradient_direction(model, batches, mask=norm_mask(nn.Sequential(nn.LayerNorm(2))))
    empty = norm_mask(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="keeps no coordinate"):
        random_direction(nn.Sequential(nn.Linear(2, 2)), mask=empty)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    with pytest.raises(InputError, match="norm 0: it gives no direction"):
        gradient_direction(flat, batches, loss=lambda out, _: 0 * out.sum(1))
    flat.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
    with pytest.raises(InputError, match="data that differ between passes"):
        loss_slice(flat, batches, [{"1.bias": torch.ones(5)}], [[0.1]])
