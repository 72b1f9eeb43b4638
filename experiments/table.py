"""The table of a comparison: one line per arm, with intervals, adjusted p values and what they rest on."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit, logit

from analysis import Interval, PairedComparison, accuracy_interval, compare_paired, mean_interval, seeds_needed
from experiments.compare import Comparison, predicted_costs
from experiments.config import BASELINE, UPDATE_SETTINGS, Arm
from experiments.measure import LAMBDA_MAX
from experiments.record import RunRecord
from masks import MaskSpec, Schedule
from sam import MethodSpec

ALPHA = 0.05
EXACT_SEEDS = 16
"""Up to so many seeds the sign-flip test enumerates all patterns."""


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
                matched=_matched(comparison, arm, count),
                jaccard_norm=_mean([b["jaccard_norm"] for b in last]),
                norm_share=_mean([b["norm_share"] for b in last if b["num_kept"]]),
                num_tensors=round(statistics.median(b["num_tensors"] for b in last)),
                rho=rho,
                rho_at_edge=len(arm.rho) > 1 and rho in (min(arm.rho), max(arm.rho)),
                radius=_mean([epoch["radius"] for epoch in history]),
                ascent=_mean([epoch["ascent"] for epoch in history]),
                accuracy=_accuracy(records),
                gain=gains.get(arm.name),
                lambda_max=_metric(records, LAMBDA_MAX),
                m_sharpness=_metric(records, comparison.measure.m_sharpness),
                cost=statistics.median(ratio),
                predicted_cost=predicted.get(arm.name),
                diverged=sum(r.result["diverged"] is not None for r in records),
                n=len(records),
            )
        )
    return Table(tuple(rows), tuple(_notes(comparison, rows)))


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


def _counts(comparison: Comparison, arm: Arm) -> set[int]:
    """Sizes of the arm's mask over all seeds and buildings."""
    return {int(b["num_kept"]) for r in comparison.records[arm.name] for b in r.result["mask_builds"]}


def _is_budgeted(arm: Arm) -> bool:
    return MaskSpec.parse(arm.mask).info.kind == "budgeted"


def matched_count(comparison: Comparison) -> int | None:
    """The one size of all budgeted masks, read off the records; None if there is none, or more than one."""
    config = comparison.config
    counts = set().union(*(_counts(comparison, arm) for arm in config.arms if _is_budgeted(arm)))
    if counts and config.density is None:
        counts = counts.union(*(_counts(comparison, arm) for arm in config.arms if _is_reference(config.match, arm)))
    return counts.pop() if len(counts) == 1 else None


def _is_reference(match: str, arm: Arm) -> bool:
    one, other = MaskSpec.parse(arm.mask), MaskSpec.parse(match)
    return (one.name, one.options) == (other.name, other.options)


def _matched(comparison: Comparison, arm: Arm, count: int | None) -> str:
    if arm.name == BASELINE:
        return "baseline"
    if _is_budgeted(arm):
        return "yes" if count is not None and _counts(comparison, arm) == {count} else "NO"
    if MaskSpec.parse(arm.mask).name == "none":
        return "no mask"
    anything = comparison.config.density is None and any(map(_is_budgeted, comparison.config.arms))
    return "reference" if anything and _is_reference(comparison.config.match, arm) else "unmatched"


def _accuracy(records: Sequence[RunRecord]) -> Interval:
    correct = [np.array([c == "1" for c in r.result["test_correct"]]) for r in records]
    if all(r.result["test_is_shared"] for r in records):
        return accuracy_interval(np.array(correct))
    return overlapping_interval(correct, [np.array(r.result["test_index"]) for r in records])


