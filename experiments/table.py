"""The table of a comparison: one line per arm, with intervals, adjusted p values and what they rest on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis import Interval, PairedComparison, accuracy_interval, compare_paired, mean_interval, seeds_needed
from experiments.compare import Comparison, predicted_costs
from experiments.config import BASELINE, Arm
from experiments.record import RunRecord
from masks import MaskSpec

ALPHA = 0.05


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
    """One arm. Accuracies and gains are fractions; ``gain`` is None for the baseline."""

    arm: Arm
    kept: int
    numel: int
    matched: str
    jaccard_norm: float | None
    norm_share: float | None
    num_tensors: int
    rho: float | None
    rho_at_edge: bool
    radius: float
    ascent: float
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


def build_table(comparison: Comparison) -> Table:
    """Summarise a comparison.

    Cost is the median over seeds of processor seconds of training (mask building included) relative to the
    baseline's run of the same seed.
    """
    gains = _gains(comparison)
    predicted = predicted_costs(comparison)
    base = {r.config["seed"]: r for r in comparison.records[BASELINE]}
    reference = _norm_count(comparison)
    rows = []
    for arm in comparison.config.arms:
        records = comparison.records[arm.name]
        last = [r.result["mask_builds"][-1] for r in records if r.result["mask_builds"]]
        history = [epoch for r in records for epoch in r.result["history"]]
        ratio = [_seconds(r) / _seconds(base[r.config["seed"]]) for r in records]
        factor = predicted[arm.name]
        rho = comparison.chosen.get(arm.name)
        rows.append(
            Row(
                arm=arm,
                kept=last[0]["num_kept"],
                numel=last[0]["numel"],
                matched=_matched(arm, last[0]["num_kept"], reference),
                jaccard_norm=_mean([b["jaccard_norm"] for b in last]),
                norm_share=_mean([b["norm_share"] for b in last if b["num_kept"]]),
                num_tensors=round(statistics.median(b["num_tensors"] for b in last)),
                rho=rho,
                rho_at_edge=len(arm.rho) > 1 and rho in (min(arm.rho), max(arm.rho)),
                radius=_mean([epoch["radius"] for epoch in history]) or 0.0,
                ascent=_mean([epoch["ascent"] for epoch in history]) or 0.0,
                accuracy=_accuracy(records),
                gain=gains.get(arm.name),
                lambda_max=_metric(records, "lambda_max"),
                m_sharpness=_metric(records, "m_sharpness"),
                cost=statistics.median(ratio),
                predicted_cost=None if factor is None else factor * arm.epochs_factor,
                diverged=sum(r.result["diverged"] is not None for r in records),
                n=len(records),
            )
        )
    return Table(tuple(rows), tuple(_notes(comparison, rows)))


def _seconds(record: RunRecord) -> float:
    return float(record.telemetry["train_cpu_seconds"])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if known else None


def _norm_count(comparison: Comparison) -> int | None:
    """Size of the mask that budgeted masks are matched to, where that is what was asked for."""
    if comparison.config.density is not None:
        return None
    for arm in comparison.config.arms:
        if MaskSpec.parse(arm.mask).info.kind == "budgeted":
            return int(comparison.records[arm.name][0].result["mask_builds"][-1]["num_kept"])
    return None


def _matched(arm: Arm, kept: int, reference: int | None) -> str:
    if MaskSpec.parse(arm.mask).info.kind == "budgeted":
        return "yes"
    if not kept:
        return "baseline"
    return "reference" if kept == reference else "unmatched"


def _accuracy(records: Sequence[RunRecord]) -> Interval:
    """Interval over seeds and test sample: crossed where all seeds share the test images.

    Where the test images are drawn anew for each seed, the spread between seeds contains both.
    """
    if all(r.result["test_is_shared"] for r in records):
        return accuracy_interval(np.array([[c == "1" for c in r.result["test_correct"]] for r in records]))
    interval = mean_interval(
        [r.result["test_accuracy"] for r in records], name="accuracy, test images redrawn per seed"
    )
    return replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))


def _metric(records: Sequence[RunRecord], key: str) -> Metric:
    found = [r.result[key] for r in records]
    good = [f for f in found if "error" not in f]
    return Metric(
        interval=mean_interval([f["value"] for f in good], name=good[0]["name"]) if good else None,
        name=good[0]["name"] if good else f"{key}: {found[0]['error']}",
        missing=len(found) - len(good),
        unconverged=sum(f.get("converged") is False for f in good),
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


def _notes(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    config = comparison.config
    sizes = comparison.records[BASELINE][0].result
    main = [a for a in config.arms if a.role == "main" and a.name != BASELINE]
    control = [a for a in config.arms if a.role == "control" and a.name != BASELINE]
    shared = sizes["test_is_shared"]
    notes = [
        f"n = {config.seeds} seeds per arm (from {config.report_seeds().start} on), paired: same "
        " initial weights, data order, split and label noise in every arm.",
        f"{sizes['train_images']} training images of {config.data}, label noise "
        f"{comparison.records[BASELINE][0].config['label_noise']:g}; {sizes['test_images']} test images, "
        + ("the same for all seeds" if shared else "redrawn per seed")
        + ", read once per run, after its last epoch.",
        _tuning_note(comparison),
        "Accuracy: 95 % interval over seeds and test sample"
        + (" (crossed random effects)." if shared else " (the test sample is redrawn with the seed)."),
        "Gain: mean paired difference to the arm none in percentage points, 95 % t interval over seeds"
        + (" (given these test images)" if shared else "")
        + ", two-sided exact sign-flip p, Holm-adjusted over "
        + f"{len(main)} main contrasts"
        + (
            f" and, as a family of its own, {len(control)} controls ({', '.join(a.name for a in control)})"
            if control
            else ""
        )
        + "; the intervals are not adjusted.",
        "Radius ||eps||_2 and ascent strength L(w+eps) - L(w): means over all steps of training.",
        "Cost: processor time of training relative to none, median over seeds, mask building included (predicted: "
        "from counted operations, mask building and elementwise work not included).",
    ]
    notes += [f"{row.lambda_max.name}." for row in rows[:1]] + [f"{row.m_sharpness.name}." for row in rows[:1]]
    notes += _warnings(comparison, rows, len(main), len(control))
    return notes


def _tuning_note(comparison: Comparison) -> str:
    config = comparison.config
    tuned = [a for a in config.arms if len(a.rho) > 1]
    if not tuned:
        return "Nothing was tuned."
    fixed = [a.name for a in config.arms if len(a.rho) <= 1]
    trials = f"{len(tuned[0].rho)} radii x {config.tuning_seeds} seeds"
    return (
        f"Tuned: rho only, per arm, {trials} on validation images, on seeds and images that the table does not test "
        f"on; nothing was tuned for {', '.join(fixed)}."
    )


def _warnings(comparison: Comparison, rows: Sequence[Row], main: int, control: int) -> list[str]:
    config = comparison.config
    out = []
    for family, size in (("main", main), ("control", control)):
        needed = seeds_needed(size, ALPHA) if size else 0
        if config.seeds < needed:
            out.append(
                f"TOO FEW SEEDS: with {size} {family} contrasts no result can reach p = {ALPHA} after Holm from "
                f"{config.seeds} seeds; at least {needed} are needed."
            )
    for row in rows:
        if row.rho_at_edge:
            out.append(
                f"RHO AT THE EDGE: for {row.arm.name} the best of {', '.join(f'{r:g}' for r in row.arm.rho)} is "
                f"{row.rho:g}; widen its grid before quoting its line."
            )
        if row.diverged:
            out.append(
                f"DIVERGED: {row.diverged} of {row.n} runs of {row.arm.name}; they are in the table as they ended."
            )
        for metric in (row.lambda_max, row.m_sharpness):
            if metric.missing or metric.unconverged:
                out.append(
                    f"METRIC INCOMPLETE: {row.arm.name}: {metric.missing} seeds without, {metric.unconverged} not "
                    f"converged: {metric.name}."
                )
    return out


def frame(table: Table) -> pd.DataFrame:
    """The table as numbers, one line per arm, for CSV files; fractions, not percent."""
    return pd.DataFrame([_flat(row) for row in table.rows])


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
    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"

    def interval(value: Interval | None, scale: float = 1.0, digits: int = 1) -> str:
        if value is None:
            return "-"
        if not math.isfinite(value.low):
            return f"{scale * value.value:.{digits}f} [-]"
        return f"{scale * value.value:.{digits}f} [{scale * value.low:.{digits}f}, {scale * value.high:.{digits}f}]"

    gain = row.gain
    gain_text = "-"
    if gain is not None:
        ends = f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]" if math.isfinite(gain.low) else "[-]"
        gain_text = f"{100 * gain.mean_difference:+.1f} {ends}"
    cost = f"{row.cost:.2f}x" + ("" if row.predicted_cost is None else f" ({row.predicted_cost:.2f})")
    return {
        "arm": row.arm.name + (" (!)" if row.diverged else ""),
        "kept": f"{row.kept:,}",
        "density": f"{100 * row.density:.3g} %",
        "matched": row.matched,
        "overlap": number(row.jaccard_norm, 2),
        "rho": number(row.rho) + ("*" if row.rho_at_edge else ""),
        "||eps||": number(row.radius),
        "ascent": number(row.ascent),
        "accuracy %": interval(row.accuracy, 100.0),
        "gain": gain_text,
        "p Holm": "-" if gain is None else f"{gain.p_holm:.3f}",
        "lambda_max": interval(row.lambda_max.interval, digits=1),
        "m-sharpness": interval(row.m_sharpness.interval, digits=3),
        "cost (predicted)": cost,
    }
