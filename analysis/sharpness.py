"""How much the loss rises inside a ball around the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np
from torch import nn

from analysis.ascent import Ball
from analysis.estimate import Estimate
from analysis.evaluation import check_batches, check_mask, describe_mask, evaluation_mode, whole_mask
from analysis.examples import check_agreement, data_digest, first_pass, micro_batches
from analysis.logits import chosen_loss
from analysis.radius import Radius, masked_radius
from masks.context import Batch, LossFn, cross_entropy
from masks.errors import InputError, unknown_name
from masks.mask import Mask
from masks.region import Region
from sam.perturbation import Identity, Rule

Method = Literal["one_step", "pgd", "apgd"]
METHODS: tuple[Method, ...] = get_args(Method)


def m_sharpness(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    m: int,
    rho: float,
    rule: Rule,
    mask: Mask | None = None,
    method: Method | None = None,
    steps: int = 1,
    step_size: float | None = None,
    normalise_logits: bool = False,
    radius: Radius = "same",
    loss: LossFn = cross_entropy,
) -> Estimate:
    """Worst-case m-sharpness (Foret et al. 2021; Andriushchenko et al. 2023).

    ``S = (1/n) sum_j [ max L_Bj(w + delta) - L_Bj(w) ]`` over the micro-batches B_1..B_n of m examples, the
    maximum over ``delta`` on the mask with ``||delta / c||_p <= rho``; p and c, the normaliser (1, |w| + eta,
    ...), are those of the rule. A coordinate with c = 0 does not move. Losses are means over a micro-batch.

    The maximum is approached from below:

    - "one_step": by the rule's own perturbation, the one that training with it takes. The plain difference of
      two losses, which may be negative. One gradient and one loss.
    - "pgd": by K steps of projected gradient ascent from w in ``u = delta / c``, where the ball is plain:
      ``u <- proj(u + alpha rho d)``, ``d = h / ||h||_2`` or ``sign(h)``, ``h = c grad``. The best of w, the one-step
      point and all iterates counts: never negative, never below the one-step value. K gradients and two losses.
    - "apgd": by K steps of Auto-PGD (Croce and Hein 2020), which chooses its step size by progress, see
      :meth:`analysis.ascent.Ball.apgd`; again never below 0 or the one-step value. K gradients and one loss.

    That the loss is a fixed function is checked with one loss more (:func:`analysis.examples.first_pass`).

    Evaluation mode throughout; the model is left as it was, bit for bit (see
    :func:`analysis.evaluation.evaluation_mode`). Losses are summed in float64.

    Args:
        model: the model, float32 or float64.
        batches: the data, a list of (inputs, targets). They are joined in order and cut anew into micro-batches
            of m; an incomplete last one is dropped.
        m: micro-batch size.
        rho: radius in units of ``delta / c``; what it means for a mask is the convention ``radius``.
        rule: metric and norm.
        mask: the coordinates that move; None for all trainable parameters.
        method: None for "one_step" where ``steps`` is 1, else "pgd".
        steps: K; 1 for one_step only.
        step_size: alpha of pgd, the length of a step in units of rho; None for ``2.5 / K``. With that, more steps
            refine the path but do not lengthen it: to see whether the maximum is reached, fix alpha and raise K.
        normalise_logits: take the loss of centred logits of norm 1, see :func:`analysis.logits.normalise`.
        radius: radius convention, see :func:`analysis.radius.masked_radius`.
        loss: per-example loss, ``(logits, targets) -> (B,)``.

    Returns:
        The mean with its standard error over the n micro-batches. ``settings["radius_used"]`` is the radius of the
        ball on the mask.

    Raises:
        InputError: no complete micro-batch, a radius or number of steps that is not positive, an empty mask,
            a loss or gradient that is not finite, at w or at a perturbed point; losses that differ between two
            passes (random augmentation inside the model).
        MaskError: the mask is of another model.
    """
    method, step_size = _check_search(m, method, steps, step_size)
    mask = whole_mask(model) if mask is None else mask
    check_mask(mask)
    used = masked_radius(model, mask, rule, rho, radius)
    batches = check_batches(batches)
    parts, dropped = micro_batches(batches, m)
    taken, loss_name = chosen_loss(loss, normalise_logits)
    ball = Ball.at_weights(model, taken, Region(mask, model), rule, used)
    rises = _rises(model, parts, taken, ball, method, steps, step_size)
    n = len(rises)
    return Estimate(
        name=(
            f"worst-case m-sharpness, m={m}, {_describe_search(method, steps, step_size)}, {_describe_ball(rule)}, "
            f"{_describe_radius(rho, radius, used)}, {describe_mask(mask)}, evaluation-mode normalization{loss_name}"
        ),
        value=float(np.mean(rises)),
        standard_error=float(np.std(rises, ddof=1)) / math.sqrt(n) if n > 1 else None,
        n=n,
        settings={
            "error_kind": "standard error over micro-batches",
            "m": m,
            "rho": rho,
            "radius": radius,
            "radius_used": used,
            "norm": _norm(rule),
            "metric": repr(rule.metric),
            "method": method,
            "steps": steps,
            "step_size": step_size if method == "pgd" else None,
            "normalise_logits": normalise_logits,
            "num_examples": n * m,
            "num_dropped": dropped,
            "data_digest": data_digest(batches),
            "mask_digest": mask.digest(),
            "num_kept": mask.num_kept,
            "dtype": str(ball.dtype).removeprefix("torch."),
        },
    )


def _check_search(m: int, method: Method | None, steps: int, step_size: float | None) -> tuple[Method, float]:
    """The method and the step size in use."""
    if steps < 1 or m < 1:
        raise InputError(f"m and steps must be at least 1, got m={m} and steps={steps}")
    if method is None:
        method = "one_step" if steps == 1 else "pgd"
    if method not in METHODS:
        raise InputError(unknown_name("method", str(method), METHODS))
    if (method == "one_step") != (steps == 1):
        raise InputError(f"method {method!r} takes {'1 step' if method == 'one_step' else 'steps > 1'}, got {steps}")
    if step_size is None:
        return method, 2.5 / steps
    if method == "one_step":
        raise InputError("step_size needs steps > 1: one step goes to the boundary of the ball")
    if method == "apgd":
        raise InputError("apgd chooses its own step size; leave step_size out or use pgd")
    if not (math.isfinite(step_size) and step_size > 0):
        raise InputError(f"step_size must be a positive finite number, got {step_size}")
    return method, step_size


def _rises(
    model: nn.Module, parts: Sequence[Batch], loss: LossFn, ball: Ball, method: Method, steps: int, step_size: float
) -> list[float]:
    """How far the loss of each micro-batch rises in the ball."""
    with evaluation_mode(model):
        checks = [partial(check_agreement, i, first) for i, first in enumerate(first_pass(model, parts, loss))]
        tasks = zip(parts, checks, strict=True)
        if method == "one_step":
            return [ball.one_step(*task) for task in tasks]
        if method == "pgd":
            return [ball.pgd(*task, steps, step_size) for task in tasks]
        return [ball.apgd(*task, steps) for task in tasks]


def _describe_search(method: Method, steps: int, step_size: float) -> str:
    if method == "one_step":
        return "one-step"
    return f"{steps}-step " + ("Auto-PGD" if method == "apgd" else f"projected gradient (step {step_size:g} rho)")


def _norm(rule: Rule) -> str:
    return "l2" if rule.p == 2 else "linf"


def _describe_ball(rule: Rule) -> str:
    return _norm(rule) if isinstance(rule.metric, Identity) else f"{_norm(rule)} {rule.metric!r}"


def _describe_radius(rho: float, radius: Radius, used: float) -> str:
    return f"rho={rho:g}" if radius == "same" else f"rho={rho:g} by radius convention {radius}, here {used:.6g}"
