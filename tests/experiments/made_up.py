"""Records and comparisons that were never run, with numbers made up here, and the table of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import table as module
from experiments.compare import Comparison, Trial
from experiments.config import Arm, CompareConfig
from experiments.measure import MeasureConfig
from experiments.record import RunRecord
from experiments.table import Row, build_table

Made = Callable[..., Comparison]
NUMEL = 1000
SIZES = {"none": 0, "all": NUMEL, "norm": 50, "random": 50}


def measured(value: float | None, name: str = "a metric", **settings: Any) -> dict[str, Any]:
    return {"value": value, "error": None, "n": 9, "settings": {"name": name, "converged": True, **settings}}


def record(arm: Arm, seed: int, accuracy: float = 0.5, **changes: Any) -> RunRecord:
    kept = SIZES.get(arm.mask.partition(":")[0], 50)
    build = {
        **{"epoch": 0, "step": 0, "digest": "d", "num_kept": kept, "numel": NUMEL, "num_tensors": 1},
        **{"norm_share": 0.0 if kept else None, "jaccard_norm": 0.25, "kept_per_tensor": {}, "error": None},
    }
    right = round(40 * accuracy)
    metrics = {"lambda_max": measured(2.0 + 0.1 * seed), "one_step_l2@0.1": measured(0.1, "other")}
    result = {
        "history": [{"loss": 1.0, "ascent": 0.25, "radius": 0.5}, {"loss": 0.5, "ascent": 0.75, "radius": 1.5}],
        **{"mask_builds": [build], "diverged": None, "val_accuracy": 0.5, "test_accuracy": right / 40},
        **{"test_correct": "1" * right + "0" * (40 - right), "test_index": list(range(seed, seed + 40))},
        **{"test_is_shared": False, "train_images": 10, "val_images": 5, "test_images": 40},
        "metrics": metrics | changes.pop("metrics", {}),
    }
    telemetry = {"train_seconds": 2.0, "clock": "processor time", **changes.pop("telemetry", {})}
    environment = {"torch": "2", **changes.pop("environment", {})}
    builds = changes.pop("builds", None)
    if builds is not None:
        result["mask_builds"] = [build | one for one in builds]
    config = {"seed": seed, "label_noise": 0.2, "mask": arm.mask, "rho": 0.1, "epochs": 2}
    return RunRecord(f"{arm.name}{seed}", arm.name, config, result | changes, telemetry, environment)


def making(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Makes comparisons whose records are made up; ``change(arm, seed)`` says in what one differs."""
    monkeypatch.setattr(module, "predicted_costs", lambda comparison: dict.fromkeys(comparison.records))
    three = (Arm("none", "none"), Arm("norm", "norm", (0.1, 0.2, 0.4)), Arm("random", "random", (0.1, 0.2, 0.4)))

    def make(
        change: Callable[[str, int], dict[str, Any]] = lambda arm, seed: {},
        arms: tuple[Arm, ...] = three,
        **settings: Any,
    ) -> Comparison:
        config = CompareConfig(arms=arms, **{"seeds": 8, **settings})
        records = {
            arm.name: tuple(record(arm, seed, **change(arm.name, seed)) for seed in config.report_seeds())
            for arm in config.arms
        }
        chosen = {arm.name: sorted(arm.rho)[len(arm.rho) // 2] for arm in config.arms if arm.rho}
        trials = tuple(Trial(arm.name, rho, 0.5, 0, 2) for arm in config.arms if len(arm.rho) > 1 for rho in arm.rho)
        return Comparison(config, MeasureConfig(), trials, chosen, records, Path("nowhere"))

    return make


def row_of(comparison: Comparison, arm: str) -> Row:
    return next(row for row in build_table(comparison).rows if row.arm.name == arm)
