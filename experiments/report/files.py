"""The numbers of a report as CSV files."""

from __future__ import annotations

from dataclasses import asdict, fields

import pandas as pd

from analysis.reliability import REPEAT
from experiments.by_method import methods_frame
from experiments.compare import Comparison, Trial
from experiments.report.findings import Findings
from experiments.report.folder import TABLE
from experiments.table import frame
from experiments.verdict import tests


def csv_files(findings: Findings) -> dict[str, str]:
    """The text of each file by its name; those of parts that the report lacks are not there."""
    comparison = findings.comparison
    frames = {
        TABLE: frame(findings.table),
        "runs.csv": runs_frame(comparison),
        "trials.csv": pd.DataFrame([asdict(t) for t in comparison.trials], columns=[f.name for f in fields(Trial)]),
        "training.csv": training_frame(comparison),
    }
    if any(arm.method for arm in comparison.config.arms):
        frames["methods_by_masks.csv"] = methods_frame(findings.table)
    if findings.masks is not None:
        frames["mask_layers.csv"] = findings.masks.layers
        frames["mask_overlap.csv"] = findings.masks.overlap.rename_axis("arm").reset_index()
        if len(findings.masks.builds):
            frames["mask_builds.csv"] = findings.masks.builds
    if findings.judgement is not None:
        frames["verdict.csv"] = tests(findings.judgement)
    if findings.failed:
        frames["failed.csv"] = pd.DataFrame(findings.failed)
    return {name: table.to_csv(index=False) for name, table in frames.items()}


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


def training_frame(comparison: Comparison) -> pd.DataFrame:
    """One line per epoch of every run of the report, epochs counted from 1."""
    return pd.DataFrame(
        [
            {
                "run_id": record.run_id,
                "arm": arm,
                "seed": record.config["seed"],
                "epoch": i + 1,
                **{key: epoch[key] for key in ("loss", "ascent", "radius")},
            }
            for arm, records in comparison.records.items()
            for record in records
            for i, epoch in enumerate(record.result["history"])
        ]
    )
