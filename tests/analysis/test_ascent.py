"""Auto-PGD step by step against its definition, on losses of many hills."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from analysis.ascent import checkpoints
from analysis.sharpness import m_sharpness
from masks import Budget, MaskContext, build_mask
from sam.perturbation import Rule


def reference_apgd(f, gradient, project, direction, rho, steps):
    """On flat vectors, written from the definition; the points visited after 0, and what happened at checkpoints."""
    marks, p, q = set(), 0.0, 0.22
    while q < 1:
        marks.add(math.ceil(round(q * steps, 9)))
        p, q = q, q + max(q - p - 0.03, 0.06)
    us = [torch.zeros_like(gradient(0))]
    fs = [f(us[0])]
    alpha, current, previous, value = 2 * rho, us[0], us[0], fs[0]
    rises, last, best_last, cut_last = [], 0, fs[0], False
    events = set()
    for k in range(1, steps + 1):
        z = project(current + alpha * direction(gradient(current)))
        point = z if k == 1 else project(current + 0.75 * (z - current) + 0.25 * (current - previous))
        rises.append(f(point) > value)
        previous, current, value = current, point, f(point)
        us.append(point)
        fs.append(value)
        if k in marks and k < steps:
            best = max(range(len(fs)), key=lambda i: (fs[i], -i))
            slow = sum(rises[last:]) < 0.75 * (k - last)
            same = fs[best] == best_last
            stuck = not cut_last and same
            events |= {"slow"} if slow else {"stuck"} if stuck else {"spared"} if same else set()
            if slow or stuck:
                alpha /= 2
                events |= {"back"} if fs[best] > value else set()
                current = previous = us[best]
                value = fs[best]
            cut_last, best_last, last = slow or stuck, fs[best], k
    return us[1:], events


class Wavy(nn.Module):
    """With :func:`total_of`: a loss of many hills."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(6, generator=g, dtype=torch.float64))
        self.register_buffer("k", 2 * torch.randn(12, 6, generator=g, dtype=torch.float64))
        self.visited: list[Tensor] = []

    def value(self, w: Tensor) -> Tensor:
        return torch.sin(self.k @ w).sum()

    def forward(self, x: Tensor) -> Tensor:
        self.visited.append(self.w.detach().clone())
        return self.value(self.w).expand(len(x))


def total_of(out: Tensor, _: Tensor) -> Tensor:
    return out


# Seeds with rare events among 400: both reasons to restart, and a search that is spared since it was cut before.
RARE = {2: [(38, 1.0, 20), (113, 1.0, 20), (32, 1.0, 20), (348, 1.0, 20)],
        math.inf: [(10, 0.2, 20), (20, 1.0, 20), (41, 1.0, 20), (50, 1.0, 20)]}  # fmt: skip


@pytest.mark.parametrize("p", [2, math.inf])
def test_auto_pgd_takes_the_steps_of_its_definition(p):
    seen = set()
    for seed, rho, steps in [*RARE[p], (0, 0.2, 7), (1, 1.0, 20), (2, 0.2, 33), (3, 1.0, 2)]:
        model = Wavy(seed)
        w = model.w.detach().clone()

        def f(u, model=model, w=w):
            return float(model.value(w + u).detach())

        def gradient(u, model=model, w=w):
            at = (w + u).requires_grad_()
            return torch.autograd.grad(model.value(at), at)[0]

        def project(u, rho=rho):
            return u.clamp(-rho, rho) if p != 2 else u * min(1.0, rho / max(float(u.norm()), 1e-300))

        def direction(h):
            return h.sign() if p != 2 else h / h.norm()

        want, events = reference_apgd(f, gradient, project, direction, rho, steps)
        seen |= events
        data = [(torch.zeros(1, 1), torch.zeros(1))]
        got = m_sharpness(model, data, m=1, rho=rho, rule=Rule(p=p), method="apgd", steps=steps, loss=total_of)
        torch.testing.assert_close(torch.stack(model.visited[2:]) - w, torch.stack(want), rtol=1e-6, atol=1e-7)
        assert got.value == pytest.approx(max(0.0, *(f(u) - f(torch.zeros_like(w)) for u in want)), abs=1e-9)
    assert seen == {"slow", "stuck", "back", "spared"}


def test_checkpoints_of_auto_pgd():
    assert checkpoints(20) == [5, 9, 12, 14, 16, 18, 19]
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == []
    assert checkpoints(2) == [1]


@pytest.mark.parametrize("method", ["pgd", "apgd"])
@pytest.mark.parametrize("mask_name", ["all", "random", "norm"])
def test_the_layout_of_the_weights_changes_nothing(method: str, mask_name: str) -> None:
    """Convolutions with the channels last: values and gradients lie in another order in memory."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )
    model = model.double().eval()
    batch = torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.randint(3, (12,))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=layout)
        context = MaskContext(model)
        budget = Budget(30, context.table.numel) if mask_name == "random" else None
        mask = build_mask(mask_name, context, budget)
        rule = Rule.named("elementwise_l2")
        estimate = m_sharpness(model, [batch], m=6, rho=0.3, rule=rule, mask=mask, method=method, steps=8)
        found.append(estimate.value)
    assert model[0].weight.stride()[1] == 1
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0] > 1e-3
