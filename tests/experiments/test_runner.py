"""Bringing a store up to date: what is done is read, what fails does not take the others along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import runner as module
from experiments import worker
from experiments.config import RunConfig
from experiments.executors.base import Executor
from experiments.measure import MeasureConfig
from experiments.record import RunRecord
from experiments.runner import Policy, RunFailed, Runner
from experiments.store import completed
from experiments.worker import Job, Outcome, Task, Terminated, execute
from masks.errors import InputError
from tests.experiments.conftest import QUIET, SerialExecutor

Tiny = Callable[..., RunConfig]


@pytest.fixture
def jobs(tiny: Tiny) -> list[Job]:
    return [Job(f"run{seed}", f"arm{seed}", tiny(seed=seed, epochs=1).resolved(), None, seed) for seed in range(4)]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "runs", SerialExecutor(), QUIET)


def fake(monkeypatch: pytest.MonkeyPatch, **failures: list[BaseException]) -> list[str]:
    """Runs that do nothing, or fail as often as they have failures; returns the names of those begun, in order."""
    asked: list[str] = []

    def execute(job: Job, *_: Any, **__: Any) -> tuple[RunRecord, Callable[[Path], None]]:
        asked.append(job.run_id)
        if failures.get(job.run_id):
            raise failures[job.run_id].pop(0)
        return RunRecord(job.run_id, job.arm, asdict(job.config), {}, {}, {}), lambda folder: None

    monkeypatch.setattr(worker, "execute", execute)
    return asked


def test_every_job_gives_a_record_and_long_ones_start_first(
    runner: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake(monkeypatch)
    with runner:
        records = runner.run(jobs, "label")
    assert asked == ["run3", "run2", "run1", "run0"]
    assert {name: record.arm for name, record in records.items()} == {f"run{i}": f"arm{i}" for i in range(4)}
    assert completed(runner.store.folder) == sorted(records)


def test_finished_runs_are_read_and_not_made_again(
    runner: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch)
    first = runner.run(jobs[:3], "label")
    before = {path: path.stat().st_mtime_ns for path in runner.store.folder.rglob("*.json")}
    asked = fake(monkeypatch)
    second = runner.run(jobs, "label")
    assert asked == ["run3"]
    assert {name: second[name] for name in first} == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert runner.run([], "label") == {}


def test_a_failing_run_does_not_take_the_others_along(
    runner: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, run3=[KeyError("what\nhappened")])
    with pytest.raises(RunFailed) as caught, runner:
        runner.run(jobs, "label")
    assert completed(runner.store.folder) == ["run0", "run1", "run2"]
    assert str(caught.value) == (
        "1 of 4 runs failed, the others are kept; first: arm3, rho 0.5, seed 3: KeyError: 'what\\nhappened'"
    )
    assert fake(monkeypatch) == []
    assert len(runner.run(jobs, "label")) == 4


def test_a_failing_run_is_tried_again_as_often_as_asked(
    runner: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.policy = replace(QUIET, retries=2)
    asked = fake(monkeypatch, run3=[KeyError(1), KeyError(2)], run2=[KeyError(1), KeyError(2), KeyError(3)])
    with pytest.raises(RunFailed, match=r"1 of 4 runs failed.*arm2"):
        runner.run(jobs, "label")
    assert (asked.count("run3"), asked.count("run2"), asked.count("run1")) == (3, 3, 1)
    assert completed(runner.store.folder) == ["run0", "run1", "run3"]
    assert runner.store.read("run3").telemetry["attempts"] == 3  # type: ignore[union-attr]


def test_bad_input_found_by_a_run_ends_the_comparison_and_names_the_arm(
    runner: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, run2=[InputError("too few")])
    with pytest.raises(InputError, match=r"^arm arm2: too few$"), runner:
        runner.run(jobs, "label")
    assert [path.name for path in runner.store.folder.iterdir()] == ["run3"]


class Scripted(Executor):
    """Ends each task as it is told, in turn, and does it where it is told nothing."""

    def __init__(self, **script: list[Outcome]) -> None:
        self.script, self.asked, self.stopped = script, list[str](), 0

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome] | None]:
        for task in tasks:
            yield None
            self.asked.append(task.job.run_id)
            told = self.script.get(task.job.run_id)
            yield task, told.pop(0) if told else worker.work(task)

    def stop(self) -> None:
        self.stopped += 1


def test_a_run_whose_process_dies_is_begun_again_but_not_for_ever(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch)
    died = Outcome("died", "its process ended abruptly")
    executor = Scripted(run1=[died] * 10, run2=[died] * 11)
    with (
        pytest.raises(RunFailed, match=r"1 of 4 runs failed.*arm2.*ended abruptly"),
        Runner(tmp_path, executor, QUIET) as runner,
    ):
        runner.run(jobs, "label")
    assert completed(tmp_path) == ["run0", "run1", "run3"]
    assert (executor.asked.count("run1"), executor.asked.count("run2"), executor.stopped) == (11, 11, 1)


@pytest.mark.parametrize(("text", "error"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", Terminated), ("", Terminated)])
def test_a_run_that_was_stopped_stops_the_driver(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch, text: str, error: type[BaseException]
) -> None:
    fake(monkeypatch)
    executor = Scripted(run1=[Outcome("interrupted", text)])
    with pytest.raises(KeyboardInterrupt) as caught, Runner(tmp_path, executor, QUIET) as runner:
        runner.run(jobs, "label")
    assert caught.type is error
    assert completed(tmp_path) == ["run2", "run3"]
    assert executor.stopped == 1


def test_another_drivers_run_is_waited_for_and_read(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake(monkeypatch)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.0)

    class Other(Scripted):
        """After three looks, the other driver has done its run."""

        def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome] | None]:
            yield from super().run(tasks)
            if self.asked.count("run1") == 3:
                worker.work(next(task for task in tasks if task.job.run_id == "run1"))

    executor = Other(run1=[Outcome("busy")] * 9)
    assert len(Runner(tmp_path, executor, QUIET).run(jobs, "label")) == 4
    assert sorted(asked) == ["run0", "run1", "run2", "run3"]
    assert executor.asked.count("run1") == 3


def test_runs_finished_before_an_interruption_are_kept(
    runner: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, run1=[KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt), runner:
        runner.run(jobs, "label")
    assert completed(runner.store.folder) == ["run2", "run3"]
    asked = fake(monkeypatch)
    runner.run(jobs, "label")
    assert asked == ["run1", "run0"]


def test_a_task_says_all_that_a_process_needs(tmp_path: Path, jobs: list[Job]) -> None:
    policy = Policy("cpu", ("p",), 1, 3, 4.5, True, 2)
    seen: list[Task] = []

    class Seen(SerialExecutor):
        def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome] | None]:
            seen.extend(tasks)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runner(tmp_path, Seen(), policy).run(jobs[:1], "label")
    assert seen == [Task(jobs[0], tmp_path.absolute(), "cpu", ("p",), 3, 4.5, 2)]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file.runs: Not a directory"):
        Runner(tmp_path / "file" / "runs", SerialExecutor())


def test_a_run_here(tiny: Tiny, measured: MeasureConfig) -> None:
    config = tiny(mask="random", epochs=1)
    tuned, _ = execute(Job("a", "arm", config, None), torch.device("cpu"))
    report, _ = execute(Job("b", "arm", config, measured), torch.device("cpu"))
    assert (tuned.run_id, tuned.arm, report.run_id) == ("a", "arm", "b")
    assert not {key for key in tuned.result if key.startswith(("test_acc", "test_corr", "metrics", "fit"))}
    assert {"test_accuracy", "test_correct", "test_index", "metrics", "metrics_repeat", "fit"} <= set(report.result)
    assert tuned.result.items() <= report.result.items()
    assert report.config == asdict(config.resolved())
    assert 0 < report.telemetry["mask_seconds"] < report.telemetry["train_seconds"]
    assert report.telemetry["measure_seconds"] > 0


@pytest.mark.parametrize("name", ["retries", "checkpoint_epochs", "checkpoint_minutes", "workers"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_policy_has_no_negative_numbers(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 0, got {value}"):
        Policy(**{name: value})
