"""Does the mask still matter at equal sharpness? Covariance analysis along the sweep over rho."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.equivalence import seed_contributions, seed_sets, set_means, set_ratios, typical_interval, typical_p
from analysis.estimate import Interval
from analysis.reliability import PairedRuns

Floats = NDArray[np.float64]
Correction = Literal["sweep", "retest"]

MIN_RADII = 3  # of each arm in the common range: two cannot tell a curve from an effect of the mask
_INTERPOLATED_SETS = 255

ASSUMPTIONS = (
    "Iso-sharpness: rho acts on the test error only through the sharpness (no other effect of a larger rho); the curve "
    "of error against log sharpness is quadratic and parallel, up to a linear interaction, on the common range.",
    "Iso-sharpness: a run's errors of measurement are independent of those of other seeds (sweep) or of the repeated "
    "measurement (retest).",
)


@dataclass(frozen=True)
class IsoEstimate:
    """The gain split at equal sharpness, with one way to correct for errors in the measured sharpness.

    Attributes:
        correction: see :func:`iso_sharpness`.
        direct: gain of the arm over the reference at equal sharpness, points, at the middle of the common range.
        indirect: the rest of the total gain, points.
        share: indirect over total; None where the interval of the total gain includes 0.
        slope: gain per unit of flatness, points; a unit is a factor e of sharpness.
        interaction: how much larger this slope is in the arm.
        p_direct: two-sided p value of ``direct = 0``.
    """

    correction: str
    direct: Interval
    indirect: Interval
    share: Interval | None
    slope: Interval
    interaction: Interval
    p_direct: float


@dataclass(frozen=True)
class IsoSharpness:
    """The iso-sharpness test of one contrast.

    Attributes:
        decided: whether the test could be made.
        reason: why not; empty where it could.
        low: lower end of the common range of flatness (minus log sharpness); above ``high`` where there is none.
        high: upper end.
        radii_reference: number of radii of the reference in the common range.
        radii_arm: number of radii of the arm in it.
        sweep: corrected by the other seeds' means; None where not decided.
        retest: corrected by the measured reliability; None where not decided or not measured twice.
        interpolated: mean gain between the arms' mean curves over the common range, points.
    """

    decided: bool
    reason: str
    low: float
    high: float
    radii_reference: int
    radii_arm: int
    sweep: IsoEstimate | None = None
    retest: IsoEstimate | None = None
    interpolated: Interval | None = None


def iso_sharpness(runs: PairedRuns, *, confidence: float = 0.95) -> IsoSharpness:
    """Analysis of covariance over the runs of both arms whose radii lie in the common range of flatness x:

    ``gain = seed + direct * arm + b (x - c) + h arm (m - c) + a (m - c)^2 + error``,

    with arm = +-1/2, c the middle of the common range, and m the mean of x over the other seeds at the same arm and
    rho: curvature and interaction need no single run's x, whose square would be mostly noise. A radius is in the common
    range if m is; for the counts, if the mean over all seeds is. Both leave a run's own errors out of the choice.

    Errors in x attenuate b, and what b does not explain of the gain looks like an effect of the mask. They are taken
    out by an instrument z for x, with which the errors of x are not correlated:

    - "sweep": z = m (grouping, Wald 1940). Only what rho moves counts; errors of any kind within a run drop out.
    - "retest": z = the repeated measurement, both ways round. ``sum x1 x2`` is ``sum xbar^2`` minus the measured
      variance of its error: the method of moments with the measured reliability, its uncertainty included.

    Intervals by the seeds' wild bootstrap (:mod:`analysis.equivalence`); ``benchmarks/verdict_calibration.py`` shows
    how they cover, and how often an analysis without correction errs.

    Args:
        runs: both arms; see :func:`paired_runs`.
        confidence: coverage, in (0, 1).

    Raises:
        InputError: a confidence outside (0, 1).
    """
    mean = runs.flatness.mean(axis=0)
    low, high = _common(mean[None, :], runs.in_arm)
    inside = _inside(mean[None, :], runs.in_arm)[0]
    counts = [int(inside[runs.in_arm == side].sum()) for side in (False, True)]
    reason = ""
    if low[0] > high[0]:
        reason = "no overlap: not decided; the arms have no flatness in common"
    elif min(counts) < MIN_RADII:
        reason = (
            f"overlap too small: not decided; the common range holds {counts[0]} radii of {runs.reference} and "
            f"{counts[1]} of {runs.arm}, {MIN_RADII} of each are needed"
        )
    found: dict[str, IsoEstimate | None] = {}
    if not reason:
        corrections: tuple[Correction, ...] = ("sweep",) if runs.repeats is None else ("sweep", "retest")
        try:
            found = {c: _estimate(runs, c, float(low[0] + high[0]) / 2, confidence) for c in corrections}
        except np.linalg.LinAlgError:
            found, reason = {}, "not decided; on the common range sharpness and mask cannot be told apart"
    return IsoSharpness(
        not reason, reason, float(low[0]), float(high[0]), counts[0], counts[1],
        found.get("sweep"), found.get("retest"),
        None if reason else _interpolated(runs, confidence),
    )  # fmt: skip


def _common(means: Floats, in_arm: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Ends of the common range for each row of means, shape (rows, K)."""
    sides = means[:, ~in_arm], means[:, in_arm]
    low = np.maximum(*(side.min(axis=1) for side in sides))
    return low, np.minimum(*(side.max(axis=1) for side in sides))


