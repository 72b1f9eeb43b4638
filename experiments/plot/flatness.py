"""Sharpness against test error, run by run and along the sweep over the radius."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from analysis.iso_sharpness import IsoSharpness
from analysis.reliability import PairedRuns
from experiments.compare import Comparison
from experiments.plot.style import Style, dots, label, legend, logarithmic, new

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def scatter(comparison: Comparison, metric: str, what: str, style: Mapping[str, Style]) -> Figure:
    """Test error against a metric, one mark per run; runs without a value are left out."""
    figure, axes = new()
    positive = True
    for name, records in comparison.records.items():
        good = [r for r in records if r.result["metrics"][metric]["value"] is not None]
        x = [r.result["metrics"][metric]["value"] for r in good]
        positive = positive and all(value > 0 for value in x)
        y = [100 * (1 - r.result["test_accuracy"]) for r in good]
        dots(axes, x, y, style[name], alpha=0.75, label=label(name))
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
