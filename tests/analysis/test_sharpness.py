"""m-sharpness against closed forms on quadratics, the exact maximum over the ball, and plain arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.func import functional_call

from analysis.examples import data_digest
from analysis.sharpness import m_sharpness
from masks.errors import InputError, MaskError
from masks.mask import Mask, Provenance
from masks.params import ParamTable
from sam.perturbation import Elementwise, Layerwise, Rule

L2, LINF = Rule(p=2), Rule(p=math.inf)
DIM = 40


class Quadratic(nn.Module):
    """With :func:`half_square`: loss of example x = 0.5 (w - x)^T A (w - x)."""

    def __init__(self, a: Tensor, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.register_buffer("a", a)
        self.visited: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.visited.append(self.w.detach().clone())
        r = self.w - x
        return torch.stack([r, r @ self.a])


def half_square(out: Tensor, _: Tensor) -> Tensor:
    return 0.5 * (out[0] * out[1]).sum(1)


def problem(seed: int = 0, *, diagonal: bool = False) -> tuple[Quadratic, Tensor, list[tuple[Tensor, Tensor]]]:
    """A positive definite quadratic and 10 examples in uneven batches."""
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(DIM, generator=g, dtype=torch.float64) + 0.1
    if not diagonal:
        q, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=g, dtype=torch.float64))
        a = q * a @ q.T
    else:
        a = torch.diag(a)
    w = torch.randn(DIM, generator=g, dtype=torch.float64)
    x = torch.randn(10, DIM, generator=g, dtype=torch.float64)
    y = torch.zeros(10)
    return Quadratic(a, w), x, list(zip(x.split([4, 5, 1]), y.split([4, 5, 1]), strict=True))


def micro_gradients(model: Quadratic, x: Tensor, m: int) -> list[Tensor]:
    """A (w - mean of x) for every complete micro-batch."""
    return [model.a @ (model.w.detach() - x[i * m : (i + 1) * m].mean(0)) for i in range(len(x) // m)]


def rise(g: Tensor, a: Tensor, delta: Tensor) -> float:
    return float(g @ delta + 0.5 * delta @ a @ delta)


CLOSED_FORMS = {
    "l2": (L2, lambda g, w, rho: rho * g / g.norm()),
    "linf": (LINF, lambda g, w, rho: rho * g.sign()),
    "elementwise l2": (
        Rule(Elementwise(0.01)),
        lambda g, w, rho: rho * (w.abs() + 0.01) ** 2 * g / ((w.abs() + 0.01) * g).norm(),
    ),
    "elementwise linf": (Rule(Elementwise(0.3), math.inf), lambda g, w, rho: rho * (w.abs() + 0.3) * g.sign()),
    "layerwise l2": (Rule(Layerwise()), lambda g, w, rho: rho * w.norm() * g / g.norm()),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("m", [1, 3, 10])
def test_one_step_closed_form(name, m):
    rule, delta = CLOSED_FORMS[name]
    model, x, batches = problem()
    got = m_sharpness(model, batches, m=m, rho=0.3, rule=rule, loss=half_square)
    w = model.w.detach()
    want = [rise(g, model.a, delta(g, w, 0.3)) for g in micro_gradients(model, x, m)]
    assert got.n == len(want) == 10 // m
    assert got.value == pytest.approx(np.mean(want), rel=1e-12)
    if got.n > 1:
        assert got.standard_error == pytest.approx(np.std(want, ddof=1) / math.sqrt(len(want)), rel=1e-9)
    else:
        assert got.standard_error is None
    assert (got.settings["num_examples"], got.settings["num_dropped"]) == (10 // m * m, 10 % m)


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("name", [name for name in CLOSED_FORMS if "layerwise" not in name])
def test_one_step_under_a_mask(name, density):
    rule, delta = CLOSED_FORMS[name]
    model, x, batches = problem()
    keep = torch.zeros(DIM, dtype=torch.bool)
    keep[torch.arange(3, DIM, round(1 / density))] = True
    mask = Mask(ParamTable.from_model(model), (keep,))
    got = m_sharpness(model, batches, m=5, rho=0.3, rule=rule, mask=mask, loss=half_square)
    w, sub = model.w.detach()[keep], model.a[keep][:, keep]
    want = [rise(g[keep], sub, delta(g[keep], w, 0.3)) for g in micro_gradients(model, x, 5)]
    assert got.value == pytest.approx(np.mean(want), rel=1e-12)
    assert f"mask explicit ({int(keep.sum())} of 40 coordinates)" in got.name
    # Nothing outside the mask ever moved, and something inside did.
    moved = torch.stack(model.visited) != model.w.detach()
    assert not moved[:, ~keep].any()
    assert moved[:, keep].any()


@pytest.mark.parametrize("method", ["pgd", "apgd"])
@pytest.mark.parametrize("rule", [LINF, Rule(Elementwise(0.05, "adaptive"), math.inf)])
def test_linf_reaches_the_corner_of_a_diagonal_quadratic(rule, method):
    model, x, batches = problem(diagonal=True)
    c = torch.ones(DIM, dtype=torch.float64) if rule is LINF else model.w.detach().abs() + 0.05
    # Of the two ends of a coordinate the better one is where the gradient at w points: the curvature adds the
    # same to both.
    want = [float((0.4 * c * g.abs() + 0.5 * 0.16 * c**2 * model.a.diag()).sum()) for g in micro_gradients(model, x, 5)]
    got = m_sharpness(model, batches, m=5, rho=0.4, rule=rule, method=method, steps=10, loss=half_square)
    assert got.value == pytest.approx(np.mean(want), rel=1e-12)


def trust_region_maximum(g: Tensor, a: Tensor, rho: float) -> float:
    """max g.u + u.A.u / 2 over ||u|| <= rho for positive definite A: (mu - A) u = g with mu > lambda_max."""
    values, q = torch.linalg.eigh(a)
    b = (q.T @ g).numpy()
    lam = values.numpy()

    def excess(mu: float) -> float:
        return float(np.linalg.norm(b / (mu - lam)) - rho)

    mu = brentq(excess, lam[-1] + 1e-9, lam[-1] + np.linalg.norm(b) / rho + 1, xtol=1e-14)
    u = b / (mu - lam)
    return float(b @ u + 0.5 * u @ (lam * u))


@pytest.mark.parametrize("rule", [L2, Rule(Elementwise(0.05))])
@pytest.mark.parametrize("rho", [0.3, 3.0, 30.0])
def test_pgd_l2_reaches_the_trust_region_maximum(rule, rho):
    model, x, batches = problem()
    c = torch.ones(DIM, dtype=torch.float64) if rule is L2 else model.w.detach().abs() + 0.05
    want = np.mean([
        trust_region_maximum(c * g, c[:, None] * model.a * c, rho) for g in micro_gradients(model, x, 5)
    ])  # fmt: skip
    one, default, converged = (
        m_sharpness(model, batches, m=5, rho=rho, rule=rule, steps=k, step_size=size, loss=half_square)
        for k, size in [(1, None), (20, None), (200, 1.0)]
    )
    assert one.value <= default.value <= converged.value <= want * (1 + 1e-12)
    assert converged.value == pytest.approx(want, rel=1e-6)
    assert default.value == pytest.approx(want, rel=0.05)
    if rho > 1:
        assert one.value < 0.995 * want  # the problem tells them apart
    assert default.settings["step_size"] == 0.125
    assert "200-step projected gradient (step 1 rho)" in converged.name
    auto, longer = (
        m_sharpness(model, batches, m=5, rho=rho, rule=rule, method="apgd", steps=k, loss=half_square)
        for k in (20, 200)
    )
    assert default.value * (1 - 1e-9) <= auto.value <= want * (1 + 1e-12)
    assert auto.value == pytest.approx(want, rel=0.01)
    assert longer.value == pytest.approx(want, rel=1e-6)
    assert "20-step Auto-PGD" in auto.name


def test_ascent_never_leaves_the_ball():
    model, _, batches = problem()
    w = model.w.detach().clone()
    for rule, norm in [
        (L2, lambda d: d.norm()),
        (LINF, lambda d: d.abs().max()),
        (Rule(Elementwise(0.1)), lambda d: (d / (w.abs() + 0.1)).norm()),
        (Rule(Elementwise(0.1), math.inf), lambda d: (d / (w.abs() + 0.1)).abs().max()),
    ]:
        model.visited.clear()
        m_sharpness(model, batches, m=5, rho=2.0, rule=rule, steps=4, loss=half_square)
        radii = [float(norm(v - w)) for v in model.visited]
        assert max(radii) == pytest.approx(2.0, rel=1e-9)
        # A first pass at w over both micro-batches; for both w, the one-step point, the iterates (the first of length
        # 2.5 rho / K).
        assert len(radii) == 2 * (1 + 2 + 4)
        assert radii[4] == pytest.approx(2.5 * 2.0 / 4, rel=1e-9)
        model.visited.clear()
        m_sharpness(model, batches, m=5, rho=2.0, rule=rule, method="apgd", steps=9, loss=half_square)
        radii = [float(norm(v - w)) for v in model.visited]
        assert max(radii) == pytest.approx(2.0, rel=1e-9)
        assert len(radii) == 2 * (1 + 1 + 9)
        assert radii[3] == pytest.approx(2.0, rel=1e-9)  # the first iterate is the one-step point


def test_one_step_may_be_negative_and_ascent_may_not():
    a, w = -torch.eye(DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
    model = Quadratic(a, w)
    batches = [(torch.full((4, DIM), 1e-3, dtype=torch.float64), torch.zeros(4))]
    g = float((a @ (w - 1e-3)).norm())
    one = m_sharpness(model, batches, m=4, rho=1.0, rule=L2, loss=half_square)
    assert one.value == pytest.approx(g - 0.5, rel=1e-9)
    assert m_sharpness(model, batches, m=4, rho=1.0, rule=L2, steps=2, loss=half_square).value == 0.0


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("p", [2, math.inf])
def test_weights_that_are_zero_do_not_move_without_a_floor(p, steps):
    model, _, batches = problem()
    with torch.no_grad():
        model.w[::4] = 0.0
        model.w[1] = -0.0
    w = model.w.detach().clone()
    got = m_sharpness(model, batches, m=5, rho=0.3, rule=Rule(Elementwise(0.0), p), steps=steps, loss=half_square)
    assert math.isfinite(got.value)
    visited = torch.stack(model.visited)
    assert not visited[:, w == 0].any()
    assert (visited[:, w != 0] != w[w != 0]).any()
    assert math.copysign(1.0, float(model.w.detach()[1])) == -1.0


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("rule", [L2, LINF])
def test_flat_loss_gives_exactly_zero(rule, steps):
    model = Quadratic(torch.zeros(DIM, DIM, dtype=torch.float64), torch.ones(DIM, dtype=torch.float64))
    batches = [(torch.zeros(4, DIM, dtype=torch.float64), torch.zeros(4))]
    assert m_sharpness(model, batches, m=2, rho=1.0, rule=rule, steps=steps, loss=half_square).value == 0.0


# -- networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_network_in_evaluation_mode_against_plain_arithmetic(case, masked):
    table = ParamTable.from_model(case.model)
    rows = [row.is_norm or not masked or case.name == "mlp" for row in table]
    mask = Mask(table, tuple(rows), Provenance("norm")) if masked else None
    model = case.fresh().train()
    got = m_sharpness(model, case.batches, m=50, rho=0.05, rule=L2, mask=mask)
    twin = case.fresh().eval()
    params = {k: p.detach() for k, p in twin.named_parameters()}
    want = []
    for x, y in zip(case.x.split(50), case.y.split(50), strict=True):
        leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
        clean = F.cross_entropy(functional_call(twin, leaves, (x,)), y)
        grads = torch.autograd.grad(clean, list(leaves.values()))
        kept = [g * keep for g, keep in zip(grads, rows, strict=True)]
        norm = torch.cat([g.flatten() for g in kept]).norm()
        moved = {k: p + 0.05 * g / norm for (k, p), g in zip(params.items(), kept, strict=True)}
        want.append(float(F.cross_entropy(functional_call(twin, moved, (x,)), y) - clean.detach()))
    assert got.value == pytest.approx(np.mean(want), rel=1e-10)
    assert got.n == 3


@pytest.mark.parametrize("rule", [L2, LINF, Rule(Elementwise())])
def test_more_search_finds_no_less(case, rule):
    rho = 0.02 if rule is LINF else 0.5
    one, few = (m_sharpness(case.model, case.batches, m=64, rho=rho, rule=rule, steps=k).value for k in (1, 4))
    assert few >= max(one, 0.0)
    assert few > 0


def test_float32_agrees_with_float64(case):
    single = m_sharpness(case.fresh(torch.float32), case.batches, m=64, rho=0.05, rule=L2)
    double = m_sharpness(case.model, case.batches, m=64, rho=0.05, rule=L2)
    assert single.value == pytest.approx(double.value, rel=1e-4)
    assert single.settings["dtype"] == "float32"


@pytest.mark.parametrize("steps", [1, 3])
def test_small_rises_of_large_float32_losses_are_not_rounded_away(steps):
    """4,096 losses of 4096, one of which rises by 1: the mean rises by 2^-12, half a float32 step."""
    model = nn.Linear(1, 1, bias=False)
    x = torch.zeros(4096, 1)
    x[0] = 1.0

    def loss(out: Tensor, _: Tensor) -> Tensor:
        return 4096 + out.squeeze(1)

    nn.init.zeros_(model.weight)
    assert m_sharpness(model, [(x, x)], m=4096, rho=1.0, rule=LINF, steps=steps, loss=loss).value == 2.0**-12


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("p", [2, math.inf])
def test_elementwise_adaptive_sharpness_is_invariant_to_relu_rescaling(p, steps):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 6, generator=g, dtype=torch.float64), torch.randint(3, (12,), generator=g)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=g, dtype=torch.float64))
    k = torch.linspace(0.1, 10, 9, dtype=torch.float64)
    scaled = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    with torch.no_grad():
        scaled[0].weight.copy_(net[0].weight * k[:, None])
        scaled[0].bias.copy_(net[0].bias * k)
        scaled[2].weight.copy_(net[2].weight / k)
        scaled[2].bias.copy_(net[2].bias)
    torch.testing.assert_close(net(x), scaled(x))

    def value(model: nn.Module, rule: Rule) -> float:
        return m_sharpness(model, [(x, y)], m=6, rho=0.05, rule=rule, steps=steps).value

    adaptive = Rule(Elementwise(0.0, "adaptive"), p)
    assert value(scaled, adaptive) == pytest.approx(value(net, adaptive), rel=1e-9)
    assert value(scaled, Rule(p=p)) != pytest.approx(value(net, Rule(p=p)), rel=0.05)


# -- Auto-PGD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "extra"), [("pgd", 2), ("apgd", 1)])
def test_k_steps_cost_k_gradients(monkeypatch, method, extra):
    model, _, batches = problem()
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), grad(*a, **k))[1])
    m_sharpness(model, batches, m=5, rho=0.5, rule=L2, method=method, steps=7, loss=half_square)
    assert len(calls) == 2 * 7
    assert len(model.visited) == 2 * (1 + 7 + extra)


def test_linf_on_a_general_quadratic_against_all_corners():
    """A convex function is largest at a corner: never exceeded, and found more often than by one step."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)
    found = {"one_step": 0, "pgd": 0, "apgd": 0}
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        root = torch.randn(8, 8, generator=g, dtype=torch.float64)
        a, w = root @ root.T, torch.randn(8, generator=g, dtype=torch.float64)
        gradient = a @ w
        want = float((corners @ gradient + 0.5 * ((corners @ a) * corners).sum(1)).max())
        values = {}
        for method in found:
            model = Quadratic(a, w)
            steps = 1 if method == "one_step" else 20
            data = [(torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1))]
            values[method] = m_sharpness(
                model, data, m=1, rho=1.0, rule=LINF, method=method, steps=steps, loss=half_square
            ).value
            assert values[method] <= want * (1 + 1e-12)
            found[method] += values[method] > want * (1 - 1e-9)
        assert values["one_step"] <= min(values["pgd"], values["apgd"]) * (1 + 1e-12)
    assert min(found["pgd"], found["apgd"]) > found["one_step"]
    assert found["apgd"] >= 12


