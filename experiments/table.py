"""The table of a comparison: one line per arm, with intervals, adjusted p values and what they rest on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from analysis import Interval, PairedComparison, compare_paired, mean_interval
from experiments.accuracy import accuracy_of
from experiments.compare import Comparison, predicted_costs
from experiments.config import BASELINE, Arm
from experiments.footnotes import footnotes, settings_text
from experiments.matching import matched, matched_count
from experiments.measure import LAMBDA_MAX
from experiments.record import RunRecord


@dataclass(frozen=True)
class Metric:
    """A number measured on the final weights, over the seeds where it could be measured.

    Attributes:
        interval: mean and 95 % t interval over seeds; None if it was measured on no seed.
        name: the metric in full.
        missing: number of seeds without it.
        unconverged: number of seeds where the solver stopped before its tolerance.
    """

    interval: Interval | None
    name: str
    missing: int
    unconverged: int


@dataclass(frozen=True)
class Row:
    """One arm. Accuracies and gains are fractions; ``gain`` is None for the baseline.

    Attributes:
        matched: "yes" (a budgeted mask that kept exactly the common count in every seed at every building),
            "reference" (the mask that gives that count), "unmatched" (natural size), "NO", "baseline", "no mask".
        radius: mean ||eps||_2 over all steps and seeds; None if some of them were not finite.
        ascent: mean ascent strength, likewise.
        n: number of seeds.
    """

    arm: Arm
    kept: int
    numel: int
    matched: str
    jaccard_norm: float | None
    norm_share: float | None
    num_tensors: int
    rho: float | None
    rho_at_edge: bool
    radius: float | None
    ascent: float | None
    accuracy: Interval
    gain: PairedComparison | None
    lambda_max: Metric
    m_sharpness: Metric
    cost: float
    predicted_cost: float | None
    diverged: int
    n: int

    @property
    def density(self) -> float:
        return self.kept / self.numel


@dataclass(frozen=True)
class Table:
    """All arms, and what a reader must know to judge them."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return f"{shown(self).to_html()}<details><summary>How to read it</summary><ul>{items}</ul></details>"


def build_table(comparison: Comparison, *, predicted: Mapping[str, float | None] | None = None) -> Table:
    """Summarise a comparison.

    Cost is the median over seeds of processor seconds of training (mask building included) relative to the
    baseline's run of the same seed.

    Args:
        comparison: the runs.
        predicted: cost of every arm's training as an earlier table of these runs has it; by default it is counted here,
            which takes the model and the data.
    """
    gains = _gains(comparison)
    predicted = _predicted(comparison) if predicted is None else predicted
    base = {r.config["seed"]: r for r in comparison.records[BASELINE]}
    count = matched_count(comparison)
    rows = []
    for arm in comparison.config.arms:
        records = comparison.records[arm.name]
        last = [r.result["mask_builds"][-1] for r in records if r.result["mask_builds"]]
        history = [epoch for r in records for epoch in r.result["history"]]
        ratio = [seconds(r) / seconds(base[r.config["seed"]]) for r in records]
        rho = comparison.chosen.get(arm.name)
        rows.append(
            Row(
                arm=arm,
                kept=last[0]["num_kept"],
                numel=last[0]["numel"],
                matched=matched(comparison, arm, count),
                jaccard_norm=_mean([b["jaccard_norm"] for b in last]),
                norm_share=_mean([b["norm_share"] for b in last if b["num_kept"]]),
                num_tensors=round(statistics.median(b["num_tensors"] for b in last)),
                rho=rho,
                rho_at_edge=len(arm.rho) > 1 and rho in (min(arm.rho), max(arm.rho)),
                radius=_mean([epoch["radius"] for epoch in history]),
                ascent=_mean([epoch["ascent"] for epoch in history]),
                accuracy=accuracy_of(records),
                gain=gains.get(arm.name),
                lambda_max=_metric(records, LAMBDA_MAX),
                m_sharpness=_metric(records, comparison.measure.m_sharpness),
                cost=statistics.median(ratio),
                predicted_cost=predicted.get(arm.name),
                diverged=sum(r.result["diverged"] is not None for r in records),
                n=len(records),
            )
        )
    return Table(tuple(rows), tuple(footnotes(comparison, rows)))


def _predicted(comparison: Comparison) -> dict[str, float | None]:
    steps = predicted_costs(comparison)
    return {
        arm.name: None if (factor := steps[arm.name]) is None else factor * arm.epochs_factor
        for arm in comparison.config.arms
    }


def seconds(record: RunRecord) -> float:
    """Processor seconds of a run's training."""
    return float(record.telemetry["train_seconds"])


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is unknown: a mean over the steps that did not diverge would look better than the run was."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _metric(records: Sequence[RunRecord], key: str) -> Metric:
    found = [r.result["metrics"][key] for r in records]
    good = [f for f in found if f["value"] is not None]
    name = good[0]["settings"]["name"] if good else f"{key}: {found[0]['settings']['reason']}"
    return Metric(
        interval=mean_interval([f["value"] for f in good], name=name) if good else None,
        name=name,
        missing=len(found) - len(good),
        unconverged=sum(f["settings"].get("converged") is False for f in good),
    )


