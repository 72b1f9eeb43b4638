"""Universal SAM: every measure's constants, and the expectation of the step's gradient, in closed form.

On a quadratic the Hessian is constant and the penalties have no gradient, so most of this is on
``L = sum_i a_i w_i^4 + b_i w_i^6``, whose expectations over x are polynomials in w and rho.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from masks import InputError, Mask, ParamTable
from masks.region import Region
from sam import SAM, Method, MethodSpec, build_method
from sam.methods.universal_sam import MEASURES, RandomPoints
from tests.sam.nets import (
    BASES,
    ENTRIES,
    Quadratic,
    Recorder,
    batches,
    buffers,
    build,
    closure,
    flat,
    gradients,
    losses,
    make,
    mixed_mask,
    quadratic_masks,
    same_bits,
    snapshot,
    state_of,
    take,
)

RHO, LAM, WIDTH = 0.3, 0.7, 0.5


class Polynomial(nn.Module):
    """``L = sum_i a_i w_i^4 + b_i w_i^6`` in float64; whatever the batch, one example."""

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b, w = torch.rand(3, size, generator=generator, dtype=torch.float64) * 0.6 + 0.2
        self.weight = nn.Parameter(w)

    def forward(self, _: object) -> torch.Tensor:
        w = self.weight
        return (self.a * w**4 + self.b * w**6).sum()[None]

    def slope(self, w: np.ndarray) -> np.ndarray:
        return 4 * self.a.numpy() * w**3 + 6 * self.b.numpy() * w**5


def mask_of(model: Polynomial, keep: list[int]) -> Mask:
    part = torch.zeros(len(model.weight), dtype=torch.bool)
    part[keep] = True
    return Mask(ParamTable.from_model(model), (part,))


def step_gradient(model, mask, method: Method, *, rho: float = RHO, seed: int = 0) -> np.ndarray:
    """The gradient that one step hands to the base optimizer."""
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=rho, method=method, seed=seed)
    optimizer.step_on(model, None)
    return flat([p.grad for p in model.parameters()])


def given_noise(monkeypatch, points: list[np.ndarray]) -> None:
    """Let the coming draws be these points, over the masked coordinates."""
    rest = iter(points)

    def noise(self, piece, generator):
        return torch.zeros_like(piece.param).masked_scatter(piece.keep, torch.from_numpy(next(rest)))

    monkeypatch.setattr(RandomPoints, "_noise", noise)


def expected_gradient(monkeypatch, model, mask, method: Method, nodes, weights) -> np.ndarray:
    """E of the step's gradient, by a product rule over all entries of all draws."""
    kept, n = mask.num_kept, method.ascent.n
    total = 0.0
    for index in itertools.product(range(len(nodes)), repeat=kept * n):
        given_noise(monkeypatch, list(nodes[list(index)].reshape(n, kept)))
        total = total + math.prod(weights[list(index)]) * step_gradient(model, mask, method)
    return total