def overlapping_interval(
    correct: Sequence[np.ndarray[Any, np.dtype[np.bool_]]], index: Sequence[np.ndarray[Any, np.dtype[np.int64]]]
) -> Interval:
    """95 % interval of an accuracy over seeds AND images, where each seed tests N images of its own of one pool.

    Two seeds share images, so their accuracies are correlated, and the t interval over seeds alone is too short.
    In the model ``y_si = mu + seed_s + image_i + e_si``, with c the covariance of the seeds' errors on images that
    two of them test, and o the mean over pairs of seeds of (images shared) / N^2,

    ``var(mean) = var(accuracies of the seeds) / n + c o``.

    With n identical test sets o = 1 / N, and this is the crossed design of
    :func:`analysis.stats.accuracy_interval`, which has the references; as there, a negative c is taken as 0,
    degrees of freedom are Satterthwaite's, and the interval is taken on the logit scale (at 0 or 1: exact binomial
    over the distinct images).

    Args:
        correct: for each seed, whether it is right on its test images, N each.
        index: for each seed, the ids of these images.
    """
    n, size = len(correct), len(correct[0])
    images, where = np.unique(np.concatenate(index), return_inverse=True)
    tested, error = np.zeros((n, len(images))), np.zeros((n, len(images)))
    for s, (right, at) in enumerate(zip(correct, where.reshape(n, size), strict=True)):
        tested[s, at] = 1
        error[s, at] = right - right.mean()
    accuracies = np.array([right.mean() for right in correct])
    mean = float(accuracies.mean())
    name = f"accuracy over {n} seeds and {len(images)} test images, of which each seed tests {size}"
    if n == 1:
        return Interval(name, mean, math.nan, math.nan, 1 - ALPHA, math.nan, math.nan, 1)
    if mean in (0.0, 1.0):
        exact = stats.binomtest(round(mean * len(images)), len(images)).proportion_ci(1 - ALPHA, method="exact")
        return Interval(name, mean, float(exact.low), float(exact.high), 1 - ALPHA, math.nan, math.nan, n)
    pairs = np.triu_indices(n, 1)
    shared = float((tested @ tested.T)[pairs].sum())
    # Deviations from the seed's own mean are a little too small: size / (size - 1).
    covariance = float((error @ error.T)[pairs].sum()) / shared * size / (size - 1) if shared else 0.0
    parts = np.array([accuracies.var(ddof=1) / n, max(covariance, 0.0) * shared / len(pairs[0]) / size**2])
    variance = float(parts.sum())
    if not variance:
        return Interval(name, mean, mean, mean, 1 - ALPHA, 0.0, n - 1, n)
    df = variance**2 / float(parts**2 @ (1 / np.array([n - 1, len(images) - 1])))
    half = float(stats.t.ppf(1 - ALPHA / 2, df)) * math.sqrt(variance) / (mean * (1 - mean))
    low, high = float(expit(logit(mean) - half)), float(expit(logit(mean) + half))
    return Interval(name, mean, low, high, 1 - ALPHA, math.sqrt(variance), df, n)


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


def _taken_note(comparison: Comparison) -> list[str]:
    records = [record for found in comparison.records.values() for record in found]
    taken = sum("taken_from" in record.telemetry for record in records)
    if not taken:
        return []
    return [f"{taken} of {len(records)} runs were taken over from other comparisons, with the times they took there."]


