"""ESAM: beta = gamma = 1 is SAM; what is perturbed, its expectation, which examples are kept; passes; refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from masks import InputError
from sam import SAM, Method, MethodSpec, build_method
from sam.methods.esam import SharpestExamples, StochasticPerturbation
from tests.sam.methods.oracles import FORMS, Expected, assert_closed_form, recorded_eps
from tests.sam.nets import (
    BASES,
    Quadratic,
    batches,
    buffers,
    build,
    closure,
    flat,
    losses,
    make,
    mixed_mask,
    quadratic_masks,
    same_bits,
)
from tests.sam.runs import CASES, assert_passes_as_stated, assert_same_training, outcome

RHO = 0.4


@pytest.mark.parametrize(("net", "mask", "base"), CASES)
def test_beta_and_gamma_one_are_sam(net, mask, base):
    """As registered, and the slots themselves, whose draws then keep everything."""
    plain = build_method("sam")
    assert_same_training(build_method("esam", beta=1.0, gamma=1.0), plain, net, mask, base)
    for unit in ("element", "tensor"):
        assert_same_training(Method(ascent=StochasticPerturbation(1.0, unit)), plain, net, mask, base)
    assert_same_training(Method(data=SharpestExamples(1.0)), plain, net, mask, base)


def quadratic(form, method, *, seed=0, lr=0.0, **options):
    model = Quadratic()
    mask = quadratic_masks(model)[form]
    base = torch.optim.SGD(model.parameters(), lr)
    return model, mask, SAM(base, model, mask=mask, rho=RHO, method=method, seed=seed, **options)


def sam_eps(model, keep, over=None):
    """rho g / ||g|| over the mask, and the norm over it or over everything."""
    g = model.A.numpy() @ flat(list(model.parameters())) - model.b.numpy().mean(0)
    return np.where(keep, RHO * g / np.linalg.norm(g[keep if over is None else over]), 0)


@pytest.mark.parametrize("scope", ["masked", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_elements(form, scope):
    """Every masked coordinate is that of SAM over beta, or 0; the others are 0; which ones changes every step."""
    model, mask, optimizer = quadratic(form, build_method("esam", beta=0.6, gamma=1.0), norm_scope=scope)
    keep = flat(mask.dense())
    expected = sam_eps(model, keep, None if scope == "masked" else np.ones_like(keep)) / 0.6
    patterns = set()
    for _ in range(6):
        eps = recorded_eps(optimizer, model)
        moved = np.abs(eps) > 1e-12
        np.testing.assert_allclose(eps, np.where(moved, expected, 0), rtol=1e-12, atol=1e-14)
        assert float(optimizer.stats.radius) == pytest.approx(np.linalg.norm(eps), rel=1e-12)
        patterns.add(tuple(moved))
    assert len(patterns) > 2


def test_the_expectation_over_elements_is_that_of_sam():
    """Over 600 draws the mean of every coordinate lies within 4.5 standard errors of SAM's, the kept share of
    beta; so with a wrong beta in the draw or in the factor it would not."""
    beta, draws = 0.3, 600
    model, mask, optimizer = quadratic("all", build_method("esam", beta=beta, gamma=1.0))
    expected = sam_eps(model, flat(mask.dense()))
    total, kept = 0.0, 0
    for _ in range(draws):
        eps = recorded_eps(optimizer, model)
        total, kept = total + eps, kept + int((np.abs(eps) > 1e-12).sum())
    error = np.abs(expected) * math.sqrt((1 - beta) / beta / draws)
    assert (np.abs(total / draws - expected) < 4.5 * error).all()
    n = draws * len(expected)
    assert abs(kept / n - beta) < 4.5 * math.sqrt(beta * (1 - beta) / n)


@pytest.mark.parametrize("scope", ["masked", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_tensors(form, scope):
    """Whole tensors of the mask, at rho/beta over the norm of the kept ones; never none."""
    model, mask, optimizer = quadratic(form, build_method("esam", beta=0.4, gamma=1.0, unit="tensor"), norm_scope=scope)
    keep = flat(mask.dense())
    owner = np.repeat(np.arange(4), [40, 4, 12, 3])
    patterns = set()
    for _ in range(12):
        eps = recorded_eps(optimizer, model)
        tensors = sorted(set(owner[np.abs(eps) > 1e-12]))
        chosen = keep & np.isin(owner, tensors)
        over = None if scope == "masked" else np.ones_like(keep)
        np.testing.assert_allclose(eps, sam_eps(model, chosen, over) / 0.4, rtol=1e-12, atol=1e-14)
        if scope == "masked":
            assert float(optimizer.stats.radius) == pytest.approx(RHO / 0.4, rel=1e-12)
        patterns.add(tuple(tensors))
    assert () not in patterns
    assert len(patterns) > 1 or len(set(owner[keep])) == 1


def test_the_share_of_tensors():
    """Of four tensors each is kept with probability beta, and each alike where the draws would keep none."""
    beta, draws = 0.25, 400
    model, _, optimizer = quadratic("all", build_method("esam", beta=beta, gamma=1.0, unit="tensor"))
    count = np.zeros(4)
    for _ in range(draws):
        eps = recorded_eps(optimizer, model)
        count += [np.abs(part).max() > 1e-12 for part in np.split(eps, [40, 44, 56])]
    expected = beta + (1 - beta) ** 4 / 4
    assert (np.abs(count / draws - expected) < 4.5 * math.sqrt(expected * (1 - expected) / draws)).all()


def test_tensors_restrict_the_first_pass(monkeypatch):
    """Autograd is asked for the kept tensors of the mask only."""
    model = make("resnet")
    optimizer = SAM(
        BASES["sgd"](model.parameters()),
        model,
        mask=build(model, "norm"),
        method=build_method("esam", beta=0.5, gamma=1.0, unit="tensor"),
    )
    asked, real = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda out, inputs, **kw: asked.append(inputs) or real(out, inputs, **kw)
    )
    for batch in batches(8):
        optimizer.step_on(losses(model), batch)
    norm = {id(p) for name, p in model.named_parameters() if "bn" in name or "shortcut.1" in name}
    assert len(asked) == 8
    assert all({id(p) for p in inputs} <= norm for inputs in asked)
    assert 0 < sum(map(len, asked)) < 8 * 6


# -- data selection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("gamma", "kept"), [(0.2, 1), (0.5, 2), (0.6, 3), (0.9, 4), (0.01, 1)])
def test_closed_form_of_the_selection(gamma, kept, form):
    """l_i(w + eps) - l_i(w) differs between examples by -b_i . eps alone."""

    def step(world, w, t):
        eps = world.eps(world.gradient(w))
        rows = sorted(np.argsort(world.b @ eps)[:kept])
        return Expected(world.gradient(w + eps, rows), eps)

    assert_closed_form(build_method("esam", beta=1.0, gamma=gamma), form, step)


def test_equal_rises_go_by_position():
    """All examples alike but the fourth, which rises least: the first three are kept, and never none."""
    model = Quadratic()
    mask = quadratic_masks(model)["all"]
    seen = []

    def marked(batch):
        seen.append(batch.tolist())
        return model(model.b[:1])[0] * torch.where(batch == 3, 0.5, 1.0)

    optimizer = SAM(
        torch.optim.SGD(model.parameters(), 0.1),
        model,
        mask=mask,
        rho=RHO,
        method=build_method("esam", beta=1.0, gamma=0.6),
    )
    optimizer.step_on(marked, torch.arange(5))
    assert seen == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2]]


def test_the_selection_moves_no_running_statistics_and_draws_the_same_dropout():
    """Buffers are those of one clean pass; the selection's forward pass sees the dropout masks of the first one."""
    model = make("resnet", dropout=0.5)
    twin = make("resnet", dropout=0.5)
    drawn = []
    model.dropout.register_forward_hook(lambda m, args, out: drawn.append(out.detach() == 0))
    optimizer = SAM(
        BASES["sgd"](model.parameters()), model, mask=mixed_mask(model), method=build_method("esam", beta=1.0)
    )
    torch.manual_seed(3)
    batch = batches(1)[0]
    optimizer.step_on(losses(model), batch)
    with torch.no_grad():
        twin(batch[0])
    assert same_bits(buffers(model), buffers(twin))
    assert torch.equal(drawn[0], drawn[1])


