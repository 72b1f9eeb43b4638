"""What all metrics say beside the verdict: rank correlations with the test error, and secondary metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.estimate import Interval
from analysis.iso_sharpness import iso_sharpness
from analysis.mediation import mediation
from analysis.reliability import paired_runs, run_grid
from analysis.stats import holm
from masks.errors import InputError

Floats = NDArray[np.float64]
Labels = NDArray[np.intp]

CONTROLS = ("train_loss", "weight_norm", "rho")
GAPS = {"gap_given": "train_error", "gap_clean": "train_error_clean"}


@dataclass(frozen=True)
class Association:
    """One rank correlation of ``metric`` with the test error or a gap. Above 0: the sharper, the worse.

    Attributes:
        target: "test_error"; "gap_given", test error minus train error on the labels as given, noise included; or
            "gap_clean", minus train error on the labels before noise.
        coefficient: "kendall" (tau-b), "spearman", or "partial" (Spearman given the controls).
        scope: over all runs ("pooled"); the mean over groups of runs that share the seed ("within_seed") or the arm
            ("within_arm"); "granulated"; or the names of the controls.
        value: the correlation; nan where one side does not vary.
        low: lower end of its interval; nan where the seeds do not differ in it.
        high: upper end.
        confidence: of the interval.
        p: two-sided permutation p value, for Kendall's tau within seeds and within arms; else nan.
        p_holm: the same after Holm's adjustment over all p values of the call, those of all metrics.
    """

    metric: str
    target: str
    coefficient: str
    scope: str
    value: float
    low: float
    high: float
    confidence: float
    p: float
    n_runs: int
    n_seeds: int
    p_holm: float = math.nan


def associations(
    frame: pd.DataFrame,
    metrics: Sequence[str],
    *,
    controls: Sequence[str] = CONTROLS,
    confidence: float = 0.95,
    resamples: int = 1999,
    seed: int = 0,
) -> tuple[Association, ...]:
    """Rank correlations of each metric with the test error and with the gaps for which there are columns.

    "gap_given" needs ``train_error``; "gap_clean" is given where ``train_error_clean`` is another than that.

    Kendall's tau-b and Spearman's rho pooled, within seeds and within arms; tau granulated (Jiang et al. 2020,
    Fantastic generalization measures: the mean over the axes arm, rho and seed of the mean tau over groups in which
    only that axis varies); the correlation of ranks given the ranks of those controls that are columns and vary.

    Intervals: seeds are drawn with replacement, all runs of a seed together; the spread of Fisher's z over the draws,
    times ``sqrt(n / (n - 1))``, goes with Student's t of n - 1 degrees. (Percentiles cover too little with few seeds.)
    P values: the metric is permuted among the runs of each seed, for "within_arm" among those of each seed and arm.

    Args:
        frame: the study; see :mod:`analysis.reliability`.
        metrics: columns of metrics.
        controls: columns to hold fixed.
        confidence: coverage, in (0, 1).
        resamples: bootstrap draws, and permutations.
        seed: of both.

    Raises:
        InputError: see :func:`analysis.reliability.run_grid`; fewer than 2 seeds or 99 resamples, or a confidence
            outside (0, 1).
    """
    if resamples < 99 or not 0 < confidence < 1:
        raise InputError(f"need resamples >= 99 and 0 < confidence < 1, got {resamples} and {confidence}")
    gaps = {gap: column for gap, column in GAPS.items() if column in frame.columns}
    if len(gaps) == 2 and (frame["train_error"] == frame["train_error_clean"]).all():
        del gaps["gap_clean"]
    present = [c for c in controls if c in frame.columns and c != "rho"] + list(gaps.values())
    grid = run_grid(frame, list(dict.fromkeys(["test_error", *metrics, *present])))
    n, k = grid.values["test_error"].shape
    if n < 2:
        raise InputError("associations need at least 2 seeds")
    columns = {name: values.ravel() for name, values in grid.values.items()}
    columns["rho"] = np.tile([rho for _, rho in grid.cells], n)
    for gap, column in gaps.items():
        columns[gap] = columns["test_error"] - columns[column]
    seeds, arms, radii = np.repeat(np.arange(n), k), np.tile([a for a, _ in grid.cells], n), columns["rho"]
    groups = {"pooled": np.zeros(n * k, dtype=np.intp), "within_seed": seeds, "within_arm": _labels(arms)}
    axes = (_labels(radii, seeds), _labels(arms, seeds), _labels(arms, radii))
    rng = np.random.default_rng(seed)
    weights = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=resamples)])
    held = [c for c in controls if c in columns and np.ptp(columns[c]) > 0]
    out: list[Association] = []
    for metric in metrics:
        for target in ("test_error", *gaps):
            x, y = columns[metric], columns[target]
            p = {
                "within_seed": _permutation_p(x, y, seeds, seeds, resamples, rng),
                "within_arm": _permutation_p(x, y, groups["within_arm"], _labels(seeds, arms), resamples, rng),
            }
            found = {("kendall", name): _kendall(x, y, group, seeds, weights) for name, group in groups.items()}
            found["kendall", "granulated"] = _mean([_kendall(x, y, axis, seeds, weights) for axis in axes])
            found |= {("spearman", name): _spearman([x, y], group, seeds, weights) for name, group in groups.items()}
            if held:
                all_columns = [x, y, *(columns[c] for c in held)]
                found["partial", "given " + ", ".join(held)] = _spearman(all_columns, groups["pooled"], seeds, weights)
            for (kind, scope), values in found.items():
                numbers = (float(values[0]), *_z_interval(values, n, confidence), confidence)
                own_p = p.get(scope, math.nan) if kind == "kendall" else math.nan
                out.append(Association(metric, target, kind, scope, *numbers, own_p, n * k, n))
    tested = [i for i, one in enumerate(out) if not math.isnan(one.p)]
    for i, p_holm in zip(tested, holm([out[i].p for i in tested]) if tested else (), strict=True):
        out[i] = replace(out[i], p_holm=float(p_holm))
    return tuple(out)


def _mean(rows: Sequence[Floats]) -> Floats:
    """Mean of each column's finite numbers; nan where there is none."""
    values = np.stack(rows)
    known = np.isfinite(values)
    return np.where(known.any(axis=0), np.nansum(values, axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)


def _labels(*keys: NDArray[Any]) -> Labels:
    """Number the distinct combinations of keys."""
    codes = [np.unique(key, return_inverse=True)[1] for key in keys]
    return np.unique(np.stack(codes), axis=1, return_inverse=True)[1].ravel()


def _mean_over_groups(values: Floats, groups: Labels, seeds: Labels, weights: Floats) -> Floats:
    """Mean over groups where there is a value, a group counting as often as its seeds were drawn; shape (draws,)."""
    member = np.zeros((values.shape[1], weights.shape[1]))
    member[groups, seeds] = 1
    drawn = weights @ (member / member.sum(axis=1, keepdims=True)).T * np.isfinite(values)
    total = drawn.sum(axis=1)
    missing = np.full(len(total), np.nan)
    return np.asarray(np.divide((np.nan_to_num(values) * drawn).sum(axis=1), total, out=missing, where=total > 0))


def _kendall(x: Floats, y: Floats, groups: Labels, seeds: Labels, weights: Floats) -> Floats:
    """Mean tau-b over groups for each row of weights, how often each seed counts; shape (draws,).

    Sums over pairs of runs depend on the weights only through the pairs of seeds that the runs are of.
    """
    i, j = np.nonzero(groups[:, None] == groups[None, :])
    a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
    n, size = weights.shape[1], int(groups.max()) + 1
    where = (groups[i] * n + seeds[i]) * n + seeds[j]

    def summed(pairs: Floats) -> Floats:
        by_seeds = np.bincount(where, pairs, size * n * n).reshape(size, n, n)
        return np.asarray(((weights @ by_seeds) * weights).sum(axis=2).T)

    bottom = np.sqrt(summed(np.abs(a)) * summed(np.abs(b)))
    tau = np.divide(summed(a * b), bottom, out=np.full_like(bottom, np.nan), where=bottom > 0)
    return _mean_over_groups(tau, groups, seeds, weights)


def _spearman(columns: Sequence[Floats], groups: Labels, seeds: Labels, weights: Floats) -> Floats:
    """Mean over groups of the correlation of the first two columns' ranks given those of the others; (draws,)."""
    out = np.full((len(weights), int(groups.max()) + 1), np.nan)
    for group in range(out.shape[1]):
        inside = groups == group
        w = weights[:, seeds[inside]]
        ranks = []
        for column in columns:
            c = column[inside]
            below = (c[None, :] < c[:, None]) + 0.5 * (c[None, :] == c[:, None])
            ranks.append(w @ below.T)
        r = np.stack(ranks, axis=1)
        total = np.maximum(w.sum(axis=1), 1)
        r = r - ((r * w[:, None]).sum(axis=2) / total[:, None])[:, :, None]
        covariance = np.einsum("bcr,bdr->bcd", r * w[:, None], r)
        scale = np.sqrt(np.einsum("bcc->bc", covariance))
        fine = (scale > 1e-9).all(axis=1)
        correlation = covariance[fine] / (scale[fine][:, :, None] * scale[fine][:, None, :])
        out[fine, group] = _given_others(correlation)
    return _mean_over_groups(out, groups, seeds, weights)


def _given_others(correlation: Floats) -> Floats:
    """Correlation of the first two variables given the others, nan where those fix one of them; shape (draws,)."""
    left, cross, rest = correlation[:, :2, :2], correlation[:, :2, 2:], correlation[:, 2:, 2:]
    if rest.shape[1]:
        left = left - cross @ np.linalg.pinv(rest, rcond=1e-9, hermitian=True) @ cross.transpose(0, 2, 1)
    a, b = left[:, 0, 0], left[:, 1, 1]
    fine = np.minimum(a, b) > 1e-9
    return np.where(fine, left[:, 0, 1] / np.sqrt(np.where(fine, a * b, 1)), np.nan)


def _z_interval(values: Floats, n: int, confidence: float) -> tuple[float, float]:
    """From the value of the study, first, and its bootstrap draws."""
    z = np.arctanh(np.clip(values, -1 + 1e-12, 1 - 1e-12))
    draws = z[1:][np.isfinite(z[1:])]
    if not np.isfinite(z[0]) or len(draws) < 2 or draws.std() < 1e-12:
        return math.nan, math.nan
    half = stats.t.ppf(0.5 + confidence / 2, n - 1) * draws.std(ddof=1) * math.sqrt(n / (n - 1))
    return float(np.tanh(z[0] - half)), float(np.tanh(z[0] + half))


def _permutation_p(
    x: Floats, y: Floats, groups: Labels, strata: Labels, permutations: int, rng: np.random.Generator
) -> float:
    """Two-sided p value of the mean tau-b over groups, x permuted within strata, the observed order counted in."""
    order = np.argsort(groups, kind="stable")
    i, j = np.nonzero(np.triu(groups[order][:, None] == groups[order][None, :], 1))
    if not len(i):
        return math.nan
    i, j = order[i], order[j]
    starts = np.flatnonzero(np.diff(groups[i], prepend=-1))
    b = np.sign(y[i] - y[j])
    base = np.argsort(strata, kind="stable")
    observed, extreme = math.nan, 0
    for block in np.array_split(
        np.arange(permutations + 1), min(permutations + 1, 1 + permutations * len(i) // 500_000)
    ):
        keys = rng.random((len(block), len(x)))
        shuffled = np.lexsort((keys, np.broadcast_to(strata, keys.shape)), axis=1)
        permuted = np.empty_like(keys)
        permuted[:, base] = x[shuffled]
        if block[0] == 0:
            permuted[0] = x
        a = np.sign(permuted[:, i] - permuted[:, j])
        sums = [np.add.reduceat(pairs, starts, axis=1) for pairs in (a * b, np.abs(a), np.abs(b)[None])]
        bottom = np.sqrt(sums[1] * sums[2])
        tau = np.divide(sums[0], bottom, out=np.zeros_like(bottom), where=bottom > 0).mean(axis=1)
        observed = float(tau[0]) if block[0] == 0 else observed
        extreme += int((np.abs(tau) >= abs(observed) - 1e-12).sum())
    return extreme / (permutations + 1)


@dataclass(frozen=True)
class SecondaryMetric:
    """What ``metric``, another one than the primary, says. It does not enter the verdict.

    Attributes:
        problem: why it says nothing; empty where it does.
        flattening: see :class:`Mediation`; None where there is a problem.
        indirect: likewise.
        direct: gain at equal sharpness, see :class:`IsoEstimate`; None where that test is not decided.
        raw: two-sided p values of ``flattening = 0``, of ``indirect = 0`` and of ``direct = 0``, not adjusted; 1 where
            not decided.
        p_flattening: the first one, adjusted by :func:`adjusted`.
        p_indirect: the second, likewise.
        p_direct: the third, likewise.
    """

    metric: str
    problem: str
    flattening: Interval | None
    indirect: Interval | None
    direct: Interval | None
    raw: tuple[float, float, float]
    p_flattening: float = math.nan
    p_indirect: float = math.nan
    p_direct: float = math.nan


def adjusted(rows: Sequence[SecondaryMetric], num_contrasts: int = 1) -> tuple[SecondaryMetric, ...]:
    """Adjust by Holm over the rows, each of the three questions for itself.

    Args:
        rows: metrics, of one contrast or of several.
        num_contrasts: number of contrasts whose rows are not among these; each counts as much again (Bonferroni).
    """
    if not rows:
        return ()
    p = np.minimum(1.0, num_contrasts * np.stack([holm(column) for column in np.array([row.raw for row in rows]).T], 1))
    return tuple(
        replace(row, p_flattening=float(a), p_indirect=float(b), p_direct=float(c))
        for row, (a, b, c) in zip(rows, p, strict=True)
    )


def secondary_metrics(
    frame: pd.DataFrame,
    metrics: Sequence[str],
    *,
    arm: str,
    reference: str,
    chosen: Mapping[str, float] | None,
    confidence: float = 0.95,
    num_contrasts: int = 1,
) -> tuple[SecondaryMetric, ...]:
    """Tests 2 and 3 of the verdict for each of several metrics, adjusted for their number and that of the contrasts.

    A metric to which they do not apply, one that is not positive, say, is named with its problem and counts as p = 1.
    The intervals are not adjusted. For the arguments see :func:`analysis.reliability.paired_runs`."""
    rows = []
    for metric in metrics:
        try:
            runs = paired_runs(frame, metric=metric, arm=arm, reference=reference, chosen=chosen)
        except InputError as error:
            rows.append(SecondaryMetric(metric, str(error), None, None, None, (1.0, 1.0, 1.0)))
            continue
        iso, within = iso_sharpness(runs, confidence=confidence), mediation(runs, confidence=confidence)
        problem = "; ".join(part.reason for part in (iso, within) if part.reason)
        direct, p_direct = (iso.sweep.direct, iso.sweep.p_direct) if iso.sweep else (None, 1.0)
        p_indirect = within.p_indirect if within.decided else 1.0
        raw = (within.p_flattening, p_indirect, p_direct)
        rows.append(SecondaryMetric(metric, problem, within.flattening, within.indirect, direct, raw))
    return adjusted(rows, num_contrasts)
