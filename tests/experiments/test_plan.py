"""What --dry-run says: the runs that the command then makes, those that are done, and seconds from what was timed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import plan, train
from experiments.cli import main
from experiments.compare import Comparison
from experiments.config import CompareConfig, RunConfig
from experiments.measure import MeasureConfig
from experiments.plan import KEPT, TIMED, Pace, duration, pace_of, plan_comparison
from experiments.store import completed, read_all
from masks import MaskSpec
from masks.errors import InputError
from tests.experiments.conftest import QUIET, TINY

Tiny = Callable[..., RunConfig]
CPU = torch.device("cpu")


def test_of_a_finished_comparison_nothing_is_left(comparison: Comparison) -> None:
    found = plan_comparison(comparison.config, comparison.folder, measure=comparison.measure, policy=QUIET)
    assert {arm.arm: arm.chosen for arm in found.arms if arm.rho} == comparison.chosen
    assert all((a.tuning_done, a.report_done) == (a.tuning_runs, a.report_runs) for a in found.arms)
    runs = sum(a.tuning_runs + a.report_runs for a in found.arms)
    assert runs == len(completed(comparison.folder / "runs"))
    assert (found.seconds_left, found.estimated) == (0.0, KEPT)
    assert f"{runs} runs, {runs} of them done" in found.as_text()


def test_of_an_unfinished_one_the_rest_is_left_and_timed_by_what_is_kept(
    comparison: Comparison, tmp_path: Path
) -> None:
    folder = tmp_path / "part"
    shutil.copytree(comparison.folder, folder)
    lost = {"all": 1, "norm": 2}
    for record in read_all(folder / "runs"):
        if not record.config["tuning"] and lost.get(record.arm, 0):
            lost[record.arm] -= 1
            shutil.rmtree(folder / "runs" / record.run_id)
    found = {
        a.arm: a for a in plan_comparison(comparison.config, folder, measure=comparison.measure, policy=QUIET).arms
    }
    assert {name: arm.report_runs - arm.report_done for name, arm in found.items()} == {
        **dict.fromkeys(found, 0),
        "all": 1,
        "norm": 2,
    }
    (kept,) = (
        r.telemetry
        for r in read_all(folder / "runs")
        if r.arm == "norm" and not r.config["tuning"]  # the only one of its arm
    )
    assert found["norm"].seconds_left == pytest.approx(2 * (kept["train_seconds"] + kept["measure_seconds"]))


def test_while_a_tuning_run_is_missing_the_radius_is_open(comparison: Comparison, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(comparison.folder, folder)
    first = next(r for r in read_all(folder / "runs") if r.config["tuning"] and r.arm == "random")
    shutil.rmtree(folder / "runs" / first.run_id)
    found = plan_comparison(comparison.config, folder, measure=comparison.measure, policy=QUIET)
    (arm,) = (a for a in found.arms if a.arm == "random")
    assert (arm.chosen, arm.tuning_runs - arm.tuning_done, arm.report_done) == (None, 1, 0)


def test_a_sweep_is_every_radius_on_the_reports_seeds(comparison: Comparison) -> None:
    found = plan_comparison(comparison.config, comparison.folder, measure=comparison.measure, sweep=True, policy=QUIET)
    seeds = comparison.config.seeds
    assert {a.arm: (a.report_runs, a.report_done) for a in found.arms} == {
        arm.name: (max(1, len(arm.rho)) * seeds, seeds) for arm in comparison.config.arms
    }


def test_the_folder_of_another_comparison_is_refused(comparison: Comparison) -> None:
    with pytest.raises(InputError, match="results of another comparison"):
        plan_comparison(replace(comparison.config, lr=0.2), comparison.folder, measure=comparison.measure)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a forward pass moves by 3 s (SAM makes two per step), a mask by 7 s, a measurement by 11 s."""
    now = [0.0]

    def moves(seconds: float, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            now[0] += seconds
            return original(*arguments, **options)

        return call

    for module in (train, plan):
        monkeypatch.setattr(module, "clock_of", lambda device: lambda: now[0])
    monkeypatch.setattr(train.Training, "_loss", moves(3.0, train.Training._loss))
    monkeypatch.setattr(MaskSpec, "build", moves(7.0, MaskSpec.build))
    monkeypatch.setattr(plan, "observe", moves(11.0, lambda *_: {}))


@pytest.mark.parametrize(
    ("settings", "seconds", "steps"),
    [
        ({}, (6, 7, 11), 8),
        ({"epochs": 5}, (6, 7, 11), 20),  # more steps than are timed
        ({"epochs": 1, "batch_size": 100}, (6, 7, 11), 1),
        ({"mask": "all@after=1"}, (6, 7, 11), 8),
        ({"sam_epochs": "1.."}, (6, 7, 11), 8),
    ],
)
def test_the_parts_of_a_run_are_timed(
    settings: dict[str, Any], seconds: tuple[float, ...], steps: int, tiny: Tiny, ticking: None
) -> None:
    found = pace_of(tiny(mask=settings.pop("mask", "all"), **settings).resolved(), CPU, MeasureConfig())
    assert (found.step, found.build, found.measure) == pytest.approx(seconds)
    assert found.steps == steps
    assert found.kept[0] == found.kept[1] > 0


@pytest.mark.parametrize(
    ("settings", "builds", "measured"),
    [
        ({}, 1, 1),
        ({"mask": "random@every=2", "epochs": 5}, 3, 1),
        ({"mask": "random@every=3steps"}, 3, 1),  # before steps 0, 3 and 6 of 8
        ({"mask": "norm@after=1", "measure_every": 1}, 1, 2),
        ({"measure_every": 2, "epochs": 5}, 1, 3),  # after 2, 4 and, the last, 5
    ],
)
def test_a_run_takes_the_sum_of_its_parts(settings: dict[str, Any], builds: int, measured: int, tiny: Tiny) -> None:
    run = tiny(**settings)
    pace = Pace(step=3.0, build=100.0, measure=1000.0, steps=4 * run.epochs, kept=(1, 1))
    assert pace.of_run(run, measures=True) == 3 * 4 * run.epochs + 100 * builds + 1000 * measured
    assert pace.of_run(run, measures=False) == 3 * 4 * run.epochs + 100 * builds


@pytest.mark.parametrize(("seeds", "warned"), [(2, True), (6, False)])
def test_too_few_seeds_are_said_before_the_runs(
    tiny_comparison: Callable[..., CompareConfig], in_folder: Path, ticking: None, seeds: int, warned: bool
) -> None:
    arms = tuple(arm for arm in tiny_comparison().arms if arm.name in ("none", "none_2x", "norm"))
    found = plan_comparison(tiny_comparison(arms=arms, seeds=seeds), processes=2, policy=QUIET)
    assert ("TOO FEW SEEDS: with 1 main contrasts" in found.as_text()) == warned
    assert bool(json.loads(found.as_json())["warnings"]) == warned


def test_runs_that_are_not_there_are_timed_and_shared_out(
    tiny_comparison: Callable[..., CompareConfig], in_folder: Path, ticking: None
) -> None:
    arms = tuple(arm for arm in tiny_comparison().arms if arm.name in ("none", "none_2x", "norm"))
    config = tiny_comparison(arms=arms)
    found = plan_comparison(config, processes=2, policy=QUIET)
    # An epoch is of 4 steps. Two epochs, or four for none_2x; a mask; a measurement of the report's runs.
    per_run = {"none": 3 * 8 + 7 + 11, "none_2x": 3 * 16 + 7 + 11, "norm": 6 * 8 + 7 + 11}
    assert {a.arm: a.report_seconds for a in found.arms} == pytest.approx(per_run)
    norm = found.arms[-1]
    assert norm.tuning_seconds == pytest.approx(6 * 8 + 7)
    assert (norm.tuning_runs, norm.report_runs) == (4, 3)
    assert found.seconds_left == pytest.approx(3 * sum(per_run.values()) + 4 * 55)
    assert f"13 runs, 0 of them done; about {duration(found.seconds_left / 2)} for the others with 2 at once" in (
        found.as_text()
    )
    assert found.estimated == TIMED
    assert list(in_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (0.348, "0.35 s"), (89.0, "89 s"), (90.0, "1.5 min"), (5399.0, "90 min"), (7560.0, "2.1 h")]
    + [(172800.0, "2 d"), (36e6, "420 d")],
)
def test_durations_are_said_with_two_figures(seconds: float, text: str) -> None:
    assert duration(seconds) == text


OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


def test_a_dry_run_of_a_comparison_writes_nothing(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", *OPTIONS, "--masks=norm", "--rho-grid=1", "--seeds=2", "--images=64", "--sharpness-m=16"]
    assert main([*command, "--dry-run", "--processes=3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "4 runs, 0 of them done" in out
    assert "with 3 at once" in out
    assert main([*command, "--dry-run", "--json"]) == 0
    assert [arm["arm"] for arm in json.loads(capsys.readouterr().out)["arms"]] == ["none", "norm"]
    assert main([*command, "--dry-run", "--gpus=1"]) == 2
    assert list(in_folder.iterdir()) == []


def test_a_dry_run_of_train_says_whether_it_is_done(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> str:
        assert main([*command, "--dry-run", "--json"]) == 0
        return str(json.loads(capsys.readouterr().out)["state"])

    command = ["train", *OPTIONS, "--out=one"]
    assert state() == "new"
    assert list(in_folder.iterdir()) == []
    (in_folder / "one.work").mkdir()
    assert state() == "unfinished"
    assert main(command) == 0
    capsys.readouterr()
    assert state() == "done"
    assert main([*command, "--dry-run"]) == 0
    assert "8 steps; the mask keeps 72 of" in capsys.readouterr().out