# -- the rest --------------------------------------------------------------------------------------------------------


def test_draws_depend_on_the_seed_alone():
    for unit in ("element", "tensor"):
        found = []
        for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
            model, _, optimizer = quadratic("mixed", build_method("esam", unit=unit), seed=seed)
            torch.manual_seed(disturbance)
            found.append([recorded_eps(optimizer, model).tolist() for _ in range(5)])
        assert found[0] == found[1] != found[2]


def test_both_parts_differ_from_sam():
    plain = outcome("resnet", "all", "sgd", build_method("sam"))[0]
    for options in ({"beta": 1.0}, {"gamma": 1.0}, {"gamma": 1.0, "unit": "tensor"}):
        assert not same_bits(outcome("resnet", "all", "sgd", build_method("esam", **options))[0], plain)


@pytest.mark.parametrize("spec", ["esam", "esam:gamma=1", "esam:beta=1:gamma=0.25", "esam:unit=tensor"])
def test_passes(spec):
    assert_passes_as_stated(spec, steps=2)


def test_refusals():
    for name in ("beta", "gamma"):
        for value in (0.0, -0.5, 1.1, math.nan):
            with pytest.raises(InputError, match=rf"{name} of esam must lie in \(0, 1\]"):
                build_method("esam", **{name: value})
    model = nn.Linear(2, 2)
    batch = (torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    for spec, works in (("esam", False), ("esam:gamma=1", True)):
        optimizer = SAM(
            torch.optim.SGD(model.parameters(), 0.1),
            model,
            mask=build(model, "all"),
            method=MethodSpec.parse(spec).build(),
        )
        if works:
            optimizer.step(closure(optimizer, losses(model), batch))
        else:
            with pytest.raises(InputError, match="use step_on"):
                optimizer.step(closure(optimizer, losses(model), batch))
