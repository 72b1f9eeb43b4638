"""One run of a study, wherever it executes: hold its lock, go on from its checkpoint, complete its record."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.build import clock_of, pick_device
from experiments.config import RunConfig
from experiments.measure import MeasureConfig, measure, observe
from experiments.record import RunRecord, environment
from experiments.resume import Checkpointing, Interrupted
from experiments.store import Busy, Store
from experiments.train import Observer, Trained, result_of, train_run
from masks import load_plugin
from masks.errors import InputError

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Job:
    """A run to be done.

    Attributes:
        run_id: its name.
        arm: the arm it belongs to.
        config: what to train.
        measure: what to measure at the end; None for tuning runs, which read no test image.
        cost: relative size, to start long runs first.
    """

    run_id: str
    arm: str
    config: RunConfig
    measure: MeasureConfig | None
    cost: float = 1.0

    def __str__(self) -> str:
        return f"{self.arm}, rho {self.config.rho:g}, seed {self.config.seed}"


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
    """

    job: Job
    store: Path
    device: str = "auto"
    plugins: tuple[str, ...] = ()
    checkpoint_epochs: int = 0
    checkpoint_minutes: float = 10.0


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a run ended.

    Attributes:
        kind: "done"; "refused": what was asked for cannot be had; "failed": an error that is not the user's; "busy":
            another driver's process works on it; "interrupted": stopped on request, with its checkpoint kept; "died":
            its process ended abruptly.
        text: the error, one line.
        notes: what the driver should say.
    """

    kind: Literal["done", "refused", "failed", "busy", "interrupted", "died"]
    text: str = ""
    notes: tuple[str, ...] = ()


STOP = threading.Event()
"""Set once somebody has asked this process to stop: what it is handed afterwards is not begun."""


def work(task: Task) -> Outcome:
    """Do one run in this process. Whatever happens is an outcome; only what kills the process is not."""
    torch.set_num_threads(1)
    try:
        if STOP.is_set():
            raise Interrupted
        for module in task.plugins:
            load_plugin(module)
        store = Store(task.store)
        with store.working_on(task.job.run_id) as folder:
            return _attempt(task, store, folder)
    except Busy:
        return Outcome("busy")
    except Interrupted:
        return Outcome("interrupted")
    except InputError as error:
        return Outcome("refused", str(error))


def _attempt(task: Task, store: Store, folder: Path) -> Outcome:
    job, notes = task.job, []
    try:
        if store.read(job.run_id, config=asdict(job.config)) is not None:
            return Outcome("done")
    except InputError as damage:
        aside = store.set_aside(job.run_id)
        notes.append(f"{damage}; it is set aside as {aside.name} and made again")
    attempt = store.begin(job.run_id)
    try:
        with stop_requests():
            checkpoints = Checkpointing(
                folder / CHECKPOINT, task.checkpoint_epochs, task.checkpoint_minutes, STOP.is_set
            )
            device = pick_device(task.device)
            trained = train_run(
                job.config, device, observer=observer_of(job.config, job.measure, device), checkpoints=checkpoints
            )
            record = record_of(trained, job.run_id, job.arm, job.measure, device)
            store.complete(record, attempt, files=lambda into: trained.mask.save(into / "mask.npz"))
    except (InputError, Interrupted):
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        store.fail(job.run_id, job.arm, text, attempt, asdict(job.config))
        return Outcome("failed", text, tuple(notes))
    return Outcome("done", notes=tuple(notes))


def observer_of(config: RunConfig, measure_config: MeasureConfig | None, device: torch.device) -> Observer | None:
    """What measures along the run; None for a tuning run (``measure_config`` None)."""
    if measure_config is None:
        return None
    return lambda model, split: observe(model, split, config.seed, measure_config, device)


def record_of(
    trained: Trained, run_id: str, arm: str, measure_config: MeasureConfig | None, device: torch.device
) -> RunRecord:
    """Measure a trained model, unless it is a tuning run (None), and write down all that is known of the run."""
    clock = clock_of(device)
    start = clock()
    measured: dict[str, Any] = {} if measure_config is None else measure(trained, measure_config, device)
    return RunRecord(
        run_id=run_id,
        arm=arm,
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


@contextmanager
def stop_requests() -> Iterator[None]:
    """Inside, SIGTERM (a scheduler's warning, or the driver's) sets :data:`STOP` instead of ending the process."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere, signals cannot be set
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
