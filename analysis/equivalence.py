"""Tests and intervals over seeds by sign flips, and equivalence and non-inferiority with a margin fixed beforehand.

The intervals of the verdict are all made in one way. Let seed s contribute ``p_s`` and ``q_s`` to an estimate
``sum p / sum q``. The estimates over the ``2^n - 1`` non-empty sets of seeds are *typical values* of the estimand
(Hartigan 1969, Using subsample values as typical values): the interval from the k-th smallest to the k-th largest has
confidence ``1 - 2k / 2^n`` if the scores ``p_s - theta q_s`` are independent and symmetric about 0. It holds exactly
those theta that the sign flips of the scores do not reject, that is, the wild bootstrap of the seeds' scores with the
null imposed and all Rademacher weights enumerated (Kline and Santos 2012, A score based approach to wild bootstrap
inference). Where the denominators of too many sets are not positive the estimand is not identified and the interval is
unbounded, as Fieller's is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.estimate import Interval
from analysis.stats import mean_interval
from masks.errors import InputError

Floats = NDArray[np.float64]

MARGIN_POINTS = 0.3
_ENUMERATED = 14  # seeds up to which all sets are enumerated; beyond, 2^14 - 1 random ones


@lru_cache(maxsize=32)
def seed_sets(n: int) -> Floats:
    """Membership of n seeds in sets of seeds, shape (2^n - 1, n), 0 or 1: all non-empty sets for n <= 14.

    For more seeds 16,383 random sets, each seed in with probability 1/2, the same on every call.

    Raises:
        InputError: n is below 1.
    """
    if n < 1:
        raise InputError(f"the number of seeds must be at least 1, got {n}")
    if n <= _ENUMERATED:
        sets = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1
    else:
        sets = np.random.default_rng(0).integers(0, 2, size=(2**_ENUMERATED - 1, n))
    out = sets.astype(np.float64)
    out.setflags(write=False)
    return out


def set_ratios(numerators: Floats, denominators: Floats) -> Floats:
    """``sum p / sum q`` over each set of :func:`seed_sets`; nan where ``sum q`` is not positive.

    Args:
        numerators: p, one per seed, shape (n,).
        denominators: q, likewise.
    """
    sets = seed_sets(len(numerators))
    p, q = sets @ numerators, sets @ denominators
    return np.divide(p, q, out=np.full_like(p, np.nan), where=q > 0)


def signed_ratios(parts: Floats, totals: Floats, sign: float) -> Floats:
    """``part / total`` of each set; nan where the total is 0 or has not the given sign. Shapes (sets,)."""
    return np.divide(parts, totals, out=np.full_like(totals, np.nan), where=totals * sign > 0)


def set_means(values: Floats) -> Floats:
    """Mean over each set of :func:`seed_sets` of one value per seed, shape (n,)."""
    return set_ratios(values, np.ones_like(values))


def typical_interval(values: Floats, *, estimate: float, n: int, name: str, confidence: float = 0.95) -> Interval:
    """The interval that the estimates over the sets of seeds give: see the top of this module.

    Args:
        values: an estimate for each set of :func:`seed_sets`; nan, which counts to both tails, where there is none.
        estimate: the estimate from all seeds.
        n: number of seeds.
        name: what is estimated.
        confidence: coverage, in (0, 1).

    Returns:
        The closed interval; unbounded on both sides where the seeds cannot give one at this confidence, which with
        fewer than 6 seeds is so at 0.95. It covers at the least attainable confidence not below the one asked for:
        for 0.95 with 6 seeds 96.9 %, with 8 seeds 95.3 %, with 12 seeds 95.02 %.

    Raises:
        InputError: a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")
    known = np.sort(values[np.isfinite(values)])
    tail = math.floor((1 - confidence) / 2 * (len(values) + 1) + 1e-9) - (len(values) - len(known))
    low, high = _rounded(float(known[tail - 1]), float(known[-tail])) if tail >= 1 else (-math.inf, math.inf)
    return Interval(name, estimate, low, high, confidence, math.nan, math.nan, n)


def _rounded(low: float, high: float) -> tuple[float, float]:
    """To 12 digits of the larger: one that ties with 0 or with a margin of few digits must not pass it by rounding."""
    largest = max(abs(low), abs(high))
    if largest < 1e-200:
        return low, high
    digits = 11 - math.floor(math.log10(largest))
    return round(low, digits), round(high, digits)


def typical_p(values: Floats, null: float = 0.0) -> float:
    """Two-sided p value of ``estimand = null``: twice the share of sets on the rarer side, the empty set counted in.

    For means it is :func:`analysis.sign_flip_p` of ``values - null``. It is at most ``1 - confidence`` where
    :func:`typical_interval` excludes ``null``, to 12 digits: the interval's ends are rounded so, and ties counted so.
    """
    return min(1.0, 2 * min(_share(values, null, below=True), _share(values, null, below=False)))


def _share(values: Floats, null: float, *, below: bool) -> float:
    finite = np.isfinite(values)
    slack = 1e-12 * float(np.abs(values[finite]).max(initial=0.0))  # ties must stay ties after rounding
    beyond = values <= null + slack if below else values >= null - slack
    return float(1 + np.count_nonzero(beyond | ~finite)) / (len(values) + 1)


