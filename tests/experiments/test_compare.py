"""Comparisons: rho chosen on other seeds and images than are reported, and nothing lost or mixed up."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import compare as module
from experiments import worker
from experiments.compare import (
    Comparison,
    Trial,
    check_arms,
    choose,
    compare,
    extended,
    open_folder,
    predicted_costs,
    trial_of,
)
from experiments.config import Arm, CompareConfig, RunConfig
from experiments.data import load_data
from experiments.measure import MeasureConfig
from experiments.plan import plan_comparison
from experiments.record import RunRecord
from experiments.report.folder import load_comparison
from experiments.runner import RunFailed
from experiments.store import completed, read_run
from experiments.worker import Job, execute
from masks import load_plugin, mask_info, registry
from masks.errors import InputError
from tests.experiments.conftest import QUIET

Make = Callable[..., CompareConfig]
Made = tuple[RunRecord, Callable[[Path], None]]
CPU = torch.device("cpu")


def all_records(comparison: Comparison) -> dict[str, RunRecord]:
    return {path.name: read_run(path) for path in (comparison.folder / "runs").iterdir()}


def again(comparison: Comparison, **changes: Any) -> Comparison:
    options = {"measure": comparison.measure, "policy": QUIET, **changes}
    return compare(comparison.config, options.pop("folder", comparison.folder), **options)


# -- choosing rho -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        ([(0.1, 0.5, 0), (0.2, 0.7, 0), (0.4, 0.6, 0)], 0.2),
        ([(0.4, 0.7, 0), (0.1, 0.7, 0), (0.2, 0.6, 0)], 0.1),  # a tie: the smallest, in any order
        ([(0.1, 0.5, 0), (0.2, 0.9, 1), (0.4, 0.6, 0)], 0.4),  # the best diverged
        ([(0.1, 0.5, 1), (0.2, 0.9, 2), (0.4, 0.4, 1)], 0.1),  # all diverged: those that did least often
        ([(0.1, 0.5, 2), (0.2, 0.5, 2)], 0.1),
        ([(3.0, 0.0, 0)], 3.0),
    ],
)
def test_the_best_mean_validation_accuracy_decides(trials: list[tuple[float, float, int]], chosen: float) -> None:
    others = [Trial("b", 7.0, 1.0, 0, 2)]
    assert choose([Trial("a", *trial, 2) for trial in trials] + others) == {"a": chosen, "b": 7.0}


def test_radii_with_as_many_images_right_are_equals(comparison: Comparison) -> None:
    """100 and 300 of 300 and 101 and 299 of 300 have means that differ by rounding."""
    record = comparison.records["norm"][0]
    trials = []
    for rho, right in ((0.1, (100, 300)), (0.2, (101, 299))):
        results = [record.result | {"val_accuracy": correct / 300, "diverged": None} for correct in right]
        trials.append(trial_of("norm", rho, [replace(record, result=result) for result in results]))
    assert sum((101 / 300, 299 / 300)) > sum((100 / 300, 300 / 300))
    assert choose(trials) == {"norm": 0.1}


def grids(trials: dict[str, dict[float, float]]) -> tuple[CompareConfig, list[Trial]]:
    """A comparison with these radii, and their validation accuracies."""
    masks = {"all": "all", "norm": "norm", "random": "random"}
    arms = tuple(Arm(name, masks[name], tuple(found)) for name, found in trials.items())
    made = [Trial(arm, rho, value, 0, 2) for arm, found in trials.items() for rho, value in found.items()]
    return CompareConfig(arms=arms), made


def radii(config: CompareConfig | None) -> dict[str, float]:
    assert config is not None
    return {arm.name: arm.rho[-1] for arm in config.arms if arm.rho}


def test_a_best_radius_at_an_end_is_followed_by_one_beyond_it_and_every_arm_has_as_many_trials() -> None:
    config, trials = grids(
        {
            "all": {0.1: 0.9, 0.2: 0.8, 0.4: 0.7},
            "norm": {0.1: 0.7, 0.2: 0.8, 0.5: 0.9},
            "random": {1.0: 0.8, 4.0: 0.9, 16.0: 0.7},
        }
    )
    assert radii(extended(config, trials)) == {"all": 0.05, "norm": 1.25, "random": 2.0}
    assert {len(arm.rho) for arm in extended(config, trials).arms if arm.rho} == {4}
    assert extended(replace(config, arms=config.arms[:1] + config.arms[3:]), trials) is None, "random's lies inside"


def test_between_the_best_radius_and_its_better_neighbour_wherever_they_are() -> None:
    config, trials = grids({"all": {4.0: 0.85, 1.0: 0.8, 2.0: 0.9}, "norm": {2.0: 0.9, 1.0: 0.8, 0.0: 0.7}})
    assert radii(extended(config, trials)) == {"all": 2.82843, "norm": 4.0}
    config, trials = grids({"all": {1.0: 0.9, 0.0: 0.95}, "norm": {2.0: 0.9, 0.0: 0.8}})
    assert radii(extended(config, trials)) == {"all": 0.5, "norm": 4.0}
    config, trials = grids({"all": {1.0: 0.9, 0.0: 0.95}})
    assert extended(config, trials) is None, "below 0 there is nothing to try"


def test_grids_are_extended_until_the_best_lies_inside(
    tiny_comparison: Make, tmp_path: Path, measured: MeasureConfig, serial: None
) -> None:
    arms = (Arm("all", "all", (1e-7, 1e-6)), Arm("norm", "norm", (1e-7, 1e-6)))
    asked = tiny_comparison(arms=arms, extend=3, seeds=2)
    folder = tmp_path / "study"
    found = compare(asked, folder, measure=measured, policy=QUIET)
    # Radii that change nothing are equally good, and of equals the smallest is chosen: always an end.
    assert [arm.rho for arm in found.config.arms[1:]] == [(1e-7, 1e-6, 1e-8, 1e-9, 1e-10)] * 2
    assert {trial.rho for trial in found.trials} == set(found.config.arms[1].rho)
    assert found.chosen == {"all": 1e-10, "norm": 1e-10}
    loaded = load_comparison(folder).comparison
    assert (loaded.config, loaded.trials, loaded.chosen) == (found.config, found.trials, found.chosen)
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    repeated = compare(asked, folder, measure=measured, policy=QUIET)
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before
    assert repeated.trials == found.trials
    planned = plan_comparison(asked, folder, measure=measured, policy=QUIET)
    assert [(arm.rho, arm.chosen, arm.tuning_done, arm.tuning_runs) for arm in planned.arms[1:]] == [
        (found.config.arms[1].rho, 1e-10, 10, 10)
    ] * 2
    assert (planned.extend, planned.seconds_left) == (0, 0)


def test_a_comparison_is_extended_later_and_where_it_was_interrupted(
    tiny_comparison: Make, tmp_path: Path, measured: MeasureConfig, serial: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tiny_comparison(arms=(Arm("all", "all", (1e-7, 1e-6)),), seeds=2)
    folder = tmp_path / "study"
    assert compare(asked, folder, measure=measured, policy=QUIET).chosen == {"all": 1e-7}
    further = replace(asked, extend=2)
    planned = plan_comparison(further, folder, measure=measured, policy=QUIET)
    assert (planned.arms[1].rho, planned.arms[1].tuning_done, planned.extend) == ((1e-7, 1e-6, 1e-8), 4, 1)
    tried, calls = module._tried, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tried(*arguments)

    monkeypatch.setattr(module, "_tried", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(further, folder, measure=measured, policy=QUIET)
    grid = json.loads((folder / "study.json").read_text())["config"]["arms"][1]["rho"]
    assert grid == [1e-7, 1e-6, 1e-8, 1e-9]
    found = compare(further, folder, measure=measured, policy=QUIET)
    assert found.config.arms[1].rho == tuple(grid)
    # Once tried, a radius is not forgotten: the same folder, asked without extension.
    assert compare(asked, folder, measure=measured, policy=QUIET).trials == found.trials
    assert load_comparison(folder).comparison.trials == found.trials


@pytest.mark.parametrize("extend", [-1, 13])
def test_how_far_a_grid_may_be_extended_has_limits(tiny_comparison: Make, extend: int) -> None:
    with pytest.raises(InputError, match=f"extend must be from 0 to 12, got {extend}"):
        tiny_comparison(extend=extend)


def test_every_arm_had_as_many_trials_and_the_best_was_chosen(comparison: Comparison) -> None:
    tuned: dict[tuple[str, float], list[RunRecord]] = {}
    for record in all_records(comparison).values():
        if record.config["tuning"]:
            tuned.setdefault((record.arm, record.config["rho"]), []).append(record)
    arms = {arm.name: arm for arm in comparison.config.arms}
    assert set(tuned) == {(name, rho) for name, arm in arms.items() for rho in arm.rho}
    assert {len(records) for records in tuned.values()} == {2}
    means = {key: np.mean([r.result["val_accuracy"] for r in records]) for key, records in tuned.items()}
    diverged = {key: sum(r.result["diverged"] is not None for r in records) for key, records in tuned.items()}
    assert {(t.arm, t.rho): (t.val_accuracy, t.diverged, t.n) for t in comparison.trials} == {
        key: (pytest.approx(mean), diverged[key], 2) for key, mean in means.items()
    }
    for name, rho in comparison.chosen.items():
        best = min(arms[name].rho, key=lambda r: (diverged[name, r], -means[name, r], r))
        assert rho == best, name
    assert set(comparison.chosen) == {name for name, arm in arms.items() if arm.rho}


def test_tuning_and_report_share_neither_seeds_nor_test_images(comparison: Comparison) -> None:
    records = all_records(comparison).values()
    tuned, reported = ([r for r in records if r.config["tuning"] is flag] for flag in (True, False))
    assert {r.config["seed"] for r in tuned} == {10_000, 10_001}
    assert {r.config["seed"] for r in reported} == {0, 1, 2}
    assert {r.result["test_images"] for r in tuned} == {0}
    assert not any("test_accuracy" in r.result for r in tuned)
    assert {len(r.result["test_correct"]) for r in reported} == {50}


# -- what is kept -------------------------------------------------------------------------------------------


def test_records_are_complete_and_paired(comparison: Comparison) -> None:
    config = comparison.config
    assert list(comparison.records) == [arm.name for arm in config.arms]
    digest = load_data("digits").digest
    for arm in config.arms:
        records = comparison.records[arm.name]
        assert [r.config["seed"] for r in records] == [0, 1, 2]
        assert {r.arm for r in records} == {arm.name}
        assert {r.config["mask"] for r in records} == {arm.mask}
        assert {r.config["rho"] for r in records} == {comparison.chosen.get(arm.name, 0.0)}
        for record in records:
            assert read_run(comparison.folder / "runs" / record.run_id) == record
            assert RunConfig(**record.config) == config.run(
                arm, rho=record.config["rho"], seed=record.config["seed"], tuning=False
            )
            result = record.result
            assert len(result["history"]) == record.config["epochs"] == 2 * arm.epochs_factor
            assert result["data_digest"] == digest
            assert result["mask_builds"][0]["digest"]
            assert {"torch", "numpy", "python", "sam_masks", "device"} <= set(record.environment)
            assert (result["train_images"], result["val_images"], result["test_images"]) == (100, 30, 50)
            assert {"test_accuracy", "test_index", "metrics", "metrics_repeat", "fit"} <= set(result)
        # The same images are tested in every arm of a seed, others in another seed.
        indices = [r.result["test_index"] for r in records]
        assert indices == [r.result["test_index"] for r in comparison.records["none"]]
        assert indices[0] != indices[1]
    study = json.loads((comparison.folder / "study.json").read_text())
    assert study["measure"] == asdict(comparison.measure)
    assert len(all_records(comparison)) == 5 * 2 * 2 + 7 * 3


def test_budgeted_masks_kept_exactly_the_norm_masks_count(comparison: Comparison) -> None:
    kept = {
        name: {build["num_kept"] for r in records for build in r.result["mask_builds"]}
        for name, records in comparison.records.items()
    }
    assert kept["random"] == kept["fisher"] == kept["norm"]
    assert len(kept["norm"]) == 1
    assert kept["none"] == kept["none_2x"] == {0}
    digests = [r.result["mask_builds"][0]["digest"] for r in comparison.records["random"]]
    assert len(set(digests)) == 3


def test_a_worker_process_gives_bitwise_what_this_process_gives(comparison: Comparison) -> None:
    for arm in ("norm", "fisher"):
        record = comparison.records[arm][1]
        here, _ = execute(Job(record.run_id, arm, RunConfig(**record.config), comparison.measure), CPU)
        assert here.result == record.result
        assert here.config == record.config
        assert here.environment == record.environment  # the number of threads, too


def test_a_second_call_makes_no_run_and_finds_the_same(
    comparison: Comparison, serial: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "execute", lambda *_, **__: pytest.fail("a run was made again"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in comparison.folder.rglob("*.json")}
    assert again(comparison) == comparison
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in comparison.folder.rglob("*.json")}


def test_a_lost_record_is_made_again_byte_for_byte(comparison: Comparison, serial: None, tmp_path: Path) -> None:
    lost = comparison.folder / "runs" / comparison.records["random"][1].run_id
    os.rename(lost, tmp_path / "lost")
    try:
        again(comparison)
        for name in ("result.json", "mask.npz"):
            assert (lost / name).read_bytes() == (tmp_path / "lost" / name).read_bytes()
    finally:
        shutil.rmtree(lost, ignore_errors=True)
        os.rename(tmp_path / "lost", lost)


def test_a_sweep_adds_every_radius_on_the_reports_seeds_and_changes_nothing_else(
    tiny_comparison: Make, measured: MeasureConfig, tmp_path: Path, serial: None
) -> None:
    arms = (Arm("none", "none"), Arm("all", "all", (0.05, 0.2)), Arm("norm", "norm", (0.5, 2.0)))
    config = tiny_comparison(arms=arms, seeds=2, tuning_seeds=1)
    options: dict[str, Any] = {"measure": measured, "policy": QUIET}
    plain = compare(config, tmp_path / "a", **options)
    before = tree(plain.folder)
    swept = compare(config, tmp_path / "a", sweep=True, **options)
    assert (plain.swept, swept.swept) == (0, 4)
    assert replace(swept, swept=0) == plain
    after = tree(plain.folder)
    assert {name: after[name] for name in before} == before
    new = {Path(name).parent for name in after.keys() - before.keys()}
    added = [read_run(plain.folder / name) for name in new]
    grid = {(arm.name, rho) for arm in arms for rho in arm.rho}
    wanted = {(*cell, seed) for cell in grid - set(plain.chosen.items()) for seed in (0, 1)}
    assert {(r.arm, r.config["rho"], r.config["seed"]) for r in added} == wanted
    for record in added:
        assert not record.config["tuning"]
        assert {"test_accuracy", "fit", "metrics", "metrics_repeat"} <= set(record.result)
    # From the start with the sweep: the same.
    assert tree(compare(config, tmp_path / "b", sweep=True, **options).folder).keys() == after.keys()


# -- folders ------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_of_another_comparison_is_refused_and_left_as_it_is(comparison: Comparison, serial: None) -> None:
    before = tree(comparison.folder)
    for config, measure in (
        (replace(comparison.config, seeds=4), comparison.measure),
        (comparison.config, MeasureConfig(images=65, sharpness_m=16)),
    ):
        with pytest.raises(InputError, match=r"holds the results of another comparison.*choose another folder"):
            compare(config, comparison.folder, measure=measure, policy=QUIET)
    assert tree(comparison.folder) == before


def test_a_folder_whose_runs_were_named_otherwise_is_refused(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs would be made again beside those that are there."""
    monkeypatch.setattr(module, "RUN_NAMES", "by comparison")
    with pytest.raises(InputError, match="holds the results of another comparison"):
        again(comparison)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "holds no comparison": lambda folder: (folder / "thesis.txt").write_text("my only copy"),
    "holds the results of another comparison": lambda folder: (folder / "study.json").write_text("{}"),
    "cannot use": lambda folder: (folder / "study.json").write_text("[]"),
    "for results": lambda folder: (folder / "study.json").write_text("not JSON"),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_a_folder_of_other_files_is_refused_and_left_as_it_is(
    tiny_comparison: Make, tmp_path: Path, message: str, serial: None
) -> None:
    FOREIGN[message](tmp_path)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=message):
        compare(tiny_comparison(), tmp_path, policy=QUIET)
    assert tree(tmp_path) == before