# -- normalised logits, radius conventions, the data --------------------------------------------------------------


def test_normalised_logits_against_plain_arithmetic(case):
    model = case.fresh().eval()

    def by_hand(logits, targets):
        centred = logits - logits.mean(1)[:, None]
        return F.cross_entropy(centred / centred.square().sum(1).sqrt()[:, None], targets, reduction="none")

    settings = {"m": 50, "rho": 0.05, "rule": Rule(Elementwise(0.0, "adaptive"), math.inf), "method": "apgd"}
    got = m_sharpness(model, case.batches, steps=3, normalise_logits=True, **settings)
    want = m_sharpness(model, case.batches, steps=3, loss=by_hand, **settings)
    assert got.value == pytest.approx(want.value, rel=1e-9)
    assert got.name.endswith("evaluation-mode normalization, normalised logits")
    plain = m_sharpness(model, case.batches, steps=3, **settings)
    assert plain.value != pytest.approx(got.value, rel=0.05)
    assert "normalised" not in plain.name


def test_normalised_logits_that_are_all_equal_have_no_nan():
    model = nn.Linear(3, 4).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    data = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    got = m_sharpness(model, data, m=2, rho=0.1, rule=L2, method="apgd", steps=3, normalise_logits=True)
    assert 0 <= got.value < math.inf
    with pytest.raises(InputError, match=r"at least 2 classes, got shape \(2, 1\)"):
        m_sharpness(nn.Linear(3, 1), data, m=2, rho=0.1, rule=L2, normalise_logits=True, loss=lambda out, _: out[:, 0])


