"""Gradient ascent on the loss inside a ball around the weights.

Notation: delta the move of the weights, c the normaliser of the rule, ``u = delta / c``, in which the ball is
plain; ``h = c grad L(w + c u)`` the gradient in u. Projection onto the ball is then a scaling (l2) or a clip (linf).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from analysis.evaluation import losses, place, precision_of
from masks.context import Batch, LossFn
from masks.errors import InputError
from masks.region import Region
from sam.perturbation import Rule, perturb, total_norm

Check = Callable[[Tensor], None]

_MOMENTUM = 0.75
_ENOUGH_RISES = 0.75


def checkpoints(steps: int) -> list[int]:
    """The steps after which Auto-PGD looks back: ``ceil(p_j K)``, ascending, without the last step K.

    ``p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)``, in whole hundredths, since
    ``ceil(0.7 * 20)`` in floating point may be 15.
    """
    out: set[int] = set()
    before, p = 0, 22
    while p < 100:
        out.add(-(-p * steps // 100))
        before, p = p, p + max(p - before - 3, 6)
    return sorted(out - {steps})


@dataclass(frozen=True, eq=False)
class Ball:
    """The maximisation of a loss over the ball around the weights at which it was made.

    Values are lists with one tensor per piece of the region, in the piece's form. Every method leaves the weights
    bit for bit as they were, also when it raises. Every search is given a ``check`` of the losses at the weights, shape
    (B,), which raises where they are not those of an earlier pass: the search has them anyway.
    """

    model: nn.Module
    loss: LossFn
    region: Region
    rule: Rule
    rho: float
    saved: list[Tensor]
    scales: list[Tensor | None]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def at_weights(cls, model: nn.Module, loss: LossFn, region: Region, rule: Rule, rho: float) -> Ball:
        weights = region.weights()
        scales = [rule.metric.scale(p.row, p.param, w) for p, w in zip(region.pieces, weights, strict=True)]
        return cls(model, loss, region, rule, rho, region.save(), scales, *precision_of(model))

    def one_step(self, batch: Batch, check: Check) -> float:
        """The rise of the loss at the rule's own perturbation: one gradient and one loss."""
        batch = place(batch, self.dtype, self.device)
        clean, gradients = self._loss_and_gradient(batch, check=check)
        return self._loss_at(batch, self._first_order(gradients)) - clean

    def pgd(self, batch: Batch, check: Check, steps: int, step_size: float) -> float:
        """The largest rise over w, the one-step point and the iterates: ``steps`` gradients and two losses."""
        batch = place(batch, self.dtype, self.device)
        clean, gradients = self._loss_and_gradient(batch, check=check)
        best = max(clean, self._loss_at(batch, self._first_order(gradients)))
        u = [torch.zeros_like(g) for g in self.region.gather(gradients)]
        for step in range(1, steps + 1):
            u = self._step(u, gradients, step_size)
            value, gradients = self._evaluate(batch, u, last=step == steps)
            best = max(best, value)
        return best - clean

    def apgd(self, batch: Batch, check: Check, steps: int) -> float:
        """The largest rise over w and the iterates of Auto-PGD: ``steps`` gradients and one loss.

        Croce and Hein 2020 (arXiv 2003.01690), algorithm 1: steps of ``2 rho`` at first, with momentum;
        at every checkpoint the step is halved and the search goes on from the best point found, without momentum,
        if fewer than three quarters of the steps since the last checkpoint raised the loss, or if neither the step
        size nor the best loss changed since then. The first iterate is the one-step point.
        """
        batch = place(batch, self.dtype, self.device)
        value, gradients = self._loss_and_gradient(batch, check=check)
        clean = best = best_then = value
        u = [torch.zeros_like(g) for g in self.region.gather(gradients)]
        best_u, best_gradients, previous = u, gradients, u
        alpha, halved, rises, since = 2.0, False, 0, 0
        due = set(checkpoints(steps))
        for step in range(1, steps + 1):
            z = self._step(u, gradients, alpha)
            if step == 1:
                u, previous = z, u
            else:
                # u + 3/4 (z - u) + 1/4 (u - previous)
                ahead = _plus(
                    _plus(u, _MOMENTUM, torch._foreach_sub(z, u)), 1 - _MOMENTUM, torch._foreach_sub(u, previous)
                )
                u, previous = self._project(ahead), u
            before_step, (value, gradients) = value, self._evaluate(batch, u, last=step == steps)
            rises += value > before_step
            if value > best:
                best, best_u, best_gradients = value, u, gradients
            if step in due:
                if rises < _ENOUGH_RISES * (step - since) or (not halved and best == best_then):
                    alpha, halved = alpha / 2, True
                    value, gradients = best, best_gradients
                    u = previous = best_u
                else:
                    halved = False
                best_then, rises, since = best, 0, step
        return best - clean

    def _evaluate(self, batch: Batch, u: list[Tensor], *, last: bool) -> tuple[float, list[Tensor]]:
        """Loss and gradient at u; at the last point only the loss."""
        delta = self._scaled(u)
        return (self._loss_at(batch, delta), []) if last else self._loss_and_gradient(batch, delta)

    def _step(self, u: list[Tensor], gradients: list[Tensor], alpha: float) -> list[Tensor]:
        """``proj(u + alpha rho d)``, d the steepest direction of norm 1."""
        return self._project(_plus(u, alpha * self.rho, self._direction(gradients)))

    def _first_order(self, gradients: list[Tensor]) -> list[Tensor]:
        step = perturb(self.rule, self.region, gradients, self.rho)
        if not bool(step.finite):  # the rule then moves nothing, which would pass for a flat loss
            raise InputError("the norm of the gradient overflows")
        return step.values

    def _scaled(self, values: list[Tensor]) -> list[Tensor]:
        return [v if c is None else v * c for v, c in zip(values, self.scales, strict=True)]

    def _direction(self, gradients: list[Tensor]) -> list[Tensor]:
        """The steepest direction in u, of norm 1; zero for a zero gradient."""
        h = self._scaled(self.region.gather(gradients))
        if self.rule.p != 2:
            return [t.sign() for t in h]
        norm = float(total_norm(h))
        if not norm < float("inf"):
            raise InputError("the norm of the gradient overflows")
        return list(torch._foreach_div(h, norm)) if norm > 0 else h

    def _project(self, u: list[Tensor]) -> list[Tensor]:
        if self.rule.p != 2:
            return list(torch._foreach_clamp_max(torch._foreach_clamp_min(u, -self.rho), self.rho))
        norm = float(total_norm(u))
        return list(torch._foreach_mul(u, self.rho / norm)) if norm > self.rho else u

    @contextmanager
    def _moved(self, delta: list[Tensor] | None) -> Iterator[str]:
        """The weights at w + delta; yields where that is, for errors."""
        if delta is None:
            yield "at the given weights"
            return
        try:
            self.region.add_(delta)
            yield f"at a point inside the ball of rho={self.rho:g}"
        finally:
            self.region.restore(self.saved)

    @torch.no_grad()
    def _loss_at(self, batch: Batch, delta: list[Tensor]) -> float:
        with self._moved(delta) as where:
            return float(losses(self.model, batch, self.loss, self.dtype, where).double().mean())

    def _loss_and_gradient(
        self, batch: Batch, delta: list[Tensor] | None = None, check: Check | None = None
    ) -> tuple[float, list[Tensor]]:
        with self._moved(delta) as where:
            values = losses(self.model, batch, self.loss, self.dtype, where)
            if check is not None:
                check(values)
            mean = values.mean()
            if not mean.requires_grad:
                raise InputError(
                    "the loss does not depend on any trainable parameter (a forward pass without gradients?)"
                )
            gradients = list(torch.autograd.grad(mean, self.region.params, materialize_grads=True))
        if not bool(torch.stack(torch._foreach_norm(gradients, torch.inf)).isfinite().all()):
            raise InputError(f"the gradient of the loss is not finite {where}")
        return float(values.detach().double().mean()), gradients


def _plus(u: Sequence[Tensor], factor: float, direction: Sequence[Tensor]) -> list[Tensor]:
    return list(torch._foreach_add(list(u), torch._foreach_mul(list(direction), factor)))
