"""Write a comparison down: CSV files and one HTML page."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from analysis.reliability import REPEAT
from experiments.by_method import methods_frame, methods_notes, methods_shown
from experiments.compare import Comparison, Trial
from experiments.config import BASELINE, CompareConfig
from experiments.plot import figures
from experiments.record import write_text
from experiments.table import Table, frame, shown
from masks.errors import InputError

PAGE = "report.html"


def write_report(comparison: Comparison, table: Table) -> Path:
    """Write ``table.csv``, ``runs.csv``, ``trials.csv`` and ``report.html`` into the comparison's folder, and
    ``methods_by_masks.csv`` where arms name methods.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder cannot be written to.
    """
    folder = comparison.folder
    trials = pd.DataFrame([asdict(t) for t in comparison.trials], columns=[f.name for f in fields(Trial)])
    files = {
        "table.csv": frame(table).to_csv(index=False),
        "runs.csv": runs_frame(comparison).to_csv(index=False),
        "trials.csv": trials.to_csv(index=False),
        PAGE: _html(comparison, table),
    }
    if any(arm.method for arm in comparison.config.arms):
        files["methods_by_masks.csv"] = methods_frame(table).to_csv(index=False)
    try:
        for name, text in files.items():
            write_text(folder / name, text)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return folder / PAGE


def runs_frame(comparison: Comparison) -> pd.DataFrame:
    """One line per run of the report."""
    lines = []
    for arm, records in comparison.records.items():
        for record in records:
            result = record.result
            builds = result["mask_builds"]
            lines.append(
                {
                    "run_id": record.run_id,
                    "arm": arm,
                    "method": record.config["method"] if arm in comparison.chosen else None,
                    "mask": record.config["mask"],
                    "rho": record.config["rho"] if arm in comparison.chosen else None,
                    "seed": record.config["seed"],
                    "epochs": record.config["epochs"],
                    "kept": builds[-1]["num_kept"] if builds else 0,
                    "mask_digest": builds[-1]["digest"] if builds else None,
                    "train_loss_last_epoch": result["history"][-1]["loss"],
                    **result["fit"],
                    "ascent_last_epoch": result["history"][-1]["ascent"],
                    "val_accuracy": result["val_accuracy"],
                    "test_accuracy": result["test_accuracy"],
                    **{name: found["value"] for name, found in result["metrics"].items()},
                    **{f"{name}{REPEAT}": found["value"] for name, found in result.get("metrics_repeat", {}).items()},
                    "diverged": result["diverged"],
                    **record.telemetry,
                }
            )
    return pd.DataFrame(lines)


def _html(comparison: Comparison, table: Table) -> str:
    config = comparison.config
    text = shown(table)
    warnings = [note for note in table.notes if note.split(":")[0].isupper()]
    first = comparison.records[BASELINE][0]
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("experiments"), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template(PAGE)
    return template.render(
        title=f"SAM under masks: {config.model} on {config.data}",
        asked=(
            f"{config.epochs} epochs of {config.optimizer} (lr {config.lr:g}), method {_methods(config)}, rule "
            f"{config.rule} and norm scope {config.norm_scope or 'masked'} for methods without their own; budgeted "
            "masks keep "
            + (
                f"a density of {config.density:g}."
                if config.density is not None
                else f"as many coordinates as {config.match}."
            )
        ),
        columns=list(text.columns),
        lines=[(name, list(cells)) for name, cells in zip(text.index, text.to_numpy(), strict=True)],
        by_method=_by_method(table),
        by_method_notes=methods_notes(comparison, table),
        warnings=warnings,
        notes=[note for note in table.notes if note not in warnings],
        figures=list(figures(comparison, table).items()),
        environment=", ".join(f"{key} {value}" for key, value in first.environment.items()),
        config=json.dumps(config.settings() | asdict(comparison.measure), indent=1),
        runs=[(arm, " ".join(r.run_id for r in records)) for arm, records in comparison.records.items()],
    )


def _methods(config: CompareConfig) -> str:
    named = dict.fromkeys(arm.method or config.method for arm in config.arms if arm.rho)
    return ", ".join(named)


def _by_method(table: Table) -> dict[str, Any]:
    """Columns, and for each method its lines: the name of the line and its cells."""
    text = methods_shown(table)
    if text is None:
        return {}
    lines = {
        method: [
            (line, list(cells)) for line, cells in zip(part.index.get_level_values(1), part.to_numpy(), strict=True)
        ]
        for method, part in text.groupby(level=0, sort=False)
    }
    return {"columns": list(text.columns), "methods": lines}
