"""Runs as Ray tasks: on this machine, or on a cluster by its address."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.executors.base import Executor
from experiments.worker import STOP, Outcome, Task, work
from masks.errors import InputError

_RETRIES = 10


class RayExecutor(Executor):
    """Every run is a task with the processors and GPUs that it asks for; Ray starts it again where a node dies.

    The store must lie on a file system that all nodes share, with locks.

    Args:
        address: of a cluster; None for Ray of this machine, "auto" for the one that runs here.
        cpus: processors per run.
        gpus: GPUs per run; a fraction puts several runs on one.

    Raises:
        InputError: Ray is not installed, no cluster answers, or it has too little for one run.
    """

    def __init__(self, address: str | None = None, *, cpus: float = 1, gpus: float = 0) -> None:
        try:
            import ray
        except ImportError:
            raise InputError("--executor ray needs Ray: pip install 'sam-masks[ray]'") from None
        self._ray: Any = ray
        self._pending: dict[Any, Task] = {}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            if not ray.is_initialized():
                self._ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from None
        finally:
            if signal.getsignal(signal.SIGTERM) is not handler:  # Ray sets its own, which ends without a word
                signal.signal(signal.SIGTERM, handler)
        have = self._ray.cluster_resources()
        for name, asked in (("CPU", cpus), ("GPU", gpus)):
            if asked > have.get(name, 0):
                raise InputError(f"a run asks for {asked:g} {name}s, the Ray cluster has {have.get(name, 0):g}")
        # Ray itself starts a task again whose process or node died; the lock and the checkpoint make that safe.
        # Errors are outcomes, and not retried by Ray.
        self._work: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(_work)

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome] | None]:
        ray = self._ray
        self._pending = {self._work.remote(task, str(Path.cwd())): task for task in tasks}
        while self._pending:
            done, _ = ray.wait(list(self._pending), num_returns=1, timeout=2.0)
            if not done:
                yield None
            for reference in done:
                task = self._pending.pop(reference)
                try:
                    outcome: Outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    outcome = Outcome("died", f"Ray lost it: {type(error).__name__}")
                if outcome.kind == "interrupted":  # its node goes away: another one goes on
                    outcome = Outcome("died", "its process was stopped from outside")
                yield task, outcome

    def stop(self) -> None:
        pending, self._pending = list(self._pending), {}
        for reference in pending:
            self._ray.cancel(reference, force=False)  # as Ctrl-C: a run that is going on saves itself
        if pending:
            self._ray.wait(pending, num_returns=len(pending), timeout=60.0)


def _work(task: Task, folder: str) -> Outcome:
    """In the driver's folder, where relative paths of data and the user's own modules are found."""
    STOP.clear()  # Ray gives the process to other runs after one that was cancelled
    if Path(folder).is_dir():
        os.chdir(folder)
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return work(task)
