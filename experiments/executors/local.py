"""Runs in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch

from experiments.executors.base import Executor
from experiments.worker import ACTIVE, STOP, Outcome, Task, work
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
        ACTIVE.acquire()
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


@dataclass
class _Slot:
    """One process at a time, replaced when it dies: nobody else's run is lost with it, and it is known whose was."""

    number: int
    pool: ProcessPoolExecutor | None = None

    def submit(self, task: Task) -> Future[Outcome]:
        if self.pool is None:
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(1, spawn, initializer=_start_worker)
        return self.pool.submit(work, task)

    def result(self, future: Future[Outcome]) -> Outcome:
        try:
            return future.result()
        except BrokenProcessPool:
            self.pool = None
            return Outcome("died", "its process ended abruptly (out of memory?)")


class LocalExecutor(Executor):
    """Processes of one thread each; on a machine with several GPUs, the runs are dealt out to them.

    Args:
        processes: how many runs at once.

    Raises:
        InputError: fewer than one.
    """

    def __init__(self, processes: int) -> None:
        if processes < 1:
            raise InputError(f"processes must be at least 1, got {processes}")
        self._slots = [_Slot(number) for number in range(processes)]

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome] | None]:
        waiting, free = deque(tasks), deque(self._slots)
        running: dict[Future[Outcome], tuple[Task, _Slot]] = {}
        while waiting or running:
            with _starting_children():
                while waiting and free:
                    task, slot = waiting.popleft(), free.popleft()
                    running[slot.submit(replace(task, device=_device_of(task.device, slot.number)))] = task, slot
            done, _ = wait(running, timeout=2.0, return_when=FIRST_COMPLETED)
            if not done:
                yield None
            for future in done:
                task, slot = running.pop(future)
                free.append(slot)
                yield task, slot.result(future)

    def stop(self) -> None:
        pools = [slot.pool for slot in self._slots if slot.pool is not None]
        workers = [worker for pool in pools for worker in (getattr(pool, "_processes", None) or {}).values()]
        for slot in self._slots:
            slot.pool = None
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        try:
            for worker in workers:
                with suppress(OSError, ValueError):
                    worker.terminate()  # a run that is going on saves itself first; an idle process ends
            deadline = time.monotonic() + _PATIENCE_SECONDS
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
        finally:  # also where the user has no patience
            for worker in workers:
                with suppress(OSError, ValueError):
                    worker.kill()


def num_gpus(device: str) -> int:
    """How many GPUs the runs of a device by this name are dealt out to; at least 1."""
    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def _device_of(name: str, slot: int) -> str:
    """The GPU of a slot, where the user named none of several."""
    return f"cuda:{slot % num_gpus(name)}" if num_gpus(name) > 1 else name