def sign_flip_interval(differences: ArrayLike, *, name: str = "mean over seeds", confidence: float = 0.95) -> Interval:
    """The interval of a mean whose decision always agrees with :func:`analysis.sign_flip_p`, for n <= 14.

    It excludes 0 exactly where that p value is at most ``1 - confidence``, which Student's t interval does not promise.

    Args:
        differences: one per seed, shape (n,).
        name: what the mean is of.
        confidence: coverage, in (0, 1); exact for differences symmetric about their mean, else approximate.

    Raises:
        InputError: not a non-empty list of finite numbers, or a confidence outside (0, 1).
    """
    x = _checked(differences)
    return typical_interval(set_means(x), estimate=float(x.mean()), n=len(x), name=name, confidence=confidence)


def seed_contributions(moments: Floats, targets: Floats, index: int) -> tuple[Floats, Floats]:
    """What each seed contributes to one coefficient of a just-identified linear moment system.

    ``theta`` solves ``sum_s (v_s - M_s theta) = 0``. With the coefficient of interest fixed at ``theta_0`` and the
    others re-estimated, the efficient score of seed s is linear in it: ``p_s - theta_0 q_s``, and
    ``sum p / sum q = theta_index``. The deviations from their means are stretched by ``sqrt(n / (n - 1))``, because
    residuals of a fit to n seeds are too small by about that.

    Args:
        moments: M, shape (n, k, k): instruments times regressors, summed within the seed.
        targets: v, shape (n, k): instruments times outcome.
        index: of the coefficient of interest.

    Returns:
        p and q, shape (n,) each; ``sum q = 1``.

    Raises:
        np.linalg.LinAlgError: the coefficients cannot be told apart, ``sum_s M_s`` is singular to rounding.
    """
    n, k = targets.shape
    total = moments.sum(axis=0)
    scale = np.sqrt(np.abs(np.diag(total)))
    if not scale.all() or np.linalg.cond(total / np.outer(scale, scale)) > 1e10:
        raise np.linalg.LinAlgError("the coefficients cannot be told apart")
    theta = np.linalg.solve(total, targets.sum(axis=0))
    row = np.linalg.solve(total.T, np.eye(k)[index])
    rest = np.delete(np.arange(k), index)
    path = np.eye(k)[index]
    path[rest] = -np.linalg.solve(total[np.ix_(rest, rest)], total[rest, index])
    q = moments @ path @ row
    p = (targets - moments @ theta) @ row + theta[index] * q
    stretch = math.sqrt(n / (n - 1))
    return p.mean() + stretch * (p - p.mean()), q.mean() + stretch * (q - q.mean())


@dataclass(frozen=True)
class Equivalence:
    """Whether a gain is no larger than a margin either way (equivalence), or not below minus the margin.

    Attributes:
        interval: of the mean gain at confidence ``1 - 2 alpha``; both decisions can be read off it.
        margin: fixed beforehand, in the unit of the gains.
        p_equivalent: of the two one-sided tests, the larger p value.
        p_not_worse: of the test of ``mean gain <= -margin``.
        equivalent: ``p_equivalent <= alpha``, that is, the interval lies strictly within +-margin.
        not_worse: ``p_not_worse <= alpha``, that is, the interval lies strictly above -margin.
        alpha: level of each one-sided test.
        method: "t" or "sign_flip".
    """

    interval: Interval
    margin: float
    p_equivalent: float
    p_not_worse: float
    equivalent: bool
    not_worse: bool
    alpha: float
    method: str


def equivalence(
    gains: ArrayLike,
    *,
    margin: float = MARGIN_POINTS,
    alpha: float = 0.05,
    method: Literal["t", "sign_flip"] = "sign_flip",
    name: str = "mean gain",
) -> Equivalence:
    """Two one-sided tests (Schuirmann 1987) of paired gains against a margin that was fixed beforehand.

    Args:
        gains: one per seed, larger is better, shape (n,), in the unit of the margin (percentage points here).
        margin: the largest difference that does not matter.
        alpha: level of each one-sided test.
        method: "t", Student's; or "sign_flip", exact for symmetric gains, so that it agrees with
            :func:`analysis.sign_flip_p` and never decides anything from fewer than 5 seeds at alpha = 0.05.
        name: what the gains are.

    Raises:
        InputError: gains that are not a non-empty list of finite numbers, a margin that is not positive, an alpha
            outside (0, 0.5), or an unknown method.
    """
    x = _checked(gains)
    if not (math.isfinite(margin) and margin > 0 and 0 < alpha < 0.5):
        raise InputError(f"need margin > 0 and 0 < alpha < 0.5, got {margin} and {alpha}")
    if method == "t":
        interval = mean_interval(x, name=name, confidence=1 - 2 * alpha)
        p_low, p_high = (_one_sided_t(sign * x, margin) for sign in (1, -1))
    elif method == "sign_flip":
        interval = sign_flip_interval(x, name=name, confidence=1 - 2 * alpha)
        means = set_means(x)
        p_low, p_high = _share(means, -margin, below=True), _share(means, margin, below=False)
    else:
        raise InputError(f"method must be 't' or 'sign_flip', got {method!r}")
    p = max(p_low, p_high)
    return Equivalence(interval, margin, p, p_low, p <= alpha, p_low <= alpha, alpha, method)


def _one_sided_t(x: Floats, margin: float) -> float:
    """P value of ``mean <= -margin``; 1 for one seed."""
    if len(x) == 1:
        return 1.0
    distance, error = float(x.mean()) + margin, float(stats.sem(x))
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / error, len(x) - 1))


def _checked(values: ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise InputError(f"need a non-empty list of numbers, one per seed, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise InputError(f"{int((~np.isfinite(x)).sum())} of {len(x)} values are not finite")
    return x