def test_radius_conventions():
    model, _, batches = problem()
    keep = torch.zeros(DIM, dtype=torch.bool)
    keep[:10] = True
    mask = Mask(ParamTable.from_model(model), (keep,))
    w = model.w.detach()
    eta, adaptive = Rule(Elementwise(0.1, "adaptive")), Rule(Elementwise(0.0, "adaptive"))
    size = w / (w.abs() + 0.1)
    for rule, convention, factor in [
        (L2, "same", 1.0),
        (L2, "rms", 0.5),
        (LINF, "rms", 1.0),
        (L2, "relative", float(w[:10].norm() / w.norm())),
        (LINF, "relative", float(w[:10].abs().max() / w.abs().max())),
        (eta, "relative", float(size[:10].norm() / size.norm())),
        (adaptive, "relative", 0.5),
        (Rule(Elementwise(0.0, "adaptive"), math.inf), "relative", 1.0),
    ]:
        got = m_sharpness(model, batches, m=5, rho=0.3, rule=rule, mask=mask, radius=convention, loss=half_square)
        want = m_sharpness(model, batches, m=5, rho=0.3 * factor, rule=rule, mask=mask, loss=half_square)
        assert got.value == pytest.approx(want.value, rel=1e-9)
        assert got.settings["radius_used"] == pytest.approx(0.3 * factor, rel=1e-9)
        assert got.settings["rho"] == 0.3
        if convention != "same":
            assert f"rho=0.3 by radius convention {convention}, here {0.3 * factor:.6g}" in got.name
        every = m_sharpness(model, batches, m=5, rho=0.3, rule=rule, radius=convention, loss=half_square)
        assert every.settings["radius_used"] == pytest.approx(0.3)
    with torch.no_grad():
        model.w[:10] = 0
    with pytest.raises(InputError, match="weights on the mask are all zero"):
        m_sharpness(model, batches, m=5, rho=0.3, rule=L2, mask=mask, radius="relative", loss=half_square)


