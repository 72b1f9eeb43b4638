"""Gauss-Newton and Fisher products against dense matrices from the Jacobian of the logits, and closed forms."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.fisher import EmpiricalFisherOperator, FisherOperator
from analysis.gauss_newton import GaussNewtonOperator
from analysis.operator import HessianOperator
from masks.errors import InputError
from masks.mask import Mask, Part, Provenance
from masks.params import ParamTable


def dense_of(operator: HessianOperator) -> Tensor:
    return torch.stack([operator.matvec(v) for v in torch.eye(operator.dimension, dtype=operator.dtype)], dim=1)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def mixed_mask(model: nn.Module) -> Mask:
    """Whole, absent and partial tensors in turn."""
    table, generator = ParamTable.from_model(model), torch.Generator().manual_seed(1)
    parts: list[Part] = []
    for i, row in enumerate(table):
        some = torch.rand(row.shape, generator=generator) < 0.3
        some.view(-1)[0], some.view(-1)[-1] = True, False
        parts.append(some if i % 3 == 0 else i % 3 == 1)
    return Mask(table, tuple(parts), Provenance("mixed"))


_jacobians: dict[str, tuple[Tensor, Tensor]] = {}


def jacobian(case) -> tuple[Tensor, Tensor]:
    """The logits, (N, C), and their Jacobian, (N, C, P), row by row on all data at once."""
    if case.name not in _jacobians:
        twin = copy.deepcopy(case.model).eval()
        params = {k: p.detach() for k, p in twin.named_parameters()}
        flat = torch.cat([p.flatten() for p in params.values()]).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            parts = flat.split([p.numel() for p in params.values()])
            weights = {k: v.view(p.shape) for (k, p), v in zip(params.items(), parts, strict=True)}
            logits = functional_call(twin, weights, (case.x,))
            rows = [torch.autograd.grad(f, flat, retain_graph=True)[0] for f in logits.flatten()]
        _jacobians[case.name] = logits.detach(), torch.stack(rows).view(*logits.shape, -1)
    return _jacobians[case.name]


def dense_fisher(case) -> Tensor:
    """By the sum over all classes of ``p_c g_c g_c^T``: shares no formula with the package."""
    logits, j = jacobian(case)
    p, n, classes = logits.softmax(1), len(logits), logits.shape[1]
    out = 0
    for c in range(classes):
        g = torch.einsum("nc,ncp->np", p - F.one_hot(torch.full((n,), c), classes), j)
        out = out + torch.einsum("n,np,nq->pq", p[:, c], g, g) / n
    return out


def dense_empirical(case) -> Tensor:
    logits, j = jacobian(case)
    g = torch.einsum("nc,ncp->np", logits.softmax(1) - F.one_hot(case.y, logits.shape[1]), j)
    return g.T @ g / len(g)


KINDS = {"gn": GaussNewtonOperator, "fisher": FisherOperator, "empirical": EmpiricalFisherOperator}


def dense(case, kind: str) -> Tensor:
    return dense_empirical(case) if kind == "empirical" else dense_fisher(case)


@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_product_equals_dense_matrix(case, kind, retain):
    want = dense(case, kind)
    with KINDS[kind](case.model, case.batches, retain=retain) as operator:
        for v in torch.randn(2, len(want), generator=torch.Generator().manual_seed(1), dtype=torch.float64):
            product = operator.matvec(v)
            assert relative(product, want @ v) < 1e-10
            for name, part in operator.unflatten(product).items():
                exact = operator.unflatten(want @ v)[name]
                assert (part - exact).norm() <= 1e-10 * exact.norm() + 1e-14, name


@pytest.mark.parametrize("kind", KINDS)
def test_masked_and_scaled(case, kind):
    mask = mixed_mask(case.model)
    keep = torch.cat([part.flatten() for part in mask.dense()])
    w = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    block = (w.abs()[:, None] * dense(case, kind) * w.abs())[keep][:, keep]
    v = torch.randn(len(block), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with KINDS[kind](case.model, case.batches, mask=mask, scale="abs") as operator:
        assert relative(operator.matvec(v), block @ v) < 1e-10
        assert operator.name.startswith(f"|w|-scaled {operator.matrix} of the mean loss over 150 examples, mask mixed")


def test_float32(case):
    v = torch.randn(len(case.hessian), generator=torch.Generator().manual_seed(3))
    for kind, cls in KINDS.items():
        with cls(case.fresh(torch.float32), case.batches) as operator:
            assert relative(operator.matvec(v).double(), dense(case, kind) @ v.double()) < 5e-6, kind


def test_gauss_newton_for_any_loss(conv_case):
    """Label smoothing has the same curvature in the logits; a quartic loss has ``12 (f - t)^2``."""
    v = torch.randn(len(conv_case.hessian), generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def smooth(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)

    def quartic(logits: Tensor, y: Tensor) -> Tensor:
        return (logits**4).sum(1)

    logits, j = jacobian(conv_case)
    want = torch.einsum("nc,ncp,nc->p", 12 * logits**2, j, j @ v) / len(logits)
    with GaussNewtonOperator(conv_case.model, conv_case.batches, loss=smooth) as operator:
        assert relative(operator.matvec(v), dense_fisher(conv_case) @ v) < 1e-10
    with GaussNewtonOperator(conv_case.model, conv_case.batches, loss=quartic) as operator:
        assert relative(operator.matvec(v), want) < 1e-10
    with GaussNewtonOperator(conv_case.model, conv_case.batches, loss=lambda f, y: f.sum(1)) as operator:
        assert not operator.matvec(v).any()


@pytest.fixture
def regression() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 4, generator=generator))
    return model, x, torch.randint(3, (30,), generator=generator)


def test_softmax_regression_in_closed_form(regression):
    """``H = G = F = (1/N) sum_i (diag p - p p^T) (x) x x^T``; empirical: ``(p - e_y)(p - e_y)^T (x) x x^T``."""
    model, x, y = regression
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    p = (x @ model.weight.T).softmax(1).detach()
    xx = torch.einsum("ni,nj->nij", x, x)
    curvature = torch.diag_embed(p) - torch.einsum("nc,nd->ncd", p, p)
    exact = torch.einsum("ncd,nij->cidj", curvature, xx).reshape(12, 12) / 30
    r = p - F.one_hot(y, 3)
    empirical = torch.einsum("nc,nd,nij->cidj", r, r, xx).reshape(12, 12) / 30
    for cls, want in [(HessianOperator, exact), (GaussNewtonOperator, exact), (FisherOperator, exact)]:
        with cls(model, batches) as operator:
            torch.testing.assert_close(dense_of(operator), want, atol=1e-14, rtol=1e-12)
    with EmpiricalFisherOperator(model, batches) as operator:
        torch.testing.assert_close(dense_of(operator), empirical, atol=1e-14, rtol=1e-12)
        assert float(dense_of(operator).trace()) == pytest.approx(float(((r**2).sum(1) * (x**2).sum(1)).mean()))


def sampled(model, batches, **kwargs) -> Tensor:
    with FisherOperator(model, batches, labels="sampled", **kwargs) as operator:
        return dense_of(operator)


def test_sampled_labels_average_to_the_exact_fisher(regression):
    model, x, y = regression
    with FisherOperator(model, [(x, y)]) as operator:
        exact = dense_of(operator)
    draws = torch.stack([sampled(model, [(x, y)], seed=s) for s in range(150)])
    z = (draws.mean(0) - exact) / (draws.std(0) / 150**0.5)
    assert 0.5 < float(z.pow(2).mean()) < 1.6
    assert float(z.abs().max()) < 5
    many = sampled(model, [(x, y)], num_samples=20_000)
    assert relative(many, exact) < 0.01
    assert relative(draws[0], exact) > 0.05


def test_one_sampled_label_is_one_outer_product_per_example(regression):
    """Each draw must be some label's ``g g^T``, and the same whatever the cut, precision of storage, or retention."""
    model, x, y = regression
    for i in range(3):
        p = (x[i] @ model.weight.T).softmax(0).detach()
        got = sampled(model, [(x[i : i + 1], y[i : i + 1])], seed=i)
        choices = [torch.outer(p - e, x[i]).flatten() for e in torch.eye(3, dtype=torch.float64)]
        assert min(float((got - torch.outer(g, g)).norm()) for g in choices) < 1e-14
    whole = sampled(model, [(x, y)], seed=3, num_samples=2)
    parts = [(x[:11], y[:11]), (x[11:12], y[11:12]), (x[12:], y[12:])]
    torch.testing.assert_close(sampled(model, parts, seed=3, num_samples=2, retain=False), whole)
    assert not torch.equal(sampled(model, [(x, y)], seed=4, num_samples=2), whole)


def test_names_and_refusals(regression):
    model, x, y = regression
    with FisherOperator(model, [(x, y)], labels="sampled", num_samples=3, seed=7) as operator:
        assert operator.name.startswith("Fisher with 3 sampled labels per example (seed 7) of the mean loss over 30")
    with pytest.raises(InputError, match="unknown labels 'data'"):
        FisherOperator(model, [(x, y)], labels="data")
    with pytest.raises(InputError, match="num_samples must be at least 1"):
        FisherOperator(model, [(x, y)], num_samples=0)

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :, None]

    odd = Odd(4, 3).double()
    with pytest.raises(InputError, match=r"one number per example, shape \(30,\), got shape \(30, 1\)"):
        FisherOperator(odd, [(x, y[:, None])])

    class Sums(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum(0)

    with pytest.raises(InputError, match="a row for each of 30 examples"):
        GaussNewtonOperator(Sums(4, 3).double(), [(x, y)], loss=lambda f, t: f.sum() * torch.ones(30).double())
