"""Curves for TensorBoard: those of the record, each point once, whatever happened on the way."""

from __future__ import annotations

import errno
import io
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import tensorboard
from experiments.cli import main
from experiments.config import RunConfig
from experiments.record import RunRecord
from experiments.single import train_one
from experiments.tensorboard import folder_name
from experiments.train import Training
from masks.errors import InputError
from tests.experiments.conftest import QUIET

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
Tiny = Callable[..., RunConfig]
STEPS = 4  # an epoch of 100 images in batches of 32


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, of all event files of a run."""
    events = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(record: RunRecord) -> dict[str, list[tuple[int, Any]]]:
    result, config = record.result, record.config
    steps = STEPS * config["epochs"]
    found = {
        f"train/{name}": [
            (STEPS * n, pytest.approx(epoch[name])) for n, epoch in enumerate(result["history"], 1) if epoch[name]
        ]
        for name in ("loss", "ascent", "radius")
    }
    # Of the last step of each epoch, whose number from 0 is one less than the steps done.
    cosine = {n: config["lr"] * (1 + math.cos(math.pi * (n - 1) / steps)) / 2 for n in range(STEPS, steps + 1, STEPS)}
    found["train/lr"] = [(n, pytest.approx(lr)) for n, lr in cosine.items()]
    found["mask/coordinates"] = [(build["step"], build["num_kept"]) for build in result["mask_builds"]]
    found["validation/accuracy"] = [(steps, pytest.approx(result["val_accuracy"]))]
    return found


def test_the_curves_are_the_records(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(mask="fisher@every=1", epochs=3)
    policy = replace(QUIET, tensorboard=tmp_path / "board")
    record, folder, _ = train_one(config, tmp_path / "logged", policy=policy)
    (board,) = (tmp_path / "board").iterdir()
    assert board.name == f"fisher_rho=0.5_seed=0_{record.run_id[:8]}"
    assert points(board) == expected(record)
    train_one(config, tmp_path / "plain", policy=QUIET)
    for name in ("result.json", "mask.npz"):
        assert (tmp_path / "plain" / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_in_parts_has_each_point_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a part that did not log, and those that were written after the last checkpoint."""
    config = tiny(mask="fisher@every=1", epochs=4)
    logged = replace(QUIET, tensorboard=tmp_path / "board")
    step, build, ended = Training._step, Training._build_mask, []

    def stopped(self: Training, *arguments: Any) -> None:
        if self.step in (6, 9) and self.step not in ended:
            ended.append(self.step)
            signal.raise_signal(signal.SIGTERM)
        step(self, *arguments)

    def died(self: Training) -> None:
        build(self)
        if self.step == 12 and self.step not in ended:
            ended.append(self.step)
            raise MemoryError

    monkeypatch.setattr(Training, "_step", stopped)
    monkeypatch.setattr(Training, "_build_mask", died)
    for policy in (QUIET, logged, logged):
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            train_one(config, tmp_path / "run", policy=policy)
    assert ended == [6, 9, 12]
    (board,) = (tmp_path / "board").iterdir()
    assert points(board)["mask/coordinates"][-1][0] == 12  # written before it died at the same step
    record, _, _ = train_one(config, tmp_path / "run", policy=logged)
    assert points(board) == expected(record)
    assert len(list(board.iterdir())) == 3


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_folder_for_results_alone_is_refused(
    in_folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """There it made a run look complete, whose record then had no place."""
    (in_folder / "link").symlink_to("out")
    boards = ["out/runs", "link/runs/board"] if command == "compare" else ["out", "link/board", "out.work/board"]
    for board in boards:
        for dry in ([], ["--dry_run"]):
            assert main([command, "--device=cpu", "--out=out", f"--tensorboard={board}", *dry]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"sam-masks: error: tensorboard {board} lies in ")
            assert error.endswith(", which is for results alone; choose another folder\n")
            assert [path.name for path in in_folder.iterdir()] == ["link"]


class Full(io.FileIO):
    """A file on a disk that is full after some writes."""

    left = 0

    def write(self, data: Any) -> int:
        Full.left -= 1
        if Full.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("writes", [0, 5])
def test_a_full_disk_costs_the_curves_and_not_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], writes: int
) -> None:
    monkeypatch.setattr(Path, "open", full_for_events(Path.open))
    Full.left = writes
    record, folder, notes = train_one(
        tiny(mask="norm"), tmp_path / "logged", policy=replace(QUIET, tensorboard=tmp_path / "board")
    )
    (board,) = (tmp_path / "board").iterdir()
    assert notes == (f"no more curves in {board}: No space left on device; the run is not affected",)
    assert Full.left < 0
    assert len(list(board.iterdir())) == 1
    found = sum(len(values) for values in points(board).values())
    assert found == max(0, writes - 2)  # after two events that open a file
    plain = train_one(tiny(mask="norm"), tmp_path / "plain", policy=QUIET)[1]
    assert (folder / "result.json").read_bytes() == (plain / "result.json").read_bytes()
    assert not (tmp_path / "logged.work").exists()
    assert capsys.readouterr().err == ""
    assert record.result["history"]


def full_for_events(opened: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "tfevents" in path.name and "x" in mode:
            return io.BufferedWriter(Full(path, mode))
        return opened(path, mode, *rest, **more)

    return chosen


def test_the_folder_of_a_run() -> None:
    assert folder_name("vasso/random depth", "rho=0.5", "ab") == "vasso-random-depth_rho=0.5_ab"


def test_a_missing_package_or_folder_is_one_line(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot use .*file for TensorBoard: .*file is not a folder that can be writ"):
        train_one(tiny(), tmp_path / "a", policy=replace(QUIET, tensorboard=tmp_path / "file"))
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    for command in ("train", "compare"):
        assert main([command, "--device=cpu", "--tensorboard=x", f"--out={tmp_path / 'b'}"]) == 2
        assert capsys.readouterr().err == (
            "sam-masks: error: tensorboard needs the package of this name: pip install 'sam-masks[tensorboard]'\n"
        )
    assert not (tmp_path / "b").exists()