def test_weights_that_are_zero_do_not_count_in_a_relative_radius():
    model, _, batches = problem()
    with torch.no_grad():
        model.w[::4] = 0
    keep = torch.zeros(DIM, dtype=torch.bool)
    keep[:10] = True
    got = m_sharpness(
        model,
        batches,
        m=5,
        rho=0.3,
        rule=Rule(Elementwise(0.0, "adaptive")),
        mask=Mask(ParamTable.from_model(model), (keep,)),
        radius="relative",
        loss=half_square,
    )
    assert got.settings["radius_used"] == pytest.approx(0.3 * math.sqrt(7 / 30))


def test_digest_is_of_the_examples_in_order(conv_case):
    x, y = conv_case.x, conv_case.y
    whole = data_digest([(x, y)])
    assert data_digest(conv_case.batches) == whole
    assert (
        len({whole, data_digest([(x.flip(0), y)]), data_digest([(x, (y + 1) % 5)]), data_digest([(x[1:], y[1:])])}) == 4
    )
    got = m_sharpness(conv_case.model, conv_case.batches, m=64, rho=0.05, rule=L2)
    assert got.settings["data_digest"] == whole
    ragged = [(x, y), (x[:, :, :4], y)]
    with pytest.raises(InputError, match=r"the inputs of batch 1 are .* of shape \(150, 1, 4, 8\)"):
        m_sharpness(conv_case.model, ragged, m=64, rho=0.05, rule=L2)


