"""How much the loss rises inside a ball around the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from analysis.estimate import Estimate
from analysis.evaluation import (
    check_batches,
    check_mask,
    describe_loss,
    describe_mask,
    evaluation_mode,
    losses,
    place,
    precision_of,
    whole_mask,
)
from masks.context import Batch, LossFn, cross_entropy
from masks.errors import InputError
from masks.mask import Mask
from masks.region import Region
from sam.perturbation import Identity, Rule, perturbation, total_norm


def m_sharpness(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    m: int,
    rho: float,
    rule: Rule,
    mask: Mask | None = None,
    steps: int = 1,
    step_size: float | None = None,
    loss: LossFn = cross_entropy,
) -> Estimate:
    """Worst-case m-sharpness (Foret et al. 2021; Andriushchenko et al. 2023).

    ``S = (1/n) sum_j [ max L_Bj(w + delta) - L_Bj(w) ]`` over the micro-batches B_1..B_n of m examples, the
    maximum over ``delta`` on the mask with ``||delta / c||_p <= rho``; p and c, the normaliser (1, |w| + eta,
    ...), are those of the rule. A coordinate with c = 0 does not move. Losses are means over a micro-batch.

    The maximum is approached from below:

    - ``steps=1``: by the rule's own perturbation, the one that training with it takes. The plain difference
      of two losses, which may be negative.
    - ``steps=K > 1``: by projected gradient ascent from w in ``u = delta / c``, where the ball is plain:
      ``u <- proj(u + alpha rho d)``, ``d = h / ||h||_2`` or ``sign(h)``, ``h = c grad``. The best of w, the one-step
      point and all iterates counts: never negative, never below the one-step value.

    Evaluation mode throughout; the model is left as it was, bit for bit (see
    :func:`analysis.evaluation.evaluation_mode`). Losses are summed in float64.

    Args:
        model: the model, float32 or float64.
        batches: the data, a list of (inputs, targets). They are joined in order and cut anew into micro-batches
            of m; an incomplete last one is dropped.
        m: micro-batch size.
        rho: radius in units of ``delta / c``; the same for every size of mask, so not the same per coordinate.
        rule: metric and norm.
        mask: the coordinates that move; None for all trainable parameters.
        steps: 1, or the number of steps K of the ascent.
        step_size: alpha, the length of a step in units of rho; None for ``2.5 / K``. With that, more steps refine
            the path but do not lengthen it: to see whether the maximum is reached, fix alpha and raise K.
        loss: per-example loss, ``(logits, targets) -> (B,)``.

    Returns:
        The mean with its standard error over the n micro-batches.

    Raises:
        InputError: no complete micro-batch, a radius or number of steps that is not positive, an empty mask,
            a loss or gradient that is not finite, at w or at a perturbed point.
        MaskError: the mask is of another model.
    """
    step_size = _check_search(m, rho, steps, step_size)
    mask = whole_mask(model) if mask is None else mask
    check_mask(mask)
    micro_batches, dropped = _cut(check_batches(batches), m)
    problem = _Problem.at_weights(model, loss, Region(mask, model), rule, rho)
    with evaluation_mode(model):
        rises = [problem.one_step(b) if steps == 1 else problem.ascent(b, steps, step_size) for b in micro_batches]
    n = len(rises)
    return Estimate(
        name=(
            f"worst-case m-sharpness, m={m}, {_describe_search(steps, step_size)}, {_describe_ball(rule)}, "
            f"rho={rho:g}, {describe_mask(mask)}, evaluation-mode normalization{describe_loss(loss)}"
        ),
        value=float(np.mean(rises)),
        standard_error=float(np.std(rises, ddof=1)) / math.sqrt(n) if n > 1 else None,
        n=n,
        settings={
            "m": m,
            "rho": rho,
            "norm": _norm(rule),
            "metric": repr(rule.metric),
            "steps": steps,
            "step_size": None if steps == 1 else step_size,
            "num_examples": n * m,
            "num_dropped": dropped,
            "mask_digest": mask.digest(),
            "num_kept": mask.num_kept,
            "dtype": str(problem.dtype).removeprefix("torch."),
        },
    )


def _check_search(m: int, rho: float, steps: int, step_size: float | None) -> float:
    """The step size in use."""
    if not (math.isfinite(rho) and rho > 0):
        raise InputError(f"rho must be a positive finite number, got {rho}")
    if steps < 1 or m < 1:
        raise InputError(f"m and steps must be at least 1, got m={m} and steps={steps}")
    if step_size is None:
        return 2.5 / steps
    if steps == 1:
        raise InputError("step_size needs steps > 1: one step goes to the boundary of the ball")
    if not (math.isfinite(step_size) and step_size > 0):
        raise InputError(f"step_size must be a positive finite number, got {step_size}")
    return step_size


def _describe_search(steps: int, step_size: float) -> str:
    return "one-step" if steps == 1 else f"{steps}-step projected gradient (step {step_size:g} rho)"


def _norm(rule: Rule) -> str:
    return "l2" if rule.p == 2 else "linf"


def _describe_ball(rule: Rule) -> str:
    return _norm(rule) if isinstance(rule.metric, Identity) else f"{_norm(rule)} {rule.metric!r}"


def _cut(batches: Sequence[Batch], m: int) -> tuple[list[Batch], int]:
    """Complete micro-batches of m examples in the order of the data, and how many examples are left over."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    n = len(x) // m
    if not n:
        raise InputError(f"m-sharpness with m={m} needs at least {m} examples, got {len(x)}")
    return list(zip(torch.split(x[: n * m], m), torch.split(y[: n * m], m), strict=True)), len(x) - n * m


