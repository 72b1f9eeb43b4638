"""A comparison read back from its folder: plain JSON, nothing is trained, and no model or data set is needed."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from experiments.compare import STUDY_FILE, STUDY_SCHEMA, Comparison, Trial, choose, trial_of
from experiments.config import BASELINE, Arm, CompareConfig
from experiments.measure import MeasureConfig
from experiments.record import RunRecord
from experiments.store import read_all
from masks.errors import InputError

TABLE = "table.csv"


@dataclass(frozen=True)
class Loaded:
    """A comparison, as far as it is finished.

    Attributes:
        comparison: its finished arms, as :func:`experiments.compare.compare` gave it.
        left_out: why the other arms are not in it.
        predicted: cost of every arm's training as counted when the comparison was made; empty where it was not kept.
    """

    comparison: Comparison
    left_out: dict[str, str]
    predicted: dict[str, float | None]


def load_comparison(folder: Path) -> Loaded:
    """Read a comparison; an arm of which runs are missing is left out.

    Raises:
        InputError: no comparison, one of another version, a mask or method that is not registered (a plugin), records
            that cannot be read, or no finished arm beside the baseline.
    """
    config, measure = _asked(folder)
    tuned: dict[tuple[str, float, int], RunRecord] = {}
    report: dict[tuple[str, float, int], RunRecord] = {}
    for record in read_all(folder / "runs"):
        key = (record.arm, float(record.config["rho"]), int(record.config["seed"]))
        (tuned if record.config["tuning"] else report)[key] = record
    trials: list[Trial] = []
    records: dict[str, tuple[RunRecord, ...]] = {}
    chosen: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for arm in config.arms:
        own, missing = _trials(arm, config.seeds_for_tuning(), tuned)
        if missing:
            left_out[arm.name] = f"{missing} of its tuning runs are not finished"
            continue
        radii = choose(own) if own else dict.fromkeys([arm.name] if arm.rho else [], *arm.rho[:1])
        rho = radii.get(arm.name, 0.0)
        found = [report.get((arm.name, rho, seed)) for seed in config.report_seeds()]
        complete = tuple(record for record in found if record is not None)
        if len(complete) < len(found):
            left_out[arm.name] = f"{len(complete)} of its {len(found)} runs at rho {rho:g} are finished"
            continue
        trials += own
        chosen |= radii
        records[arm.name] = complete
    if BASELINE not in records or len(records) < 2:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InputError(
            f"{folder} has no finished arm to report beside a finished {BASELINE} ({why}); let sam-masks compare finish"
        )
    kept = replace(config, arms=tuple(arm for arm in config.arms if arm.name in records))
    swept = len(report) - sum(map(len, records.values()))
    comparison = Comparison(kept, measure, tuple(trials), chosen, records, folder, swept)
    return Loaded(comparison, left_out, _predicted(folder))


def _asked(folder: Path) -> tuple[CompareConfig, MeasureConfig]:
    path = folder / STUDY_FILE
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        if study["schema"] != STUDY_SCHEMA:
            raise InputError(f"{path} has another schema than {STUDY_SCHEMA}")
        arms = tuple(_made(Arm, arm | {"rho": tuple(arm["rho"])}) for arm in study["config"]["arms"])
        return _made(CompareConfig, study["config"] | {"arms": arms}), _made(MeasureConfig, study["measure"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{folder} is not the folder of a comparison: cannot read its {STUDY_FILE} ({why}); give one that compare "
            "wrote, such as results/compare-ID"
        ) from None


def _made(cls: type, values: dict[str, Any]) -> Any:
    unknown = sorted(set(values) - {field.name for field in fields(cls)})
    if unknown:
        raise InputError(f"the comparison was made by another version: its {', '.join(unknown)} is not known here")
    return cls(**values)


def _trials(arm: Arm, seeds: Sequence[int], runs: dict[tuple[str, float, int], RunRecord]) -> tuple[list[Trial], int]:
    """What every radius of an arm reached, and how many of the runs are missing."""
    if len(arm.rho) < 2:
        return [], 0
    cells = {rho: [runs[arm.name, rho, seed] for seed in seeds if (arm.name, rho, seed) in runs] for rho in arm.rho}
    missing = sum(len(seeds) - len(found) for found in cells.values())
    return [] if missing else [trial_of(arm.name, rho, found) for rho, found in cells.items()], missing


def _predicted(folder: Path) -> dict[str, float | None]:
    """The counted costs that the comparison's own table holds: counting them anew would take its model and data."""
    try:
        with (folder / TABLE).open(encoding="utf-8", newline="") as file:
            return {
                line["arm"]: float(cost) if (cost := line["predicted_cost"]) else None for line in csv.DictReader(file)
            }
    except (OSError, KeyError, ValueError):
        return {}