def test_a_file_in_the_place_of_the_folder(tiny_comparison: Make, tmp_path: Path, measured: MeasureConfig) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot use .*file.* for results"):
            open_folder(folder, tiny_comparison(), measured, "id")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_default_folder_is_named_after_the_comparison(
    tiny_comparison: Make, in_folder: Path, serial: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "execute", fake_run)
    small = {"arms": (Arm("none", "none"), Arm("norm", "norm", (0.1,))), "seeds": 2}
    one, same, other = (
        compare(tiny_comparison(**small, **more), policy=QUIET).folder for more in ({}, {}, {"lr": 0.2})
    )
    assert one == same
    assert one.parent == other.parent == Path("results")
    assert one != other
    study = json.loads((one / "study.json").read_text())
    assert one.name == f"compare-{study['study_id'][:8]}"
    assert len(list((one / "runs").iterdir())) == 4


def fake_run(job: Job, *_: Any, **__: Any) -> Made:
    result = {"val_accuracy": 0.5, "diverged": None, "mask_builds": [], "history": []}
    return RunRecord(job.run_id, job.arm, asdict(job.config), result, {}, {}), lambda folder: None


# -- what cannot be had -------------------------------------------------------------------------------------

BAD: dict[str, dict[str, Any]] = {
    "arm norm: mask norm: none of the model's 6 trainable tensors": {"model": "mlp", "masks": "norm"},
    "arm random: mask norm: none of the model's 6 trainable tensors": {"model": "mlp", "masks": "all,random"},
    "arm random: density 1e-09 of .* is out of reach": {"density": 1e-9, "masks": "random"},
    "arm random_depth: cannot keep": {"density": 1.0, "masks": "random_depth"},
    "arm norm@after=2: mask norm@after=2 would never be built": {"masks": "norm@after=2"},
    "n_train = 5000 and n_val = 30, but a tuning split": {"n_train": 5000},
    "needs validation images": {"n_val": 0},
    "n_test = 1200": {"n_test": 1200},
    "label_noise must be from 0 to 1": {"label_noise": 1.5},
    "unknown model 'restnet'": {"model": "restnet"},
    "unknown data set 'digtis'": {"data": "digtis"},
    "match must name a mask of natural size": {"match": "random"},
    "mask file needs its option path": {"masks": "file"},
    "cannot read mask file": {"masks": "file:path=nowhere.npz"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_had_is_refused_before_any_run_and_leaves_nothing(
    tiny_comparison: Make, in_folder: Path, message: str, serial: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "execute", lambda *_, **__: pytest.fail("a run was started"))
    changes = dict(BAD[message])
    if "masks" in changes:
        changes["rho_grid"] = "0.1,0.2"
    with pytest.raises(InputError, match=message):
        compare(tiny_comparison(**changes), Path("out"), policy=QUIET)
    assert list(in_folder.iterdir()) == []


def test_no_validation_images_are_needed_where_nothing_is_tuned(tiny_comparison: Make) -> None:
    check_arms(tiny_comparison(n_val=0, rho_grid="0.1"))


def test_bad_input_that_only_a_run_finds_leaves_the_folder_free(
    tiny_comparison: Make, in_folder: Path, serial: None
) -> None:
    with pytest.raises(InputError, match=r"arm fisher: cannot keep .* are eligible"):
        compare(tiny_comparison(density=0.99, masks="fisher"), Path("out"), policy=QUIET)
    assert list(in_folder.iterdir()) == []


def test_a_failing_run_keeps_the_others_and_is_made_by_the_next_call(
    tiny_comparison: Make, tmp_path: Path, serial: None, measured: MeasureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_comparison(arms=(Arm("none", "none"), Arm("norm", "norm", (0.1,))), seeds=2)
    made: list[Job] = []

    def sometimes(job: Job, *rest: Any, **options: Any) -> Made:
        made.append(job)
        if fail and job.arm == "norm" and job.config.seed == 1:
            raise RuntimeError("out of luck")
        return execute(job, *rest, **options)

    monkeypatch.setattr(worker, "execute", sometimes)
    fail = True
    with pytest.raises(RunFailed, match=r"1 of 4 runs failed.*norm, rho 0.1, seed 1: RuntimeError: out of luck"):
        compare(config, tmp_path / "out", measure=measured, policy=QUIET)
    assert len(completed(tmp_path / "out" / "runs")) == 3
    fail = False
    made.clear()
    done = compare(config, tmp_path / "out", measure=measured, policy=QUIET)
    assert [(job.arm, job.config.seed) for job in made] == [("norm", 1)]
    assert done.chosen == {"norm": 0.1}
    assert done.trials == ()
    assert [len(records) for records in done.records.values()] == [2, 2]


def test_a_damaged_record_is_set_aside_with_a_warning_and_made_again(
    tiny_comparison: Make, tmp_path: Path, serial: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(worker, "execute", fake_run)
    config = tiny_comparison(arms=(Arm("none", "none"), Arm("norm", "norm", (0.1,))), seeds=1)
    done = compare(config, tmp_path / "out", policy=QUIET)
    name = done.records["norm"][0].run_id
    path = tmp_path / "out" / "runs" / name / "result.json"
    text = path.read_text()
    path.write_text(text[:50])
    compare(config, tmp_path / "out", policy=QUIET)
    assert path.read_text() == text
    assert path.parent.with_name(f"{name}.damaged-1").joinpath("result.json").read_text() == text[:50]
    said = capsys.readouterr().err
    assert said.startswith("sam-masks: warning: ")
    assert said.rstrip().endswith(f"it is set aside as {name}.damaged-1 and made again")


PLUGIN = """from masks import register_score

@register_score("reloaded", summary="s", source="test")
def score(context):
    return [{} * p.abs() for p in context.parameters()]
"""


def test_records_of_an_older_plugin_are_not_taken_for_those_of_a_newer_one(
    tiny_comparison: Make, in_folder: Path, serial: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "execute", fake_run)
    mask_info("norm")
    for factor in ("1", "-1"):
        monkeypatch.setattr(registry, "_registry", dict(registry._registry))
        registry._registry.pop("reloaded", None)
        sys.modules.pop("reloaded_masks", None)
        (in_folder / "reloaded_masks.py").write_text(PLUGIN.format(factor))
        load_plugin("reloaded_masks")
        config = tiny_comparison(masks="reloaded", rho_grid="0.1")
        if factor == "1":
            compare(config, in_folder / "out", policy=QUIET)
        else:
            with pytest.raises(InputError, match="another comparison"):
                compare(config, in_folder / "out", policy=QUIET)


def test_predicted_costs_are_of_what_the_masks_touch(comparison: Comparison) -> None:
    costs = predicted_costs(comparison)
    assert costs["none"] == costs["none_2x"] == 1.0
    assert costs["all"] == costs["no_norm"] == 2.0
    assert costs["norm"] is not None
    assert 1.5 < costs["norm"] < 1.9
    full = replace(comparison, config=replace(comparison.config, norm_scope="full"))
    assert predicted_costs(full)["norm"] == 2.0


def test_long_runs_start_first(comparison: Comparison) -> None:
    plan = module.Plan(comparison.config, comparison.measure, {arm.name: {} for arm in comparison.config.arms})
    cost = {arm.name: plan.report(arm, 0.1)[0].cost for arm in comparison.config.arms}
    assert cost["none"] < cost["none_2x"] == cost["all"] == cost["norm"] < cost["fisher"]


def test_runs_are_named_after_all_that_they_depend_on(comparison: Comparison) -> None:
    arm = comparison.config.arms[4]

    def name(content: str = "d", rho: float = 0.1, tuning: bool = False, **measured: Any) -> str:
        plan = module.Plan(comparison.config, replace(comparison.measure, **measured), {"norm": {"data": content}})
        return plan.job(arm, rho, 0, tuning=tuning).run_id

    names = [name(), name("e"), name(rho=0.2), name(images=65), name(sharpness_rho=0.3), name(tuning=True)]
    assert len(set(names)) == 6
    assert name(tuning=True, images=65) == names[5]  # a tuning run is not measured
