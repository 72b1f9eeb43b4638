"""The sections of a report, in the order of reading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from experiments.by_method import methods_notes, methods_shown
from experiments.config import BASELINE, CompareConfig
from experiments.plot import outcome
from experiments.plot.style import Style, styles
from experiments.report.along import along
from experiments.report.answer import answer, of_flatness
from experiments.report.content import Absent, Block, Details, Document, Grid, Notes, Section, Text, grid, picture
from experiments.report.curvature import curvature
from experiments.report.findings import Findings
from experiments.report.flatness import flatness
from experiments.report.masks import masks
from experiments.table import Row, seconds, shown

MIN_DENSITIES = 3


def document(findings: Findings) -> Document:
    """The whole report."""
    config = findings.comparison.config
    style = styles(config.arms)
    return Document(
        f"SAM under masks: {config.model} on {config.data}",
        (
            Section("The answer", tuple(Text(line) for line in _answers(findings))),
            Section("What was asked", (Text(_asked(config)),)),
            Section("Arms", tuple(_arms(findings))),
            *_by_method(findings),
            Section("How to read it", (Notes(tuple(n for n in findings.table.notes if not _is_warning(n))),)),
            Section("Accuracy", tuple(_accuracy(findings, style))),
            Section("Sharpness and test error", tuple(flatness(findings, style))),
            Section("Curvature", tuple(curvature(findings, style))),
            Section("Masks", tuple(masks(findings, style))),
            Section("Training", (*_training(findings, style), *along(findings, style))),
            Section("Cost", tuple(_cost(findings, style))),
            Section("Failed and diverged runs", tuple(_failed(findings))),
            Section("Runs behind each number", tuple(_runs(findings))),
            Section("Made by", tuple(_made_by(findings))),
        ),
    )


def _is_warning(note: str) -> bool:
    return note.split(":")[0].isupper()


def _answers(findings: Findings) -> list[str]:
    """None of an unfinished comparison: p values adjusted over the arms that happen to be there are too small."""
    if findings.left_out:
        return [
            f"Not answered yet: runs of {', '.join(findings.left_out)} are missing; see the arms that are left out."
        ]
    lines = answer(findings.table)
    if findings.judgement is not None:
        lines += [f"Does the gain come from flatness? {said}" for said in of_flatness(findings.judgement.verdicts)]
    return lines


def _asked(config: CompareConfig) -> str:
    methods = dict.fromkeys(arm.method or config.method for arm in config.arms if arm.rho)
    budget = f"as many coordinates as {config.match}" if config.density is None else f"a density of {config.density:g}"
    return (
        f"{config.epochs} epochs of {config.optimizer} (lr {config.lr:g}), method {', '.join(methods)}, rule "
        f"{config.rule} and norm scope {config.norm_scope or 'masked'} for methods without their own; budgeted masks "
        f"keep {budget}."
    )


def _arms(findings: Findings) -> Iterator[Block]:
    yield grid(shown(findings.table).reset_index())
    for name, why in findings.left_out.items():
        yield Text(
            f"LEFT OUT: {name}: {why}; sam-masks compare goes on from there. Until then p values are adjusted over the "
            "other arms only.",
            warning=True,
        )
    for note in findings.table.notes:
        if _is_warning(note):
            yield Text(note, warning=True)


def _by_method(findings: Findings) -> Iterator[Section]:
    text = methods_shown(findings.table)
    if text is not None:
        notes = Notes(tuple(methods_notes(findings.comparison, findings.table)))
        yield Section("Methods by masks", (grid(text.reset_index(), grouped=True), notes))


def _accuracy(findings: Findings, style: dict[str, Style]) -> Iterator[Block]:
    comparison, rows = findings.comparison, findings.table.rows
    n = rows[0].n
    yield picture(
        outcome.accuracy(comparison, rows, style),
        "accuracy",
        "Test accuracy per arm",
        f"Each dot is one of n = {n} seeds; mark: their mean; bar: its 95 % interval over seeds and test images.",
    )
    if comparison.trials:
        swept, tries = findings.swept, comparison.config.tuning_seeds
        beside = "" if swept is None else f" Right: mean test accuracy over the report's n = {n} seeds, not tuned on."
        yield picture(
            outcome.against_rho(comparison, style, swept),
            "rho",
            "Accuracy against the radius rho, per mask",
            f"{'Left: mean' if swept is not None else 'Mean'} validation accuracy over n = {tries} tuning "
            f"seed{'s' * (tries > 1)}, without an interval; the ring marks the radius chosen; an axis ends at most "
            f"{outcome.BELOW:g} points below the lowest ring.{beside}",
        )
    else:
        yield Absent(
            "Accuracy against rho",
            "no arm had several radii to choose from",
            "give each arm several radii (--rho-grid)",
        )
    yield _density(findings, style)


def _density(findings: Findings, style: dict[str, Style]) -> Block:
    rows = [row for row in findings.table.rows if row.arm.rho and row.kept]
    densities = {row.density for row in rows}
    if len(densities) < MIN_DENSITIES:
        return Absent(
            "Accuracy against density",
            f"the masks have {len(densities)} different densit{'ies' if len(densities) > 1 else 'y'}, and "
            f"{MIN_DENSITIES} are needed",
            "compare masks of more natural sizes with each other",
        )
    (baseline,) = (row for row in findings.table.rows if row.arm.name == BASELINE)
    return picture(
        outcome.against_density(rows, style, baseline),
        "density",
        "Test accuracy against density",
        f"Mark: mean over n = {rows[0].n} seeds; bar: its 95 % interval over seeds and test images; line and band: "
        f"{baseline.arm.name} and its interval. Arms of nearly one density stand side by side.",
    )


def _training(findings: Findings, style: dict[str, Style]) -> Iterator[Block]:
    records = findings.comparison.records
    n = findings.table.rows[0].n
    band = (
        f"Line: mean over n = {n} seeds; band: its 95 % t interval over seeds; a gap where a run has no finite number."
    )
    for key, name, title, what in (
        ("loss", "loss", "Training loss per epoch", "training loss L(w), nats"),
        ("ascent", "ascent", "Ascent strength per epoch", "ascent strength L(w + eps) - L(w), nats"),
        ("radius", "radius", "Length of the perturbation per epoch", "||eps||, units of weights"),
    ):
        arms = [row.arm for row in findings.table.rows if key == "loss" or row.arm.rho]
        curves = {arm.name: [[epoch[key] for epoch in r.result["history"]] for r in records[arm.name]] for arm in arms}
        known = {arm: runs for arm, runs in curves.items() if any(v is not None for run in runs for v in run)}
        if known:
            yield picture(outcome.along_training(known, style, what), name, title, band)
        else:
            yield Absent(title, "no run recorded it", "choose a method that computes L(w)")


def _cost(findings: Findings, style: dict[str, Style]) -> Iterator[Block]:
    comparison, rows = findings.comparison, findings.table.rows
    base = {record.config["seed"]: seconds(record) for record in comparison.records[BASELINE]}
    ratios = {
        arm: [seconds(record) / base[record.config["seed"]] for record in records]
        for arm, records in comparison.records.items()
    }
    predicted = {row.arm.name: row.predicted_cost for row in rows}
    clock = comparison.records[BASELINE][0].telemetry["clock"]
    yield picture(
        outcome.cost(ratios, predicted, style),
        "cost",
        "Cost of training per arm",
        f"{clock.capitalize()} relative to the arm {BASELINE} with the same seed: each dot is one of n = {rows[0].n} "
        "seeds, the bar the median, the ring the cost predicted from counted operations.",
    )
    if all(cost is None for cost in predicted.values()):
        yield Text("Predicted costs are not in the folder (its table.csv is missing); sam-masks compare counts them.")


def _failed(findings: Findings) -> Iterator[Block]:
    if not findings.failed:
        yield Text("None: every run in the folder ended well.")
        return
    columns = ("run", "state", "arm", "rho", "seed", "reason")
    yield Grid(columns, tuple(tuple(str(row.get(name, "-")) for name in columns) for row in findings.failed))


def _runs(findings: Findings) -> Iterator[Block]:
    yield Text(
        "Every number of an arm rests on its runs of the report; its radius on its tuning runs. A run's record is "
        "runs/ID/result.json; runs.csv has a line per run of the report."
    )
    for row in findings.table.rows:
        yield Details(f"{row.arm.name}: {row.n} run{'s' * (row.n != 1)} of the report", _ids(findings, row))


def _ids(findings: Findings, row: Row) -> str:
    name = row.arm.name
    lines = [f"report: {' '.join(r.run_id for r in findings.comparison.records[name])}"]
    report = {r.run_id for r in findings.comparison.records[name]}
    others: dict[tuple[str, float], list[str]] = {}
    for record in findings.runs:
        if record.arm == name and record.run_id not in report:
            what = "tuning" if record.config["tuning"] else "sweep"
            others.setdefault((what, float(record.config["rho"])), []).append(record.run_id)
    return "\n".join(
        [*lines, *(f"{what}, rho {rho:g}: {' '.join(ids)}" for (what, rho), ids in sorted(others.items()))]
    )


def _made_by(findings: Findings) -> Iterator[Block]:
    comparison = findings.comparison
    first = next(iter(comparison.records.values()))[0]
    yield Text(", ".join(f"{key} {value}" for key, value in first.environment.items()))
    asked = comparison.config.settings() | asdict(comparison.measure)
    yield Details("Configuration, as a file for --config", json.dumps(asked, indent=1))
