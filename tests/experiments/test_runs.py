"""Looking at runs: every number is a record's, nothing is left out in silence, and thousands are read in seconds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.record import RunRecord, code_digest
from experiments.runs import RunsOptions, as_json, load_results, show
from experiments.store import Failure, Store, write_run
from masks.errors import InputError


def result(seed: int, **changes: Any) -> dict[str, Any]:
    return {
        "val_accuracy": 0.5 + seed / 100,
        "test_accuracy": 0.25,
        "test_correct": "0101",
        "test_index": [1, 2],
        "diverged": None,
        "history": [{"loss": 9.0, "ascent": 8.0, "radius": 7.0}, {"loss": 1.5, "ascent": None, "radius": 0.5}],
        "mask_builds": [{"num_kept": 1}, {"num_kept": 72, "numel": 1382, "digest": "d", "kept_per_tensor": {"a": 1}}],
        "fit": {"train_loss": 0.1, "train_error": 0.0},
        "metrics": {"lambda_max": {"value": 3.5, "error": None}},
        "metrics_repeat": {"lambda_max": {"value": 3.75, "error": None}},
        **changes,
    }


def record(seed: int, *, code: str | None = None, arm: str = "norm", rho: float = 0.1, **changes: Any) -> RunRecord:
    config = {"seed": seed, "rho": rho, "mask": arm, "method": "sam", "tuning": False, "density": None}
    environment = {"code": code or code_digest(), "torch": "2", "device": "cpu"}
    return RunRecord(f"{arm[0]}{seed:03}", arm, config, result(seed, **changes), {"train_seconds": 2.5}, environment)


def keep(folder: Path, made: RunRecord) -> Path:
    with Store(folder).working_on(made.run_id):
        Store(folder).complete(made.run_id, made, 1)
    return folder / made.run_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two comparisons and a single run, one run failed, one diverged, one unfinished."""
    for seed in range(3):
        keep(tmp_path / "a" / "runs", record(seed))
    keep(tmp_path / "b" / "runs", record(7, arm="all", rho=0.2))
    keep(tmp_path / "b" / "runs", record(8, arm="all", diverged="loss 9 at the end"))
    keep(tmp_path, record(9, arm="single"))
    store = Store(tmp_path / "b" / "runs")
    with store.working_on("a010"):
        store.fail("a010", Failure("a010", "all", "ValueError: bad luck", 2, {"seed": 10, "rho": 0.4}))
    with store.working_on("a011") as work:
        (work / "checkpoint.pt").write_text("")
    return tmp_path


def test_results_are_the_records(folder: Path) -> None:
    frame = load_results(folder)
    assert list(frame["run"]) == ["n000", "n001", "n002", "a007", "a008", "s009"]
    for row in frame.to_dict("records"):
        assert row["val_accuracy"] == 0.5 + row["seed"] / 100
        assert (row["loss"], row["radius"]) == (1.5, 0.5)
        assert (row["mask.num_kept"], row["mask.numel"], row["mask.digest"]) == (72, 1382, "d")
        assert (row["lambda_max"], row["lambda_max_repeat"], row["train_loss"]) == (3.5, 3.75, 0.1)
        assert (row["train_seconds"], row["attempts"]) == (2.5, 1)
        assert row["code"] == code_digest()
        assert Path(row["folder"], "result.json").exists()
    assert list(frame["state"]) == ["done"] * 4 + ["diverged", "done"]
    assert not {"test_correct", "test_index", "history"} & set(frame.columns)
    assert load_results(folder / "a").equals(load_results(folder / "a" / "runs"))
    assert len(load_results(folder / "s009")) == 1


def test_an_empty_folder_has_no_results_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    assert len(load_results(tmp_path)) == 0
    assert show(RunsOptions(str(tmp_path))) == ("no runs", [])
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_results(tmp_path / "nowhere")


def test_the_list_counts_every_state(folder: Path) -> None:
    text, rows = show(RunsOptions(str(folder)))
    lines = text.splitlines()
    assert lines[0].split() == [
        *("run", "state", "arm", "method", "mask", "rho", "seed", "val_accuracy", "test_accuracy", "train_seconds")
    ]
    assert lines[1].split() == ["n000", "done", "norm", "sam", "norm", "0.1", "0", "0.5", "0.25", "2.5"]
    assert lines[-1] == "8 runs: 1 diverged, 5 done, 1 failed, 1 unfinished"
    assert len(rows) == 8
    assert json.loads(as_json(rows)) == rows