@dataclass(frozen=True, eq=False)
class _Problem:
    """The maximisation over the ball around the weights at which it was made.

    Values are lists with one tensor per piece of the region, in the piece's form.
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
    def at_weights(cls, model: nn.Module, loss: LossFn, region: Region, rule: Rule, rho: float) -> _Problem:
        weights = region.weights()
        scales = [rule.metric.scale(p.row, p.param, w) for p, w in zip(region.pieces, weights, strict=True)]
        return cls(model, loss, region, rule, rho, region.save(), scales, *precision_of(model))

    def one_step(self, batch: Batch) -> float:
        """The rise of the loss at the rule's own perturbation."""
        batch = place(batch, self.dtype, self.device)
        clean, gradients = self._loss_and_gradient(batch)
        return self._loss_at(batch, self._first_order(gradients)) - clean

    def ascent(self, batch: Batch, steps: int, step_size: float) -> float:
        """The largest rise over w, the one-step point and the iterates of projected gradient ascent."""
        batch = place(batch, self.dtype, self.device)
        clean, gradients = self._loss_and_gradient(batch)
        best = max(clean, self._loss_at(batch, self._first_order(gradients)))
        length = step_size * self.rho
        u = [torch.zeros_like(g) for g in self.region.gather(gradients)]
        for step in range(steps):
            u = self._project([a + length * b for a, b in zip(u, self._direction(gradients), strict=True)])
            delta = self._scaled(u)
            if step < steps - 1:
                value, gradients = self._loss_and_gradient(batch, delta)
            else:
                value = self._loss_at(batch, delta)
            best = max(best, value)
        return best - clean

    def _first_order(self, gradients: list[Tensor]) -> list[Tensor]:
        step = perturbation(self.rule, self.region, gradients, self.rho)
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
        return [t / norm for t in h] if norm > 0 else h

    def _project(self, u: list[Tensor]) -> list[Tensor]:
        if self.rule.p != 2:
            return [t.clamp(-self.rho, self.rho) for t in u]
        norm = float(total_norm(u))
        return [t * (self.rho / norm) for t in u] if norm > self.rho else u

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

    def _loss_and_gradient(self, batch: Batch, delta: list[Tensor] | None = None) -> tuple[float, list[Tensor]]:
        with self._moved(delta) as where:
            values = losses(self.model, batch, self.loss, self.dtype, where)
            mean = values.mean()
            if not mean.requires_grad:
                raise InputError(
                    "the loss does not depend on any trainable parameter (a forward pass without gradients?)"
                )
            gradients = list(torch.autograd.grad(mean, self.region.params, materialize_grads=True))
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            raise InputError(f"the gradient of the loss is not finite {where}")
        return float(values.detach().double().mean()), gradients
