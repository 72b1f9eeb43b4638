"""Exact SAM: the ascent in numpy, and its gradient by central differences of w -> L(w + eps(w))."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from masks import InputError, Mask, ParamTable
from sam import SAM, Method, MethodSpec, Rule, build_method
from sam.method import Direction
from sam.methods.exact_sam import ExactGradient
from tests.sam.nets import (
    BASES,
    ENTRIES,
    Quadratic,
    Recorder,
    batches,
    buffers,
    build,
    describe,
    flat,
    gradients,
    losses,
    make,
    mixed_mask,
    quadratic_masks,
    reference_eps,
    same_bits,
    snapshot,
    state_of,
    take,
)

ADAPTIVE = {"rule": "elementwise_l2", "eta": 0.05}


# -- the ascent, on a quadratic in numpy ---------------------------------------------------------------------


def ascend(w, gradient, mask, rule, scope, *, steps, stride, project, rho):
    """eps_1 ... eps_n from the formulas; T is that at w."""
    found, eps = [], np.zeros_like(w)
    for _ in range(steps):
        # The metric of the reference is taken from the weights it is given: w, not w + eps.
        move, T = reference_eps(
            w, gradient(w + eps), mask, **describe(rule), scope=scope, rho=np.full_like(w, rho * stride)
        )
        eps = eps + move
        if project:
            unit = np.where(T > 0, eps / np.where(T > 0, T, 1), 0)
            eps = eps / max(1, np.linalg.norm(unit) / rho) if rule.p == 2 else np.clip(unit, -rho, rho) * T
        found.append(eps)
    return found


@pytest.mark.parametrize(
    ("form", "entry"),
    [("whole", "step_on"), ("index", "step"), ("dense", "step_on"), *[("mixed", e) for e in ENTRIES], ("all", "step")],
)
@pytest.mark.parametrize(
    ("rule", "scope"),
    [
        ("l2", "masked"),
        ("l2", "full"),
        ("linf", "masked"),
        ("elementwise_l2", "masked"),
        ("elementwise_linf", "masked"),
        ("layerwise_l2", "full"),
    ],
)
@pytest.mark.parametrize(("project", "step"), [(True, None), (True, 0.7), (False, 0.7)])
def test_closed_form_of_the_ascent(project, step, rule, scope, form, entry):
    """Two steps of the optimizer, three of the ascent: every point visited, the final gradient and the weights."""
    model = Quadratic()
    mask = quadratic_masks(model)[form]
    lr, rho = 0.02, 0.4
    method = build_method("exact_sam", steps=3, backpropagate=False, project=project, step=step, rule=rule)
    base = torch.optim.SGD(model.parameters(), lr)
    optimizer = SAM(base, model, mask=mask, rho=rho, method=method, norm_scope=scope)
    A, b = model.A.numpy(), model.b.numpy().mean(0)
    w = flat(list(model.parameters()))
    for _ in range(2):
        recorder = Recorder(model, model)
        take(optimizer, recorder, model.b, entry)
        points = ascend(
            w,
            lambda v: A @ v - b,
            mask,
            Rule.named(rule),
            scope,
            steps=3,
            stride=step or 1 / 3,
            project=project,
            rho=rho,
        )
        assert len(recorder.weights) == 4
        for k, eps in enumerate(points, start=1):
            np.testing.assert_allclose(flat(list(recorder.eps(0, k).values())), eps, rtol=1e-10, atol=1e-13)
        g = A @ (w + points[-1]) - b
        np.testing.assert_allclose(flat([p.grad for p in model.parameters()]), g, rtol=1e-10, atol=1e-12)
        assert float(optimizer.stats.radius) == pytest.approx(np.linalg.norm(points[-1]), rel=1e-10)
        w = w - lr * g
        np.testing.assert_allclose(flat(list(model.parameters())), w, rtol=1e-11, atol=1e-13)
    if (rule, scope) == ("l2", "masked"):  # so the three settings are three: inside, on and beyond the sphere
        radius = float(optimizer.stats.radius) / rho
        assert radius < 1 if step is None else radius == pytest.approx(1) if project else radius > 1.5


def test_projection_with_a_radius_per_group():
    """The ball is ||eps_i / rho_i|| <= 1 over all tensors, as for a single step."""
    model = Quadratic()
    tensors = list(model.parameters())
    base = torch.optim.SGD([{"params": tensors[:1], "rho": 0.3}, {"params": tensors[1:], "rho": 0.0}], lr=0.0)
    method = build_method("exact_sam", steps=4, step=0.9, backpropagate=True)
    optimizer = SAM(base, model, mask=quadratic_masks(model)["all"], method=method)
    recorder = Recorder(model, model)
    optimizer.step_on(recorder, model.b)
    eps = recorder.eps(0, 4)
    assert math.sqrt(float(eps.pop("one.weight").square().sum())) == pytest.approx(0.3 * found_share(model), rel=1e-9)
    assert not any(e.any() for e in eps.values())


def found_share(model) -> float:
    """The share of the whole unit vector that lies in the first tensor, ascended by hand."""
    A, b, w = model.A.numpy(), model.b.numpy().mean(0), flat(list(model.parameters()))
    rho = np.concatenate([np.full(40, 0.3), np.zeros(19)])
    eps = np.zeros_like(w)
    for _ in range(4):
        g = A @ (w + eps) - b
        eps = eps + 0.9 * rho * g / np.linalg.norm(g)
        eps = eps / max(1, np.linalg.norm(eps / 0.3))
    return np.linalg.norm(eps) / 0.3


@pytest.mark.parametrize("form", ["whole", "index", "dense", "mixed", "all"])
@pytest.mark.parametrize("scope", ["masked", "full"])
def test_closed_form_of_the_derivative_of_one_step(scope, form):
    """v + (rho / ||g||) H (m v - g <m g, v> / ||g||^2), g and its norm over the mask or over everything."""
    model = Quadratic()
    mask = quadratic_masks(model)[form]
    base = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    optimizer = SAM(base, model, mask=mask, rho=0.4, method=build_method("exact_sam"), norm_scope=scope)
    A, b = model.A.numpy(), model.b.numpy().mean(0)
    keep = np.concatenate([part.numpy().reshape(-1) for part in mask.dense()])
    w, velocity = flat(list(model.parameters())), 0.0
    for _ in range(3):
        optimizer.step_on(model, model.b)
        g = A @ w - b
        counted = np.where(keep, g, 0) if scope == "masked" else g
        norm = np.linalg.norm(counted)
        v = A @ (w + 0.4 * np.where(keep, g, 0) / norm) - b
        mv = np.where(keep, v, 0)
        final = v + 0.4 / norm * A @ (mv - counted * (counted @ mv) / norm**2)
        np.testing.assert_allclose(flat([p.grad for p in model.parameters()]), final, rtol=1e-11, atol=1e-13)
        velocity = 0.9 * velocity + final
        w = w - 0.02 * velocity
        np.testing.assert_allclose(flat(list(model.parameters())), w, rtol=1e-11, atol=1e-13)


# -- the gradient of w -> L(w + eps(w)), by central differences ------------------------------------------------


class Attention(nn.Module):
    """One attention layer, whose fused kernel has no second derivative, between two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(self.embed(x.view(len(x), 3, 2)))
        return self.head(F.gelu(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 3)),
    "layernorm": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Dropout(0.3), nn.Linear(5, 3)),
    "batchnorm": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3)),
    "attention": Attention,
}


