"""Runs on disk: one folder per run, complete or not there; safe for several drivers and for any crash.

::

    STORE/RUN_ID/result.json       what configuration and seed determine: the same bytes when made again
    STORE/RUN_ID/telemetry.json    what they do not: times, host, attempts
    STORE/RUN_ID/mask.npz          the final mask, and further files of the run
    STORE/RUN_ID.work/             of a run that is not finished: its lock, checkpoint, attempts and last failure
    STORE/RUN_ID.partial/          of a process that died while it wrote a record
    STORE/RUN_ID.damaged-N/        a record that could not be read, set aside

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
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from experiments.record import RunRecord, write_text
from masks.errors import InputError

RESULT, TELEMETRY, CHECKPOINT = "result.json", "telemetry.json", "checkpoint.pt"
WORK, PARTIAL, DAMAGED = ".work", ".partial", ".damaged-"
SCHEMA = "sam-masks/run/2"
_LOCK, _FAILURE, _ATTEMPTS = "lock", "failure.json", "attempts.json"


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
    """A folder of runs. Nothing is written before something is asked to be.

    Args:
        folder: made when it is first written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Make the folder, and remove what processes that died left of runs that are complete.

        Raises:
            InputError: it cannot be made or written to.
        """
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for name in unfinished(self.folder):
            if self.is_complete(name):
                try:
                    with self.working_on(name):
                        pass
                except Busy:
                    pass

    # -- reading --------------------------------------------------------------------------------------------

    def is_complete(self, name: str) -> bool:
        """Whether there is a record, damaged or not; a folder that holds something else is none."""
        return (self.folder / name / RESULT).is_file()

    def read(self, name: str, *, config: dict[str, Any] | None = None) -> RunRecord | None:
        """The record of a completed run, or None where there is none.

        Args:
            name: of its folder.
            config: refuse a record of another configuration.

        Raises:
            InputError: the record is damaged or of another schema or configuration; see :meth:`set_aside`.
        """
        if not self.is_complete(name):
            return None
        record = read_run(self.folder / name)
        if config is not None and record.config != json.loads(json.dumps(config)):
            raise InputError(f"{self.folder / name} is the record of another run ({record.run_id})")
        return record

    # -- one run ----------------------------------------------------------------------------------------------

    @contextmanager
    def working_on(self, name: str) -> Iterator[Path]:
        """Hold the run's lock; gives the folder for what is to survive a crash, which is gone once it is not needed.

        Raises:
            Busy: another process holds it.
            InputError: the folder cannot be written to.
        """
        work = self.folder / (name + WORK)
        # A soft lock would outlive a process that dies: where there are no others, that is said.
        lock = filelock.FileLock(work / _LOCK, timeout=0, fallback_to_soft=False)
        with writing_to(self.folder):
            work.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except (filelock.Timeout, FileNotFoundError):  # held, or just removed by who held it
                raise Busy(name) from None
        try:
            yield work
        finally:
            if self.is_complete(name) or not any((work / kept).exists() for kept in (CHECKPOINT, _FAILURE)):
                shutil.rmtree(work, ignore_errors=True)
            lock.release()

    def begin(self, name: str) -> int:
        """Count an attempt at the run whose lock is held; returns its number, from 1."""
        path = self.folder / (name + WORK) / _ATTEMPTS
        try:
            attempt = int(json.loads(path.read_text(encoding="utf-8"))) + 1
        except (OSError, ValueError, TypeError):
            attempt = 1
        with writing_to(self.folder):
            write_text(path, f"{attempt}\n")
        return attempt

    def fail(self, name: str, failure: Failure) -> None:
        """Note why an attempt failed."""
        with writing_to(self.folder):
            write_text(self.folder / (name + WORK) / _FAILURE, json.dumps(asdict(failure), indent=1) + "\n")

    def set_aside(self, name: str) -> Path:
        """Rename what is in the place of a run whose lock is held, so that nothing is lost; returns where it went."""
        n = 1
        while (aside := self.folder / f"{name}{DAMAGED}{n}").exists():
            n += 1
        with writing_to(self.folder):
            os.rename(self.folder / name, aside)
        return aside

    def complete(
        self, name: str, record: RunRecord, attempts: int, *, files: Callable[[Path], None] | None = None
    ) -> None:
        """Keep the record of the run whose lock is held: written to the side, then renamed. What stands in its place
        and is no record is set aside.

        Args:
            name: of its folder.
            record: the run.
            attempts: how many it took.
            files: writes further files of the run into the folder that it is given.

        Raises:
            InputError: it cannot be written.
        """
        telemetry = {
            **record.telemetry,
            "attempts": attempts,
            "host": socket.gethostname(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self._written(name) as aside:
            if files is not None:
                files(aside)
            write_run(aside, record, telemetry)

    @contextmanager
    def _written(self, name: str) -> Iterator[Path]:
        """A folder to write a run into, which is then renamed; what stands in its place and is no record is set aside.

        Raises:
            InputError: it cannot be written; nothing is left of it.
        """
        aside = self.folder / (name + PARTIAL)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            with writing_to(self.folder):
                aside.mkdir()
                yield aside
                if not self.is_complete(name) and (self.folder / name).exists():
                    self.set_aside(name)
                os.rename(aside, self.folder / name)
        except InputError:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def take_over(self, name: str, source: Store, arm: str, config: dict[str, Any]) -> bool:
        """Copy a completed run of another store, as one of this store's arm.

        Args:
            name: of its folder in both.
            source: where it is.
            arm: the arm that it belongs to here.
            config: what it must have been of.

        Returns:
            Whether it is here now: not where there is none, or another process is making it.

        Raises:
            InputError: it is damaged or of another configuration, or cannot be copied.
        """
        record = source.read(name, config=config)
        if record is None:
            return False
        taken = replace(record, arm=arm, telemetry=record.telemetry | {"taken_from": str(source.folder.parent)})
        with suppress(Busy), self.working_on(name):
            if not self.is_complete(name):
                with self._written(name) as aside:
                    shutil.copytree(source.folder / name, aside, dirs_exist_ok=True)
                    write_run(aside, taken, taken.telemetry)
        return self.is_complete(name)


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
        if not all(isinstance(part, dict) for part in (record.config, record.result, record.environment)):
            raise ValueError("a part is missing")
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} is not the record of a run ({type(error).__name__}: {error})") from None


def completed(folder: Path) -> list[str]:
    """Names of the runs in a store that are complete, sorted."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_run(entry.name) and Store(folder).is_complete(entry.name))


