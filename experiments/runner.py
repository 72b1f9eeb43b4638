"""Run many configurations: one process per core, one thread each, records written as they finish."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.config import RunConfig
from experiments.measure import MeasureConfig, measure, observe
from experiments.record import RunRecord, environment
from experiments.train import Observer, Trained, clock_of, pick_device, result_of, train_run
from masks import load_plugin
from masks.errors import InputError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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


class RunFailed(RuntimeError):
    """A run raised an error that is not the user's."""


def execute(job: Job, device_name: str) -> RunRecord:
    """Do one run here, in this process."""
    device = pick_device(device_name)
    trained = train_run(job.config, device, observer=observer_of(job.config, job.measure, device))
    return record_of(trained, job.run_id, job.arm, job.measure, device)


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
    measured = {} if measure_config is None else measure(trained, measure_config, device)
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


def _start_worker(plugins: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for module in plugins:
        load_plugin(module)


@contextmanager
def _starting_children() -> Iterator[None]:
    """What processes started inside inherit: one thread, read when they load their libraries, and deafness to
    Ctrl-C, which is for this process; they are ended by :meth:`Runner.__exit__`."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    in_main = threading.current_thread() is threading.main_thread()  # elsewhere, signals cannot be set
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _load(path: Path, job: Job) -> RunRecord:
    record = RunRecord.load(path)
    if record.run_id != job.run_id or record.config != asdict(job.config):
        raise InputError(f"{path} is the record of another run ({record.run_id}); move it away")
    return record


class Runner:
    """A pool of worker processes; use it as a context manager.

    Args:
        folder: where records go; records that are there already are not made again.
        processes: how many runs at once.
        device: name of the device of every run.
        plugins: modules that every worker imports for their masks.
        quiet: no progress bar.
    """

    def __init__(
        self, folder: Path, *, processes: int, device: str = "auto", plugins: Sequence[str] = (), quiet: bool = False
    ) -> None:
        if processes < 1:
            raise InputError(f"processes must be at least 1, got {processes}")
        self.folder, self.device, self.quiet = folder, device, quiet
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot use {folder} for results: {error.strerror or error}") from None
        self._pool = ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tuple(plugins),)
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: Any) -> None:
        failed = exception[0] is not None
        workers = dict(getattr(self._pool, "_processes", None) or {}) if failed else {}
        self._pool.shutdown(wait=not failed, cancel_futures=True)
        for worker in workers.values():  # else the interpreter would wait for runs that nobody wants
            worker.terminate()

    def run(self, jobs: Sequence[Job], label: str) -> dict[str, RunRecord]:
        """Do all jobs, or read their records where they are done.

        Returns:
            Records by run id.

        Raises:
            InputError: a run found that its configuration cannot be had, or a record cannot be read or written;
                finished records are kept.
            RunFailed: a run failed otherwise; the others are finished first, unless its process died.
        """
        if not jobs:
            return {}
        records: dict[str, RunRecord] = {}
        todo: list[Job] = []
        for job in jobs:
            path = self.folder / f"{job.run_id}.json"
            if path.exists():
                records[job.run_id] = _load(path, job)
            else:
                todo.append(job)
        failures: list[str] = []
        bar = tqdm(
            total=len(jobs), initial=len(records), desc=label, unit="run", disable=self.quiet, dynamic_ncols=True
        )
        todo.sort(key=lambda job: -job.cost)
        with bar:
            with _starting_children():
                waiting: dict[Future[RunRecord], Job] = {
                    self._pool.submit(execute, job, self.device): job for job in todo
                }
            while waiting:
                # Wake up now and then, so that the bar's clock moves although no run has finished.
                done, _ = wait(waiting, timeout=2.0, return_when=FIRST_COMPLETED)
                bar.refresh()
                for future in done:
                    job = waiting.pop(future)
                    try:
                        record = future.result()
                    except InputError as error:
                        raise InputError(f"arm {job.arm}: {error}") from None
                    except BrokenProcessPool:
                        raise RunFailed(
                            f"a process that ran {job.arm}, seed {job.config.seed}, or another run, ended abruptly "
                            "(out of memory?); finished runs are kept; try fewer --processes"
                        ) from None
                    except Exception as error:
                        text = " ".join(f"{type(error).__name__}: {error}".split())
                        failures.append(f"{job.arm}, rho {job.config.rho:g}, seed {job.config.seed}: {text}")
                        continue
                    try:
                        record.save(self.folder)
                    except OSError as error:
                        raise InputError(f"cannot write to {self.folder}: {error.strerror or error}") from None
                    records[job.run_id] = record
                    bar.update()
        if failures:
            raise RunFailed(f"{len(failures)} of {len(jobs)} runs failed, the others are kept; first: {min(failures)}")
        return records
