"""What pairs of runs of one seed say: mediation of the gain by sharpness, and agreement of signs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import comb

from analysis.equivalence import (
    seed_contributions,
    set_means,
    set_ratios,
    signed_ratios,
    typical_interval,
    typical_p,
)
from analysis.estimate import Interval
from analysis.reliability import PairedRuns
from masks.errors import InputError

Floats = NDArray[np.float64]

CURVED_FROM = 4  # cells from which the slope may change along the sweep

ASSUMPTIONS = (
    "Mediation: among runs of the same arm and rho nothing else moves sharpness and test error together (no unmeasured "
    "common cause; the sensitivity analysis says how strong one must be), and error follows sharpness, not vice versa.",
    "Mediation: the slope of error on log sharpness between such runs is the slope between the two arms, linear in log "
    "sharpness from one chosen radius to the other up to a constant change along the sweep.",
    "Mediation: the errors of the two measurements of a run are independent of each other and of the test error; the "
    "variation of log sharpness between runs of the same arm and rho is not strongly skewed where the slope changes.",
)


@dataclass(frozen=True)
class Mediation:
    """The gain split into a part through sharpness and the rest.

    Attributes:
        decided: whether the indirect effect has a bounded interval and is corrected for unreliability.
        reason: why not; empty where it is.
        corrected: whether errors in the measured sharpness were taken out.
        total: gain of the arm over the reference at the chosen radii, points.
        flattening: how much flatter the arm is there, log units of sharpness (0.7 halves it).
        slope: gain per unit of flatness between runs of the same arm and rho, points.
        slope_difference: how much larger this slope is in the arm.
        indirect: slope times flattening, points.
        direct: total minus indirect, points.
        share: indirect over total; None where the interval of the total gain includes 0.
        p_flattening: two-sided p value of ``flattening = 0``.
        p_indirect: two-sided p value of ``indirect = 0``.
        residual_ratio: standard deviation of the gain given flatness over that of flatness, both between runs of the
            same arm and rho, free of error of measurement, points per unit; nan where they cannot be told from 0.
        robustness: see :meth:`Mediation.under_confounding`: the strength of a common cause at which the estimate is 0.
        robustness_low: the strength at which the slope's interval reaches 0; 0 where it includes 0 already.
    """

    decided: bool
    reason: str
    corrected: bool
    total: Interval
    flattening: Interval
    slope: Interval
    slope_difference: Interval
    indirect: Interval
    direct: Interval
    share: Interval | None
    p_flattening: float
    p_indirect: float
    residual_ratio: float
    robustness: float
    robustness_low: float

    def under_confounding(self, gain_r2: float, flatness_r2: float) -> Interval:
        """The indirect effect's interval, widened by the bias that a common cause of a given strength can make.

        ``|bias of slope| = sqrt(gain_r2 flatness_r2 / (1 - flatness_r2)) residual_ratio`` (Cinelli and Hazlett 2020,
        Making sense of sensitivity: extending omitted variable bias), times the flattening. With both strengths equal
        to ``robustness`` the bias is the estimate.

        Args:
            gain_r2: share of the gain's variance given flatness, between runs of the same arm and rho, that the cause
                explains, in [0, 1].
            flatness_r2: share of the flatness's variance that it explains, in [0, 1).

        Raises:
            InputError: shares outside these ranges.
        """
        if not (0 <= gain_r2 <= 1 and 0 <= flatness_r2 < 1):
            raise InputError(f"need 0 <= gain_r2 <= 1 and 0 <= flatness_r2 < 1, got {gain_r2} and {flatness_r2}")
        bias = math.sqrt(gain_r2 * flatness_r2 / (1 - flatness_r2)) * self.residual_ratio * abs(self.flattening.value)
        if math.isnan(bias):
            bias = math.inf if gain_r2 * flatness_r2 else 0.0
        return replace(
            self.indirect,
            name=f"{self.indirect.name}, common cause of R2 {gain_r2:g} with gain and {flatness_r2:g} with flatness",
            low=self.indirect.low - bias,
            high=self.indirect.high + bias,
        )


def mediation(runs: PairedRuns, *, confidence: float = 0.95) -> Mediation:
    """Mediation within seeds after Judd, Kenny and McClelland (2001), over all radii of both arms.

    ``gain = seed + cell + b x + h arm (x - mean) + a (x - mean)(mean - c) + error``

    for flatness x with the mean of its cell (arm, rho) and c the middle of the two chosen cells' means: b is the slope
    there, which for a quadratic is that of the chord between them. With one radius per arm this is their regression
    of the difference in gain on the difference and the centred sum of x (the a term, which then cannot be told, is left
    out). Each further radius adds n - 1 degrees of freedom to the slope. ``indirect = b * flattening``.

    What rho does to error by other ways cannot disturb b: the cells take it out. That is what the sweep of
    :func:`iso_sharpness` cannot do, and the reverse holds for common causes within a cell.

    Errors in x are taken out as by "retest" there: with x1 and x2 as each other's instruments. Intervals by the seeds'
    wild bootstrap (:mod:`analysis.equivalence`), those of products from the products over each set of seeds.

    Args:
        runs: both arms; see :func:`paired_runs`.
        confidence: coverage, in (0, 1).

    Raises:
        InputError: a confidence outside (0, 1).
    """
    n, k = runs.gain.shape
    mean = runs.flatness.mean(axis=0)
    middle = (mean[runs.chosen[0]] + mean[runs.chosen[1]]) / 2
    arm = np.where(runs.in_arm, 0.5, -0.5)

    def design(x: Floats) -> Floats:
        columns = [x, arm * (x - mean)] + ([(x - mean) * (mean - middle)] if k >= CURVED_FROM else [])
        return np.stack([_within(column) for column in columns], axis=-1)

    first, second = (design(x) for x in (runs.flatness[None].repeat(2, 0) if runs.repeats is None else runs.repeats))
    y = _within(runs.gain)
    moments = (np.einsum("scj,sck->sjk", first, second) + np.einsum("scj,sck->sjk", second, first)) / 2
    targets = np.einsum("scj,sc->sj", (first + second) / 2, y)
    try:
        slopes = [set_ratios(p, q) for p, q in (seed_contributions(moments, targets, i) for i in (0, 1))]
        theta = np.linalg.solve(moments.sum(axis=0), targets.sum(axis=0))
        ratio = _residual_ratio(moments.sum(axis=0), (y - first @ theta, y - second @ theta))
    except np.linalg.LinAlgError:
        unknown = np.full(len(set_means(y[:, 0])), np.nan)
        slopes, theta, ratio = [unknown, unknown], np.full(2, np.nan), math.nan
    total, flattening = runs.contrast(runs.gain), runs.contrast(runs.flatness)

    def interval(name: str, values: Floats, estimate: float) -> Interval:
        return typical_interval(values, estimate=estimate, n=n, name=name, confidence=confidence)

    totals, flattenings = set_means(total), set_means(flattening)
    indirects = slopes[0] * flattenings
    mean_total, indirect = float(total.mean()), float(theta[0] * flattening.mean())
    whole = interval("gain, points", totals, mean_total)
    share = None
    if not whole.low <= 0 <= whole.high:
        shares = signed_ratios(indirects, totals, mean_total)
        share = interval("share of the gain through sharpness", shares, indirect / mean_total)
    slope = interval("gain per unit of flatness, points", slopes[0], float(theta[0]))
    through = interval("gain through sharpness, points", indirects, indirect)
    nearest = 0.0 if slope.low <= 0 <= slope.high else min(abs(slope.low), abs(slope.high))
    bounded = math.isfinite(through.low)
    reason = "" if bounded else "not decided: too little true variation of sharpness between runs of the same cell"
    if runs.repeats is None:
        reason = f"not decided: the reliability of {runs.metric} was not measured (no column {runs.metric}_repeat)"
    return Mediation(
        decided=not reason,
        reason=reason,
        corrected=runs.repeats is not None,
        total=whole,
        flattening=interval("flattening, log units", flattenings, float(flattening.mean())),
        slope=slope,
        slope_difference=interval("difference of this slope between the arms", slopes[1], float(theta[1])),
        indirect=through,
        direct=interval("gain not through sharpness, points", totals - indirects, mean_total - indirect),
        share=share,
        p_flattening=typical_p(flattenings),
        p_indirect=typical_p(indirects),
        residual_ratio=ratio,
        robustness=robustness_value(float(theta[0]) / ratio),
        robustness_low=robustness_value(nearest / ratio),
    )


def robustness_value(f: float) -> float:
    """The robustness value of Cinelli and Hazlett (2020), ``(sqrt(f^4 + 4 f^2) - f^2) / 2``; 0 for nan.

    Args:
        f: the partial Cohen's f of the slope, its ratio to :attr:`Mediation.residual_ratio`.

    Returns:
        The R2 with both, in [0, 1], that an unmeasured common cause needs to make the whole slope.
    """
    square = f * f
    return 0.0 if math.isnan(square) else (math.sqrt(square * square + 4 * square) - square) / 2


def _within(x: Floats) -> Floats:
    """Means of seeds and of cells taken out, shape (n, K)."""
    return np.asarray(x - x.mean(axis=1, keepdims=True) - x.mean(axis=0) + x.mean())


def _residual_ratio(moments: Floats, residuals: tuple[Floats, Floats]) -> float:
    """sd(gain given flatness) / sd(flatness): the errors of the two measurements drop out of both cross products."""
    left = float((residuals[0] * residuals[1]).sum())
    flatness = float(1 / np.linalg.inv(moments)[0, 0])
    return math.sqrt(left / flatness) if left > 0 and flatness > 0 else math.nan


@dataclass(frozen=True)
class SignAgreement:
    """Over pairs of runs of one seed, one of each arm: is the better run the flatter one?

    Attributes:
        n: number of pairs.
        agree: in how many the better run is the flatter one.
        ties: how many have equal errors or equal sharpness; each counts as half an agreement.
        agreement: share of agreement.
        low: lower end of its interval (Clopper and Pearson 1934, on ``agree + ties / 2``).
        high: upper end.
        confidence: of the interval.
        implied: the share that the arms' own signs imply if gain and flatness were paired at random: one arm better
            in all pairs and flatter in all pairs gives 1 without any link between the two.
        null_low: lower end of the central range of the agreement at random pairing, at ``confidence``.
        null_high: upper end.
        p: two-sided exact p value of the agreement under random pairing, 1 where the arms' signs leave no choice.
    """

    n: int
    agree: int
    ties: int
    agreement: float
    low: float
    high: float
    confidence: float
    implied: float
    null_low: float
    null_high: float
    p: float


def sign_agreement(gain: ArrayLike, flatness: ArrayLike, *, confidence: float = 0.95) -> SignAgreement:
    """Agreement of signs over seeds, against all pairings of the gains of some seeds with the flatness of others.

    The null distribution is exact: a table of signs (+, 0, -) with fixed margins, the multivariate hypergeometric
    distribution (without ties Fisher's exact test).

    Args:
        gain: of the arm over the reference, one per seed, larger is better, shape (n,).
        flatness: likewise, larger is flatter.
        confidence: coverage, in (0, 1).

    Raises:
        InputError: not two lists of as many finite numbers, or a confidence outside (0, 1).
    """
    a, b = np.sign(np.asarray(gain, dtype=np.float64)), np.sign(np.asarray(flatness, dtype=np.float64))
    if a.ndim != 1 or a.shape != b.shape or not len(a) or not np.isfinite(a + b).all():
        raise InputError(f"need two lists of as many finite numbers, got shapes {a.shape} and {b.shape}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")
    n, ties = len(a), int((a * b == 0).sum())
    score = (n + float(a @ b)) / 2
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, score, n - score + 1)) if score > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, score + 1, n - score)) if score < n else 1.0
    implied = float(1 + a.mean() * b.mean()) / 2
    shares, chance = _random_pairing(a, b)
    cumulative = np.cumsum(chance)
    p = float(chance[np.abs(shares - implied) >= abs(score / n - implied) - 1e-9].sum())
    return SignAgreement(
        n, int((a * b > 0).sum()), ties, score / n, low, high, confidence, implied,
        float(shares[np.searchsorted(cumulative, tail)]),
        float(shares[np.searchsorted(cumulative, 1 - tail - 1e-12)]), min(p, 1.0),
    )  # fmt: skip


def _random_pairing(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """The possible shares of agreement, ascending, and their probabilities when a is paired with b at random."""
    n = len(a)
    plus, minus = int((a > 0).sum()), int((a < 0).sum())
    up, down = int((b > 0).sum()), int((b < 0).sum())
    # of the pluses i fall on ups and j on downs; of the minuses k on ups and m on downs
    i, j, k, m = np.indices((plus + 1, plus + 1, minus + 1, minus + 1)).reshape(4, -1)
    ways = comb(up, i) * comb(up - i, k) * comb(down, j) * comb(down - j, m)
    rest, left = plus - i - j, minus - k - m
    ways = ways * comb(n - up - down, rest) * comb(n - up - down - rest, left)
    scores = np.bincount(i - j - k + m + n, ways, 2 * n + 1)
    return np.arange(2 * n + 1) / (2 * n), scores / scores.sum()
