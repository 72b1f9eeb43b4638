"""Gradient ascent on the loss inside a ball around the weights.

Notation: delta the move of the weights, c the normaliser of the rule, ``u = delta / c``, in which the ball is
plain; ``h = c grad L(w + c u)`` the gradient in u. Projection onto the ball is then a scaling (l2) or a clip (linf).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from analysis.evaluation import losses, place, precision_of
from masks.context import Batch, LossFn
from masks.errors import InputError
from masks.region import Region, like_storage
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

    Points and gradients are flat vectors, the values of one piece of the region after the other, each tensor in the
    order in which it lies in memory: a few operations on long vectors instead of many on short ones. Every method
    leaves the weights bit for bit as they were, also when it raises. Every search is given a ``check`` of the losses at
    the weights, shape (B,), which raises where they are not those of an earlier pass: the search has them anyway.
    """

    model: nn.Module
    loss: LossFn
    region: Region
    rule: Rule
    rho: float
    saved: list[Tensor]
    layout: list[tuple[torch.Size, tuple[int, ...], int]]
    scale: Tensor | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def at_weights(cls, model: nn.Module, loss: LossFn, region: Region, rule: Rule, rho: float) -> Ball:
        weights = region.weights()
        scales = [rule.metric.scale(p.row, p.param, w) for p, w in zip(region.pieces, weights, strict=True)]
        layout, start = [], 0
        for weight in weights:
            # Laid out as the parameter is, where it fills its storage.
            form = like_storage(weight.new_empty(weight.numel()), weight)
            layout.append((form.shape, form.stride(), start))
            start += weight.numel()
        ball = cls(model, loss, region, rule, rho, region.save(), layout, None, *precision_of(model))
        if all(scale is None for scale in scales):
            return ball
        full = [torch.ones_like(w) if c is None else c.expand_as(w) for c, w in zip(scales, weights, strict=True)]
        return replace(ball, scale=ball._flat(full))

    def one_step(self, batch: Batch, check: Check) -> float:
        """The rise of the loss at the rule's own perturbation: one gradient and one loss."""
        batch = place(batch, self.dtype, self.device)
        clean, gradients = self._loss_and_gradients(batch, check=check)
        return self._loss_at(batch, self._first_order(gradients)) - clean

    def pgd(self, batch: Batch, check: Check, steps: int, step_size: float) -> float:
        """The largest rise over w, the one-step point and the iterates: ``steps`` gradients and two losses."""
        batch = place(batch, self.dtype, self.device)
        clean, gradients = self._loss_and_gradients(batch, check=check)
        best = max(clean, self._loss_at(batch, self._first_order(gradients)))
        h = self._ascent(gradients)
        u = torch.zeros_like(h)
        for step in range(1, steps + 1):
            u = self._step(u, h, step_size)
            value, h = self._evaluate(batch, u, last=step == steps)
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
        value, gradients = self._loss_and_gradients(batch, check=check)
        h = self._ascent(gradients)
        clean = best = best_then = value
        u = torch.zeros_like(h)
        best_u, best_h, previous = u, h, u
        alpha, halved, rises, since = 2.0, False, 0, 0
        due = set(checkpoints(steps))
        for step in range(1, steps + 1):
            z = self._step(u, h, alpha)
            if step > 1:  # u + 3/4 (z - u) + 1/4 (u - previous)
                ahead = torch.lerp(previous, u, 2.0)
                z = self._project_(z.mul_(_MOMENTUM).add_(ahead, alpha=1 - _MOMENTUM))
            u, previous = z, u
            before_step, (value, h) = value, self._evaluate(batch, u, last=step == steps)
            rises += value > before_step
            if value > best:
                best, best_u, best_h = value, u, h
            if step in due:
                if rises < _ENOUGH_RISES * (step - since) or (not halved and best == best_then):
                    alpha, halved = alpha / 2, True
                    value, h = best, best_h
                    u = previous = best_u
                else:
                    halved = False
                best_then, rises, since = best, 0, step
        return best - clean

    def _evaluate(self, batch: Batch, u: Tensor, *, last: bool) -> tuple[float, Tensor]:
        """Loss and gradient at u; at the last point only the loss."""
        delta = self._pieces(u if self.scale is None else u * self.scale)
        if last:
            return self._loss_at(batch, delta), u.new_empty(0)
        value, gradients = self._loss_and_gradients(batch, delta)
        return value, self._ascent(gradients)

    def _step(self, u: Tensor, h: Tensor, alpha: float) -> Tensor:
        """``proj(u + alpha rho d)``, a new tensor; d the steepest direction of norm 1, zero for a zero gradient."""
        length = alpha * self.rho
        if self.rule.p != 2:
            return self._project_(torch.add(u, h.sign(), alpha=length))
        norm = float(total_norm([h]))
        if not norm < float("inf"):
            raise InputError("the norm of the gradient overflows")
        return self._project_(torch.add(u, h, alpha=length / norm) if norm > 0 else u.clone())

    def _project_(self, u: Tensor) -> Tensor:
        """In place, into the ball."""
        if self.rule.p != 2:
            return u.clamp_(-self.rho, self.rho)
        norm = float(total_norm([u]))
        return u.mul_(self.rho / norm) if norm > self.rho else u

    def _first_order(self, gradients: list[Tensor]) -> list[Tensor]:
        step = perturb(self.rule, self.region, gradients, self.rho)
        if not bool(step.finite):  # the rule then moves nothing, which would pass for a flat loss
            raise InputError("the norm of the gradient overflows")
        return step.values

    def _ascent(self, gradients: list[Tensor]) -> Tensor:
        """The gradient in u, of gradients of whole tensors."""
        h = self._flat(self.region.gather(gradients))
        return h if self.scale is None else h.mul_(self.scale)

    def _flat(self, values: Sequence[Tensor]) -> Tensor:
        """The values of all pieces as one new vector."""
        flat = torch.empty(sum(value.numel() for value in values), dtype=self.dtype, device=self.device)
        torch._foreach_copy_(self._pieces(flat), list(values))
        return flat

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        """Its views, one per piece, laid out as the piece's values are."""
        return [flat.as_strided(*form) for form in self.layout]

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

    def _loss_and_gradients(
        self, batch: Batch, delta: list[Tensor] | None = None, check: Check | None = None
    ) -> tuple[float, list[Tensor]]:
        """The loss, and the gradient of every tensor of the region."""
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
        if not _all_finite(gradients):
            raise InputError(f"the gradient of the loss is not finite {where}")
        return float(values.detach().double().mean()), gradients


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    """A finite sum has finite terms; only where it is not (it may overflow) every entry is looked at."""
    if bool(torch.stack([t.sum() for t in tensors]).isfinite().all()):
        return True
    return all(bool(t.isfinite().all()) for t in tensors)