class Noisy(nn.Module):
    def __init__(self, model, noise):
        super().__init__()
        self.model, self.noise = model, noise

    def forward(self, x):
        return self.model(self.noise(x))


NOISES = {
    "numpy": lambda x: x + torch.from_numpy(np.random.default_rng().normal(size=tuple(x.shape))),
    "torch": lambda x: x + 0.01 * torch.randn_like(x),
    "dropout left on": lambda x: F.dropout(x, 0.1),
    "flip": lambda x: x.flip(3) if next(_toggle) else x,
}
_toggle = iter(i % 2 == 1 for i in range(10**9))


@pytest.mark.parametrize("kind", NOISES)
def test_data_that_differ_between_passes_are_named(conv_case, kind, snapshot):
    model = Noisy(conv_case.fresh(), NOISES[kind])
    before = snapshot(model)
    with pytest.raises(
        InputError, match=r"data that differ between passes: .* second pass at the same weights"
    ) as error:
        m_sharpness(model, conv_case.batches, m=64, rho=0.05, rule=L2)
    assert "\n" not in str(error.value)
    before.check()


# -- nothing is left behind, no wrong number ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["one_step", "pgd", "apgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_is_left_untouched(case, method, dtype, snapshot):
    steps = 1 if method == "one_step" else 3
    model = case.fresh(dtype).train()
    next(iter(model.children())).eval()
    with torch.no_grad():  # values that adding and subtracting would not give back
        first = next(model.parameters()).view(-1)
        first[0], first[1], first[2] = -0.0, 1e-30, 1e6
    for p in list(model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    table = ParamTable.from_model(model)
    partial = tuple(torch.rand(row.shape) < 0.5 for row in table)
    before = snapshot(model)
    for mask in (None, Mask(table, partial)):
        m_sharpness(model, case.batches, m=64, rho=1.0, rule=LINF, mask=mask, method=method, steps=steps)
        before.check()


class Boom(Exception):
    pass


@pytest.mark.parametrize("method", ["pgd", "apgd"])
@pytest.mark.parametrize("fail_at", [1, 3, 4, 5])
def test_weights_come_back_after_an_exception(conv_case, fail_at, method, snapshot):
    model, calls = conv_case.fresh().train(), []
    before = snapshot(model)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == fail_at:
            raise Boom
        return F.cross_entropy(logits, targets, reduction="none")

    with pytest.raises(Boom):
        m_sharpness(model, conv_case.batches, m=64, rho=1.0, rule=L2, method=method, steps=3, loss=loss)
    assert len(calls) == fail_at
    before.check()


def test_not_finite_is_an_error_not_a_number(conv_case, snapshot):
    model = conv_case.fresh()
    before = snapshot(model)

    def root(logits: Tensor, targets: Tensor) -> Tensor:
        # 0 at the given weights, where the root has no finite derivative.
        return (logits - logits.detach()).square().sum(1).sqrt()

    with pytest.raises(InputError, match="the gradient of the loss is not finite at the given weights"):
        m_sharpness(model, conv_case.batches, m=64, rho=1.0, rule=L2, loss=root)
    before.check()
    with pytest.raises(InputError, match=r"loss is not finite .* inside the ball of rho=1e\+300"):
        m_sharpness(model, conv_case.batches, m=64, rho=1e300, rule=L2)
    before.check()


def test_unusable_input_is_refused(conv_case):
    model, batches = conv_case.model, conv_case.batches
    good = {"m": 64, "rho": 0.1, "rule": L2}
    table = ParamTable.from_model(model)
    for change, text in [
        ({"m": 151}, "m=151 needs at least 151 examples, got 150"),
        ({"m": 0}, "must be at least 1"),
        ({"steps": 0}, "must be at least 1"),
        ({"steps": 2, "step_size": 0.0}, "step_size must be"),
        ({"step_size": 1.0}, "step_size needs steps > 1"),
        ({"rho": 0.0}, "rho must be a positive finite number"),
        ({"rho": math.nan}, "rho must be"),
        ({"rho": math.inf}, "rho must be"),
        ({"rho": True}, "rho must be"),
        ({"method": "agpd", "steps": 3}, "unknown method 'agpd'; did you mean apgd"),
        ({"method": "apgd"}, "method 'apgd' takes steps > 1, got 1"),
        ({"method": "one_step", "steps": 2}, "method 'one_step' takes 1 step, got 2"),
        ({"method": "apgd", "steps": 3, "step_size": 1.0}, "chooses its own step size"),
        ({"radius": "relativ"}, "did you mean relative"),
        ({"mask": Mask(table, (False,) * len(table))}, "keeps no coordinate"),
    ]:
        with pytest.raises(InputError, match=text):
            m_sharpness(model, batches, **{**good, **change})
    with pytest.raises(InputError, match=r"is torch\.bfloat16"):
        m_sharpness(conv_case.fresh(torch.bfloat16), batches, **good)
    with pytest.raises(MaskError):
        m_sharpness(model, batches, **good, mask=Mask(ParamTable.from_model(nn.Linear(2, 2)), (True, True)))


@pytest.mark.parametrize("steps", [1, 2])
def test_overflow_of_the_norm_is_an_error_not_zero(steps):
    """The gradient is finite in float32; scaled by the metric it is not."""
    model = nn.Linear(40, 1, bias=False)
    nn.init.constant_(model.weight, 1e-30)
    data = [(torch.full((2, 40), 3e38), torch.zeros(2))]
    with pytest.raises(InputError, match="norm of the gradient overflows"):
        m_sharpness(
            model, data, m=1, rho=1e-30, rule=Rule(Elementwise(1e5)), steps=steps, loss=lambda out, _: out.squeeze(1)
        )


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)


