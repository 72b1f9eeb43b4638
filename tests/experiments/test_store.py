"""The store: complete or not there, for several drivers at once, on full disks and after any crash."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments import worker
from experiments.config import RunConfig
from experiments.executors.local import LocalExecutor
from experiments.record import RunRecord
from experiments.runner import Policy, Runner
from experiments.store import (
    Busy,
    Failure,
    Store,
    completed,
    read_all,
    read_failure,
    read_run,
    unfinished,
    write_run,
)
from experiments.worker import Job, Task, work
from masks.errors import InputError
from tests.experiments.conftest import QUIET, SerialExecutor

Tiny = Callable[..., RunConfig]
RECORD = RunRecord("abc", "norm", {"seed": 3, "rho": [0.1, 2]}, {"val_accuracy": 1 / 3}, {"s": 0.1}, {"code": "c"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def keep(store: Store, record: RunRecord = RECORD) -> Path:
    with store.working_on(record.run_id):
        store.complete(record.run_id, record, store.begin(record.run_id))
    return store.folder / record.run_id


# -- records ------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(store: Store) -> None:
    path = keep(store)
    read = store.read("abc", config={"seed": 3, "rho": (0.1, 2)})
    assert read is not None
    assert (read.config, read.result, read.environment) == (RECORD.config, RECORD.result, RECORD.environment)
    assert read.telemetry["s"] == 0.1
    assert read.telemetry["attempts"] == 1
    assert {"host", "finished"} <= set(read.telemetry)
    assert sorted(p.name for p in path.iterdir()) == ["result.json", "telemetry.json"]
    assert [p.name for p in store.folder.iterdir()] == ["abc"]
    assert not {"s", "host", "finished", "attempts"} & set(json.loads((path / "result.json").read_text()))


def test_a_store_that_is_only_read_is_not_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    assert store.read("abc") is None
    assert (completed(store.folder), read_all(store.folder), unfinished(store.folder)) == ([], [], [])
    assert not store.folder.exists()


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "3", "{}", "\udcff"),
        '{"schema": "sam-masks/run/2"}',
        '{"schema": "sam-masks/run/2", "foo": 1}',
        '{"schema": "sam-masks/run/1"}',
        '{"schema": "sam-masks/run/2", "run_id": "a", "arm": "b", "environment": {}, "config": [], "result": {}}',
        None,
    ],
)
@pytest.mark.parametrize("name", ["result.json", "telemetry.json"])
def test_what_is_no_record_is_refused_with_its_path(store: Store, content: str | None, name: str) -> None:
    path = keep(store)
    (path / name).unlink()
    if (name, content) == ("result.json", None):
        assert store.read("abc") is None
        return
    if content is not None:
        (path / name).write_bytes(content.encode(errors="surrogateescape"))
    if (name, content) == ("telemetry.json", '{"schema": "sam-masks/run/2"}'):
        return  # telemetry may be anything
    if name == "telemetry.json" and content is not None and content.startswith('{"schema": "sam-masks/run/2", '):
        return
    with pytest.raises(InputError) as caught:
        store.read("abc")
    assert str(path) in str(caught.value)
    assert "is not the record of a run" in str(caught.value) or "another schema" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_of_another_configuration_is_refused(store: Store) -> None:
    keep(store)
    with pytest.raises(InputError, match=r"abc is the record of another run"):
        store.read("abc", config={"seed": 4, "rho": [0.1, 2]})


def test_a_truncated_record_is_set_aside_as_often_as_needed(store: Store) -> None:
    for n in (1, 2):
        path = keep(store)
        (path / "result.json").write_text("{")
        with store.working_on("abc"):
            assert store.set_aside("abc").name == f"abc.damaged-{n}"
        assert completed(store.folder) == []
    assert not store.is_complete("abc")


def test_what_is_no_record_makes_no_run_complete_and_is_set_aside(store: Store) -> None:
    """Another program wrote into the place of a run in progress: its checkpoint was removed, and its record lost."""
    with store.working_on("abc") as work:
        (work / "checkpoint.pt").write_text("")
        (store.folder / "abc").mkdir()
        (store.folder / "abc" / "events").write_text("curves")
    assert work.exists()
    assert (store.is_complete("abc"), store.read("abc"), completed(store.folder)) == (False, None, [])
    store.prepare()
    assert (work / "checkpoint.pt").exists()
    keep(store)
    assert store.read("abc") is not None
    assert (store.folder / "abc.damaged-1" / "events").read_text() == "curves"
    assert not work.exists()


def test_renamed_means_complete(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the process before the rename, there is no record; and the next attempt is not disturbed."""

    def die(*_: Any) -> None:
        raise SystemExit

    def attempt(files: Callable[[Path], None] | None) -> None:
        with store.working_on("abc"):
            store.complete("abc", RECORD, 1, files=files)

    for where, name, files in (
        ("experiments.store", "write_run", die),
        ("experiments.store", "write_run", None),
        ("os", "rename", None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"{where}.{name}", die)
            with pytest.raises(SystemExit):
                attempt(files)
        assert completed(store.folder) == []
        assert store.read("abc") is None
    assert (store.folder / "abc.partial").exists()
    assert keep(store).exists()
    assert [p.name for p in store.folder.iterdir()] == ["abc"]


def test_an_empty_folder_in_its_place_is_no_record(store: Store) -> None:
    (store.folder / "abc").mkdir(parents=True)
    assert not store.is_complete("abc")
    assert keep(store).exists()


# -- locks --------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from experiments.store import Store
with Store(Path(sys.argv[1])).working_on("abc") as work:
    (work / "checkpoint.pt").write_text("")
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_is_one_process_s_and_the_lock_of_a_dead_one_does_not_block(store: Store) -> None:
    held = subprocess.Popen([sys.executable, "-c", HOLD, str(store.folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout is not None
        assert held.stdout.readline() == "held\n"
        with pytest.raises(Busy), store.working_on("abc"):
            pass
        with store.working_on("def"):  # another run is free
            pass
        held.kill()
        held.wait()
        assert (store.folder / "abc.work" / "lock").exists()
        with store.working_on("abc") as work:
            assert (work / "checkpoint.pt").exists()
    finally:
        held.kill()
        held.communicate()


def test_what_is_not_needed_is_not_kept(store: Store) -> None:
    with store.working_on("abc") as work:
        assert work.is_dir()
        assert store.begin("abc") == 1
    assert not work.exists()
    with store.working_on("abc"):
        (work / "checkpoint.pt").write_text("")
        assert store.begin("abc") == 1
    with store.working_on("abc"):
        assert store.begin("abc") == 2
    assert work.exists()


def test_leftovers_of_complete_runs_are_removed_and_those_of_others_kept(store: Store) -> None:
    keep(store)
    for name in ("abc", "def"):
        (store.folder / f"{name}.work").mkdir()
        (store.folder / f"{name}.work" / "checkpoint.pt").write_text("")
    with store.working_on("abc"):
        store.prepare()  # somebody is working there
        assert (store.folder / "abc.work").exists()
    assert unfinished(store.folder) == ["def"]
    (store.folder / "abc.work").mkdir()
    store.prepare()
    assert unfinished(store.folder) == ["def"]


def test_a_lock_that_was_just_removed_is_busy(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.prepare()
    original = Path.mkdir

    def gone(path: Path, *args: Any, **options: Any) -> None:
        original(path, *args, **options)
        if path.name == "abc.work":
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", gone)
    with pytest.raises(Busy), store.working_on("abc"):
        pass


def test_failures_say_why(store: Store) -> None:
    failure = Failure("abc", "norm", "ValueError: x", 2, {"seed": 3})
    with store.working_on("abc"):
        store.fail("abc", failure)
    assert read_failure(store.folder, "abc") == failure
    assert read_failure(store.folder, "def") is None
    (store.folder / "abc.work" / "failure.json").write_text("{")
    assert read_failure(store.folder, "abc") is None


# -- full disks and folders that cannot be written to -------------------------------------------------------


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 2000])  # the count of attempts, the checkpoint, the record
def test_a_full_disk_is_one_line_and_what_is_complete_is_kept(tiny: Tiny, store: Store, size: int) -> None:
    jobs = [Job(f"run{seed}", "arm", tiny(seed=seed, epochs=2).resolved(), None) for seed in range(2)]
    policy = Policy(device="cpu", quiet=True, checkpoint_epochs=1 if size == 100 else 0)
    runner = Runner(store.folder, SerialExecutor(), policy)
    runner.run(jobs[:1], "label")
    before = {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()}
    with small_files(size), pytest.raises(InputError) as caught:
        runner.run(jobs, "label")
    assert "File too large; what is complete is kept" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()} == before
    assert len(runner.run(jobs, "label")) == 2


def test_no_space_left_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write to .*runs: No space left on device; what is complete is kept"):
        keep(store)
    assert list(store.folder.iterdir()) == []


def test_a_folder_that_may_not_be_written_to(store: Store, tmp_path: Path) -> None:
    keep(store)
    for folder in (*tmp_path.parents, tmp_path):
        if folder.stat().st_uid == os.geteuid() and str(folder).startswith(str(tmp_path.parents[2])):
            folder.chmod(0o755)
    store.folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # root may write anywhere
    try:
        assert [record.run_id for record in read_all(store.folder)] == ["abc"]
        store.prepare()
        with pytest.raises(InputError, match=r"cannot write to .*runs: Permission denied"), store.working_on("def"):
            pass
    finally:
        if root:
            os.seteuid(0)
        store.folder.chmod(0o755)


def test_a_file_system_without_locks_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def missing(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(InputError, match=r"cannot write to .*: Function not implemented"), store.working_on("abc"):
        pass


# -- the same bytes, once -----------------------------------------------------------------------------------

DRIVE = """
import json, sys
from pathlib import Path
from experiments import worker
from experiments.config import RunConfig
from experiments.executors.local import LocalExecutor
from experiments.runner import Policy, Runner
from experiments.worker import Job

if __name__ == "__main__":
    folder, processes, configs = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    jobs = [Job(f"run{i}", "arm", RunConfig(**config), None) for i, config in enumerate(configs)]
    print("ready", flush=True)
    sys.stdin.readline()
    with Runner(folder, LocalExecutor(processes), Policy(device="cpu", quiet=True)) as runner:
        print(len(runner.run(jobs, "label")))
"""


def drive(tmp_path: Path, folder: Path, processes: int, configs: list[RunConfig]) -> subprocess.Popen[str]:
    (tmp_path / "drive.py").write_text(DRIVE)
    argument = json.dumps([asdict(config) for config in configs])
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "drive.py"), str(folder), str(processes), argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(worker.__file__).parents[1])},
    )


