"""What a reader of a comparison's table must know: what its numbers rest on, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.compare import Comparison
from experiments.config import BASELINE, UPDATE_SETTINGS, Arm
from experiments.matching import matched_count
from experiments.significance import EXACT_SEEDS, too_few_seeds
from masks import MaskSpec, Schedule
from sam import MethodSpec

if TYPE_CHECKING:
    from experiments.table import Row


def footnotes(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """What the numbers of a table rest on, then what is wrong with them, each warning under a word in capitals."""
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


def _taken_note(comparison: Comparison) -> list[str]:
    records = [record for found in comparison.records.values() for record in found]
    taken = sum("taken_from" in record.telemetry for record in records)
    if not taken:
        return []
    return [f"{taken} of {len(records)} runs were taken over from other comparisons, with the times they took there."]


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
