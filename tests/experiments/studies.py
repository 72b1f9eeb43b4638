"""Folders of comparisons that were never run, with numbers made up by the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.record import RunRecord
from experiments.store import write_run

ARMS: dict[str, tuple[float, ...]] = {"none": (), "all": (0.1, 0.2, 0.4), "norm": (0.5, 1.0, 2.0)}
CHOSEN = {"all": 0.2, "norm": 1.0}


def found(value: float | None) -> dict[str, Any]:
    settings = {"name": "a metric", "m": 128, "num_examples": 1024, "num_dropped": 0, "data_digest": "0123456789"}
    return {"value": value, "error": 0.1, "n": 3, "settings": settings}


def weights(loss: float, metrics: dict[str, float | None], repeats: dict[str, float | None]) -> dict[str, Any]:
    """What is measured on the weights of a run, at its end or along the way."""
    fit = {"train_loss": loss, "train_error": 0.1, "train_loss_clean": 0.2, "train_error_clean": 0.05}
    return {
        "fit": {**fit, "weight_norm": 3.0},
        "metrics": {name: found(value) for name, value in metrics.items()},
        **({"metrics_repeat": {name: found(value) for name, value in repeats.items()}} if repeats else {}),
    }


def write_study(
    folder: Path,
    result: Callable[[str, float, int], dict[str, Any] | None],
    *,
    arms: dict[str, tuple[float, ...]] = ARMS,
    seeds: int = 8,
    chosen: dict[str, float] = CHOSEN,
    role: Callable[[str], str] = lambda name: "main",
    environment: Callable[[int], dict[str, Any]] = lambda seed: {},
) -> Path:
    """A comparison's folder; ``result(arm, rho, seed)`` is of a run of the report, None for one that is missing."""
    made = [{"name": name, "mask": f"nowhere_{name}", "rho": rho, "role": role(name)} for name, rho in arms.items()]
    folder.mkdir(parents=True)
    study = {"schema": "sam-masks/comparison/1", "study_id": "x", "config": {"arms": made, "model": "evil:model"}}
    (folder / "study.json").write_text(json.dumps(study))
    (folder / "runs").mkdir()

    def save(arm: str, rho: float, seed: int, tuning: bool, content: dict[str, Any]) -> None:
        config = {"seed": seed, "rho": rho, "tuning": tuning, "mask": "nowhere"}
        name = f"{arm}-{rho}-{seed}-{tuning}".replace(".", "p")
        (folder / "runs" / name).mkdir()
        write_run(folder / "runs" / name, RunRecord(name, arm, config, content, {}, environment(seed)), {})

    for arm, radii in arms.items():
        for rho in radii if len(radii) > 1 else ():
            good = {"val_accuracy": 0.9 if rho == chosen[arm] else 0.5, "diverged": None}
            save(arm, rho, 10_000, True, good)
        for rho in radii or (0.0,):
            for seed in range(seeds):
                content = result(arm, rho, seed)
                if content is not None:
                    save(arm, rho, seed, False, {"diverged": None, "history": [{"loss": 1.0}], **content})
    return folder