def test_name_says_the_metric_in_full(conv_case):
    one = m_sharpness(conv_case.model, conv_case.batches, m=64, rho=0.05, rule=L2)
    assert one.name == (
        "worst-case m-sharpness, m=64, one-step, l2, rho=0.05, all parameters, evaluation-mode normalization"
    )
    table = ParamTable.from_model(conv_case.model)
    mask = Mask(table, tuple(row.is_norm for row in table), Provenance("norm"))
    rule = Rule(Elementwise(0.0), math.inf)
    many = m_sharpness(conv_case.model, conv_case.batches, m=64, rho=0.05, rule=rule, steps=2, mask=mask)
    assert many.name == (
        "worst-case m-sharpness, m=64, 2-step projected gradient (step 1.25 rho), "
        "linf Elementwise(eta=0.0, bias='identity'), rho=0.05, mask norm (28 of 679 coordinates), "
        "evaluation-mode normalization"
    )
    assert many.settings["norm"] == "linf"
    model = conv_case.fresh()
    model.head.weight.requires_grad_(False)
    frozen = m_sharpness(model, conv_case.batches, m=64, rho=0.05, rule=L2, loss=smoothed)
    assert frozen.name.endswith(
        "all trainable parameters (160 coordinates frozen), evaluation-mode normalization, loss smoothed"
    )
    assert many.settings["mask_digest"] == mask.digest()