def network(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = NETS[name]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
            p.copy_(torch.where(p.abs() < 0.01, 0.01, p))  # |w| has a kink at 0
    return model


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 6, dtype=torch.float64, generator=generator), torch.randint(0, 3, (7,), generator=generator)


def some_mask(model: nn.Module, name: str) -> Mask:
    if name == "norm":
        kinds = (nn.LayerNorm, nn.BatchNorm1d)
        wanted = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
        return Mask(ParamTable.from_model(model), tuple(id(p) in wanted for p in model.parameters()))
    return mixed_mask(model) if name == "mixed" else build(model, "all")


class Objective:
    """w -> L(w + eps(w)) and its derivative, from the formulas, on flat vectors."""

    def __init__(self, model, mask, *, steps, stride, project, rho, rule, scope):
        self.model, self.mask, self.table = copy.deepcopy(model), mask, ParamTable.from_model(model)
        self.steps, self.stride, self.project, self.rho, self.rule, self.scope = (
            steps,
            stride,
            project,
            rho,
            rule,
            scope,
        )

    def loss(self, w: torch.Tensor) -> torch.Tensor:
        parts = w.split([row.numel for row in self.table])
        named = {row.name: part.view(row.shape) for row, part in zip(self.table, parts, strict=True)}
        torch.manual_seed(9)  # the dropout mask of every pass
        x, y = data()
        return F.cross_entropy(functional_call(self.model, named, (x,)), y)

    def gradient(self, w: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(w).requires_grad_()
        return torch.autograd.grad(self.loss(at), at)[0].numpy()

    def __call__(self, w: np.ndarray) -> float:
        eps = ascend(
            w,
            self.gradient,
            self.mask,
            self.rule,
            self.scope,
            steps=self.steps,
            stride=self.stride,
            project=self.project,
            rho=self.rho,
        )[-1]
        return float(self.loss(torch.from_numpy(w + eps)))

    def derivative(self, w: np.ndarray, directions: np.ndarray, h: float = 1e-4) -> np.ndarray:
        """Along these directions, by central differences of fourth order."""
        weights = {-2: 1, -1: -8, 1: 8, 2: -1}
        return np.array([sum(c * self(w + k * h * d) for k, c in weights.items()) / (12 * h) for d in directions])


DERIVATIVES = [
    # net, mask, scope, steps, step, project, rule
    ("mlp", "all", "masked", 1, None, True, {}),
    ("mlp", "all", "masked", 3, None, True, {}),
    ("mlp", "mixed", "masked", 3, 0.7, True, {}),
    ("mlp", "mixed", "full", 3, 0.7, True, {}),
    ("mlp", "mixed", "full", 1, None, True, {}),
    ("mlp", "all", "masked", 3, 0.7, False, {}),
    ("mlp", "all", "masked", 1, None, True, ADAPTIVE),
    ("mlp", "mixed", "masked", 3, 0.7, True, ADAPTIVE),
    ("mlp", "mixed", "full", 2, 0.8, True, ADAPTIVE),
    ("mlp", "mixed", "masked", 2, 0.8, True, {"rule": "layerwise_l2", "bias": "adaptive"}),
    ("layernorm", "norm", "masked", 1, None, True, {}),
    ("layernorm", "norm", "masked", 3, 0.7, True, {}),
    ("layernorm", "mixed", "masked", 3, None, False, {}),
    ("batchnorm", "all", "masked", 1, None, True, {}),
    ("batchnorm", "norm", "masked", 3, 0.7, True, {}),
    ("batchnorm", "mixed", "full", 3, 0.7, False, {}),
    ("attention", "mixed", "masked", 2, 0.8, True, {}),
    ("attention", "norm", "masked", 1, None, True, {}),
]


@pytest.mark.parametrize(("net", "name", "scope", "steps", "step", "project", "rule"), DERIVATIVES)
def test_gradient_is_the_derivative_of_the_loss_at_the_ascended_point(net, name, scope, steps, step, project, rule):
    model, rho = network(net), 0.3
    mask = some_mask(model, name)
    options = {"steps": steps, "step": step, "project": project, **rule}
    method = build_method("exact_sam", **options)
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=rho, method=method, norm_scope=scope
    )
    w = flat(list(model.parameters()))
    torch.manual_seed(9)
    optimizer.step_on(losses(model), data())
    found = flat([p.grad for p in model.parameters()])
    objective = Objective(
        model, mask, steps=steps, stride=step or 1 / steps, project=project, rho=rho, rule=method.rule, scope=scope
    )
    assert float(optimizer.stats.perturbed_loss) == pytest.approx(objective(w), rel=1e-12)
    directions = np.random.default_rng(0).standard_normal((5, len(w)))
    expected = objective.derivative(w, directions)
    np.testing.assert_allclose(directions @ found, expected, rtol=0, atol=1e-9)
    plain = build_method("exact_sam", **options, backpropagate=False)
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=rho, method=plain, norm_scope=scope)
    torch.manual_seed(9)
    optimizer.step_on(losses(model), data())
    without = flat([p.grad for p in model.parameters()])
    assert np.abs(directions @ without - expected).max() > 1e-3  # what backpropagation is there for