def _inside(means: Floats, in_arm: NDArray[np.bool_]) -> NDArray[np.bool_]:
    low, high = _common(means, in_arm)
    return np.asarray((means >= low[:, None]) & (means <= high[:, None]))


def _estimate(runs: PairedRuns, correction: Correction, centre: float, confidence: float) -> IsoEstimate:
    x, n = runs.flatness, runs.n
    others = (x.sum(axis=0) - x) / (n - 1)
    weight = _inside(others, runs.in_arm).astype(np.float64)
    arm = np.broadcast_to(np.where(runs.in_arm, 0.5, -0.5), x.shape)
    m = others - centre

    def within_seed(values: Floats) -> Floats:
        mean = (values * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1)
        return np.asarray((values - mean[:, None]) * weight)

    def design(z: Floats) -> Floats:
        return np.stack([within_seed(column) for column in (arm, z, arm * m, m**2)], axis=-1)

    pairs = [(design(others), design(x))]
    if correction == "retest" and runs.repeats is not None:
        first, second = (design(repeat) for repeat in runs.repeats)
        pairs = [(first, second), (second, first)]
    y = within_seed(runs.gain)
    moments = sum(np.einsum("scj,sck->sjk", z, r) for z, r in pairs) / len(pairs)
    targets = sum(np.einsum("scj,sc->sj", z, y) for z, _ in pairs) / len(pairs)

    def interval(name: str, values: Floats, estimate: float) -> Interval:
        return typical_interval(values, estimate=estimate, n=n, name=name, confidence=confidence)

    def coefficient(name: str, index: int) -> tuple[Interval, Floats]:
        p, q = seed_contributions(moments, targets, index)
        values = set_ratios(p, q)
        return interval(name, values, float(p.sum())), values

    direct, direct_sets = coefficient("gain at equal sharpness, points", 0)
    total = runs.contrast(runs.gain)
    total_sets = set_means(total)
    mean_total = float(total.mean())
    share = None
    if not interval("", total_sets, mean_total).low <= 0 <= interval("", total_sets, mean_total).high:
        ratios = np.where(total_sets * mean_total > 0, 1 - direct_sets / total_sets, np.nan)
        share = interval("share of the gain through sharpness", ratios, 1 - direct.value / mean_total)
    return IsoEstimate(
        correction,
        direct,
        interval("gain through sharpness, points", total_sets - direct_sets, mean_total - direct.value),
        share,
        coefficient("gain per unit of flatness, points", 1)[0],
        coefficient("interaction of mask and flatness, points per unit", 2)[0],
        typical_p(direct_sets),
    )


def _interpolated(runs: PairedRuns, confidence: float) -> Interval:
    """Mean distance of the arms' curves of mean gain against mean flatness, straight between radii.

    Means over seeds carry little error of measurement, but some: what is left of it is not corrected. The interval is
    from the distances of sets of seeds, at most 255 of them.
    """

    sets = seed_sets(runs.n)
    if len(sets) > _INTERPOLATED_SETS:
        sets = sets[np.random.default_rng(0).choice(len(sets), _INTERPOLATED_SETS, replace=False)]
    weights = np.vstack([np.full(runs.n, 1 / runs.n), sets / np.maximum(sets.sum(axis=1, keepdims=True), 1)])
    x, y = weights @ runs.flatness, weights @ runs.gain
    low, high = _common(x, runs.in_arm)
    distance = np.full(len(weights), np.nan)
    for i in np.flatnonzero(low <= high):
        grid = np.linspace(low[i], high[i], 33)
        curves = []
        for side in (runs.in_arm, ~runs.in_arm):
            order = np.argsort(x[i, side])
            curves.append(np.interp(grid, x[i, side][order], y[i, side][order]))
        distance[i] = (curves[0] - curves[1]).mean()
    return typical_interval(
        distance[1:],
        estimate=float(distance[0]),
        n=runs.n,
        name="gain at equal sharpness by interpolation, points",
        confidence=confidence,
    )
