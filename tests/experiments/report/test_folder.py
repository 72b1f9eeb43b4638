"""A comparison read back from its folder is the one that was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.compare import Comparison
from experiments.report.folder import load_comparison
from experiments.table import build_table, frame
from masks.errors import InputError


@pytest.fixture
def copy(comparison: Comparison, tmp_path: Path) -> Path:
    return Path(shutil.copytree(comparison.folder, tmp_path / "copy"))


def change(folder: Path, edit: Any) -> None:
    path = folder / "study.json"
    study = json.loads(path.read_text())
    edit(study)
    path.write_text(json.dumps(study))


def test_it_is_the_comparison_that_was_made(comparison: Comparison) -> None:
    loaded = load_comparison(comparison.folder)
    assert loaded.comparison == comparison
    assert loaded.left_out == {}


def test_predicted_costs_are_those_of_the_table_made_before(comparison: Comparison, copy: Path) -> None:
    assert load_comparison(copy).predicted == {}
    made = build_table(comparison)
    (copy / "table.csv").write_text(frame(made).to_csv(index=False))
    loaded = load_comparison(copy)
    assert loaded.predicted == {row.arm.name: row.predicted_cost for row in made.rows}
    assert build_table(loaded.comparison, predicted=loaded.predicted).rows == made.rows
    assert made.rows[1].predicted_cost == pytest.approx(2)


def test_neither_data_nor_model_is_needed(copy: Path) -> None:
    def elsewhere(study: Any) -> None:
        study["config"] |= {"data": "npz:gone.npz", "model": "gone:build"}

    change(copy, elsewhere)
    loaded = load_comparison(copy)
    assert build_table(loaded.comparison, predicted=loaded.predicted).rows[0].n == 3


def test_an_arm_with_missing_runs_is_left_out(comparison: Comparison, copy: Path) -> None:
    (norm, *_), (all_, *_) = comparison.records["norm"], comparison.records["all"]
    shutil.rmtree(copy / "runs" / norm.run_id)
    tuning = next(
        path
        for path in (copy / "runs").iterdir()
        if (run := json.loads((path / "result.json").read_text()))["arm"] == "random" and run["config"]["tuning"]
    )
    shutil.rmtree(tuning)
    loaded = load_comparison(copy)
    rho = comparison.chosen["norm"]
    assert loaded.left_out == {
        "norm": f"2 of its 3 runs at rho {rho:g} are finished",
        "random": "1 of its tuning runs are not finished",
    }
    assert set(loaded.comparison.records) == {"none", "none_2x", "all", "no_norm", "fisher"}
    assert [arm.name for arm in loaded.comparison.config.arms] == list(loaded.comparison.records)
    assert {trial.arm for trial in loaded.comparison.trials} == {"all", "no_norm", "fisher"}
    assert all_.run_id in {record.run_id for record in loaded.comparison.records["all"]}


def test_without_a_finished_baseline_there_is_no_report(comparison: Comparison, copy: Path) -> None:
    shutil.rmtree(copy / "runs" / comparison.records["none"][0].run_id)
    with pytest.raises(InputError, match=r"no finished arm .* none \(none: 2 of its 3 runs at rho 0 are finished\)"):
        load_comparison(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda study: study.update(schema="x/2"), "another schema than sam-masks/comparison/1"),
        (lambda study: study["config"].update(colour=1), "another version: its colour is not known here"),
        (lambda study: study["config"]["arms"][2].update(mask="nosuch"), "unknown mask 'nosuch'"),
        (lambda study: study.pop("measure"), "is not the folder of a comparison: .*KeyError"),
    ],
)
def test_folders_of_something_else(copy: Path, edit: Any, message: str) -> None:
    change(copy, edit)
    with pytest.raises(InputError, match=message):
        load_comparison(copy)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not the folder of a comparison: .* \(No such file or directory\)"):
        load_comparison(tmp_path)


def test_runs_of_a_sweep_are_counted_and_not_in_the_table(comparison: Comparison, copy: Path) -> None:
    """A run of the report's seeds at another radius than the chosen one."""
    record = comparison.records["norm"][0]
    made = shutil.copytree(copy / "runs" / record.run_id, copy / "runs" / "other")
    run = json.loads((made / "result.json").read_text())
    run["config"]["rho"] = 123.0
    (made / "result.json").write_text(json.dumps(run))
    loaded = load_comparison(copy)
    assert loaded.comparison.swept == 1
    assert loaded.comparison.records == comparison.records
