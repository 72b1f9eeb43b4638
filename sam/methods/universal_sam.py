"""Universal SAM: a function of the Hessian is penalised, estimated from the loss at random points."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from masks.errors import InputError
from masks.region import Piece
from sam.method import Ascent, Method, Setting
from sam.passes import Passes
from sam.perturbation import total_norm
from sam.registry import register_method
from sam.step import Ascended, Step

Measure = Literal["trace", "determinant", "frobenius"]

MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "trace": lambda t: t.mean(),
    "determinant": lambda t: (-t / 2).exp().mean() ** -2,
    "frobenius": lambda t: 2 * t.var(),
}
"""S from t_1 ... t_n, shape (n,): t is ``x^T H x / 2`` up to terms in rho."""


@dataclass(frozen=True)
class RandomPoints(Ascent):
    """The gradient of ``L + lam S(t_1, ..., t_n)``, where t_i compares the loss at w with that at random points.

    x_i has one entry per masked coordinate and is not normalised: ``||rho x||`` grows with the root of their number.
    The gradient is the exact one of this objective at the points drawn. So its mean over draws is the gradient of
    ``L + lam E[S]``; for the determinant E[S] lies above the S of infinitely many points (Jensen), for the others
    it equals it. The gradients of the n draws are held until the last one.

    Args:
        measure: S, see :data:`MEASURES`.
        n: number of draws.
        lam: weight of S; the ``1 / rho^2`` of t belongs to S.
        a: half-width of the cube that x is uniform on, for the determinant; the others take x ~ N(0, 1).
        antithetic: visit w - rho x too, and let t be the mean of both.
    """

    measure: Measure
    n: int
    lam: float
    a: float
    antithetic: bool

    every_gradient = True

    def check(self, setting: Setting) -> None:
        if setting.norm_scope == "full":
            raise InputError('universal_sam takes no norm, so norm_scope="full" has no meaning; use "masked"')
        if setting.replicated and self.measure != "trace" and self.lam != 0:
            raise InputError(
                f"measure={self.measure} weighs points by their losses, which differ between replicas; "
                "use one process, or measure=trace"
            )

    def __call__(self, step: Step, passes: Passes) -> Ascended:
        device = step.region.pieces[0].param.device
        if self.lam == 0:
            return Ascended.unperturbed(passes.backward("only"), device)
        rho = _common_radius(step)
        loss, clean = passes.gradients(step.first_region)
        signs = (1, -1) if self.antithetic else (1,)
        values, norms = [], []
        changes: list[list[Tensor]] = []  # of every draw: the gradients there, less the one at w, summed over the signs
        for draw in range(self.n):
            noise = [self._noise(piece, step.memory.generator) for piece in step.region.pieces]
            norms.append(total_norm(noise) * rho)
            for sign in signs:
                last = draw == self.n - 1 and sign == signs[-1]
                with step.moved([x * (sign * rho) for x in noise]):
                    value, gradients = _final(step, passes) if last else passes.gradients(step.first_region, "inner")
                values.append(_number(value, device))
                change = list(torch._foreach_sub(gradients, clean))
                if sign == signs[0]:
                    changes.append(change)
                else:
                    torch._foreach_add_(changes[-1], change)
        points = torch.stack(values).view(self.n, len(signs))
        t = ((points - _number(loss, device)).mean(1) / rho**2).requires_grad_()
        (slopes,) = torch.autograd.grad(MEASURES[self.measure](t), t)
        mixed: list[Tensor] = clean
        for change, slope in zip(changes, slopes.tolist(), strict=True):
            factor = self.lam * slope / (len(signs) * rho**2)
            mixed = list(torch._foreach_add(mixed, change, alpha=factor))  # autograd may share tensors: not in place
        for param, gradient in zip(step.first_region.params, mixed, strict=True):
            if param.grad is not None:  # of a parameter that the loss does not use it is, and the base skips it
                param.grad.copy_(gradient)
        return Ascended(loss, points.mean(), torch.stack(norms).mean().to(device), torch.isfinite(points).all())

    def _noise(self, piece: Piece, generator: torch.Generator) -> Tensor:
        """x at the masked coordinates of one tensor, in the piece's form."""
        x = torch.empty((piece.param if piece.index is None else piece.index).shape, dtype=piece.param.dtype)
        if self.measure == "determinant":
            x.uniform_(-self.a, self.a, generator=generator)
        else:
            x.normal_(generator=generator)
        x = x.to(piece.param.device)
        return x if piece.keep is None else torch.where(piece.keep, x, 0)


def _final(step: Step, passes: Passes) -> tuple[Any, list[Tensor]]:
    loss = passes.backward()
    return loss, [torch.zeros_like(p) if p.grad is None else p.grad for p in step.first_region.params]