def test_two_drivers_do_every_run_once_and_give_the_bytes_of_one_process(tiny: Tiny, tmp_path: Path) -> None:
    configs = [tiny(seed=seed, mask="random", epochs=4).resolved() for seed in range(6)]
    other = drive(tmp_path, tmp_path / "both", 1, configs)
    jobs = [Job(f"run{i}", "arm", config, None) for i, config in enumerate(configs)]
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    with Runner(tmp_path / "both", LocalExecutor(1), QUIET) as runner:
        assert other.stdin is not None
        other.stdin.write("\n")  # both start a process now
        other.stdin.flush()
        assert len(runner.run(jobs, "label")) == 6
    assert other.communicate(timeout=120)[0].strip() == "6"
    assert other.returncode == 0
    here = tmp_path / "here"
    for i, config in enumerate(configs):
        assert work(Task(Job(f"run{i}", "arm", config, None), here, "cpu")).kind == "done"
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == [f"run{i}" for i in range(6)]
    for i in range(6):
        both = tmp_path / "both" / f"run{i}"
        assert (both / "result.json").read_bytes() == (here / f"run{i}" / "result.json").read_bytes()
        assert json.loads((both / "telemetry.json").read_text())["attempts"] == 1  # begun once, by one of them


def test_reading_executes_nothing(store: Store, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_folder / "evil.py").write_text("raise SystemExit('executed')")
    config = {"model": "evil:model", "mask": "evil", "data": "npz:evil.py", "plugin": "evil"}
    path = keep(store, RunRecord("abc", "!!python/object:evil.x", config, {"a": "evil"}, {}, {}))
    (path / "mask.npz").write_bytes(b"not opened")
    (path / "checkpoint.pt").write_bytes(b"\x80\x04cevil\nx\n.")
    before = set(sys.modules)
    assert read_all(store.folder)[0].config == config
    assert "evil" not in set(sys.modules) - before


def test_thousands_of_records_are_read_in_seconds(tmp_path: Path) -> None:
    for i in range(500):
        folder = tmp_path / f"{i:016x}"
        folder.mkdir()
        (folder / "telemetry.json").write_text('{"schema": "sam-masks/run/2"}')
        (folder / "result.json").write_text(json.dumps({"schema": "sam-masks/run/2", **_synthetic(i)}))
    start = time.process_time()
    assert len(read_all(tmp_path)) == 500
    assert time.process_time() - start < 1.25  # 5 s for two thousand
    shutil.rmtree(tmp_path)


def _synthetic(i: int) -> dict[str, Any]:
    return {"run_id": f"{i:016x}", "arm": "a", "environment": {}, "config": {"seed": i}, "result": {"x": "1" * 2000}}


def test_writing_and_reading_are_inverse(tmp_path: Path) -> None:
    write_run(tmp_path, RECORD, RECORD.telemetry)
    assert read_run(tmp_path) == RECORD
