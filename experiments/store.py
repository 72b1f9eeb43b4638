"""Runs on disk: one folder per run, complete or not there; safe for several drivers and for any crash.

::

    STORE/RUN_ID/result.json       what configuration and seed determine: the same bytes when made again
    STORE/RUN_ID/telemetry.json    what they do not: times, host, attempts
    STORE/RUN_ID/mask.npz          the final mask, and further files of the run
    STORE/RUN_ID.work/             of a run that is not finished: its checkpoint and attempts
    STORE/RUN_ID.damaged-N/        a record that could not be read, set aside
    STORE/.locks/RUN_ID            held while somebody works on the run

A run is written to ``RUN_ID.partial`` and renamed, so completed means renamed. Locks are those of the operating
system (library filelock): a process that dies lets go of them, on a network file system if its server supports locks.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from experiments.record import RunRecord, write_text
from masks.errors import InputError

RESULT, TELEMETRY, WORK, PARTIAL, DAMAGED = "result.json", "telemetry.json", ".work", ".partial", ".damaged-"
SCHEMA = "sam-masks/run/2"
_FAILURE = "failure.json"
_ATTEMPTS = "attempts.json"


class Busy(Exception):
    """Another process is working on the run."""


@dataclass(frozen=True)
class Failure:
    """Why the last attempt at a run failed.

    Attributes:
        run_id: its name.
        arm: the arm it belongs to.
        error: one line.
        attempts: how often it was tried.
        config: what was to be run.
    """

    run_id: str
    arm: str
    error: str
    attempts: int
    config: dict[str, Any]


class Store:
    """A folder of runs.

    Args:
        folder: made if it is not there.

    Raises:
        InputError: it cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with writing_to(folder):
            (folder / ".locks").mkdir(parents=True, exist_ok=True)

    # -- reading --------------------------------------------------------------------------------------------

    def read(self, run_id: str, *, config: dict[str, Any] | None = None) -> RunRecord | None:
        """The record of a completed run, or None; a damaged one counts as not there, see :meth:`set_aside`.

        Args:
            run_id: its name.
            config: refuse a record of another configuration.

        Raises:
            InputError: the record is of another configuration (two configurations with one name: never by chance).
        """
        path = self.folder / run_id
        if not path.is_dir():
            return None
        record = read_run(path)
        if config is not None and record.config != config:
            raise InputError(f"{path} is the record of another run ({record.run_id}); move it away")
        return record

    def set_aside(self, run_id: str) -> Path:
        """Rename a damaged record, so that the run is made again and nothing is lost; returns where it went."""
        n = 1
        while (aside := self.folder / f"{run_id}{DAMAGED}{n}").exists():
            n += 1
        with writing_to(self.folder):
            os.rename(self.folder / run_id, aside)
        return aside

    def is_complete(self, run_id: str) -> bool:
        return (self.folder / run_id).is_dir()

    def completed(self) -> list[str]:
        """Names of all completed runs, sorted."""
        return sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir() and "." not in entry.name)

    def failures(self) -> list[Failure]:
        """Runs whose last attempt failed and that were not completed since, sorted by name."""
        out = []
        for path in sorted(self.folder.glob(f"*{WORK}/{_FAILURE}")):
            with suppress(OSError, ValueError, TypeError):
                out.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
        return out

    # -- one run ----------------------------------------------------------------------------------------------

    @contextmanager
    def working_on(self, run_id: str) -> Iterator[Path]:
        """Hold the run's lock; gives the folder for what is to survive a crash.

        Raises:
            Busy: another process holds it.
            InputError: the folder cannot be written to.
        """
        lock = filelock.FileLock(self.folder / ".locks" / run_id, timeout=0)
        try:
            with writing_to(self.folder):
                lock.acquire()
        except filelock.Timeout:
            raise Busy(run_id) from None
        try:
            work = self.folder / (run_id + WORK)
            with writing_to(self.folder):
                work.mkdir(exist_ok=True)
            yield work
        finally:
            lock.release()

    def begin(self, run_id: str) -> int:
        """Count an attempt at the run whose lock is held; returns its number, from 1."""
        path = self.folder / (run_id + WORK) / _ATTEMPTS
        try:
            attempt = int(json.loads(path.read_text(encoding="utf-8"))) + 1
        except (OSError, ValueError, TypeError):
            attempt = 1
        with writing_to(self.folder):
            write_text(path, f"{attempt}\n")
        return attempt

    def fail(self, run_id: str, arm: str, error: str, attempts: int, config: dict[str, Any]) -> None:
        """Note why an attempt failed."""
        path = self.folder / (run_id + WORK) / _FAILURE
        with writing_to(self.folder):
            write_text(path, json.dumps(asdict(Failure(run_id, arm, error, attempts, config)), indent=1) + "\n")

    def complete(self, record: RunRecord, attempts: int, *, files: Callable[[Path], None] | None = None) -> None:
        """Keep a record: written to the side, then renamed. The lock must be held.

        Args:
            record: the run.
            attempts: how many it took.
            files: writes further files of the run into the folder that it is given.
        """
        aside = self.folder / (record.run_id + PARTIAL)
        with writing_to(self.folder):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            if files is not None:
                files(aside)
            telemetry = {
                **record.telemetry,
                "attempts": attempts,
                "host": socket.gethostname(),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            write_run(aside, record, telemetry)
            os.rename(aside, self.folder / record.run_id)
            shutil.rmtree(self.folder / (record.run_id + WORK), ignore_errors=True)


def write_run(folder: Path, record: RunRecord, telemetry: dict[str, Any]) -> None:
    """Write both files of a record into a folder."""
    content = {
        "schema": SCHEMA,
        "run_id": record.run_id,
        "arm": record.arm,
        "environment": record.environment,
        "config": record.config,
        "result": record.result,
    }
    _write_synced(folder / RESULT, json.dumps(content, indent=1, allow_nan=False) + "\n")
    _write_synced(folder / TELEMETRY, json.dumps({"schema": SCHEMA, **telemetry}, indent=1) + "\n")


def read_run(folder: Path) -> RunRecord:
    """Read the record in a folder; nothing is executed.

    Raises:
        InputError: not a record, a damaged one, or one of another schema.
    """
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        telemetry = json.loads((folder / TELEMETRY).read_text(encoding="utf-8"))
        for part in (content, telemetry):
            if part.pop("schema") != SCHEMA:
                raise InputError(f"{folder} has another schema than {SCHEMA}")
        record = RunRecord(telemetry=telemetry, **content)
        if record.run_id != folder.name.partition(".")[0]:
            raise ValueError(f"it calls itself {record.run_id}")
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} is not the record of a run ({type(error).__name__}: {error})") from None


def read_all(folder: Path) -> list[RunRecord]:
    """The records of all completed runs in a store, sorted by name.

    Raises:
        InputError: one of them cannot be read.
    """
    return [read_run(folder / run_id) for run_id in Store(folder).completed()] if folder.is_dir() else []


def _write_synced(path: Path, text: str) -> None:
    """Write to the disk itself: after a power cut, a renamed folder must not hold empty files."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of a folder (full disk, no permission) into one line."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        if isinstance(error, filelock.Timeout):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"cannot write to {folder}: {reason}; what is complete is kept") from None