def test_evaluation_mode():
    """With running statistics, constants of the loss."""
    model = network("batchnorm").eval()
    model[1].running_mean.normal_()
    mask = some_mask(model, "mixed")
    method = build_method("exact_sam")
    SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=0.3, method=method).step_on(
        losses(model), data()
    )
    objective = Objective(model, mask, steps=1, stride=1.0, project=True, rho=0.3, rule=Rule(), scope="masked")
    directions = np.random.default_rng(0).standard_normal((5, mask.table.numel))
    expected = objective.derivative(flat(list(model.parameters())), directions)
    found = flat([p.grad for p in model.parameters()])
    np.testing.assert_allclose(directions @ found, expected, rtol=0, atol=1e-9)


# -- identities, passes, surroundings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "net", "name", "base"),
    [
        *itertools.product(["l2"], ["resnet", "vit"], ["all", "norm", "mixed"], ["sgd", "adamw"]),
        *itertools.product(["linf", "elementwise_l2"], ["resnet"], ["mixed"], ["sgd"]),
    ],
)
def test_one_step_without_backpropagation_is_sam(rule, net, name, base):
    found = []
    for method in (Method(rule=Rule.named(rule)), build_method("exact_sam", rule=rule, backpropagate=False)):
        model = make(net, dropout=0.2)
        mask = mixed_mask(model) if name == "mixed" else build(model, name)
        optimizer = SAM(BASES[base](model.parameters()), model, mask=mask, rho=0.1, method=method)
        torch.manual_seed(5)
        for batch, entry in zip(batches(4), ENTRIES * 2, strict=True):
            take(optimizer, losses(model), batch, entry)
        found.append((snapshot(model), buffers(model), state_of(optimizer), optimizer.stats.radius.item()))
    (*one, radius), (*other, expected) = found
    assert same_bits(one, other)
    assert radius == pytest.approx(expected, rel=3e-7)  # SAM's is that of eps before it was rounded