def _number(loss: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(loss, device=device).detach().double()


def _common_radius(step: Step) -> float:
    radii = sorted({float(rho) for rho in step.rho})
    if len(radii) > 1:
        raise InputError(f"universal_sam divides by one rho^2; the groups' radii are {radii}: give them one rho")
    if radii[0] == 0:
        raise InputError("universal_sam divides by rho^2, so rho must be > 0; for the base optimizer set lam=0")
    return radii[0]


def _least(measure: str) -> int:
    return 2 if measure == "frobenius" else 1  # a variance needs two


@register_method(
    "universal_sam",
    summary="the gradient of L + lam S, S the trace, determinant or Frobenius norm of the masked Hessian",
    source="Tahmasebi et al. 2024, arXiv 2406.03682; its estimators differ, see the docstring",
    passes="1 + 2 n; 1 + n with antithetic=false; 1 with lam=0",
    num_passes=lambda measure, n, lam, a, antithetic: (
        1.0 if lam == 0 else 1.0 + (n or _least(measure)) * (2 if antithetic else 1)
    ),
    rho=0.01,
    tuned_on=(
        "trace and determinant: CIFAR-10, ResNet-18 (the published code's, restated; its determinant takes rho = 1), "
        "without antithetic points; frobenius: nothing"
    ),
    limits=(
        "one rho > 0 for all groups, because S is divided by rho^2",
        'norm_scope "full" is refused: no norm is taken',
        "differences of losses and gradients over rho^2: with parameters in float16 or bfloat16 they are noise",
        "a closure's loss and gradient must have the same scale, unless the measure is trace",
        "random numbers are drawn on the CPU, one per masked coordinate and draw: with large masks on an accelerator, "
        "or small batches, that costs more than a pass",
        "every step reads the losses of its points, for which an accelerator is waited",
        "data-parallel training: trace only, and ascent_gradient=synchronised; the others weigh points by their losses",
    ),
)
def universal_sam(
    *,
    measure: Measure = "trace",
    n: int | None = None,
    lam: float | None = None,
    a: float | None = None,
    antithetic: bool = True,
) -> Method:
    """Penalise S, a function of the Hessian H on the masked coordinates (Tahmasebi et al. 2024).

    With x drawn over the mask, x ~ N(0, I) (determinant: uniform on [-a, a]^d), and

        t = (L(w + rho x) + L(w - rho x) - 2 L(w)) / (2 rho^2) = x^T H x / 2 + O(rho^2)

    the objective is L + lam S, with the factors 1 / rho^2 in S, not in lam, and

    - trace: ``S = E t = tr(H) / 2 + O(rho^2)``;
    - frobenius: ``S = 2 Var t = ||H||_F^2 + O(rho^2)``, from the sample variance of n draws, unbiased;
    - determinant: ``S = (E exp(-t / 2))^-2``. Wide cubes: ``S -> (a^2 / pi)^d det H``; narrow ones:
      ``S = 1 + a^2 tr(H) / 6 + O(a^4)``, the trace again, as with the published a = 0.01.

    With ``antithetic`` off, ``t = (L(w + rho x) - L(w)) / rho^2``, as published: half the passes, and a term
    ``<g, x> / rho`` in t. The trace's expectation stays, with a noise of H x / rho in its gradient. The determinant's
    S gains ``exp`` of a multiple of ``||g||^2 / rho^2``. Frobenius becomes ``2 ||g||^2 / rho^2 + ||H||_F^2``: on a
    quadratic its gradient is ``4 lam H g / rho^2``, so what is penalised there is the gradient's norm.

    The published code (dbahri/universal_sam) is one-sided and leaves factors out: its lam is, in these units,
    ``lam / rho^2`` for trace and determinant and ``4 lam / rho^2`` for frobenius. Its trace default (lam 1, n 1) is
    the gradient at w + rho x. Avoided: noise meant for a sphere but never normalised (here Gaussian by intent; it
    makes the constants above exact for every d), n = 1 in a variance, running statistics updated at noisy weights.

    Args:
        measure: S.
        n: draws per step; 1, and 2 for frobenius, unless set.
        lam: weight; 1e-4 (trace), 1 (determinant), 1e-6 (frobenius, untuned) unless set. 0 is the base optimizer.
        a: half-width of the determinant's cube, 0.01 unless set.
        antithetic: whether -x is visited with x.

    Raises:
        InputError: a value that is out of range, or ``a`` for another measure.
    """
    least = _least(measure)
    n = least if n is None else n
    if n < least:
        raise InputError(f"n must be at least {least} for measure={measure}, got {n}")
    lam = {"trace": 1e-4, "determinant": 1.0, "frobenius": 1e-6}[measure] if lam is None else lam
    if not 0 <= lam < math.inf:
        raise InputError(f"lam must be a finite number >= 0, got {lam}")
    if a is not None and measure != "determinant":
        raise InputError(f"a is the half-width of the determinant's cube; measure={measure} draws from a Gaussian")
    a = 0.01 if a is None else a
    if not 0 < a < math.inf:
        raise InputError(f"a must be a finite number > 0, got {a}")
    return Method(ascent=RandomPoints(measure, n, lam, a, antithetic))
