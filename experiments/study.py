"""A comparison's folder as a table of runs, for a verdict: plain JSON is read, nothing is executed or imported."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.reliability import REPEAT
from experiments.compare import STUDY_FILE, STUDY_SCHEMA, choose, trial_of
from experiments.record import RunRecord
from experiments.store import read_all
from masks.errors import InputError

CONTROLS = ("train_error", "train_loss", "weight_norm")
"""Columns beside the metrics: of the final weights, on all training images with their labels as given."""

INVERSE = "1/"

COLLAPSED = 10.0
"""Percentage points of validation accuracy that a radius larger than the one chosen may cost; beyond, training counts
as collapsed: such weights are flat and wrong, and a few of them decide any line through all."""


@dataclass(frozen=True, eq=False)
class Study:
    """The runs of a comparison on the report's seeds.

    Attributes:
        frame: one row per run: ``arm``, ``seed``, ``rho`` (0 for an arm without one), ``test_error``, ``train_error``,
            ``train_loss``, ``weight_norm``, ``train_error_clean``, a column for each metric and, where it was measured
            twice, METRIC_repeat; see :mod:`analysis.reliability`. Arms and radii with a run that diverged or is missing
            are left out, and those at which training collapsed, see :data:`COLLAPSED`.
        arms: names of the arms in the order of the comparison; those with role "control" are in ``controls``.
        chosen: the radius of each arm that has one, chosen on validation data.
        metrics: the metrics that all runs name, in full. All grow with sharpness: one of which a larger value means
            flatter is replaced by its inverse, named 1/METRIC, nan where it is not positive.
        settings: for each of these how it was measured: what all runs agree on, ``images`` (incomplete micro-batches
            included), ``label_noise``, and ``data_digests`` by seed.
        trajectories: for each (arm, seed, rho) what was measured along training, the final weights last: rows like
            those of the frame, with column ``epoch``.
        left_out: the other pairs of arm and radius, and why they are left out.
        codes: how many of the runs were made by each version of the code.
    """

    frame: pd.DataFrame
    arms: tuple[str, ...]
    controls: frozenset[str]
    chosen: dict[str, float]
    metrics: tuple[str, ...]
    settings: dict[str, dict[str, Any]]
    trajectories: dict[tuple[str, int, float], pd.DataFrame]
    left_out: dict[tuple[str, float], str]
    codes: dict[str, int]


def load_frame(folder: Path) -> pd.DataFrame:
    """The runs of a comparison as a table; see :class:`Study` for the columns and :func:`load_study` for errors."""
    return load_study(folder).frame


def load_study(folder: Path, collapsed: float = COLLAPSED) -> Study:
    """Read the folder of a comparison.

    Args:
        folder: of the comparison.
        collapsed: see :data:`COLLAPSED`.

    Raises:
        InputError: no comparison, one that is not finished, or records that cannot be read.
    """
    arms = _arms(folder)
    records = read_all(folder / "runs")
    try:
        tuned: dict[tuple[str, float], list[RunRecord]] = {}
        for record in records:
            if record.config["tuning"]:
                tuned.setdefault((record.arm, float(record.config["rho"])), []).append(record)
        chosen = {name: radii[0] for name, (_, radii) in arms.items() if radii}
        chosen |= choose([trial_of(arm, rho, found) for (arm, rho), found in tuned.items()])
        report = [record for record in records if not record.config["tuning"]]
        if not report:
            raise InputError(f"{folder} holds no finished run of the report; let sam-masks compare finish first")
        kept, left_out = _complete(report)
        failed = _collapsed(kept, chosen, collapsed)
        kept, left_out = [record for record in kept if _key(record)[::2] not in failed], left_out | failed
        settings: dict[str, list[tuple[RunRecord, dict[str, Any]]]] = {}
        for record in kept:
            for name, found in record.result["metrics"].items():
                settings.setdefault(_name(name, found["settings"]), []).append((record, found["settings"]))
        return Study(
            frame=pd.DataFrame([_row(record, record.result) for record in kept]),
            arms=tuple(arms),
            controls=frozenset(name for name, (role, _) in arms.items() if role == "control"),
            chosen=chosen,
            metrics=tuple(settings),
            settings={name: _common(each) for name, each in settings.items()},
            trajectories={_key(record): _trajectory(record) for record in kept},
            left_out=left_out,
            codes=dict(Counter(str(record.environment.get("code")) for record in kept)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the records in {folder} are of another version: {type(error).__name__} {error}; run the comparison again"
        ) from None


def _arms(folder: Path) -> dict[str, tuple[str, list[float]]]:
    """Role and radii of each arm."""
    path = folder / STUDY_FILE
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        if study["schema"] != STUDY_SCHEMA:
            raise InputError(f"{path} has another schema than {STUDY_SCHEMA}")
        return {arm["name"]: (arm["role"], [float(rho) for rho in arm["rho"]]) for arm in study["config"]["arms"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{folder} is not the folder of a comparison: cannot read its {STUDY_FILE} ({type(error).__name__}); "
            "give one that compare wrote, such as results/compare-ID"
        ) from None


def _key(record: RunRecord) -> tuple[str, int, float]:
    config = record.config
    return record.arm, int(config["seed"]), float(config["rho"])


def _complete(records: list[RunRecord]) -> tuple[list[RunRecord], dict[tuple[str, float], str]]:
    """The records of the arms and radii of which every seed is there and none diverged, and why the others are not."""
    cells: dict[tuple[str, float], list[RunRecord]] = {}
    for record in records:
        arm, _, rho = _key(record)
        cells.setdefault((arm, rho), []).append(record)
    seeds = {record.config["seed"] for record in records}
    kept: list[RunRecord] = []
    left_out: dict[tuple[str, float], str] = {}
    for cell, found in sorted(cells.items()):
        diverged = sorted(record.config["seed"] for record in found if record.result["diverged"])
        if diverged:
            which = f"seed{'s' * (len(diverged) > 1)} {', '.join(map(str, diverged))}"
            left_out[cell] = f"{len(diverged)} of {len(found)} runs diverged ({which})"
        elif len(found) < len(seeds):
            left_out[cell] = f"{len(found)} of {len(seeds)} seeds are finished"
        else:
            kept += found
    if not kept:
        why = "; ".join(f"{arm} at rho {rho:g}: {reason}" for (arm, rho), reason in left_out.items())
        raise InputError(f"no arm and radius is left to judge: {why}")
    return kept, left_out


def _collapsed(records: list[RunRecord], chosen: dict[str, float], points: float) -> dict[tuple[str, float], str]:
    """The arms and radii at which training collapsed, by the mean validation accuracy of the report's runs: beside that
    of the radius chosen, or of the best one where the chosen one is not there. None without validation images."""
    cells: dict[str, dict[float, list[float]]] = {}
    for record in records:
        arm, _, rho = _key(record)
        cells.setdefault(arm, {}).setdefault(rho, []).append(100 * _number(record.result.get("val_accuracy")))
    out = {}
    for arm, radii in cells.items():
        means = {rho: sum(found) / len(found) for rho, found in radii.items()}
        best = chosen[arm] if chosen.get(arm) in means else max(means, key=lambda rho: means[rho])
        for rho, mean in means.items():
            if rho > best and mean < means[best] - points:
                out[arm, rho] = f"collapsed: validation accuracy {mean:.1f} %, {means[best]:.1f} % at rho {best:g}"
    return out


def _row(record: RunRecord, result: dict[str, Any]) -> dict[str, Any]:
    """One run: final weights (``result`` of the record) or weights along the way (``observed`` of an epoch)."""
    arm, seed, rho = _key(record)
    row: dict[str, Any] = {"arm": arm, "seed": seed, "rho": rho, "test_error": 1 - record.result["test_accuracy"]}
    row |= {name: _number(result["fit"][name]) for name in (*CONTROLS, "train_error_clean")}
    for suffix, taken in (("", result["metrics"]), (REPEAT, result.get("metrics_repeat", {}))):
        for name, found in taken.items():
            own, value = _name(name, found["settings"]), _number(found["value"])
            row[own + suffix] = value if own == name else 1 / value if value > 0 else math.nan
    return row


def _name(metric: str, settings: dict[str, Any]) -> str:
    """The metric's column; records without a direction are of metrics that grow with sharpness."""
    return INVERSE + metric if settings.get("direction", "sharper") == "flatter" else metric


def _common(each: list[tuple[RunRecord, dict[str, Any]]]) -> dict[str, Any]:
    """What all runs say of how a metric was measured."""
    first = each[0][1]
    common = {key: value for key, value in first.items() if all(one.get(key) == value for _, one in each)}
    if "num_examples" in common:
        common["images"] = common["num_examples"] + common.get("num_dropped", 0)
    noise = {record.config.get("label_noise") for record, _ in each}
    digests: dict[str, list[str]] = {}
    for record, one in each:
        if "data_digest" in one and one["data_digest"] not in digests.setdefault(str(record.config["seed"]), []):
            digests[str(record.config["seed"])].append(one["data_digest"])
    return {**common, "label_noise": noise.pop() if len(noise) == 1 else None, "data_digests": digests}


def _trajectory(record: RunRecord) -> pd.DataFrame:
    history = record.result["history"]
    rows = [
        {"epoch": epoch + 1, **_row(record, one["observed"])} for epoch, one in enumerate(history) if "observed" in one
    ]
    return pd.DataFrame([*rows, {"epoch": len(history), **_row(record, record.result)}])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
