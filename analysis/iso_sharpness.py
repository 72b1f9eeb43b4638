"""Does the mask still matter at equal sharpness? Covariance analysis along the sweep over rho."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.equivalence import (
    seed_contributions,
    seed_sets,
    set_means,
    set_ratios,
    signed_ratios,
    typical_interval,
    typical_p,
)
from analysis.estimate import Interval
from analysis.reliability import PairedRuns

Floats = NDArray[np.float64]
Correction = Literal["sweep", "retest"]

MIN_RADII = 3  # of an arm whose curve is read off at the single radius of the other
MIN_EACH, MIN_CELLS = 2, 5  # radii of each arm and of both in the common range: the curve has five coefficients
NEAREST_RADII = 4  # of an arm compared to a reference with a single one, so that the curve need only hold near it
_INTERPOLATED_SETS = 255

ASSUMPTIONS = (
    "Iso-sharpness: rho acts on the test error only through the sharpness (no other effect of a larger rho, nor of any "
    "rho against none); the curve of error against log sharpness is quadratic and parallel, up to a linear "
    "interaction, on the common range.",
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
        interaction: how much larger this slope is in the arm; nan, and unbounded, where one arm has a single radius.
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
        radii_reference: number of radii of the reference in the common range, or compared to the arm's single one.
        radii_arm: number of radii of the arm, likewise.
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
    range if m is; for the counts, if the mean over all seeds is. Both leave a run's own errors out of the choice. At
    least 2 radii of each arm and 5 in all must be in it.

    An arm with a single radius (a baseline with rho = 0) has no slope of its own. Where its flatness lies within the
    other arm's range, the common range is that one flatness: the other arm's curve through its (at most 4) nearest
    radii is read off there, without interaction. The direct part then is the gain at the single one's sharpness.

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
    reason = _undecided(runs, float(low[0] - high[0]), counts)
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


def _single(in_arm: NDArray[np.bool_]) -> bool:
    """Whether one arm has a single radius and the other a sweep."""
    sizes = sorted((int(in_arm.sum()), int((~in_arm).sum())))
    return sizes[0] == 1 < sizes[1]


def _undecided(runs: PairedRuns, gap: float, counts: list[int]) -> str:
    """Why the arms cannot be compared at equal sharpness; empty where they can."""
    sizes = [int((runs.in_arm == side).sum()) for side in (False, True)]
    names = runs.reference, runs.arm
    if max(sizes) == 1:
        return f"no sweep: not decided; {names[0]} and {names[1]} have one radius each, {MIN_RADII} of one are needed"
    if gap > 0:
        means = [float(runs.flatness[:, runs.in_arm == side].mean()) for side in (False, True)]
        flat, sharp = names if means[0] > means[1] else names[::-1]
        cure = (
            f"compare {names[1 - sizes.index(1)]} with an arm that has a sweep too"
            if 1 in sizes
            else ("extend their sweeps towards each other")
        )
        return (
            f"no overlap: not decided; every radius of {flat} is flatter than every radius of {sharp}, by at least "
            f"{gap:.2f} log units, so that mask and sharpness cannot be told apart; {cure}"
        )
    if _single(runs.in_arm):
        one = sizes.index(1)
        if sizes[1 - one] >= MIN_RADII:
            return ""
        return (
            f"overlap too small: not decided; {names[one]} has a single radius, so that {MIN_RADII} of "
            f"{names[1 - one]} are needed, got {sizes[1 - one]}"
        )
    if min(counts) >= MIN_EACH and sum(counts) >= MIN_CELLS:
        return ""
    return (
        f"overlap too small: not decided; the common range holds {counts[0]} radii of {names[0]} and {counts[1]} of "
        f"{names[1]}, {MIN_EACH} of each and {MIN_CELLS} in all are needed"
    )


def _common(means: Floats, in_arm: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Ends of the common range for each row of means, shape (rows, K)."""
    sides = means[:, ~in_arm], means[:, in_arm]
    low = np.maximum(*(side.min(axis=1) for side in sides))
    return low, np.minimum(*(side.max(axis=1) for side in sides))


def _inside(means: Floats, in_arm: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which cells are compared, for each row of means, shape (rows, K)."""
    if _single(in_arm):
        one = in_arm if in_arm.sum() == 1 else ~in_arm
        distance = np.where(one, -1.0, np.abs(means - means[:, one]))
        return np.asarray(distance.argsort(axis=1).argsort(axis=1) <= NEAREST_RADII)
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

    shape = (m**2,) if _single(runs.in_arm) else (m**2, arm * m)

    def design(z: Floats) -> Floats:
        return np.stack([within_seed(column) for column in (arm, z, *shape)], axis=-1)

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
    steeper = "interaction of mask and flatness, points per unit"
    share = None
    if not interval("", total_sets, mean_total).low <= 0 <= interval("", total_sets, mean_total).high:
        ratios = signed_ratios(total_sets - direct_sets, total_sets, mean_total)
        share = interval("share of the gain through sharpness", ratios, 1 - direct.value / mean_total)
    return IsoEstimate(
        correction,
        direct,
        interval("gain through sharpness, points", total_sets - direct_sets, mean_total - direct.value),
        share,
        coefficient("gain per unit of flatness, points", 1)[0],
        coefficient(steeper, 3)[0]
        if len(shape) == 2
        else interval(steeper, np.full_like(total_sets, np.nan), math.nan),
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
    grid = np.linspace(low, high, 33, axis=1)
    arm, reference = (_polygon(grid, x[:, side], y[:, side]) for side in (runs.in_arm, ~runs.in_arm))
    distance = np.where(low <= high, (arm - reference).mean(axis=1), np.nan)
    return typical_interval(
        distance[1:],
        estimate=float(distance[0]),
        n=runs.n,
        name="gain at equal sharpness by interpolation, points",
        confidence=confidence,
    )


def _polygon(grid: Floats, x: Floats, y: Floats) -> Floats:
    """For each row the polygon through the points (x, y), shape (rows, K), at the row's grid, shape (rows, points)."""
    order = x.argsort(axis=1)
    x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
    right = np.clip((x[:, None, :] < grid[:, :, None]).sum(axis=2), min(1, x.shape[1] - 1), x.shape[1] - 1)
    left = np.maximum(right - 1, 0)
    x0, x1, y0, y1 = (np.take_along_axis(v, side, 1) for v in (x, y) for side in (left, right))
    part = np.divide(grid - x0, x1 - x0, out=np.zeros_like(grid), where=x1 > x0)
    return np.asarray(y0 + part * (y1 - y0))
