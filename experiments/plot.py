"""Figures of a comparison, as SVG text. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.compare import Comparison
from experiments.config import BASELINE
from experiments.measure import LAMBDA_MAX
from experiments.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008), told apart under the common colour-vision deficiencies; then two shades of grey.
PALETTE = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#8A7F00", "#7F3C8D", "#7A7A7A")
MARKERS = "osD^vPX*<>"


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each arm, the same in every figure; 100 arms can be told apart."""
    n = len(PALETTE)
    return {name: (PALETTE[i % n], MARKERS[(i + i // n) % len(MARKERS)]) for i, name in enumerate(names)}


def _label(name: str) -> str:
    """The name as text: matplotlib reads formulas between dollar signs and hides labels with a leading underscore."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def figures(comparison: Comparison, table: Table) -> dict[str, str]:
    """SVG text of the figures that the data allow, by caption."""
    out = {
        "Test accuracy per arm: each dot is one seed, the bar the mean with its 95 % interval.": _accuracy(
            comparison, table
        )
    }
    if comparison.trials:
        out["Validation accuracy against rho on the tuning seeds; the ring marks the radius chosen."] = _rho(comparison)
    out["Test error against largest Hessian eigenvalue, one mark per run."] = _scatter(comparison, LAMBDA_MAX)
    out["Test error against m-sharpness, one mark per run."] = _scatter(
        comparison, comparison.measure.m_sharpness, "m-sharpness"
    )
    out["Training loss L(w) per epoch, mean over seeds."] = _history(comparison)
    return out


def _new(width: float = 7.2, height: float = 3.6) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Fixed ids and no date: the same results give the same file.
    with rc_context({"svg.hashsalt": "sam-masks", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _accuracy(comparison: Comparison, table: Table) -> str:
    figure, axes = _new(height=0.5 + 0.38 * len(table.rows))
    style = styles([row.arm.name for row in table.rows])
    for y, row in enumerate(table.rows):
        colour, marker = style[row.arm.name]
        values = [100 * r.result["test_accuracy"] for r in comparison.records[row.arm.name]]
        axes.plot(values, [y] * len(values), linestyle="", marker=".", color=colour, alpha=0.45)
        mean, low, high = (100 * v for v in (row.accuracy.value, row.accuracy.low, row.accuracy.high))
        if math.isfinite(low):
            axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot([mean], [y], marker=marker, color=colour)
    axes.set_yticks(range(len(table.rows)), [_label(row.arm.name) for row in table.rows])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %")
    return _svg(figure)


def _rho(comparison: Comparison) -> str:
    figure, axes = _new()
    style = styles([arm.name for arm in comparison.config.arms])
    for name in dict.fromkeys(t.arm for t in comparison.trials):
        colour, marker = style[name]
        trials = sorted((t for t in comparison.trials if t.arm == name and t.rho > 0), key=lambda t: t.rho)
        axes.plot(
            [t.rho for t in trials],
            [100 * t.val_accuracy for t in trials],
            marker=marker,
            color=colour,
            label=_label(name),
        )
        best = [t for t in trials if t.rho == comparison.chosen[name]]
        axes.plot(
            [t.rho for t in best],
            [100 * t.val_accuracy for t in best],
            linestyle="",
            marker="o",
            markersize=13,
            markerfacecolor="none",
            markeredgecolor=colour,
        )
    axes.set_xscale("log")
    axes.set_xlabel("rho")
    axes.set_ylabel("validation accuracy, %")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _scatter(comparison: Comparison, metric: str, label: str | None = None) -> str:
    figure, axes = _new()
    style = styles([arm.name for arm in comparison.config.arms])
    positive = True
    for name, records in comparison.records.items():
        good = [r for r in records if r.result["metrics"][metric]["value"] is not None]
        x = [r.result["metrics"][metric]["value"] for r in good]
        positive = positive and all(value > 0 for value in x)
        colour, marker = style[name]
        y = [100 * (1 - r.result["test_accuracy"]) for r in good]
        axes.plot(x, y, linestyle="", marker=marker, color=colour, alpha=0.75, label=_label(name))
    if positive:
        axes.set_xscale("log")
    axes.set_xlabel(label or metric)
    axes.set_ylabel("test error, %")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _history(comparison: Comparison) -> str:
    figure, axes = _new()
    style = styles([arm.name for arm in comparison.config.arms])
    for name, records in comparison.records.items():
        curves = [[epoch["loss"] for epoch in r.result["history"]] for r in records]
        # A loss that is not finite is None in a record: the curve ends there.
        mean = [math.nan if None in values else sum(values) / len(values) for values in zip(*curves, strict=True)]
        line = "--" if name == BASELINE else "-"
        axes.plot(range(1, len(mean) + 1), mean, line, color=style[name][0], label=_label(name))
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)
