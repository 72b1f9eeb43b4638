"""The pool: what is done is read, what fails does not take the others along."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments import runner as module
from experiments.config import RunConfig
from experiments.measure import MeasureConfig
from experiments.record import RunRecord
from experiments.runner import Job, RunFailed, Runner, execute
from masks.errors import InputError

Tiny = Callable[..., RunConfig]


@pytest.fixture
def jobs(tiny: Tiny) -> list[Job]:
    return [Job(f"run{seed}", f"arm{seed}", tiny(seed=seed, epochs=1).resolved(), None, seed) for seed in range(4)]


@pytest.fixture
def pool(tmp_path: Path, serial: None) -> Runner:
    return Runner(tmp_path / "runs", processes=1, device="cpu", quiet=True)


def fake(monkeypatch: pytest.MonkeyPatch, **failures: BaseException) -> list[str]:
    """Runs that do nothing, or fail; returns the names of those asked for, in order."""
    asked: list[str] = []

    def execute(job: Job, device: str) -> RunRecord:
        asked.append(job.run_id)
        if job.run_id in failures:
            raise failures[job.run_id]
        return RunRecord(job.run_id, job.arm, asdict(job.config), {}, {}, {})

    monkeypatch.setattr(module, "execute", execute)
    return asked


def files(pool: Runner) -> set[str]:
    return {path.stem for path in pool.folder.iterdir()}


def test_every_job_gives_a_record_and_long_ones_start_first(
    pool: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake(monkeypatch)
    with pool:
        records = pool.run(jobs, "label")
    assert asked == ["run3", "run2", "run1", "run0"]
    assert {name: record.arm for name, record in records.items()} == {f"run{i}": f"arm{i}" for i in range(4)}
    assert files(pool) == set(records)


def test_finished_runs_are_read_and_not_made_again(
    pool: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch)
    first = pool.run(jobs[:3], "label")
    before = {path: path.stat().st_mtime_ns for path in pool.folder.iterdir()}
    asked = fake(monkeypatch)
    second = pool.run(jobs, "label")
    assert asked == ["run3"]
    assert {name: second[name] for name in first} == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert pool.run([], "label") == {}


def test_a_failing_run_does_not_take_the_others_along(
    pool: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, run3=KeyError("what\nhappened"))
    with pytest.raises(RunFailed) as caught, pool:
        pool.run(jobs, "label")
    assert files(pool) == {"run0", "run1", "run2"}
    message = str(caught.value)
    assert message == (
        "1 of 4 runs failed, the others are kept; first: arm3, rho 0.5, seed 3: KeyError: 'what\\nhappened'"
    )
    assert fake(monkeypatch) == []
    assert len(pool.run(jobs, "label")) == 4


def test_bad_input_found_by_a_run_ends_the_comparison_and_names_the_arm(
    pool: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, run2=InputError("too few"))
    with pytest.raises(InputError, match=r"^arm arm2: too few$"), pool:
        pool.run(jobs, "label")


def test_a_process_that_dies_is_reported_in_words(
    pool: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, run3=BrokenProcessPool("A process in the process pool was terminated abruptly"))
    with pytest.raises(RunFailed, match=r"ended abruptly .out of memory.*; finished runs are kept"), pool:
        pool.run(jobs, "label")


def test_runs_finished_before_an_interruption_are_kept(
    pool: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch)
    original, calls = module.wait, []

    def wait(waiting: Any, **options: Any) -> Any:
        calls.append(len(waiting))
        if len(calls) > 2:
            raise KeyboardInterrupt
        done, rest = original(waiting, **options)
        return set(sorted(done, key=id)[:1]), rest

    monkeypatch.setattr(module, "wait", wait)
    with pytest.raises(KeyboardInterrupt), pool:
        pool.run(jobs, "label")
    assert len(files(pool)) == 2
    monkeypatch.setattr(module, "wait", original)
    asked = fake(monkeypatch)
    pool.run(jobs, "label")
    assert len(asked) == 2


@pytest.mark.parametrize("change", [{"run_id": "other"}, {"config": {"seed": 9}}])
def test_a_record_of_another_run_is_not_taken(
    pool: Runner, jobs: list[Job], change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch)
    pool.run(jobs[:1], "label")
    path = pool.folder / "run0.json"
    content = json.loads(path.read_text())
    config = content["config"] | change.pop("config", {})
    path.write_text(json.dumps(content | change | {"config": config}))
    with pytest.raises(InputError, match=r"run0\.json is the record of another run"):
        pool.run(jobs[:1], "label")


def test_what_cannot_be_written_is_said(pool: Runner, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunRecord, "save", full)
    with pytest.raises(InputError, match=r"cannot write to .*runs: No space left on device"):
        pool.run(jobs, "label")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, serial: None) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot use .*file.runs for results: Not a directory"):
        Runner(tmp_path / "file" / "runs", processes=1)
    with pytest.raises(InputError, match="processes must be at least 1, got 0"):
        Runner(tmp_path / "runs", processes=0)


def test_children_inherit_one_thread_and_deafness_to_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    handler = signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    with module._starting_children():
        assert {os.environ[name] for name in module._THREAD_VARIABLES} == {"1"}
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_here(tiny: Tiny, measured: MeasureConfig) -> None:
    config = tiny(mask="random", epochs=1)
    tuned = execute(Job("a", "arm", config, None), "cpu")
    report = execute(Job("b", "arm", config, measured), "cpu")
    assert (tuned.run_id, tuned.arm, report.run_id) == ("a", "arm", "b")
    assert not {key for key in tuned.result if key.startswith(("test_acc", "test_corr", "metrics", "fit"))}
    assert {"test_accuracy", "test_correct", "test_index", "metrics", "metrics_repeat", "fit"} <= set(report.result)
    assert tuned.result.items() <= report.result.items()
    assert report.config == asdict(config.resolved())
    assert 0 < report.telemetry["mask_seconds"] < report.telemetry["train_seconds"]
    assert report.telemetry["measure_seconds"] > 0
