"""Sharpness against test error, run by run and along the sweep over the radius."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from analysis.iso_sharpness import IsoSharpness
from analysis.reliability import PairedRuns
from experiments.compare import Comparison
from experiments.plot.style import BLACK, Style, dots, label, legend, logarithmic, new

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


def scatter(comparison: Comparison, metric: str, what: str, style: Mapping[str, Style]) -> Figure:
    """Test error against a metric: a dot per run, and a mark at each arm's means, of a positive metric the geometric
    one; runs without a value are left out."""
    figure, axes = new()
    found: dict[str, NDArray[np.float64]] = {}
    for name, records in comparison.records.items():
        both = [(r.result["metrics"][metric]["value"], 100 * (1 - r.result["test_accuracy"])) for r in records]
        found[name] = np.array([run for run in both if run[0] is not None], dtype=float).reshape(-1, 2)
    positive = all((runs[:, 0] > 0).all() for runs in found.values())
    for name, runs in found.items():
        axes.plot(*runs.T, linestyle="", marker=".", color=style[name].colour, alpha=0.3)
    for name, runs in found.items():
        x, y = np.log(runs[:, 0]) if positive else runs[:, 0], runs[:, 1]
        middle = [(np.exp(x.mean()) if positive else x.mean(), y.mean())] if len(runs) else []
        look = {"label": label(name), "markersize": 9, "markeredgecolor": BLACK, "markeredgewidth": 0.5}
        dots(axes, [at for at, _ in middle], [height for _, height in middle], style[name], **look)
    if positive:
        logarithmic(axes)
    axes.set_xlabel(what)
    axes.set_ylabel("test error, %")
    legend(axes)
    return figure


def equal_sharpness(runs: PairedRuns, iso: IsoSharpness, style: Mapping[str, Style]) -> Figure:
    """Mean test error against mean sharpness (geometric, over seeds and both measurements) of two arms along their
    radii; the band is the range of sharpness that both have."""
    figure, axes = new()
    sharpness, error = np.exp(-runs.flatness.mean(axis=0)), -runs.gain.mean(axis=0)
    for name, own in ((runs.reference, ~runs.in_arm), (runs.arm, runs.in_arm)):
        order = np.flatnonzero(own)[np.argsort(runs.radii[own])]
        look = style[name]
        marks = {"marker": look.marker, "color": look.colour, "label": label(name)}
        axes.plot(sharpness[order], error[order], look.line, **marks)
    if iso.decided:
        axes.axvspan(
            math.exp(-iso.high), math.exp(-iso.low), color="0.5", alpha=0.15, linewidth=0, label="common range"
        )
    logarithmic(axes)
    axes.set_xlabel(label(runs.metric))
    axes.set_ylabel("test error, %")
    legend(axes)
    return figure
