"""The runs of a study as arrays, and how well a metric repeats on other data: test-retest reliability.

A study is a plain ``pandas.DataFrame`` with one row per run: ``arm``, ``seed``, ``rho``, ``test_error`` (a fraction,
0 to 1) and one column per metric, all of which grow with sharpness. A column ``METRIC_repeat`` holds the same metric of
the same weights, measured anew on another subset of the data with another probe seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from masks.errors import InputError, unknown_name

Floats = NDArray[np.float64]
Cell = tuple[str, float]
Scope = Literal["pooled", "within_seed", "within_cell"]

REPEAT = "_repeat"


@dataclass(frozen=True, eq=False)
class RunGrid:
    """A complete study: every cell (arm, rho) holds one run of every seed.

    Attributes:
        seeds: n seeds.
        cells: K cells (arm, rho).
        values: for each column its numbers, shape (n, K).
    """

    seeds: tuple[Any, ...]
    cells: tuple[Cell, ...]
    values: Mapping[str, Floats]


@dataclass(frozen=True, eq=False)
class PairedRuns:
    """Two arms over their radii and seeds, in the units of the verdict.

    Attributes:
        metric: which sharpness.
        arm: the arm whose gain is to be explained.
        reference: the arm that it is compared to.
        n: number of seeds.
        radii: rho of each of K cells, shape (K,).
        in_arm: whether a cell is of ``arm``, shape (K,).
        chosen: index of the cells of the reference and of the arm at which the gain is reported.
        gain: ``-100 test_error``, percentage points, larger is better, shape (n, K).
        flatness: ``-log metric``, larger is flatter, shape (n, K); the mean of both measurements where there are two.
        repeats: both measurements, shape (2, n, K); None where the metric was measured once.
    """

    metric: str
    arm: str
    reference: str
    n: int
    radii: Floats
    in_arm: NDArray[np.bool_]
    chosen: tuple[int, int]
    gain: Floats
    flatness: Floats
    repeats: Floats | None

    def contrast(self, values: Floats) -> Floats:
        """The arm minus the reference at the chosen radii, one per seed, shape (n,)."""
        reference, arm = self.chosen
        return np.asarray(values[:, arm] - values[:, reference])


def run_grid(frame: pd.DataFrame, columns: Sequence[str], arms: Sequence[str] | None = None) -> RunGrid:
    """Check a study and arrange it by seed and cell.

    Args:
        frame: one row per run.
        columns: the numbers that are needed.
        arms: only these arms; by default all.

    Raises:
        InputError: a column or an arm that is not there, a run that is there twice or not at all, numbers that are not
            finite, or test errors outside 0 to 1.
    """
    needed = ["arm", "seed", "rho", *columns]
    missing = [c for c in needed if c not in frame.columns]
    if missing:
        raise InputError(unknown_name("column", missing[0], map(str, frame.columns)))
    for arm in arms or ():
        if arm not in set(frame["arm"]):
            raise InputError(unknown_name("arm", arm, map(str, frame["arm"].unique())))
    rows = frame.loc[frame["arm"].isin(list(arms)) if arms else slice(None), needed]
    if not len(rows):
        raise InputError("the study holds no run")
    if not np.isfinite(pd.to_numeric(rows["rho"], errors="coerce")).all():
        raise InputError("column rho must hold finite numbers; give the baseline rho = 0")
    twice = int(rows.duplicated(["arm", "seed", "rho"]).sum())
    if twice:
        raise InputError(f"{twice} of {len(rows)} runs have the arm, seed and rho of another run")
    seeds, seed = np.unique(rows["seed"].to_numpy(), return_inverse=True)
    cells = sorted({(str(arm), float(rho)) for arm, rho in zip(rows["arm"], rows["rho"], strict=True)})
    number = {cell: i for i, cell in enumerate(cells)}
    cell = [number[str(arm), float(rho)] for arm, rho in zip(rows["arm"], rows["rho"], strict=True)]
    there = np.zeros((len(seeds), len(cells)), dtype=np.bool_)
    there[seed, cell] = True
    if not there.all():
        s, c = np.argwhere(~there)[0]
        raise InputError(
            f"{int((~there).sum())} runs are missing: {len(rows)} of {len(seeds)} seeds x {len(cells)} pairs of arm and"
            f" rho, for one {cells[c][0]} at rho = {cells[c][1]:g}, seed {seeds[s]}; leave out the radii or seeds that "
            "are not complete"
        )
    values = {}
    for column in columns:
        values[column] = np.empty((len(seeds), len(cells)))
        values[column][seed, cell] = _numbers(rows[column])
    error = values.get("test_error")
    if error is not None and (error.min() < 0 or error.max() > 1):
        raise InputError(f"test_error must be a fraction from 0 to 1, got {error.min():g} to {error.max():g}")
    return RunGrid(tuple(seeds.tolist()), tuple(cells), values)


def _numbers(column: pd.Series[Any]) -> Floats:
    try:
        values = column.to_numpy(dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"column {column.name} must hold numbers") from None
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise InputError(
            f"column {column.name}: {bad} of {values.size} runs have no finite value; leave out their radii"
        )
    return values


def paired_runs(
    frame: pd.DataFrame, *, metric: str, arm: str, reference: str, chosen: Mapping[str, float] | None = None
) -> PairedRuns:
    """Two arms of a study, for :func:`iso_sharpness` and :func:`mediation`.

    Args:
        frame: the study; ``METRIC_repeat`` is used where it is there.
        metric: column of the metric, all positive.
        arm: the arm whose gain is to be explained.
        reference: the arm that it is compared to.
        chosen: for each arm with several radii the one at which the gain is reported, chosen on other data.

    Raises:
        InputError: see :func:`run_grid`; fewer than 2 seeds, a metric that is not positive, no or an unknown chosen
            radius, or an arm compared with itself.
    """
    if arm == reference:
        raise InputError(f"arm {arm} is compared with itself")
    both = [metric, metric + REPEAT] if metric + REPEAT in frame.columns else [metric]
    grid = run_grid(frame, ["test_error", *both], [reference, arm])
    if len(grid.seeds) < 2:
        raise InputError("a paired comparison needs at least 2 seeds, got 1")
    flatness = np.stack([-_log(grid.values[column], column) for column in both])
    cells = [_chosen(grid.cells, name, chosen or {}) for name in (reference, arm)]
    return PairedRuns(
        metric=metric,
        arm=arm,
        reference=reference,
        n=len(grid.seeds),
        radii=np.array([rho for _, rho in grid.cells]),
        in_arm=np.array([name == arm for name, _ in grid.cells]),
        chosen=(cells[0], cells[1]),
        gain=-100 * grid.values["test_error"],
        flatness=np.asarray(flatness.mean(axis=0)),
        repeats=flatness if len(both) == 2 else None,
    )


def _chosen(cells: Sequence[Cell], arm: str, chosen: Mapping[str, float]) -> int:
    radii = [rho for name, rho in cells if name == arm]
    if arm not in chosen and len(radii) > 1:
        raise InputError(f"arm {arm} has {len(radii)} radii; name the one chosen on validation data")
    rho = chosen.get(arm, radii[0])
    if (arm, rho) not in cells:
        raise InputError(f"arm {arm} was not run at rho = {rho:g}, only at {', '.join(f'{r:g}' for r in radii)}")
    return list(cells).index((arm, rho))


def _log(values: Floats, column: str) -> Floats:
    low = int((values <= 0).sum())
    if low:
        raise InputError(
            f"column {column}: {low} of {values.size} values are not positive and have no logarithm; measure it at a "
            "larger radius or name another metric"
        )
    return np.asarray(np.log(values))


@dataclass(frozen=True)
class Reliability:
    """How much of a metric's variance is of the networks and not of the measurement.

    Attributes:
        metric: which metric.
        scope: between which runs: all ("pooled"), those of one seed ("within_seed"), or those that share arm and rho,
            after the seed's mean is taken out ("within_cell").
        scale: "log" for a positive metric, else "raw".
        value: intraclass correlation of one measurement with a repeated one; below 0 by chance only.
        low: lower end of its interval.
        high: upper end.
        confidence: of the interval.
        error_sd: standard deviation of the error of one measurement, on ``scale``.
        max_correlation: attenuation bound ``sqrt(value)``: no correlation with a single measurement can be expected
            beyond it (Spearman 1904).
        n_runs: number of runs.
        df: degrees of freedom of both variances.
    """

    metric: str
    scope: Scope
    scale: str
    value: float
    low: float
    high: float
    confidence: float
    error_sd: float
    max_correlation: float
    n_runs: int
    df: int


def reliability(
    frame: pd.DataFrame, metric: str, *, scope: Scope = "within_seed", confidence: float = 0.95
) -> Reliability:
    """Test-retest reliability from the columns METRIC and METRIC_repeat.

    The consistency ICC(C,1) of McGraw and Wong (1996): with ``F = var(x1 + x2) / var(x1 - x2)`` within the scope,
    ``(F - 1) / (F + 1)``; a shift of all runs between the two subsets does not count. Interval from the F distribution,
    exact for normal errors and runs; for runs spread by a grid of radii it errs on the wide side.

    Args:
        frame: the study; see the top of this module.
        metric: column of the metric.
        scope: see :class:`Reliability`.
        confidence: coverage, in (0, 1).

    Raises:
        InputError: see :func:`run_grid`; an unknown scope; too few runs, or a metric that is the same in all of them.
    """
    grid = run_grid(frame, [metric, metric + REPEAT])
    first, second = grid.values[metric], grid.values[metric + REPEAT]
    positive = first.min() > 0 and second.min() > 0
    if positive:
        first, second = np.log(first), np.log(second)
    n, cells = first.shape
    degrees = {"pooled": n * cells - 1, "within_seed": n * (cells - 1), "within_cell": (n - 1) * (cells - 1)}
    if scope not in degrees:
        raise InputError(unknown_name("scope", scope, degrees))
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")
    df = degrees[scope]
    if df < 1:
        raise InputError(f"{n} seeds x {cells} pairs of arm and rho give no reliability {scope}")
    both = float((_centred(first + second, scope) ** 2).sum())
    error = float((_centred(first - second, scope) ** 2).sum())
    if both == 0:
        raise InputError(f"{metric} is the same in all runs ({scope})")
    edge = float(stats.f.ppf(0.5 + confidence / 2, df, df))
    value, low, high = (_icc(both, error * factor) for factor in (1.0, edge, 1 / edge))
    return Reliability(
        metric, scope, "log" if positive else "raw", value, low, high, confidence,
        math.sqrt(error / df / 2), math.sqrt(max(value, 0.0)), first.size, df,
    )  # fmt: skip


def _icc(both: float, error: float) -> float:
    return (both - error) / (both + error)


def _centred(x: Floats, scope: Scope) -> Floats:
    if scope == "pooled":
        return np.asarray(x - x.mean())
    x = x - x.mean(axis=1, keepdims=True)
    return np.asarray(x - x.mean(axis=0)) if scope == "within_cell" else x
