"""Runs as jobs of a Slurm cluster, in arrays, through submitit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.executors.base import Executor
from experiments.worker import Outcome, Task, work
from masks.errors import InputError

_POLL_SECONDS = 2.0


class _Requeued:
    """A task that Slurm may stop at its time limit: it has saved itself, and is put into the queue again."""

    def __call__(self, task: Task) -> Outcome:
        return work(task)

    def checkpoint(self, task: Task) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, task)


class SlurmExecutor(Executor):
    """Submits all runs as one job array and waits for them.

    The store must lie on a file system that all nodes share, with locks.

    Args:
        folder: for submitit's scripts and logs.
        cluster: "slurm", or "local" for processes of this machine through the same code.
        minutes: time limit of a job; one that reaches it saves itself and is queued again.
        cpus: processors per run.
        gpus: GPUs per run.
        partition: name of the partition; None for the default one.
        at_once: how many jobs of the array run at once.

    Raises:
        InputError: submitit is not installed, or Slurm is not there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cluster: str = "slurm",
        minutes: int = 240,
        cpus: int = 1,
        gpus: int = 0,
        partition: str | None = None,
        at_once: int = 256,
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise InputError("--executor slurm needs submitit: pip install 'sam-masks[slurm]'") from None
        self._jobs: list[Any] = []
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(
                timeout_min=minutes, cpus_per_task=cpus, gpus_per_node=gpus, slurm_array_parallelism=at_once,
                **({"slurm_partition": partition} if partition else {}),
            )  # fmt: skip
        except RuntimeError as error:
            raise InputError(f"cannot use Slurm: {' '.join(str(error).split())}") from None

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome] | None]:
        waiting = dict(zip(self._executor.map_array(_Requeued(), list(tasks)), tasks, strict=True))
        self._jobs = list(waiting)
        while waiting:
            done = [job for job in waiting if job.done()]
            if not done:
                yield None
                time.sleep(_POLL_SECONDS)
            for job in done:
                task = waiting.pop(job)
                self._jobs.remove(job)
                error = job.exception()
                if error is None:
                    yield task, job.result()
                else:
                    yield task, Outcome("died", f"Slurm job {job.job_id}: {' '.join(str(error).split())[:300]}")

    def stop(self) -> None:
        for job in self._jobs:
            job.cancel()
        self._jobs = []