@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_radius_zero_is_the_base_optimizer_but_for_rounding(net):
    model, twin = make(net, dropout=0.2), make(net, dropout=0.2)
    method = build_method("exact_sam", steps=2, step=0.9)
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=mixed_mask(model), rho=0.0, method=method)
    torch.manual_seed(5)
    optimizer.step_on(losses(model), batches()[0])
    torch.manual_seed(5)
    losses(twin)(batches()[0]).mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "forward", "passes"),
    [
        ({}, 3, 5),
        ({"steps": 3}, 7, 13),
        ({"steps": 3, "backpropagate": False}, 4, 4),
        ({"backpropagate": False}, 2, 2),
    ],
)
def test_passes_are_as_stated(options, forward, passes):
    """A forward pass and a backward one at each point; with backpropagation another of each at the n points before
    the last one, and there a Hessian product, the cost of two passes."""
    model = make("resnet")
    optimizer = SAM(
        BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), method=build_method("exact_sam", **options)
    )
    recorder = Recorder(model)
    optimizer.step_on(recorder, batches()[0])
    spec = MethodSpec("exact_sam", options)
    assert len(recorder.weights) == forward
    steps = spec.options["steps"]
    assert spec.info.num_passes(**spec.options) == passes == forward + (2 * steps if passes > forward else 0)