def gauss(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of E f(x), x ~ N(0, 1); exact for polynomials of degree below 2 * points."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return nodes, weights / weights.sum()


def uniform(points: int, a: float) -> tuple[np.ndarray, np.ndarray]:
    """The same for x uniform on [-a, a]."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return nodes * a, weights / 2


# -- the measures: their constants ---------------------------------------------------------------------------


def test_constants_of_the_measures():
    """From t = x^T H x / 2: tr(H) / 2, ||H||_F^2, and products of error functions that become a^2d det(H) / pi^d."""
    h = np.array([2.0, 0.5])
    nodes, weights = gauss(5)
    grid = np.array(list(itertools.product(nodes, nodes)))
    probability = np.array([p * q for p, q in itertools.product(weights, weights)])
    t = 0.5 * grid**2 @ h
    assert probability @ t == pytest.approx(h.sum() / 2, rel=1e-12)
    # The expected sample variance of two draws is that of the population.
    pairs = [(p * q, [u, v]) for (p, u), (q, v) in itertools.product(zip(probability, t, strict=True), repeat=2)]
    found = sum(p * float(MEASURES["frobenius"](torch.tensor(pair))) for p, pair in pairs)
    assert found == pytest.approx((h**2).sum(), rel=1e-12)
    middle = (np.arange(400) + 0.5) / 200 - 1
    for a in (0.1, 1.5, 20.0):
        x = a * np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 2)
        S = float(MEASURES["determinant"](torch.from_numpy(0.5 * x**2 @ h)))
        one = [math.sqrt(math.pi / value) * math.erf(a * math.sqrt(value) / 2) / a for value in h]
        assert pytest.approx(math.prod(one) ** -2, rel=1e-3) == S
        if a == 20:
            assert pytest.approx((a**2 / math.pi) ** 2 * math.prod(h), rel=1e-3) == S
        if a == 0.1:
            assert pytest.approx(a**2 * h.sum() / 6, rel=1e-2) == S - 1
    assert float(MEASURES["trace"](torch.from_numpy(t))) == pytest.approx(t.mean())


# -- the expectation of a step's gradient, exactly ------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [True, False])
def test_expectation_of_trace(monkeypatch, antithetic):
    """``L + lam E t``: tr(H) / 2, the finite-rho term of the sixth power included, on the masked coordinates only."""
    model = Polynomial(3)
    a, b, w = model.a.numpy(), model.b.numpy(), flat([model.weight])
    mask = mask_of(model, [0, 2])
    method = build_method("universal_sam", measure="trace", n=1, lam=LAM, antithetic=antithetic)
    found = expected_gradient(monkeypatch, model, mask, method, *gauss(4))
    penalty = 12 * a * w + 60 * b * w**3 + 90 * b * RHO**2 * w
    expected = model.slope(w) + LAM * np.array([1, 0, 1]) * penalty
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_expectation_of_frobenius(monkeypatch):
    """``L + lam 2 Var t``, ||H||_F^2 and the terms in rho: for a w^4, t = a (6 w^2 x^2 + rho^2 x^4)."""
    model = Polynomial(3)
    model.b.zero_()
    a, w = model.a.numpy(), flat([model.weight])
    mask = mask_of(model, [0, 2])
    method = build_method("universal_sam", measure="frobenius", lam=LAM)
    found = expected_gradient(monkeypatch, model, mask, method, *gauss(4))
    # 2 Var t = a^2 (144 w^4 + 288 w^2 rho^2 + 192 rho^4), from Var x^2 = 2, Cov(x^2, x^4) = 12, Var x^4 = 96
    penalty = a**2 * (576 * w**3 + 576 * w * RHO**2)
    expected = model.slope(w) + LAM * np.array([1, 0, 1]) * penalty
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_expectation_of_published_frobenius_is_a_gradient_norm(monkeypatch):
    """One-sided points on a quadratic: ``lam 2 Var t = lam (2 ||g||^2 / rho^2 + ||H||_F^2)``; antithetic ones: none."""
    h, w = np.array([2.0, 0.5, 1.0]), np.array([0.3, -0.7, 0.4])

    class Bowl(Polynomial):
        def forward(self, _):
            return (0.5 * torch.from_numpy(h) * self.weight**2).sum()[None]

    model = Bowl(3)
    model.weight.data = torch.from_numpy(w.copy())
    mask = mask_of(model, [0, 2])
    for antithetic, factor in ((False, 4 * LAM / RHO**2), (True, 0.0)):
        method = build_method("universal_sam", measure="frobenius", lam=LAM, antithetic=antithetic)
        found = expected_gradient(monkeypatch, model, mask, method, *gauss(3))
        np.testing.assert_allclose(found, h * w + factor * np.array([1, 0, 1]) * h * (h * w), rtol=1e-10)


@pytest.mark.parametrize("antithetic", [True, False])
def test_expectation_of_determinant(monkeypatch, antithetic):
    """n draws: the gradient of ``L + lam E[(mean exp(-t / 2))^-2]``, here for n = 2, one coordinate; by quadrature
    over the draws and central differences in w."""
    model = Polynomial(2)
    mask = mask_of(model, [1])
    method = build_method("universal_sam", measure="determinant", n=2, lam=LAM, a=WIDTH, antithetic=antithetic)
    nodes, weights = uniform(12, WIDTH)
    found = expected_gradient(monkeypatch, model, mask, method, nodes, weights)
    a, b, w = model.a.numpy(), model.b.numpy(), flat([model.weight])

    def objective(w: np.ndarray) -> float:
        def loss(v):
            return a[1] * v**4 + b[1] * v**6

        t = (loss(w[1] + RHO * nodes) - loss(w[1])) / RHO**2
        if antithetic:
            t = (t + t[::-1]) / 2
        psi = np.exp(-t / 2)
        S = weights @ ((psi[:, None] + psi[None, :]) / 2) ** -2 @ weights
        return float((a * w**4 + b * w**6).sum() + LAM * S)

    step = 1e-5 * np.eye(2)
    expected = [(objective(w + e) - objective(w - e)) / 2e-5 for e in step]
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_determinant_of_many_draws(monkeypatch):
    """As many draws as a grid has points: the gradient of ``L + lam (E exp(-t / 2))^-2`` itself."""
    model = Polynomial(1)
    n = 200
    grid = WIDTH * ((np.arange(n) + 0.5) * 2 / n - 1)
    rest = iter(grid)
    monkeypatch.setattr(RandomPoints, "_noise", lambda self, piece, generator: torch.tensor([next(rest)]))
    method = build_method("universal_sam", measure="determinant", n=n, lam=LAM, a=WIDTH)
    found = step_gradient(model, Mask(ParamTable.from_model(model), (True,)), method)
    nodes, weights = uniform(20, WIDTH)
    a, b, w = model.a.item(), model.b.item(), model.weight.item()

    def S(w: float) -> float:
        x = RHO * nodes
        t = a * (6 * w**2 * x**2 + x**4) + b * (15 * w**4 * x**2 + 15 * w**2 * x**4 + x**6)
        return float((weights @ np.exp(-t / RHO**2 / 2)) ** -2)

    slope = (S(w + 1e-5) - S(w - 1e-5)) / 2e-5
    assert found[0] == pytest.approx(model.slope(w)[0] + LAM * slope, rel=1e-4)


# -- the same with the method's own draws --------------------------------------------------------------------


@pytest.mark.parametrize("keep", [[1], [0, 1, 2, 5, 6, 7, 9], list(range(12))], ids=["index", "dense", "whole"])
def test_monte_carlo_mean(keep):
    """The mean of 400 steps' gradients is the expectation, within 4 standard errors: the draws have the variance that
    they should have, in every form of a mask, and are independent."""
    model = Polynomial(12)
    a, b, w = model.a.numpy(), model.b.numpy(), flat([model.weight])
    mask = mask_of(model, keep)
    inside = np.isin(np.arange(12), keep)
    cases = {
        "trace": ({}, 12 * a * w + 60 * b * w**3 + 90 * b * RHO**2 * w),
        # a narrow cube: S = 1 + a^2 tr(H) / 6 + O(a^4), the variance of x being a^2 / 3
        "determinant": ({"a": 0.05}, 0.05**2 / 6 * (24 * a * w + 120 * b * w**3)),
    }
    for measure, (options, penalty) in cases.items():
        method = build_method("universal_sam", measure=measure, n=1, lam=LAM, **options)
        optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=RHO, method=method)
        found = []
        for _ in range(400):
            optimizer.step_on(model, None)
            found.append(flat([model.weight.grad]) - model.slope(w))
        found = np.array(found) / LAM
        np.testing.assert_allclose(found[:, ~inside], 0, atol=1e-14)
        error = found.std(0, ddof=1)[inside] / math.sqrt(len(found))
        assert (np.abs(found.mean(0)[inside] - penalty[inside]) < 4 * error).all(), measure
        assert (error < 0.2 * np.abs(penalty[inside])).all()  # so that a wrong constant would show


@pytest.mark.parametrize(("measure", "deviation"), [("trace", 1.0), ("determinant", WIDTH / math.sqrt(3))])
def test_distribution_of_the_draws(measure, deviation):
    """Centred: the pairs of antithetic points would hide it if it were not."""
    model = Polynomial(20000)
    region = Region(Mask(ParamTable.from_model(model), (True,)), model)
    ascent = RandomPoints(measure, 1, LAM, WIDTH, True)
    x = ascent._noise(region.pieces[0], torch.Generator().manual_seed(0))
    assert abs(float(x.mean())) < 4 * deviation / math.sqrt(len(x))
    assert float(x.std()) == pytest.approx(deviation, rel=0.02)
    assert float(x.max()) == pytest.approx(WIDTH, rel=1e-3) if measure == "determinant" else x.max() > 3


def test_noise_is_drawn_over_the_mask_and_is_not_normalised():
    """||rho x||^2 is about rho^2 times the number of masked coordinates; reported as the radius."""
    model = make("resnet")
    mask = build(model, "norm")
    method = build_method("universal_sam", n=3)
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=mask, rho=0.01, method=method)
    recorder = Recorder(model)
    optimizer.step_on(recorder, batches()[0])
    found = []
    for k in range(1, 7):
        eps = recorder.eps(0, k)
        found.append(math.sqrt(sum(float(e.double().square().sum()) for e in eps.values())))
    for plus, minus in ((1, 2), (3, 4), (5, 6)):
        opposite = recorder.eps(0, minus)
        torch.testing.assert_close(recorder.eps(0, plus), {k: -e for k, e in opposite.items()}, rtol=0, atol=2e-7)
    assert len({round(norm, 7) for norm in found[::2]}) == 3
    assert float(optimizer.stats.radius) == pytest.approx(np.mean(found), rel=1e-4)
    assert np.mean(found) == pytest.approx(0.01 * math.sqrt(mask.num_kept), rel=0.2)


# -- identities, passes, surroundings ------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["all", "norm", "mixed"])
@pytest.mark.parametrize("net", ["resnet", "vit"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_lam_zero_is_the_base_optimizer(net, name, base, entry):
    model, twin = make(net, dropout=0.2), make(net, dropout=0.2)
    mask = mixed_mask(model) if name == "mixed" else build(model, name)
    plain = BASES[base](twin.parameters())
    method = build_method("universal_sam", lam=0)
    optimizer = SAM(BASES[base](model.parameters()), model, mask=mask, method=method)
    torch.manual_seed(5)
    for batch in batches(3):
        take(optimizer, losses(model), batch, entry)
    torch.manual_seed(5)
    for batch in batches(3):
        plain.step(closure(plain, losses(twin), batch))
    assert same_bits(snapshot(model), snapshot(twin))
    assert same_bits(buffers(model), buffers(twin))
    assert same_bits(state_of(optimizer), state_of(plain))


def test_the_published_trace_default_is_the_gradient_at_a_random_point():
    """lam = rho^2, one draw, one-sided."""
    model = Quadratic()
    mask = quadratic_masks(model)["mixed"]
    method = build_method("universal_sam", lam=0.09, antithetic=False)
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=0.3, method=method)
    recorder = Recorder(model, model)
    optimizer.step_on(recorder, model.b)
    point = flat(list(recorder.weights[1].values()))
    expected = model.A.numpy() @ point - model.b.numpy().mean(0)
    np.testing.assert_allclose(flat([p.grad for p in model.parameters()]), expected, rtol=1e-11)


@pytest.mark.parametrize("options", ["measure=frobenius:n=3", "measure=determinant:a=0.5:lam=0.01", "n=2"])
@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_both_entries_agree_and_dropout_is_replayed(net, options):
    found = []
    for entry in ENTRIES:
        model = make(net, dropout=0.3)
        chosen = dict(part.split("=") for part in options.split(":"))
        method = build_method("universal_sam", **chosen)
        optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=mixed_mask(model), rho=0.01, method=method)
        recorder = Recorder(model)
        twin = make(net, dropout=0.3)
        torch.manual_seed(5)
        take(optimizer, recorder, batches()[0], entry)
        assert net == "vit" or all(same_bits(drawn, recorder.drawn[0]) for drawn in recorder.drawn[1:])
        torch.manual_seed(5)
        losses(twin)(batches()[0])  # one clean forward pass
        assert same_bits(buffers(model), buffers(twin))
        found.append((snapshot(model), gradients(model)))
    assert same_bits(found[0], found[1])


@pytest.mark.parametrize(
    ("options", "passes"),
    [({}, 3), ({"n": 3}, 7), ({"antithetic": False}, 2), ({"measure": "frobenius"}, 5), ({"lam": 0}, 1)],
)
def test_passes_are_as_stated(options, passes):
    model = make("resnet")
    method = build_method("universal_sam", **options)
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), rho=0.01, method=method)
    recorder = Recorder(model)
    backward = []
    model.conv1.weight.register_hook(backward.append)
    optimizer.step_on(recorder, batches()[0])
    spec = MethodSpec("universal_sam", options)
    assert spec.info.num_passes(**spec.options) == passes
    assert len(recorder.weights) == len(backward) == passes


def test_a_parameter_that_the_loss_does_not_use_keeps_no_gradient():
    model = make("resnet")
    model.unused = nn.Linear(3, 3)
    method = build_method("universal_sam")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "all"), rho=0.01, method=method)
    before = snapshot(model)
    optimizer.step_on(losses(model), batches()[0])
    assert model.unused.weight.grad is None  # else weight decay would shrink it
    assert same_bits(before["unused.weight"], snapshot(model)["unused.weight"])


def test_refused():
    for options, message in [
        ({"measure": "frobenius", "n": 1}, "n must be at least 2 for measure=frobenius, got 1"),
        ({"n": 0}, "n must be at least 1"),
        ({"lam": -1.0}, "lam must be a finite number >= 0, got -1.0"),
        ({"lam": math.inf}, "lam must be a finite number"),
        ({"a": 0.1}, "half-width of the determinant's cube; measure=trace"),
        ({"measure": "determinant", "a": 0.0}, "a must be a finite number > 0, got 0.0"),
    ]:
        with pytest.raises(InputError, match=message):
            build_method("universal_sam", **options)
    model = Quadratic()
    mask = quadratic_masks(model)["all"]
    tensors = list(model.parameters())
    for groups, options, message in [
        ([{"params": tensors}], {"rho": 0.0}, "rho must be > 0"),
        ([{"params": tensors[:1], "rho": 0.1}, {"params": tensors[1:]}], {}, r"radii are \[0.05, 0.1\]"),
    ]:
        before = snapshot(model)
        method = build_method("universal_sam")
        optimizer = SAM(torch.optim.SGD(groups, 0.1), model, mask=mask, method=method, **options)
        with pytest.raises(InputError, match=message):
            optimizer.step_on(model, model.b)
        assert same_bits(before, snapshot(model))
    with pytest.raises(InputError, match="takes no norm"):
        SAM(torch.optim.SGD(tensors, 0.1), model, mask=mask, method=build_method("universal_sam"), norm_scope="full")
