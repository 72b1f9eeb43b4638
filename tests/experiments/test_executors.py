"""Where runs execute: processes that die take nobody along, and are stopped without losing a step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import commands, worker
from experiments.config import RunConfig
from experiments.executors import local as module
from experiments.executors.base import Executor
from experiments.executors.local import LocalExecutor
from experiments.runner import Runner
from experiments.store import completed, unfinished
from experiments.worker import Job, Task
from masks.errors import InputError
from tests.experiments.conftest import QUIET

Tiny = Callable[..., RunConfig]
LONG = 2000  # epochs: minutes


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def tasks(tiny: Tiny, folder: Path, *epochs: int) -> list[Task]:
    return [
        Task(Job(f"run{i}", "arm", tiny(seed=i, epochs=n).resolved(), None), folder, "cpu")
        for i, n in enumerate(epochs)
    ]


def begun(folder: Path, name: str) -> Callable[[], bool]:
    return (folder / f"{name}.work" / "attempts.json").exists


def worker_pids(executor: LocalExecutor) -> list[int]:
    return [pid for slot in executor._slots if slot.pool for pid in slot.pool._processes]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_at_least_one_process() -> None:
    with pytest.raises(InputError, match="processes must be at least 1, got 0"):
        LocalExecutor(0)


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


def test_runs_are_dealt_out_to_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [module._device_of("auto", slot) for slot in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [module._device_of(name, 1) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    for count in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert module._device_of("auto", 1) == "auto"


@pytest.mark.slow
def test_a_process_that_is_killed_takes_only_its_own_run_along(tiny: Tiny, tmp_path: Path) -> None:
    executor = LocalExecutor(2)
    ends: dict[str, str] = {}
    killed = False
    try:
        for ended in executor.run(tasks(tiny, tmp_path, LONG, 1, 1)):
            if ended:
                ends[ended[0].job.run_id] = ended[1].kind
            if not killed and begun(tmp_path, "run0")():
                killed = True
                os.kill(worker_pids(executor)[0], signal.SIGKILL)
    finally:
        executor.stop()
    assert ends == {"run0": "died", "run1": "done", "run2": "done"}
    assert completed(tmp_path) == ["run1", "run2"]
    assert unfinished(tmp_path) == ["run0"]


DRIVE = """
import sys
from pathlib import Path
from typing import Any
from experiments.config import RunConfig
from experiments.executors.local import LocalExecutor
from experiments.worker import Job, Task
import json

if __name__ == "__main__":
    executor = LocalExecutor(1)
    config = RunConfig(**json.loads(sys.argv[2]))
    for ended in executor.run([Task(Job("run0", "arm", config, None), Path(sys.argv[1]), "cpu")]):
        print(executor._slots[0].pool._processes.popitem()[0] if ended is None else ended, flush=True)
"""


def test_a_process_whose_driver_is_killed_saves_its_run_and_ends(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "drive.py").write_text(DRIVE)
    store = tmp_path / "runs"
    config = tiny(epochs=LONG).resolved()
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "drive.py"), str(store), json.dumps(config.__dict__)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(worker.__file__).parents[1])},
    )
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    wait_for(begun(store, "run0"))
    driver.kill()
    driver.wait()
    driver.stdout.close()
    try:
        wait_for(lambda: not is_alive(pid), seconds=30)
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    saved = torch.load(store / "run0.work" / "checkpoint.pt", weights_only=True)
    assert saved["of"] == "run0"


def interrupt(executor: Executor, todo: list[Task], pids: list[int]) -> None:
    """Do the tasks, and interrupt the driver once the first is begun."""
    with Runner(todo[0].store, executor, QUIET):
        for ended in executor.run(todo):
            if not ended and begun(todo[0].store, todo[0].job.run_id)():
                pids += worker_pids(executor) if isinstance(executor, LocalExecutor) else []
                raise KeyboardInterrupt


def test_leaving_by_an_exception_saves_the_runs(tiny: Tiny, tmp_path: Path) -> None:
    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(LocalExecutor(1), tasks(tiny, tmp_path, LONG), pids)
    assert not is_alive(*pids)
    assert (tmp_path / "run0.work" / "checkpoint.pt").exists()


# -- clusters -----------------------------------------------------------------------------------------------


def reference(tiny: Tiny, folder: Path, *epochs: int) -> dict[str, bytes]:
    """What each run's result must be, made in this process."""
    for task in tasks(tiny, folder, *epochs):
        assert worker.work(task).kind == "done"
    return results(folder)


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name / "result.json").read_bytes() for name in completed(folder)}