def is_run(name: str) -> bool:
    """Whether a folder of this name in a store is that of a complete run."""
    return not name.startswith(".") and not name.endswith((WORK, PARTIAL)) and DAMAGED not in name


def unfinished(folder: Path) -> list[str]:
    """Names of the runs in a store that were begun and have something kept of them, sorted."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name.removesuffix(WORK) for entry in entries if entry.name.endswith(WORK))


def read_failure(folder: Path, name: str) -> Failure | None:
    """Why the last attempt at an unfinished run failed; None if it did not."""
    try:
        return Failure(**json.loads((folder / (name + WORK) / _FAILURE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_all(folder: Path) -> list[RunRecord]:
    """The records of all completed runs in a store, sorted by name.

    Raises:
        InputError: one of them cannot be read, or two are of the same arm and configuration.
    """
    names = completed(folder)
    records = [read_run(folder / name) for name in names]
    seen: dict[str, str] = {}
    for name, record in zip(names, records, strict=True):
        other = seen.setdefault(json.dumps([record.arm, record.config], sort_keys=True), name)
        if other != name:
            raise InputError(
                f"{folder} holds the same run of arm {record.arm} twice, as {other} and {name}: made by different "
                "versions, or of other files; keep one of them"
            )
    return records


def _write_synced(path: Path, text: str) -> None:
    """Write to the disk itself: after a power cut, a renamed folder must not hold empty files."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def check_writable(folder: Path, what: str) -> None:
    """Refuse, before anything is made, a folder that can neither be written to nor be made.

    Raises:
        InputError: it is one; ``what`` says what it was to be used for.
    """
    place = folder.resolve()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot use {folder} for {what}: {there} is not a folder that can be written to")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of a folder (full disk, no permission) into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; what is complete is kept") from None
