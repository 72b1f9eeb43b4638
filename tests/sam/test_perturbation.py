"""eps: against the formulas in numpy, against the maximum it is defined as, and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from masks import InputError, Mask, ParamTable
from masks.region import Region
from sam import Elementwise, Identity, Layerwise, Rule, perturb
from sam.perturbation import RULE_NAMES, total_norm
from tests.sam.nets import (
    RULES,
    RULES_AND_SCOPES,
    Quadratic,
    describe,
    flat,
    make,
    mixed_mask,
    quadratic_masks,
    reference_eps,
)

FORMS = ("whole", "index", "dense", "mixed", "all")


def perturbed(model, mask, rule, scope="masked", rho=0.3, gradients=None):
    """`perturbation` of a model at its current gradient: eps over all coordinates, g, and the result."""
    region = Region(mask, model)
    if gradients is None:
        gradients = torch.autograd.grad(model(model.b).mean(), list(model.parameters()))
    touched = [gradients[piece.position] for piece in region.pieces]
    whole = Region(Mask(mask.table, (True,) * len(mask.table)), model) if scope == "full" else None
    out = perturb(rule, region, touched, rho, whole=whole, whole_gradients=gradients if whole else ())
    parts = [torch.zeros(row.shape, dtype=torch.float64) for row in mask.table]
    for piece, eps in zip(region.pieces, region.scatter(out.values), strict=True):
        parts[piece.position] = eps
    return flat(parts), flat(gradients), out


def test_the_forms_of_the_quadratic_are_what_they_say():
    model = Quadratic()
    for name, mask in quadratic_masks(model).items():
        pieces = Region(mask, model).pieces
        kinds = {"index" if p.index is not None else "dense" if p.keep is not None else "whole" for p in pieces}
        assert kinds == ({"whole", "index", "dense"} if name == "mixed" else {"whole"} if name == "all" else {name})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rule", "scope"), RULES_AND_SCOPES)
def test_eps_follows_the_formula(rule, scope, form):
    model = Quadratic()
    mask = quadratic_masks(model)[form]
    eps, g, out = perturbed(model, mask, RULES[rule], scope)
    w = flat(list(model.parameters()))
    expected, T = reference_eps(w, g, mask, **describe(RULES[rule]), scope=scope, rho=np.full_like(w, 0.3))
    np.testing.assert_allclose(eps, expected, rtol=1e-13, atol=1e-16)
    assert out.radius.item() == pytest.approx(np.sqrt((expected**2).sum()), rel=1e-13)
    assert bool(out.finite)
    # the norm that the rule bounds
    inside = np.concatenate([part.numpy().reshape(-1) for part in mask.dense()]) & (T > 0)
    norm = np.linalg.norm((eps / np.where(T > 0, T, 1))[inside], RULES[rule].p)
    if scope == "masked":
        assert norm == pytest.approx(0.3, rel=1e-13)
    else:
        assert norm <= 0.3 * (1 + 1e-13)
        if form != "all":
            assert norm < 0.3 * 0.999


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_no_feasible_point_beats_eps(rule, form):
    """eps maximises <g, eps> over ||T^-1 eps||_p <= rho: no random point does better, and the bound is attained."""
    model = Quadratic(seed=4)
    mask = quadratic_masks(model)[form]
    eps, g, _ = perturbed(model, mask, RULES[rule])
    w = flat(list(model.parameters()))
    _, T = reference_eps(w, g, mask, **describe(RULES[rule]), scope="masked", rho=np.full_like(w, 0.3))
    keep = np.concatenate([part.numpy().reshape(-1) for part in mask.dense()])
    best = g @ eps
    dual = np.linalg.norm((T * g)[keep], 2 if RULES[rule].p == 2 else 1)
    assert best == pytest.approx(0.3 * dual, rel=1e-12)
    rng = np.random.default_rng(0)
    for scale in (1.0, 0.1, 1e-3):  # far away and close by
        noise = rng.standard_normal((200, len(w))) * keep * T * scale
        points = noise + (0.0 if scale == 1.0 else eps)
        normalised = np.divide(points, T, out=np.zeros_like(points), where=T > 0)
        norms = np.linalg.norm(normalised, RULES[rule].p, axis=1, keepdims=True)
        assert (points * (0.3 / norms) @ g).max() <= best * (1 + 1e-12)


def test_linf_has_no_full_scope_but_l2_differs_by_it():
    model = Quadratic()
    mask = quadratic_masks(model)["index"]
    masked, _, _ = perturbed(model, mask, Rule(), "masked")
    full, g, _ = perturbed(model, mask, Rule(), "full")
    keep = masked != 0
    ratio = np.linalg.norm(g[keep]) / np.linalg.norm(g)
    np.testing.assert_allclose(full, masked * ratio, rtol=1e-12)
    assert ratio < 0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rule", "scope"),
    [("l2", "masked"), ("l2", "full"), ("linf", "masked"), ("elementwise_l2-eta0.05-identity", "masked")],
)
def test_eps_is_multiplier_times_directions_and_the_radius_its_norm(rule, scope, form):
    """In float32, where the radius is taken from the directions' norm and eps is rounded."""
    model = Quadratic().float()
    g = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in model.parameters()]
    eps, _, out = perturbed(model, quadratic_masks(model)[form], RULES[rule], scope, gradients=g)
    assert out.multiplier is not None
    assert all(torch.equal(d * out.multiplier, v) for d, v in zip(out.directions, out.values, strict=True))
    assert out.radius.dtype == torch.float64
    assert out.radius.item() == pytest.approx(np.sqrt((eps.astype(np.float64) ** 2).sum()), rel=3e-7)