def _gains(comparison: Comparison) -> dict[str, PairedComparison]:
    """Paired differences to the baseline; main and control arms are two families for Holm."""
    base = np.array([r.result["test_accuracy"] for r in comparison.records[BASELINE]])
    gains: dict[str, PairedComparison] = {}
    for role in ("main", "control"):
        family = {
            arm.name: np.array([r.result["test_accuracy"] for r in comparison.records[arm.name]]) - base
            for arm in comparison.config.arms
            if arm.role == role and arm.name != BASELINE
        }
        if family:
            gains |= {c.name: c for c in compare_paired(family)}
    return gains


def frame(table: Table) -> pd.DataFrame:
    """The table as numbers, one line per arm, for CSV files; fractions, not percent. Methods and settings where arms
    name them."""
    numbers = pd.DataFrame([_flat(row) for row in table.rows])
    if any(row.arm.method for row in table.rows):
        numbers.insert(1, "method", [row.arm.method or None for row in table.rows])
    if any(row.arm.settings for row in table.rows):
        numbers.insert(2, "settings", [settings_text(row.arm) or None for row in table.rows])
    return numbers


def _flat(row: Row) -> dict[str, Any]:
    gain = row.gain
    flat: dict[str, Any] = {
        "arm": row.arm.name,
        "mask": row.arm.mask,
        "role": row.arm.role,
        "kept": row.kept,
        "numel": row.numel,
        "density": row.density,
        "matched": row.matched,
        "jaccard_norm": row.jaccard_norm,
        "norm_share": row.norm_share,
        "num_tensors": row.num_tensors,
        "rho": row.rho,
        "rho_at_edge": row.rho_at_edge,
        "radius": row.radius,
        "ascent": row.ascent,
        "test_accuracy": row.accuracy.value,
        "test_accuracy_low": row.accuracy.low,
        "test_accuracy_high": row.accuracy.high,
        "gain": gain.mean_difference if gain else None,
        "gain_low": gain.low if gain else None,
        "gain_high": gain.high if gain else None,
        "gain_p": gain.p if gain else None,
        "gain_p_holm": gain.p_holm if gain else None,
    }
    for name, metric in (("lambda_max", row.lambda_max), ("m_sharpness", row.m_sharpness)):
        interval = metric.interval
        flat[name] = interval.value if interval else None
        flat[f"{name}_low"] = interval.low if interval else None
        flat[f"{name}_high"] = interval.high if interval else None
        flat[f"{name}_seeds"] = row.n - metric.missing
    return flat | {
        "cost": row.cost,
        "predicted_cost": row.predicted_cost,
        "diverged": row.diverged,
        "n": row.n,
    }


def shown(table: Table) -> pd.DataFrame:
    """The table as a reader wants it: text, percent and percentage points, few digits."""
    return pd.DataFrame([_text(row) for row in table.rows]).set_index("arm")


def _text(row: Row) -> dict[str, str]:
    def metric(value: Metric) -> str:
        if value.interval is None:
            return "-"
        # As many decimals as give the mean three significant digits.
        size = abs(value.interval.value)
        digits = min(6, max(0, 2 - math.floor(math.log10(size)))) if size else 3
        return interval_text(value.interval, 1.0, digits) + (
            f" ({row.n - value.missing} of {row.n})" if value.missing else ""
        )

    gain = row.gain
    cost = f"{row.cost:.2f}x" + ("" if row.predicted_cost is None else f" ({row.predicted_cost:.2f})")
    return {
        "arm": row.arm.name + (" (!)" if row.diverged else ""),
        "kept": f"{row.kept:,}",
        "density": f"{100 * row.density:.3g} %",
        "matched": row.matched,
        "overlap": _number(row.jaccard_norm, 2),
        "rho": rho_text(row),
        "||eps||": _number(row.radius),
        "ascent": _number(row.ascent),
        "accuracy %": interval_text(row.accuracy, 100.0, 1),
        "gain": gain_text(row),
        "p Holm": "-" if gain is None else f"{gain.p_holm:.3f}" if gain.p_holm >= 0.0005 else "<0.001",
        "lambda_max": metric(row.lambda_max),
        "m-sharpness": metric(row.m_sharpness),
        "cost (predicted)": cost,
    }


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def interval_text(value: Interval, scale: float, digits: int) -> str:
    """``mid [low, high]``, or ``mid [-]`` where there is no interval."""
    low, mid, high = (f"{scale * v:.{digits}f}" for v in (value.low, value.value, value.high))
    return f"{mid} [{low}, {high}]" if math.isfinite(value.low) else f"{mid} [-]"


def gain_text(row: Row) -> str:
    """The gain in percentage points with its interval; ``-`` for the baseline."""
    gain = row.gain
    if gain is None:
        return "-"
    ends = f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]" if math.isfinite(gain.low) else "[-]"
    return f"{100 * gain.mean_difference:+.1f} {ends}"


def rho_text(row: Row) -> str:
    """The radius; a star at the edge of its grid."""
    return _number(row.rho) + ("*" if row.rho_at_edge else "")