def test_the_list_shows_the_settings_in_which_runs_differ(tmp_path: Path) -> None:
    """Runs of a sweep over a setting that has no column of its own could not be told apart."""
    for seed, (lr, epochs) in enumerate([(0.1, 12), (0.2, 12), (0.2, 12)]):
        made = record(seed)
        made.config.update({"lr": lr, "epochs": epochs, "tuning": seed == 2, "code_of_old": seed})
        keep(tmp_path, made)
    lines = [line.split() for line in show(RunsOptions(str(tmp_path)))[0].splitlines()]
    assert lines[0][6:] == ["seed", "tuning", "lr", "val_accuracy", "test_accuracy", "train_seconds"]
    assert [line[6:9] for line in lines[1:4]] == [["0", "False", "0.1"], ["1", "False", "0.2"], ["2", "True", "0.2"]]
    assert "lr" not in show(RunsOptions(str(tmp_path), where="lr=0.2"))[0].split()


@pytest.mark.parametrize(
    ("where", "runs"),
    [
        ("arm=norm", ["n000", "n001", "n002"]),
        ("seed=1", ["n001"]),
        ("rho=0.10,seed=2", ["n002"]),
        ("rho=2e-1", ["a007"]),
        ("state=failed", ["a010"]),
        ("tuning=false, arm=all", ["a007", "a008"]),
        ("density=none,arm=single", ["s009"]),
        ("seed=1.5", []),
        ("seed=x", []),
    ],
)
def test_runs_are_filtered(folder: Path, where: str, runs: list[str]) -> None:
    assert [row["run"] for row in show(RunsOptions(str(folder), where=where))[1]] == runs


def test_failures_have_their_reason(folder: Path) -> None:
    (folder / "a" / "runs" / "n001" / "result.json").write_text("{")
    lines = show(RunsOptions(str(folder), failed=True))[0].splitlines()
    assert lines[0].startswith("n001 ")
    assert "n001: damaged: " in lines[0]
    assert "is not the record of a run (JSONDecodeError" in lines[0]
    assert lines[1:] == [
        "a010 arm all, rho 0.4, seed 10: failed: ValueError: bad luck (attempt 2)",
        f"a011 {folder / 'b' / 'runs' / 'a011.work'}: unfinished: begun, and not finished",
        "a008 arm all, rho 0.1, seed 8: diverged: loss 9 at the end",
        "4 runs: 1 damaged, 1 diverged, 1 failed, 1 unfinished",
    ]
    assert show(RunsOptions(str(folder / "s009"), failed=True)) == ("none of 1 runs", [])
    with pytest.raises(InputError, match=r"1 damaged records, first: .*n001 is not the record of a run"):
        load_results(folder)


def test_configurations_are_compared(folder: Path) -> None:
    text, rows = show(RunsOptions(str(folder), compare="n000,a007"))
    assert {row["key"]: (row["first"], row["second"]) for row in rows} == {
        "arm": ("norm", "all"),
        "seed": (0, 7),
        "rho": (0.1, 0.2),
        "mask": ("norm", "all"),
        "val_accuracy": (0.5, pytest.approx(0.57)),
    }
    assert "  rho: 0.1 | 0.2" in text.splitlines()
    assert show(RunsOptions(str(folder), compare="s,s"))[0] == "they do not differ"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare": "n000"}, "compare takes the ids of two runs, separated by a comma, got n000"),
        ({"compare": "n,s"}, r"n could be n000 or n001 or n002; give more letters"),
        ({"compare": "x,s"}, "there is no run x among 8"),
        ({"where": "seed"}, "where takes KEY=VALUE, got 'seed'"),
        ({"where": "sede=1"}, "unknown key of a run 'sede'; did you mean seed"),
    ],
)
def test_what_cannot_be_shown_is_one_line(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        show(RunsOptions(str(folder), **options))


def test_runs_of_other_code_are_marked(folder: Path) -> None:
    assert "OTHER CODE" not in show(RunsOptions(str(folder)))[0]
    keep(folder, record(12, arm="old", code="beef"))
    text = show(RunsOptions(str(folder)))[0]
    assert f"OTHER CODE: runs were made by code {code_digest()} (6 runs), beef (1 runs)" in text or (
        f"OTHER CODE: runs were made by code beef (1 runs), {code_digest()} (6 runs)" in text
    )
    assert text.splitlines()[0].split()[-1] == "code"
    assert "OTHER CODE: runs were made by code beef" in show(RunsOptions(str(folder), where="arm=old"))[0]


def test_two_thousand_runs_are_listed_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    for seed in range(2000):
        made = record(seed, test_correct="01" * 500, test_index=list(range(1000)))
        (tmp_path / f"r{seed:04}").mkdir()
        write_run(tmp_path / f"r{seed:04}", made, made.telemetry)
    start = time.process_time()
    assert show(RunsOptions(str(tmp_path)))[0].endswith("2000 runs: 2000 done")
    assert time.process_time() - start < 5