@pytest.mark.parametrize("rho_as", [float, torch.tensor])
def test_radii_per_piece_share_one_norm(rho_as):
    model = Quadratic()
    mask = quadratic_masks(model)["mixed"]
    rho = [rho_as(r) for r in (0.1, 0.7, 0.0)]
    eps, g, _ = perturbed(model, mask, Rule.named("elementwise_l2"), rho=rho)
    w = flat(list(model.parameters()))
    radii = np.concatenate([np.full(40, 0.1), np.full(4, 0.7), np.zeros(12), np.zeros(3)])
    expected, _ = reference_eps(
        w, g, mask, metric="elementwise", p=2, eta=0.01, bias="identity", scope="masked", rho=radii
    )
    np.testing.assert_allclose(eps, expected, rtol=1e-6 if rho_as is torch.tensor else 1e-13, atol=1e-18)


@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_zero_gradient_does_not_move(name, form):
    model = Quadratic()
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    eps, _, out = perturbed(model, quadratic_masks(model)[form], Rule.named(name), gradients=zeros)
    assert not eps.any()
    assert bool(out.finite)
    assert out.radius.item() == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_nonfinite_gradient_does_not_move(name, form, value):
    model = Quadratic()
    mask = quadratic_masks(model)[form]
    gradients = [torch.ones_like(p) for p in model.parameters()]
    for gradient, part in zip(gradients, mask.dense(), strict=True):
        if part.any():
            gradient.view(-1)[part.view(-1).nonzero()[-1]] = value
    eps, _, out = perturbed(model, mask, Rule.named(name), gradients=gradients)
    assert not eps.any()
    assert not bool(out.finite)
    assert out.radius.item() == 0.0


@pytest.mark.parametrize("name", RULE_NAMES)
def test_gradients_and_weights_are_not_changed(name):
    model = Quadratic()
    gradients = list(torch.autograd.grad(model(model.b).mean(), list(model.parameters())))
    before = [g.clone() for g in gradients], [p.detach().clone() for p in model.parameters()]
    for mask in quadratic_masks(model).values():
        perturbed(model, mask, Rule.named(name), gradients=gradients)
    assert all(torch.equal(a, b) for a, b in zip(before[0], gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[1], model.parameters(), strict=True))


def test_what_lies_outside_the_mask_does_not_matter():
    """A wild gradient outside the mask changes nothing under the masked scope, in every form."""
    model = Quadratic()
    gradients = list(torch.autograd.grad(model(model.b).mean(), list(model.parameters())))
    for mask in quadratic_masks(model).values():
        wild = [torch.where(part, g, math.nan) for g, part in zip(gradients, mask.dense(), strict=True)]
        a, _, out = perturbed(model, mask, Rule(), gradients=gradients)
        b, _, wild_out = perturbed(model, mask, Rule(), gradients=wild)
        np.testing.assert_array_equal(a, b)
        assert bool(wild_out.finite)
        assert out.radius == wild_out.radius


@pytest.mark.parametrize("rule", ["l2", "elementwise_l2", "layerwise_linf"])
def test_channels_last_gives_the_same_eps(rule):
    """Index positions are in storage order: the same coordinates must move under any layout of w and of g."""
    plain = make("resnet")
    last = make("resnet").to(memory_format=torch.channels_last)
    mask = mixed_mask(plain)
    gradients = [torch.randn(p.shape) for p in plain.parameters()]
    results = []
    for model in (plain, last):
        for layout in (torch.contiguous_format, torch.channels_last):
            region = Region(mask, model)
            laid = [g.contiguous(memory_format=layout) if g.ndim == 4 else g for g in gradients]
            out = perturb(Rule.named(rule), region, [laid[p.position] for p in region.pieces], 0.1)
            results.append(region.scatter(out.values))
    keep = [part for part in mask.dense() if part.any()]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    for eps, part in zip(results[-1], keep, strict=True):
        assert not eps[~part].any()
        assert eps[part].all()


