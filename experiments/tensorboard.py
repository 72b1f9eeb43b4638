"""What TensorBoard shows of a run while it trains (extra ``[tensorboard]``); the record does not depend on it.

A run that goes on from a checkpoint writes all its points again, from the first one, after an event that makes readers
forget those of earlier attempts: none is lost, whatever was unwritten when an attempt died, and none is there twice.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from experiments.store import check_writable
from masks.errors import InputError

if TYPE_CHECKING:
    from experiments.train import Epoch, MaskBuild


def check_tensorboard() -> None:
    """Refuse to log where the package is missing.

    Raises:
        InputError: it is.
    """
    if find_spec("tensorboard") is None:
        raise InputError("tensorboard needs the package of this name: pip install 'sam-masks[tensorboard]'")


def check_board(folder: Path, runs: Sequence[Path]) -> None:
    """Refuse, before any work, a folder for TensorBoard that would fail later or mix with results.

    Args:
        folder: that of all runs.
        runs: folders that are the store's own.

    Raises:
        InputError: it is one of ``runs`` or in it, or cannot be made or written to; or the package is missing.
    """
    check_tensorboard()
    for own in runs:
        if folder.resolve().is_relative_to(own.resolve()):
            raise InputError(f"tensorboard {folder} lies in {own}, which is for results alone; choose another folder")
    check_writable(folder, "TensorBoard")


def folder_name(*parts: str) -> str:
    """The parts of a run's name as the name of a folder."""
    return "_".join(re.sub(r"[^\w.=+@-]+", "-", part) for part in parts)


class Board:
    """Points of one run by steps done; a context manager.

    Every point is on the disk once it is given. Where that fails (a full disk), it is said once, and what follows is
    left out: no run is lost for its curves. Hence not torch's SummaryWriter, which writes from a thread of its own.

    Args:
        folder: of its event files, made if it is not there.
        notes: what the user should be told is added to it.

    Raises:
        InputError: the package is missing.
    """

    def __init__(self, folder: Path, notes: list[str]) -> None:
        check_tensorboard()
        self.folder, self.notes = folder, notes
        self._file: BinaryIO | None = None
        self._tried(self._open)

    def epoch(self, step: int, epoch: Epoch, lr: float) -> None:
        """Means over an epoch that ended after ``step`` steps, and the learning rate of its last step."""
        values = {"loss": epoch.loss, "ascent": epoch.ascent, "radius": epoch.radius, "lr": lr}
        for name, value in values.items():
            if value is not None:
                self._add(f"train/{name}", value, step)

    def build(self, build: MaskBuild) -> None:
        """How many coordinates a mask keeps."""
        self._add("mask/coordinates", build.num_kept, build.step)

    def accuracy(self, step: int, value: float) -> None:
        """Of the validation images, after the last epoch."""
        self._add("validation/accuracy", value, step)

    def _add(self, tag: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        if self._file is not None:
            self._tried(lambda: self._write(step=step, summary=scalar(tag, value)))  # type: ignore[no-untyped-call]

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self.folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self.folder / name).open("xb")
        self._write(file_version="brain.Event:2")
        self._write(step=0, session_log=SessionLog(status=SessionLog.START))  # readers forget earlier attempts

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None
        RecordWriter(self._file).write(Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()

    def _tried(self, writing: Callable[[], None]) -> None:
        try:
            writing()
        except OSError as error:
            self.notes.append(f"no more curves in {self.folder}: {error.strerror or error}; the run is not affected")
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # again, of what is still unwritten
                self._file.close()
            self._file = None

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()
