"""One run of a study, wherever it executes: hold its lock, go on from its checkpoint, complete its record."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from experiments.build import clock_of
from experiments.checkpoint import read_weights, save_checkpoint
from experiments.config import RunConfig
from experiments.distributed import Team, device_for
from experiments.measure import MeasureConfig, measure, observe
from experiments.record import RunRecord, code_digest, environment, file_digest
from experiments.resume import Checkpointing, Interrupted
from experiments.store import CHECKPOINT, Busy, Failure, Store
from experiments.tensorboard import Board, folder_name
from experiments.train import Observer, Trained, result_of, train_run
from masks import load_plugin
from masks.errors import InputError


class Terminated(KeyboardInterrupt):
    """This process was asked to end by SIGTERM: by a scheduler, a shutdown, or a user's ``kill``."""


@dataclass(frozen=True)
class Job:
    """A run to be done.

    Attributes:
        run_id: its name.
        arm: the arm it belongs to.
        config: what to train.
        measure: what to measure at the end; None for tuning runs, which read no test image.
        cost: relative size, to start long runs first.
        init: checkpoint to start from instead of the seed's weights; the record then says its digest.
        keep_weights: whether the final weights and optimizer state are kept beside the record.
        folder: name of its folder in the store; by default the name of the run.
    """

    run_id: str
    arm: str
    config: RunConfig
    measure: MeasureConfig | None
    cost: float = 1.0
    init: Path | None = None
    keep_weights: bool = False
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.arm}, rho {self.config.rho:g}, seed {self.config.seed}"

    @property
    def name(self) -> str:
        return self.folder or self.run_id


@dataclass(frozen=True)
class Task:
    """A job and all that a process on any machine needs to do it.

    Attributes:
        job: the run.
        store: folder of the runs, the same for all processes.
        device: name of the device.
        plugins: modules to import.
        checkpoint_epochs: epochs between checkpoints; 0 for none by epochs.
        checkpoint_minutes: minutes between checkpoints.
        workers: processes that decode images, where they stay in their files.
        tensorboard: folder in which every run has one of its own for TensorBoard; None for none.
        quiet: no progress bar of the run's own.
    """

    job: Job
    store: Path
    device: str = "auto"
    plugins: tuple[str, ...] = ()
    checkpoint_epochs: int = 0
    checkpoint_minutes: float = 10.0
    workers: int = 0
    tensorboard: Path | None = None
    quiet: bool = True

    @property
    def board(self) -> Path | None:
        """The run's own folder for TensorBoard."""
        job = self.job
        label = folder_name(job.arm, f"rho={job.config.rho:g}", f"seed={job.config.seed}", job.run_id[:8])
        return None if self.tensorboard is None else self.tensorboard / label