# -- the norm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [1, 2048, 2049, 65536, 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_total_norm(numel, dtype):
    generator = torch.Generator().manual_seed(numel)
    tensors = [torch.randn(numel, generator=generator).to(dtype), torch.randn(7, generator=generator).to(dtype)]
    exact = math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))
    assert total_norm(tensors).item() == pytest.approx(exact, rel=1e-13 if dtype == torch.float64 else 5e-7)
    assert total_norm(tensors).dtype == torch.float64


def test_total_norm_of_any_layout():
    big = torch.randn(4, 32, 32, 32)
    for tensor in (
        big,
        big.to(memory_format=torch.channels_last),
        big.transpose(0, 3),
        big[:, ::2],
        big.expand(2, 4, 32, 32, 32),
    ):
        exact = math.sqrt(float((tensor.double() ** 2).sum()))
        assert total_norm([tensor]).item() == pytest.approx(exact, rel=5e-7)


def test_total_norm_is_accurate_where_torch_is_not():
    """The float32 norm of many entries is off by 1e-4; the radius is not."""
    tensor = torch.full((10_000_000,), 0.01)
    assert total_norm([tensor]).item() == pytest.approx(0.01 * math.sqrt(1e7), rel=2e-6)
    assert torch.linalg.vector_norm(tensor).item() != pytest.approx(0.01 * math.sqrt(1e7), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-24, 1e-21, 1e-17, 1e17, 1e20, 1e30])
def test_total_norm_out_of_the_range_of_squares(scale):
    tensors = [torch.randn(1000) * scale, torch.randn(70_000) * scale]
    exact = math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))
    assert total_norm(tensors).item() == pytest.approx(exact, rel=1e-6)


def test_total_norm_at_the_edges():
    assert total_norm([]).item() == 0.0
    assert total_norm([torch.zeros(3), torch.zeros(0)]).item() == 0.0
    assert math.isnan(total_norm([torch.tensor([1e30, math.nan])]).item())
    assert total_norm([torch.tensor([1.0, math.inf])]).item() == math.inf
    assert total_norm([torch.ones(3), torch.ones(6, dtype=torch.float64)]).item() == pytest.approx(3.0, rel=1e-7)


@pytest.mark.parametrize("scale", [1e-27, 1e-22, 1e20])
def test_the_radius_is_rho_for_gradients_of_any_size(scale):
    model = nn.Linear(30, 30)
    mask = Mask(ParamTable.from_model(model), (True, True))
    region = Region(mask, model)
    out = perturb(Rule(), region, [torch.randn_like(p) * scale for p in model.parameters()], 0.05)
    assert out.radius.item() == pytest.approx(0.05, rel=1e-5)


def test_a_vanishing_gradient_gives_a_finite_eps():
    model = nn.Linear(3, 3)
    region = Region(Mask(ParamTable.from_model(model), (True, True)), model)
    out = perturb(Rule(), region, [torch.full_like(p, 1e-42) for p in model.parameters()], 100.0)
    assert all(torch.isfinite(v).all() for v in out.values)


# -- names and settings --------------------------------------------------------------------------------------


def test_named_rules():
    assert Rule.named("l2") == Rule() == Rule(Identity(), 2)
    assert Rule.named("linf") == Rule(p=math.inf)
    assert Rule.named("elementwise_l2") == Rule(Elementwise(0.01, "identity"))
    assert Rule.named("layerwise_linf", eta=0.2, bias="adaptive") == Rule(Layerwise(0.2, "adaptive"), math.inf)


def test_equal_rules_have_equal_text():
    """Checkpoints compare rules as text."""
    assert repr(Rule(Elementwise(0), 2.0)) == repr(Rule(Elementwise(0.0), 2))
    assert repr(Rule(Layerwise(1))) == repr(Rule(Layerwise(1.0)))


@pytest.mark.parametrize(
    ("make_rule", "message"),
    [
        (lambda: Rule.named("elementwise_l1"), "unknown rule 'elementwise_l1'; did you mean elementwise_l2"),
        (lambda: Rule.named("l2", eta=0.1), "'l2' takes neither eta nor a bias"),
        (lambda: Rule.named("linf", bias="adaptive"), "'linf' takes neither eta nor a bias"),
        (lambda: Rule(p=1), "p must be 2 or infinity, got 1"),
        (lambda: Elementwise(-0.1), "eta must be a finite number >= 0, got -0.1"),
        (lambda: Layerwise(math.nan), "eta must be a finite number >= 0, got nan"),
        (lambda: Elementwise("0.1"), "eta must be a finite number >= 0, got 0.1"),
        (lambda: Elementwise(bias="identiy"), "unknown bias convention 'identiy'; did you mean identity"),
    ],
)
def test_refused_rules(make_rule, message):
    with pytest.raises(InputError, match=message):
        make_rule()
