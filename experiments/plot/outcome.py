"""Accuracy: per arm, against the radius, against the density; and what training cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import mean_interval
from experiments.compare import Comparison
from experiments.plot.style import BLACK, Style, dots, epochs, label, legend, logarithmic, new
from experiments.table import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Styles = Mapping[str, Style]
Curves = dict[str, list[tuple[float, float]]]
"""For each arm its radii, and what each reached."""
BESIDE = 1.06
"""Factor between the positions of arms of one density."""
BELOW = 15.0
"""Percentage points below the lowest chosen radius where the axis of accuracy against radii ends."""


def accuracy(comparison: Comparison, rows: Sequence[Row], style: Styles) -> Figure:
    """One line per arm: a dot per seed, the mean and its interval."""
    figure, axes = new(height=0.7 + 0.36 * len(rows))
    for y, row in enumerate(rows):
        own = style[row.arm.name]
        values = [100 * r.result["test_accuracy"] for r in comparison.records[row.arm.name]]
        axes.plot(values, [y] * len(values), linestyle="", marker=".", color=own.colour, alpha=0.45)
        mean, low, high = (100 * v for v in (row.accuracy.value, row.accuracy.low, row.accuracy.high))
        if math.isfinite(low):
            axes.plot([low, high], [y, y], color=own.colour, linewidth=2)
        dots(axes, [mean], [y], own)
    axes.set_yticks(range(len(rows)), [label(row.arm.name) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %")
    return figure


def against_rho(comparison: Comparison, style: Styles, swept: pd.DataFrame | None) -> Figure:
    """Validation accuracy of the tuning runs and, where the report's seeds were trained at all radii (``swept``: a
    study's frame), test accuracy beside it, a row per method; the ring marks the radius chosen. The axes end
    :data:`BELOW` points below the lowest ring of a column, so that collapsed runs do not flatten all others."""
    config = comparison.config
    method = {arm.name: arm.method or config.method for arm in config.arms}
    columns: dict[str, Curves] = {"validation accuracy, %": {}}
    for trial in comparison.trials:
        columns["validation accuracy, %"].setdefault(trial.arm, []).append((trial.rho, 100 * trial.val_accuracy))
    if swept is not None:
        means = swept.groupby(["arm", "rho"])["test_error"].mean()
        columns["test accuracy, %"] = {
            name: [(float(rho), 100 * (1 - error)) for rho, error in means[name].items()]
            for name in comparison.chosen
            if name in means.index
        }
    methods = list(dict.fromkeys(method[trial.arm] for trial in comparison.trials))
    size: dict[str, Any] = {"width": 7.2 + 2.6 * (len(columns) - 1), "height": 3.6 * len(methods)}
    figure, axes = new(**size, columns=len(columns), rows=len(methods), squeeze=False, sharex="row", sharey="col")
    for column, (what, curves) in zip(axes.T, columns.items(), strict=True):
        for name, curve in curves.items():
            _radii(column[methods.index(method[name])], curve, comparison.chosen[name], style[name], label(name))
        rings = [value for name, curve in curves.items() for rho, value in curve if rho == comparison.chosen[name]]
        lowest = min((value for curve in curves.values() for _, value in curve), default=math.inf)
        if rings and lowest < min(rings) - BELOW:
            column[0].set_ylim(bottom=min(rings) - BELOW)
        for one in column:
            one.set_ylabel(what)
    for one in axes.flat:
        logarithmic(one)
        one.set_xlabel("radius rho, units of weights")
    for row in axes:
        legend(row[-1])
    return figure


def _radii(axes: Any, points: list[tuple[float, float]], chosen: float, style: Style, name: str) -> None:
    points = sorted(point for point in points if point[0] > 0)  # 0 has no place on a logarithmic axis
    x, y = [rho for rho, _ in points], [value for _, value in points]
    axes.plot(x, y, style.line, marker=style.marker, color=style.colour, label=name)
    best = [point for point in points if point[0] == chosen]
    ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": style.colour}
    axes.plot([rho for rho, _ in best], [value for _, value in best], linestyle="", marker="o", **ring)


def against_density(rows: Sequence[Row], style: Styles, baseline: Row) -> Figure:
    """Mean test accuracy and its interval at the density of each arm's mask, arms of one density side by side; the band
    is the baseline's."""
    figure, axes = new()
    low, high = 100 * baseline.accuracy.low, 100 * baseline.accuracy.high
    if math.isfinite(low):
        axes.axhspan(low, high, color=BLACK, alpha=0.08, linewidth=0)
    axes.axhline(100 * baseline.accuracy.value, color=BLACK, linewidth=1, label=label(baseline.arm.name))
    for row in rows:
        own = style[row.arm.name]
        same = [other.arm.name for other in rows if math.isclose(other.density, row.density, rel_tol=0.1)]
        at = 100 * row.density * BESIDE ** (same.index(row.arm.name) - (len(same) - 1) / 2)
        if math.isfinite(row.accuracy.low):
            axes.plot([at, at], [100 * row.accuracy.low, 100 * row.accuracy.high], color=own.colour)
        dots(axes, [at], [100 * row.accuracy.value], own, label=label(row.arm.name))
    logarithmic(axes)
    axes.set_xlabel("density: share of coordinates perturbed, %")
    axes.set_ylabel("test accuracy, %")
    legend(axes)
    return figure


def cost(ratios: Mapping[str, Sequence[float]], predicted: Mapping[str, float | None], style: Styles) -> Figure:
    """One line per arm: a dot per seed, a bar at the median, a ring at the counted cost."""
    figure, axes = new(height=0.7 + 0.36 * len(ratios))
    for y, (name, values) in enumerate(ratios.items()):
        own, counted = style[name], predicted.get(name)
        axes.plot(list(values), [y] * len(values), linestyle="", marker=".", color=own.colour, alpha=0.45)
        axes.plot([pd.Series(values).median()], [y], marker="|", markersize=14, markeredgewidth=2, color=own.colour)
        if counted is not None:
            axes.plot([counted], [y], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=own.colour)
    axes.set_yticks(range(len(ratios)), [label(name) for name in ratios])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("cost of training relative to the baseline")
    return figure


def along_training(
    curves: Mapping[str, Sequence[Sequence[float | None]]],
    style: Styles,
    what: str,
    after: Mapping[str, Sequence[int]] | None = None,
) -> Figure:
    """A number per epoch: mean over seeds and, shaded, its 95 % t interval.

    Args:
        curves: for each arm one list per seed; None for an epoch without a number, where the curve has a gap.
        style: of each arm.
        what: label of the axis, with its unit.
        after: for each arm the numbers of the epochs, counted from 1; None for all of them.
    """
    figure, axes = new()
    for name, runs in curves.items():
        own = style[name]
        at = range(1, len(runs[0]) + 1) if after is None else after[name]
        ends = [_interval(values) for values in zip(*runs, strict=True)]
        middle, low, high = ([end[i] for end in ends] for i in range(3))
        axes.plot(at, middle, own.line, color=own.colour, label=label(name))
        axes.fill_between(at, low, high, color=own.colour, alpha=0.15, linewidth=0)
    epochs(axes, "epoch")
    axes.set_ylabel(what)
    legend(axes)
    return figure


def _interval(values: Sequence[float | None]) -> tuple[float, float, float]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return math.nan, math.nan, math.nan
    found = mean_interval(known, name="")
    return found.value, found.low, found.high