def begin_here(tiny: Tiny, store: Path, *epochs: int) -> None:
    """A study that is interrupted in its first run on this machine, to be finished elsewhere."""
    with pytest.raises(KeyboardInterrupt):
        interrupt(LocalExecutor(1), tasks(tiny, store, *epochs), [])
    assert (store / "run0.work" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_submitit_gives_the_same_bytes_also_after_a_time_out_and_an_interruption(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    from experiments.executors.slurm import SlurmExecutor

    epochs = (400, 60, 400)
    jobs = [task.job for task in tasks(tiny, tmp_path, *epochs)]
    store = tmp_path / "study" / "runs"
    begin_here(tiny, store, *epochs)
    # The warning before a time limit saves a run, which is queued again.
    executor = SlurmExecutor(cluster="local", minutes=5)
    asked = []
    for ended in executor.run(tasks(tiny, store, *epochs)):
        assert ended is None or ended[1].kind == "done"
        if not asked and begun(store, "run2")():
            (job,) = (job for job, task in executor._jobs.items() if task.job.run_id == "run2")
            time.sleep(1)
            children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGUSR2)  # as Slurm does
            asked.append(job)
    assert asked[0].result().kind == "interrupted"
    assert len(Runner(store, executor, QUIET).run(jobs, "label")) == 3
    assert results(store) == reference(tiny, tmp_path / "whole", *epochs)


@pytest.mark.slow
def test_ray_gives_the_same_bytes_also_when_a_node_dies(tiny: Tiny, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from experiments.executors.ray import RayExecutor

    epochs = (150, 150, 150, 150)
    jobs = [task.job for task in tasks(tiny, tmp_path, *epochs)]
    store = tmp_path / "runs"
    begin_here(tiny, store, *epochs)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        executor = RayExecutor(cluster.address)
        killed = False
        ends = []
        for ended in executor.run(tasks(tiny, store, *epochs)):
            if not killed and all(begun(store, f"run{i}")() for i in (0, 1)):
                cluster.remove_node(node, allow_graceful=False)
                killed = True
            if ended:
                ends.append(ended[1].kind)
        assert killed
        with Runner(store, executor, QUIET) as runner:
            assert len(runner.run(jobs, "label")) == 4
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert results(store) == reference(tiny, tmp_path / "whole", *epochs)


@pytest.mark.slow
def test_stopping_ray_saves_the_runs(tiny: Tiny, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from experiments.executors.ray import RayExecutor

    try:
        executor = RayExecutor()
        with pytest.raises(InputError, match=r"asks for 1e\+06 CPUs, the Ray cluster has"):
            RayExecutor(cpus=1e6)
        with pytest.raises(KeyboardInterrupt):
            interrupt(executor, tasks(tiny, tmp_path, LONG), [])
    finally:
        ray.shutdown()
    assert (tmp_path / "run0.work" / "checkpoint.pt").exists()


@pytest.mark.parametrize(("name", "extra"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_says_how_to_get_it(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(InputError, match=rf"--executor {name} needs .*pip install 'sam-masks\[{name}\]'"):
        commands._executor(commands.CompareOptions(executor=name))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "ray", "processes": 2}, "processes has no effect with executor ray"),
        ({"executor": "slurm", "address": "x"}, "address has no effect with executor slurm"),
        ({"gpus": 1.0}, "gpus has no effect with executor local"),
        ({"partition": "p"}, "partition has no effect with executor local"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
    ],
)
def test_options_of_another_executor_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        commands._executor(commands.CompareOptions(**options))
