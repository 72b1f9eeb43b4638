"""A study whose processes are killed at random ends with the bytes of one that ran undisturbed, every run done once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments import commands, worker
from experiments.cli import EXIT_CODES, main
from experiments.config import RunConfig
from experiments.store import completed
from experiments.worker import Job, Task, work

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
Tiny = Callable[..., RunConfig]

# Every process of the study imports this file, so that completions are counted wherever they happen.
DRIVE = """
import json, os, sys
from pathlib import Path
from experiments.config import RunConfig
from experiments.executors.local import LocalExecutor
from experiments.runner import Policy, Runner
from experiments.store import Store
from experiments.worker import Job

complete = Store.complete

def counted(self, name, *arguments, **options):
    complete(self, name, *arguments, **options)
    with open(sys.argv[2], "ab", buffering=0) as file:
        file.write(f"{name}\\n".encode())

Store.complete = counted

if __name__ == "__main__":
    configs = json.loads(sys.argv[3])
    jobs = [Job(f"run{i}", "arm", RunConfig(**config), None) for i, config in enumerate(configs)]
    with Runner(Path(sys.argv[1]), LocalExecutor(2), Policy("cpu", checkpoint_epochs=3, quiet=True)) as runner:
        runner.run(jobs, "label")
"""


def workers_of(driver: int) -> list[int]:
    found = []
    for pid in Path(f"/proc/{driver}/task/{driver}/children").read_text().split():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "spawn_main" in command:
            found.append(int(pid))
    return found


def attempts(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.glob("*.work/attempts.json"):
        try:
            found[path.parent.name] = path.read_text()
        except OSError:  # completed meanwhile
            continue
    return found


@pytest.mark.parametrize(
    ("kills", "runs", "epochs", "seed"),
    [(3, 6, 24, 0), pytest.param(50, 24, 100, 1, marks=pytest.mark.slow)],
)
def test_killed_at_random_points(tiny: Tiny, tmp_path: Path, kills: int, runs: int, epochs: int, seed: int) -> None:
    configs = [tiny(seed=i, epochs=epochs, mask="fisher@every=9").resolved() for i in range(runs)]
    (tmp_path / "drive.py").write_text(DRIVE)
    store, log = tmp_path / "runs", tmp_path / "log"
    command = [sys.executable, str(tmp_path / "drive.py"), str(store), str(log), json.dumps([*map(asdict, configs)])]
    environment = {**os.environ, "PYTHONPATH": str(Path(worker.__file__).parents[1])}
    draw = random.Random(seed)
    seen: dict[str, tuple[int, int]] = {}
    killed: Counter[str] = Counter()
    driver = subprocess.Popen(command, env=environment)
    try:
        while killed.total() < kills:
            before = attempts(store)
            while attempts(store).items() <= before.items():  # until a run is begun, again or for the first time
                assert driver.poll() is None, f"the study ended after {killed.total()} kills"
                time.sleep(0.02)
            time.sleep(draw.uniform(0.0, 1.0))
            for name in completed(store):
                status = (store / name / "result.json").stat()
                assert seen.setdefault(name, (status.st_ino, status.st_mtime_ns)) == (status.st_ino, status.st_mtime_ns)
            workers = workers_of(driver.pid)
            if workers and draw.random() < 0.6:
                killed["worker"] += 1
                os.kill(draw.choice(workers), signal.SIGKILL)
            else:
                killed["driver"] += 1
                driver.kill()
                driver.wait()
                driver = subprocess.Popen(command, env=environment)
        assert driver.wait(timeout=1200) == 0
    finally:
        driver.kill()
        driver.wait()
    assert min(killed["worker"], killed["driver"]) > 0
    # Nothing is lost, nothing was completed twice, nothing is left over.
    assert sorted(path.name for path in store.iterdir()) == sorted(f"run{i}" for i in range(runs))
    completions = Counter(log.read_text().split())
    assert set(completions.values()) == {1}
    for name, (inode, changed) in seen.items():
        status = (store / name / "result.json").stat()
        assert (status.st_ino, status.st_mtime_ns) == (inode, changed)
    tried = [json.loads((store / f"run{i}" / "telemetry.json").read_text())["attempts"] for i in range(runs)]
    assert sum(tried) > runs  # some were interrupted
    for i, config in enumerate(configs):
        assert work(Task(Job(f"run{i}", "arm", config, None), tmp_path / "whole", "cpu")).kind == "done"
        for name in ("result.json", "mask.npz"):
            assert (store / f"run{i}" / name).read_bytes() == (tmp_path / "whole" / f"run{i}" / name).read_bytes()


TINY = ["--n-train=100", "--n-val=30", "--n-test=50", "--width=4", "--batch-size=32", "--images=64", "--sharpness-m=16"]
SAID = {
    signal.SIGINT: "sam-masks: interrupted; finished runs are kept, and the same command goes on from there\n",
    signal.SIGTERM: "sam-masks: ended by SIGTERM; finished runs are kept, and the same command goes on from there\n",
}


@pytest.mark.parametrize(
    ("arguments", "begun"),
    [
        pytest.param(
            ["train", *TINY[:5], "--epochs=150", "--mask=random", "--out=o"],
            "o.work/attempts.json",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["compare", *TINY, "--epochs=40", "--masks=norm", "--rho-grid=1", "--seeds=2", "--quiet", "--processes=2",
             "--out=o"],
            "o/runs/*.work/attempts.json",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_ctrl_c_and_sigterm_save_what_runs_and_the_same_command_ends_with_the_same_bytes(
    tmp_path: Path, arguments: list[str], begun: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(worker.__file__).parents[1])}
    command = [sys.executable, "-m", "experiments.cli", *arguments]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        running = subprocess.Popen(
            command, cwd=parts, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        before = time.time()
        while not any(path.stat().st_mtime > before for path in parts.glob(begun)):
            assert running.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)
        # As a terminal does, to the workers, too; a scheduler's to the command alone.
        os.killpg(running.pid, number) if number == signal.SIGINT else running.send_signal(number)
        said = running.communicate(timeout=120)[1]
        assert (running.returncode, said) == (code, SAID[number])
        assert list(parts.glob(begun.replace("attempts.json", "checkpoint.pt")))
    for folder in (parts, whole):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert (done.returncode, done.stderr) == (0, "")
    results = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("result.json")}
    assert results
    assert {path.relative_to(parts): path.read_bytes() for path in parts.rglob("result.json")} == results
    assert not list(parts.rglob("*.work"))


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (worker.Terminated, 143)])
def test_exit_codes_of_interruptions(
    error: type[BaseException], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(values: Any) -> int:
        raise error

    monkeypatch.setattr(commands, "run_train", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["train"]) == code
    assert capsys.readouterr().err == SAID[signal.SIGINT if code == 130 else signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"{code} " in EXIT_CODES


def test_sigterm_ends_what_has_no_run_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "run_masks", lambda values: signal.raise_signal(signal.SIGTERM))
    assert main(["masks"]) == 143