@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_every_pass_draws_the_same_dropout_and_statistics_move_once(net):
    model, twin = make(net, dropout=0.3), make(net, dropout=0.3)
    mask = mixed_mask(model)
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), 0.0),
        model,
        mask=mask,
        rho=0.3,
        method=build_method("exact_sam", steps=2, step=0.8),
    )
    recorder, before = Recorder(model), snapshot(model)
    torch.manual_seed(5)
    optimizer.step_on(recorder, batches()[0])
    after = torch.get_rng_state()
    assert net == "vit" or all(same_bits(drawn, recorder.drawn[0]) for drawn in recorder.drawn[1:])
    torch.manual_seed(5)
    losses(twin)(batches()[0])
    assert same_bits(after, torch.get_rng_state())
    assert same_bits(buffers(model), buffers(twin))
    assert same_bits(before, snapshot(model))
    for first, second in ((0, 4), (1, 3)):  # back along the same points
        assert same_bits(recorder.weights[first], recorder.weights[second])


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_weights_come_back_after_an_exception(failing):
    model = make("resnet")
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), 0.1),
        model,
        mask=mixed_mask(model),
        rho=0.3,
        method=build_method("exact_sam", steps=2),
    )
    recorder, before = Recorder(model), snapshot(model)

    def loss_fn(batch):
        out = recorder(batch)
        if len(recorder.weights) == failing:
            raise RuntimeError("no luck")
        return out

    with pytest.raises(RuntimeError, match="no luck"):
        optimizer.step_on(loss_fn, batches()[0])
    assert same_bits(before, snapshot(model))


def test_a_zero_gradient_has_no_direction():
    """No move and no NaN: the derivative of a direction that does not exist is left out."""
    model = Quadratic()
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), 0.0),
        model,
        mask=quadratic_masks(model)["all"],
        method=build_method("exact_sam", steps=2),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer.step_on(model, torch.zeros_like(model.b))
    assert optimizer.skipped_steps == 0
    assert not any(p.grad.any() for p in model.parameters())


def test_nonfinite_gradients_skip_the_step():
    model = make("resnet")
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), 0.1),
        model,
        mask=build(model, "all"),
        method=build_method("exact_sam", steps=2),
    )
    before = snapshot(model)
    x, y = batches()[0]
    optimizer.step_on(losses(model), (x * math.inf, y))
    assert optimizer.skipped_steps == 1
    assert same_bits(before, snapshot(model))


def test_a_parameter_that_the_loss_does_not_use_keeps_no_gradient():
    model = make("resnet")
    model.unused = nn.Linear(3, 3)
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "all"), method=build_method("exact_sam"))
    optimizer.step_on(losses(model), batches()[0])
    assert gradients(model)["unused.weight"] is None


def test_a_loss_without_second_derivative_is_refused():
    model = make("resnet")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "all"), method=build_method("exact_sam"))
    before = snapshot(model)

    def loss_fn(batch):
        one = torch.ones(len(batch[1]), dtype=torch.int64)
        return F.ctc_loss(
            model(batch[0]).log_softmax(1)[None], batch[1][:, None].clamp(min=1), one, one, reduction="none"
        )

    with pytest.raises(InputError, match=r"second derivatives of the loss, .* is not implemented"):
        optimizer.step_on(loss_fn, batches()[0])
    assert same_bits(before, snapshot(model))


def test_refused():
    for options, message in [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"step": 0.0}, "step must be a finite number > 0"),
        ({"rule": "linf"}, "derivative is zero almost everywhere; set backpropagate=false"),
        ({"eta": 0.1}, "takes neither eta"),
    ]:
        with pytest.raises(InputError, match=message):
            build_method("exact_sam", **options)
    model = make("resnet")

    class Other(Direction):
        pass

    for method, message in [
        (build_method("exact_sam"), "step_on"),
        (Method(direction=Other(), ascent=ExactGradient(1, 1.0, True)), "climbs along the gradient"),
    ]:
        optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "all"), method=method)
        entry = "step" if message == "step_on" else "step_on"
        with pytest.raises(InputError, match=message):
            take(optimizer, losses(model), batches()[0], entry)