Kind = Literal["done", "refused", "failed", "busy", "interrupted", "died"]


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a run ended.

    Attributes:
        kind: "done"; "refused": what was asked for cannot be had; "failed": an error that is not the user's; "busy":
            another driver's process works on it; "interrupted": stopped on request, with its checkpoint kept; "died":
            its process ended abruptly.
        text: the error, one line; the name of the signal that it was interrupted by.
        notes: what the driver should say.
    """

    kind: Kind
    text: str = ""
    notes: tuple[str, ...] = ()


class _Stop(threading.Event):
    """Attributes: signal: by which it was asked; "" for another way."""

    signal = ""


STOP = _Stop()
"""Set once somebody has asked this process to stop: what it is handed afterwards is not begun."""
ACTIVE = threading.Lock()
"""Held while this process does a run."""


def work(task: Task, team: Team | None = None) -> Outcome:
    """Do one run in this process. Whatever happens is an outcome; only what kills the process is not.

    Args:
        task: the run.
        team: processes that train the model together; this one leads, and the others call :func:`assist`.
    """
    torch.set_num_threads(1)
    notes: list[str] = []
    try:
        with ACTIVE, stop_requests():
            for module in task.plugins:
                load_plugin(module)
            with Store(task.store).working_on(task.job.name) as folder:
                kind, text = _attempt(task, folder, notes, team)
    except Busy:
        kind, text = "busy", ""
    except Interrupted:
        kind, text = "interrupted", STOP.signal
    except InputError as error:
        kind, text = "refused", str(error)
    return Outcome(kind, text, tuple(notes))


def assist(task: Task, team: Team) -> None:
    """Train together with rank 0 of a team, which does the run in :func:`work`.

    Raises:
        InputError: what was asked for cannot be had, or rank 0 does another run.
        Interrupted: a process of the team was asked to stop; the run is saved.
    """
    torch.set_num_threads(1)
    with ACTIVE, stop_requests():
        leads = team.by_leader(list[str])
        if not leads:  # the run is done
            return
        own = _identity(task.job)
        if own != leads:
            raise InputError(
                f"rank 0 would train run {' of code '.join(leads)}, and rank {team.rank} run {' of code '.join(own)}: "
                "the same command, data and code must be on all machines"
            )
        train_run(
            task.job.config,
            device_for(task.device, team),
            initial=None if task.job.init is None else read_weights(task.job.init),
            checkpoints=Checkpointing(Path(), stop=STOP.is_set),
            workers=task.workers,
            team=team,
        )


def _identity(job: Job) -> list[str]:
    """What all processes of a team must have in common."""
    return [job.run_id, code_digest()]


def _attempt(task: Task, folder: Path, notes: list[str], team: Team | None) -> tuple[Kind, str]:
    job, store = task.job, Store(task.store)
    try:
        if store.read(job.name, config=asdict(job.config)) is not None:
            if team is not None:
                team.by_leader(list[str])
            return "done", ""
    except InputError as damage:
        notes.append(f"{damage}; it is set aside as {store.set_aside(job.name).name} and made again")
    attempt = store.begin(job.name)
    if team is not None:
        team.by_leader(lambda: _identity(job))
    device = device_for(task.device, team)
    made_by = {"code": code_digest(), "torch": str(torch.__version__), "device": device.type}
    checkpoints = Checkpointing(
        folder / CHECKPOINT,
        task.checkpoint_epochs,
        task.checkpoint_minutes,
        STOP.is_set,
        run=job.run_id,
        world_size=job.config.world_size or 1,
        made_by=made_by,
        notes=notes,
    )
    try:
        with nullcontext() if task.board is None else Board(task.board, notes) as board:
            record, files = execute(job, device, checkpoints, task.workers, team=team, board=board, quiet=task.quiet)
            store.complete(job.name, record, attempt, files=files)
    except (InputError, Interrupted):
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        store.fail(job.name, Failure(job.run_id, job.arm, text, attempt, asdict(job.config)))
        return "failed", text
    return "done", ""


def raise_interrupted(outcome: Outcome) -> NoReturn:
    """End this process as it would have ended had the signal reached it.

    Raises:
        KeyboardInterrupt: :class:`Terminated`, but after Ctrl-C.
    """
    raise KeyboardInterrupt if outcome.text == "SIGINT" else Terminated


def execute(
    job: Job,
    device: torch.device,
    checkpoints: Checkpointing | None = None,
    workers: int = 0,
    *,
    team: Team | None = None,
    board: Board | None = None,
    quiet: bool = True,
) -> tuple[RunRecord, Callable[[Path], None]]:
    """Train and measure one model.

    Returns:
        Its record, and a function that writes the run's further files into a folder.

    Raises:
        InputError: what was asked for cannot be had.
        Interrupted: ``checkpoints.stop`` asked for it; the run is saved.
    """
    trained = train_run(
        job.config,
        device,
        initial=None if job.init is None else read_weights(job.init),
        observer=_observer(job, device),
        checkpoints=checkpoints,
        workers=workers,
        team=team,
        board=board,
        quiet=quiet,
    )
    clock = clock_of(device)
    start = clock()
    measured: dict[str, Any] = {} if job.measure is None else measure(trained, job.measure, device)
    if job.init is not None:
        measured["init_digest"] = file_digest(job.init)
    record = RunRecord(
        run_id=job.run_id,
        arm=job.arm,
        config=asdict(trained.config),
        result=result_of(trained) | measured,
        telemetry={
            "clock": "time on the wall" if device.type == "cuda" else "processor time",
            "train_seconds": trained.train_seconds,
            "mask_seconds": trained.mask_seconds,
            "measure_seconds": clock() - start + trained.observe_seconds,
        },
        environment=environment(device),
    )
    return record, lambda folder: _keep(trained, folder, weights=job.keep_weights)


def _observer(job: Job, device: torch.device) -> Observer | None:
    """What measures along the run; None for a tuning run."""
    config = job.measure
    if config is None:
        return None
    return lambda model, split: observe(model, split, job.config.seed, config, device)


def _keep(trained: Trained, folder: Path, *, weights: bool) -> None:
    trained.mask.save(folder / "mask.npz")
    if weights:
        save_checkpoint(folder / CHECKPOINT, {"model": trained.model.state_dict(), "sam": trained.sam.state_dict()})


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises :class:`Terminated`, so that what runs is stopped as by Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere, signals cannot be set
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_requests() -> Iterator[None]:
    """Inside, SIGTERM (a scheduler's warning, or the driver's) and Ctrl-C, where it is not ignored, set :data:`STOP`
    instead of ending the process; the second Ctrl-C ends it at once.

    Raises:
        Interrupted: somebody has asked already.
    """
    if STOP.is_set():
        raise Interrupted
    if threading.current_thread() is not threading.main_thread():  # elsewhere, signals cannot be set
        yield
        return

    def ask(number: int, frame: object) -> None:
        if STOP.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        STOP.signal = signal.Signals(number).name
        STOP.set()

    heard = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
