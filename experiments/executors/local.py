"""Runs in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress

import torch

from experiments.executors.base import Executor
from experiments.worker import STOP, Outcome, Task, work
from masks.errors import InputError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PATIENCE_SECONDS = 60.0


def _start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_outlive_nobody, daemon=True).start()


def _outlive_nobody() -> None:
    """A process whose driver was killed saves its run and ends, instead of waiting for orders forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        STOP.set()
        time.sleep(_PATIENCE_SECONDS)
        os._exit(1)


@contextmanager
def _starting_children() -> Iterator[None]:
    """What processes started inside inherit: one thread, read when they load their libraries, and deafness to
    Ctrl-C, which is for this process; they are asked to stop by :meth:`LocalExecutor.stop`."""
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


class LocalExecutor(Executor):
    """A pool of processes, one thread each; a pool that lost a process is replaced.

    Args:
        processes: how many runs at once.

    Raises:
        InputError: fewer than one.
    """

    def __init__(self, processes: int) -> None:
        if processes < 1:
            raise InputError(f"processes must be at least 1, got {processes}")
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome] | None]:
        waiting = self._submit(tasks)
        while waiting:
            done, _ = wait(waiting, timeout=2.0, return_when=FIRST_COMPLETED)
            if not done:
                yield None
            for future in done:
                task = waiting.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    # Nobody can tell whose process it was: all that was handed out comes back.
                    self._pool = None
                    outcome = Outcome("died", "its process, or another of the pool, ended abruptly (out of memory?)")
                yield task, outcome

    def _submit(self, tasks: Sequence[Task]) -> dict[Future[Outcome], Task]:
        with _starting_children():
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    self.processes, multiprocessing.get_context("spawn"), initializer=_start_worker
                )
            return {self._pool.submit(work, task): task for task in tasks}

    def stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        workers = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            with suppress(OSError, ValueError):
                worker.terminate()  # a run that is going on saves itself first; an idle process ends
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.kill()
