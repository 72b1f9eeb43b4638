"""Runs as jobs of a Slurm cluster, in arrays, through submitit."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from experiments.executors.base import Executor
from experiments.worker import STOP, Outcome, Task, work
from masks.errors import InputError

_POLL_SECONDS = 2.0
LOGS = "slurm"
"""Folder beside the store for submitit's scripts and logs."""


class SlurmExecutor(Executor):
    """Submits all runs as one job array and waits for them. A job that reaches its time limit or is pre-empted saves
    its run, which is queued again.

    The store must lie on a file system that all nodes share, with locks.

    Args:
        cluster: "slurm", or "local" for processes of this machine through the same code.
        minutes: time limit of a job.
        cpus: processors per run.
        gpus: GPUs per run.
        partition: name of the partition; None for the default one.
        at_once: how many jobs of the array run at once.
        warning_seconds: how long before the time limit a job is told.

    Raises:
        InputError: submitit is not installed, Slurm is not there, or settings out of range.
    """

    def __init__(
        self,
        *,
        cluster: Literal["slurm", "local"] = "slurm",
        minutes: int = 240,
        cpus: int = 1,
        gpus: float = 0,
        partition: str | None = None,
        at_once: int = 256,
        warning_seconds: int = 90,
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise InputError("--executor slurm needs submitit: pip install 'sam-masks[slurm]'") from None
        if cluster == "slurm" and shutil.which("srun") is None:
            raise InputError("--executor slurm needs Slurm, and there is no srun here; start it on a login node")
        if minutes < 1 or gpus < 0 or gpus != int(gpus):
            raise InputError(f"minutes must be at least 1 and gpus a whole number with slurm, got {minutes} and {gpus}")
        self._make = submitit.AutoExecutor
        self._cluster = cluster
        self._parameters = {
            "timeout_min": minutes,
            "cpus_per_task": cpus,
            "gpus_per_node": int(gpus),
            "slurm_array_parallelism": at_once,
            "slurm_signal_delay_s": warning_seconds,
            **({"slurm_partition": partition} if partition else {}),
        }
        self._jobs: dict[Any, Task] = {}

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome] | None]:
        if not tasks:
            return
        executor = self._make(folder=tasks[0].store.parent / LOGS, cluster=self._cluster)
        executor.update_parameters(**self._parameters)
        self._jobs = dict(zip(executor.map_array(_work, list(tasks)), tasks, strict=True))
        while self._jobs:
            done = [job for job in self._jobs if job.done()]
            if not done:
                yield None
                time.sleep(_POLL_SECONDS)
            for job in done:
                task, error = self._jobs.pop(job), job.exception()
                if error is not None:
                    yield task, Outcome("died", f"Slurm job {job.job_id}: {' '.join(str(error).split())[:300]}")
                elif job.result().kind == "interrupted":
                    self._jobs[executor.submit(_work, task)] = task
                else:
                    yield task, job.result()

    def stop(self) -> None:
        for job in self._jobs:
            job.cancel()
        self._jobs = {}


def _work(task: Task) -> Outcome:
    signal.signal(signal.SIGUSR2, lambda *_: STOP.set())  # Slurm's warning, by submitit's choice
    return work(task)
