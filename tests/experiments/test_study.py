"""A comparison's folder as a table: every number is that of a record, and nothing is left out in silence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.study import load_frame, load_study
from experiments.verdict import judge
from masks.errors import InputError
from tests.experiments.studies import ARMS, weights, write_study

RHO = {arm: radii or (0.0,) for arm, radii in ARMS.items()}


def numbers(arm: str, rho: float, seed: int) -> tuple[float, float, float]:
    """Test accuracy and two metrics that tell every run apart."""
    cell = [(a, r) for a, radii in RHO.items() for r in radii].index((arm, rho))
    return 0.5 + 0.01 * cell + 0.001 * seed, 10.0 + cell + 0.1 * seed, 20.0 + cell + 0.1 * seed


def result(arm: str, rho: float, seed: int) -> dict[str, Any]:
    accuracy, first, second = numbers(arm, rho, seed)
    return {"test_accuracy": accuracy, **weights(0.5, {"lambda_max": first}, {"lambda_max": second})}


def test_the_frame_is_the_records_and_an_arm_without_a_radius_has_0(tmp_path: Path) -> None:
    before = set(sys.modules)
    frame = load_frame(write_study(tmp_path / "s", result, seeds=3))
    assert not {name for name in set(sys.modules) - before if "evil" in name}  # neither model nor masks are looked for
    assert list(frame.columns) == [
        *("arm", "seed", "rho", "test_error", "train_error", "train_loss", "weight_norm", "train_error_clean"),
        *("lambda_max", "lambda_max_repeat"),
    ]
    assert len(frame) == 7 * 3
    for row in frame.to_dict("records"):
        accuracy, first, second = numbers(row["arm"], row["rho"], row["seed"])
        assert row["test_error"] == pytest.approx(1 - accuracy, abs=1e-12)
        assert (row["lambda_max"], row["lambda_max_repeat"]) == (first, second)
        assert (row["train_loss"], row["train_error"], row["train_error_clean"]) == (0.5, 0.1, 0.05)
    assert set(frame.loc[frame["arm"] == "none", "rho"]) == {0.0}


def test_radii_are_chosen_by_the_tuning_runs_alone(tmp_path: Path) -> None:
    # The best on test images is another one.
    study = load_study(write_study(tmp_path / "s", result, seeds=2, chosen={"all": 0.1, "norm": 0.5}))
    assert study.chosen == {"all": 0.1, "norm": 0.5}
    assert study.arms == ("none", "all", "norm")
    assert study.metrics == ("lambda_max",)


def test_a_given_radius_needs_no_tuning(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", lambda *run: {"test_accuracy": 0.5, **weights(1.0, {"x": 1.0}, {})},
                         arms={"none": (), "all": (0.3,)}, seeds=2)  # fmt: skip
    assert load_study(folder).chosen == {"all": 0.3}


def test_radii_with_a_diverged_or_missing_run_are_left_out_and_named(tmp_path: Path) -> None:
    def some(arm: str, rho: float, seed: int) -> dict[str, Any] | None:
        if (arm, rho, seed) == ("all", 0.4, 2):
            return None
        return result(arm, rho, seed) | ({"diverged": "loss 9"} if (arm, rho) == ("norm", 2.0) and seed else {})

    study = load_study(write_study(tmp_path / "s", some, seeds=3))
    assert study.left_out == {
        ("all", 0.4): "2 of 3 seeds are finished",
        ("norm", 2.0): "2 of 3 runs diverged (seeds 1, 2)",
    }
    assert {*zip(study.frame["arm"], study.frame["rho"], strict=True)} == {
        *(("none", 0.0), ("all", 0.1), ("all", 0.2), ("norm", 0.5), ("norm", 1.0))
    }
    assert set(study.frame.groupby(["arm", "rho"]).size()) == {3}


def test_radii_at_which_training_collapsed_are_left_out_and_named(tmp_path: Path) -> None:
    """By validation accuracy: more than 10 points below the mean at the radius chosen, over the seeds together; too
    small a radius is no collapse."""
    value = {0.1: 0.7, 0.2: 0.9, 0.4: 0.79, 0.5: 0.79, 1.0: 0.88, 2.0: 0.2}

    def made(arm: str, rho: float, seed: int) -> dict[str, Any]:
        noise = 0.05 * (-1) ** seed
        found = {} if arm == "none" else {"val_accuracy": value[rho] + noise}
        return {"test_accuracy": 0.99, **found, **weights(0.1, {"m": 1.0}, {})}

    folder = write_study(tmp_path / "a", made)
    study = load_study(folder)
    assert study.left_out == {
        ("all", 0.4): "collapsed: validation accuracy 79.0 %, 90.0 % at rho 0.2",
        ("norm", 2.0): "collapsed: validation accuracy 20.0 %, 88.0 % at rho 1",
    }
    assert set(zip(study.frame.arm, study.frame.rho, strict=True)) == {
        ("none", 0.0), ("all", 0.1), ("all", 0.2), ("norm", 0.5), ("norm", 1.0)
    }  # fmt: skip
    assert set(load_study(folder, collapsed=12).left_out) == {("norm", 2.0)}
    assert load_study(folder, collapsed=100).left_out == {}


def test_where_the_chosen_radius_is_missing_the_best_one_says_what_collapsed(tmp_path: Path) -> None:
    def made(arm: str, rho: float, seed: int) -> dict[str, Any]:
        found = {"val_accuracy": 0.1 if rho == 2.0 else 0.9, "diverged": "loss 9" if rho == 1.0 else None}
        return {"test_accuracy": 0.9, **found, **weights(0.1, {"m": 1.0}, {})}

    found = load_study(write_study(tmp_path / "a", made)).left_out
    assert found["norm", 2.0] == "collapsed: validation accuracy 10.0 %, 90.0 % at rho 0.5"
    assert "diverged" in found["norm", 1.0]


def test_a_metric_that_was_not_measured_is_nan(tmp_path: Path) -> None:
    folder = write_study(
        tmp_path / "s", lambda arm, rho, seed: {"test_accuracy": 0.5, **weights(1.0, {"x": None if seed else 2.0}, {})}
    )
    assert np.isnan(load_frame(folder).query("seed > 0")["x"]).all()


def test_trajectories_end_with_the_final_weights(tmp_path: Path) -> None:
    def along(arm: str, rho: float, seed: int) -> dict[str, Any]:
        history = [
            {"loss": 9.0},
            {"loss": 8.0, "observed": weights(2.0, {"lambda_max": 5.0}, {"lambda_max": 6.0})},
            {"loss": 7.0},
        ]
        return result(arm, rho, seed) | {"history": history}

    path = load_study(write_study(tmp_path / "s", along, seeds=2)).trajectories["norm", 1, 0.5]
    assert list(path["epoch"]) == [2, 3]
    assert list(path["train_loss"]) == [2.0, 0.5]
    assert list(path["lambda_max"]) == [5.0, numbers("norm", 0.5, 1)[1]]
    assert list(path["lambda_max_repeat"]) == [6.0, numbers("norm", 0.5, 1)[2]]


def test_folders_that_are_no_comparison_are_one_line(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", result, seeds=2)
    with pytest.raises(InputError, match=r"is not the folder of a comparison: cannot read its study.json"):
        load_study(tmp_path)
    record = next((folder / "runs").iterdir()) / "result.json"
    text = record.read_text()
    record.write_text(text[:-30])
    with pytest.raises(InputError, match="is not the record of a run"):
        load_study(folder)
    old = json.loads(text)
    del old["result"]["diverged"]
    record.write_text(json.dumps(old))
    with pytest.raises(InputError, match="are of another version: KeyError 'diverged'; run the comparison again"):
        load_study(folder)
    for path in (folder / "runs").iterdir():
        shutil.rmtree(path)
    with pytest.raises(InputError, match="holds no finished run of the report"):
        load_study(folder)
    for wrong, message in (('{"schema": "other/1"}', "has another schema"), ("[]", "is not the folder of a")):
        (folder / "study.json").write_text(wrong)
        with pytest.raises(InputError, match=message):
            load_study(folder)


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", lambda *run: result(*run) | {"diverged": "loss"}, arms={"none": ()}, seeds=2)
    with pytest.raises(InputError, match=r"no arm and radius is left to judge: none at rho 0: 2 of 2 runs diverged"):
        load_study(folder)


def test_versions_of_the_code_are_counted_and_a_verdict_names_them(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", result, seeds=3, environment=lambda seed: {"code": "b" if seed == 2 else "a"})
    assert load_study(folder).codes == {"a": 14, "b": 7}
    notes = judge(folder, primary="lambda_max", resamples=0).notes
    assert "MIXED CODE: the runs were made by 2 versions of the code (a: 14 runs, b: 7 runs)" in notes
    same = write_study(tmp_path / "t", result, seeds=3, environment=lambda seed: {"code": "a"})
    assert not any("MIXED" in note for note in judge(same, primary="lambda_max", resamples=0).notes)
