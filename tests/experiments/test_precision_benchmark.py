"""What bfloat16 and the memory layout cost: means, intervals and ratios from made-up records, and one small try."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import precision
from experiments.record import RunRecord


def record(arm: str, seed: int, accuracy: float, seconds: float, *, tuning: bool = False) -> RunRecord:
    config = {"tuning": tuning, "seed": seed, "rho": 0.0 if arm == "none" else 0.5}
    telemetry = {"train_seconds": seconds + 1, "mask_seconds": 1.0}
    return RunRecord(f"{arm}{seed}{tuning}", arm, config, {"test_accuracy": accuracy}, telemetry, {})


def test_runs_of_the_report_by_arm_and_seed() -> None:
    found = precision.runs_of([record("all", 3, 0.5, 2.0), record("all", 10_000, 0.9, 9.0, tuning=True)])
    assert found == {"all": {3: {"test_accuracy": 0.5, "rho": 0.5, "seconds": 2.0}}}


def test_differences_are_paired_over_seeds() -> None:
    """Three differences of 0, 1 and 2 points: mean 1, s = 1, and t of two degrees of freedom is 4.3027 at 97.5 %."""

    def settings(factor: float) -> dict[str, precision.Runs]:
        found = {}
        for i, setting in enumerate(precision.SETTINGS):
            records = [
                record(arm, seed, 0.6 + 0.1 * seed + (0.01 * seed if i else 0), factor**i * (1 + seed) * (1 + i))
                for arm in precision.MASKS
                for seed in (2, 0, 1)
            ]
            found[setting] = precision.runs_of(records)
        return found

    rows = {row.what: row for row in precision.rows([settings(1.0), settings(2.0)])}
    assert len(rows) == 3 * 3 * 2
    points = rows["bf16, contiguous, all, test accuracy"]
    half = 4.302652729911275 / math.sqrt(3)
    assert points.found == pytest.approx({"median": 1.0, "q1": 1 - half, "q3": 1 + half})
    assert points.unit == "point"
    assert "71.0 % at rho 0.5, where float32, channels last has 70.0 % at rho 0.5" in points.note
    assert "rho" not in rows["bf16, contiguous, none, test accuracy"].note
    # A quarter of a ratio of 4 in the first round, 32 in the second, the same for each of three seeds.
    assert rows["bf16, contiguous, all, training"].found == pytest.approx({"median": 18.0, "q1": 4.0, "q3": 32.0})
    assert rows["float32, contiguous, norm, training"].found["q1"] == pytest.approx(2.0)


def test_one_seed_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        precision.main(["--seeds", "1"])
    assert "--seeds must be at least 2" in capsys.readouterr().err


@pytest.mark.slow
def test_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = precision.read_all, []

    def noted(folder: Path) -> list[RunRecord]:
        records = read(folder)
        seen.append({(r.config["precision"], r.config["channels_last"]) for r in records})
        return records

    monkeypatch.setattr(precision, "read_all", noted)
    path = tmp_path / "precision.json"
    small = ["--rho_grid=0.1", "--tuning_seeds=1", "--epochs=3", "--width=4", "--lr=0.1", "--n_test=100", "--metrics="]
    precision.main(["--seeds", "2", "--json", str(path), "--", *small])
    asked = [{(p, layout)} for p in ("float32", "bf16") for layout in (True, False)]
    assert sorted(seen, key=str) == sorted(asked, key=str)
    result = json.loads(path.read_text())
    assert result["columns"] == ["difference", "95 % interval"]
    rows: dict[str, dict[str, Any]] = {row["what"]: row for row in result["rows"]}
    runs = result["rounds"]["compare"][0]
    for arm in precision.MASKS:
        here, there = runs["bf16, channels last"][arm], runs[precision.REFERENCE][arm]
        assert set(here) == {"0", "1"}
        gained = [100 * (here[seed]["test_accuracy"] - there[seed]["test_accuracy"]) for seed in here]
        assert rows[f"bf16, channels last, {arm}, test accuracy"]["found"]["median"] == pytest.approx(sum(gained) / 2)
        assert 0.1 < rows[f"bf16, channels last, {arm}, training"]["found"]["median"] < 10
    accuracies = [runs[setting]["all"]["0"]["test_accuracy"] for setting in precision.SETTINGS]
    assert min(accuracies) > 0.2  # it has learnt something