def _notes(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    config = comparison.config
    sizes = comparison.records[BASELINE][0].result
    main = [a for a in config.arms if a.role == "main" and a.name != BASELINE]
    control = [a for a in config.arms if a.role == "control" and a.name != BASELINE]
    shared = sizes["test_is_shared"]
    clock = comparison.records[BASELINE][0].telemetry["clock"]
    notes = [
        f"n = {config.seeds} seeds per arm (from {config.report_seeds().start} on), paired: same "
        "initial weights, data order, split and label noise in every arm.",
        *_mask_notes(comparison),
        *_method_notes(comparison),
        *_settings_notes(comparison),
        f"{sizes['train_images']} training images of {config.data}, label noise "
        f"{comparison.records[BASELINE][0].config['label_noise']:g}; {sizes['test_images']} test images, "
        + ("the same for all seeds" if shared else "redrawn per seed")
        + ", read once per run, after its last epoch.",
        _tuning_note(comparison),
        "Accuracy: 95 % interval over seeds and test images (crossed random effects"
        + (")." if shared else "; it counts that two seeds share test images)."),
        "Gain: mean paired difference to the arm none in percentage points, 95 % t interval over seeds, given these "
        + ("test images" if shared else "images to draw from")
        + f", two-sided {'exact ' if config.seeds <= EXACT_SEEDS else ''}sign-flip p, Holm-adjusted over "
        + f"{len(main)} main contrasts"
        + (
            f" and, as a family of its own, {len(control)} controls ({', '.join(a.name for a in control)})"
            if control
            else ""
        )
        + "; the intervals are not adjusted.",
        "Radius ||eps||_2 and ascent strength L(w+eps) - L(w): means over all steps of training.",
        f"Cost: {clock} of training relative to none, median over seeds, mask building included (predicted: "
        "from counted operations, mask building and elementwise work not included).",
        *_taken_note(comparison),
        "lambda_max and m-sharpness, on training images with the labels trained on: mean, 95 % t interval over seeds.",
        f"lambda_max: {rows[0].lambda_max.name}.",
        f"m-sharpness: {rows[0].m_sharpness.name}.",
        *_sweep_note(comparison),
        "overlap: Jaccard index of the final mask with the normalization parameters, mean over seeds. (!) an arm with "
        "diverged runs; * the best radius lies at the edge of its grid.",
    ]
    notes += _warnings(comparison, rows, len(main), len(control))
    return notes


def _mask_notes(comparison: Comparison) -> list[str]:
    config, count, notes = comparison.config, matched_count(comparison), []
    if count is not None:
        source = f"as many as {config.match}" if config.density is None else f"density {config.density:g}"
        notes.append(f"Matched: every budgeted mask kept exactly {count:,} coordinates, {source}, in every run.")
    specs = {arm.name.removeprefix(f"{arm.method}/"): MaskSpec.parse(arm.mask) for arm in config.arms}
    other = [
        f"{name} is {spec}, built {_when(spec.schedule)}"
        for name, spec in specs.items()
        if str(spec) != name or spec.schedule != Schedule()
    ]
    if other:
        notes.append(f"Masks: {'; '.join(other)}; all others are built once, before the first step.")
    return notes


def _method_notes(comparison: Comparison) -> list[str]:
    methods, notes = _methods(comparison), []
    if comparison.config.method != "sam":
        notes.append(f"Method: {comparison.config.method}, in every arm with a mask that does not name another one.")
    blind = [name for name, spec in methods.items() if spec.name == "momentum_sam"]
    if blind:
        notes.append(f"Ascent strength is not known (-) where L(w) is never computed: {', '.join(blind)}.")
    return notes


def _settings_notes(comparison: Comparison) -> list[str]:
    arms = [arm for arm in comparison.config.arms if arm.settings]
    if not arms:
        return []
    notes = [f"Settings differ: {'; '.join(f'{arm.name} has {settings_text(arm)}' for arm in arms)}."]
    other = [arm.name for arm in arms if any(name in UPDATE_SETTINGS for name in arm.settings)]
    if other:
        notes.append(
            f"The arm {BASELINE} is trained without these settings: gains of {', '.join(other)} are also those of the "
            "settings."
        )
    return notes


def settings_text(arm: Arm) -> str:
    """The settings that an arm has of its own, on one line."""
    return ", ".join(f"{name} {value}" for name, value in arm.settings.items())


def _methods(comparison: Comparison) -> dict[str, MethodSpec]:
    """The methods of the arms with a perturbation."""
    config = comparison.config
    return {arm.name: MethodSpec.parse(arm.method or config.method) for arm in config.arms if arm.rho}


def _when(schedule: Schedule) -> str:
    if schedule.kind == "init":
        return "once, before the first step"
    number = schedule.unit if schedule.n == 1 else f"{schedule.n} {schedule.unit}s"
    return f"once, after {number}, with nothing perturbed before" if schedule.kind == "after" else f"every {number}"


def _tuning_note(comparison: Comparison) -> str:
    config = comparison.config
    tuned = [a for a in config.arms if len(a.rho) > 1]
    if not tuned:
        given = ", ".join(f"{arm} {rho:g}" for arm, rho in comparison.chosen.items())
        return f"Nothing was tuned here; rho was given: {given}."
    fixed = [a.name for a in config.arms if len(a.rho) <= 1]
    seeds = f"{config.tuning_seeds} seed{'s' if config.tuning_seeds > 1 else ''}"
    trials = f"{len(tuned[0].rho)} radii x {seeds}"
    return (
        f"Tuned: rho only, per arm, {trials} on validation images, on seeds and images that the table does not test "
        f"on; nothing was tuned for {', '.join(fixed)}."
    )


def _sweep_note(comparison: Comparison) -> list[str]:
    if not comparison.swept:
        return []
    return [
        f"Sweep: {comparison.swept} more runs, every arm at every radius of its grid on the seeds above; they are not "
        f"in this table but in the verdict: sam-masks verdict {comparison.folder}"
    ]


def too_few_seeds(seeds: int, main: int, control: int) -> list[str]:
    """Whether a result can be significant at all, for each family of so many contrasts."""
    out = []
    for family, size in (("main", main), ("control", control)):
        needed = seeds_needed(size, ALPHA) if size else 0
        if seeds < needed:
            out.append(
                f"TOO FEW SEEDS: with {size} {family} contrasts no result can reach p = {ALPHA} after Holm from "
                f"{seeds} seeds; at least {needed} are needed."
            )
    return out


def _warnings(comparison: Comparison, rows: Sequence[Row], main: int, control: int) -> list[str]:
    config, m = comparison.config, comparison.measure.sharpness_m
    measured_on = min(comparison.measure.images, comparison.records[BASELINE][0].result["train_images"])
    smaller = f"; compare with --sharpness-m {measured_on} or less" if measured_on < m else ""
    out = too_few_seeds(config.seeds, main, control)
    for row in rows:
        if row.rho_at_edge:
            out.append(
                f"RHO AT THE EDGE: for {row.arm.name} the best of {', '.join(f'{r:g}' for r in row.arm.rho)} is "
                f"{row.rho:g}; widen its grid (--extend 4) before quoting its line."
            )
        if row.diverged:
            out.append(
                f"DIVERGED: {row.diverged} of {row.n} runs of {row.arm.name}; they are in the table as they ended."
            )
        for metric, advice in ((row.lambda_max, ""), (row.m_sharpness, smaller)):
            if metric.missing or metric.unconverged:
                out.append(
                    f"METRIC INCOMPLETE: {row.arm.name}: {metric.missing} seeds without, {metric.unconverged} not "
                    f"converged: {metric.name}{advice}."
                )
        if row.matched == "NO":
            out.append(f"NOT MATCHED: {row.arm.name} did not keep the same count in every run; see runs.csv.")
    scaled = [name for name, spec in _methods(comparison).items() if spec.info.needs_model]
    if scaled:
        out.append(
            f"OTHER INITIAL WEIGHTS: {', '.join(scaled)}: their initial weights and learning rates are scaled with the "
            f"width, those of the arm {BASELINE} are not; their gains are also those of the scaling."
        )
    records = [record for found in comparison.records.values() for record in found]
    codes = Counter(str(record.environment.get("code")) for record in records)
    if len(codes) > 1:
        out.append(
            f"MIXED CODE: the runs were made by {len(codes)} versions of the code "
            f"({', '.join(f'{code}: {n} runs' for code, n in sorted(codes.items()))}); make them again in another "
            "folder before quoting their differences."
        )
    others = {tuple(sorted((k, v) for k, v in record.environment.items() if k != "code")) for record in records}
    if len(others) > 1:
        out.append(
            "MIXED ENVIRONMENTS: the runs were made with different versions or devices (see their records); their "
            "seeds are then not paired bit for bit, and their costs do not compare."
        )
    return out


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
