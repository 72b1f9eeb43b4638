"""Carry out the runs of a study: those that are not in the store yet, wherever the executor puts them."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from experiments.executors.base import Executor
from experiments.record import RunRecord
from experiments.store import Store
from experiments.tensorboard import check_board
from experiments.worker import Job, Outcome, Task, raise_interrupted
from masks.errors import InputError

_MOST_DEATHS = 10
_POLL_SECONDS = 0.5


class RunFailed(RuntimeError):
    """Runs failed with errors that are not the user's."""


@dataclass(frozen=True)
class Policy:
    """How runs are carried out.

    Args:
        device: name of the device of every run.
        plugins: modules that every process imports.
        retries: how often a run that failed is tried again.
        checkpoint_epochs: epochs between checkpoints; 0 for none by epochs.
        checkpoint_minutes: minutes between checkpoints.
        quiet: no progress bar.
        workers: processes of each run that decode images, where they stay in their files.
        tensorboard: folder in which every run has one of its own for TensorBoard; None for none.
        reuse: folders of other comparisons, whose runs are taken over where they are the same.

    Raises:
        InputError: a negative number.
    """

    device: str = "auto"
    plugins: tuple[str, ...] = ()
    retries: int = 0
    checkpoint_epochs: int = 0
    checkpoint_minutes: float = 10.0
    quiet: bool = False
    workers: int = 0
    tensorboard: Path | None = None
    reuse: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for name in ("retries", "checkpoint_epochs", "checkpoint_minutes", "workers"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")

    def check(self, data: str, *runs: Path) -> None:
        """Refuse, before any work, what these runs have no use for or could be harmed by.

        Args:
            data: what they are trained on.
            runs: folders in which they are kept.

        Raises:
            InputError: workers for images in memory; a folder to reuse without runs; see also
                :func:`experiments.tensorboard.check_board`.
        """
        if self.workers and not data.startswith("stream:"):
            raise InputError(
                f"workers has no effect with data {data}, whose images are in memory; leave it out, or give "
                "stream:DIR@SIZE"
            )
        for folder in self.reuse:
            if not (folder / "runs").is_dir():
                raise InputError(f"reuse: {folder} is not the folder of a comparison (it has no folder runs)")
        if self.tensorboard is not None:
            check_board(self.tensorboard, runs)


class Runner:
    """Brings a store up to date with lists of jobs; a context manager, which stops the executor.

    Args:
        folder: the store.
        executor: where runs execute.
        policy: how.

    Raises:
        InputError: the folder cannot be used.
    """

    def __init__(self, folder: Path, executor: Executor, policy: Policy | None = None) -> None:
        self.store, self.executor, self.policy = Store(folder), executor, policy or Policy()
        self.store.prepare()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.executor.stop()

    def run(self, jobs: Sequence[Job], label: str) -> dict[str, RunRecord]:
        """Do all jobs, or read their records where they are done.

        Returns:
            Records by run id.

        Raises:
            InputError: what a run asked for cannot be had, or the store cannot be written; finished runs are kept.
            RunFailed: runs failed otherwise, as often as the policy allows; the others are finished first.
            KeyboardInterrupt: a run was stopped from outside, on request.
        """
        todo = {job.run_id: job for job in jobs}
        records: dict[str, RunRecord] = {}
        tries: Counter[str] = Counter()
        deaths: Counter[str] = Counter()
        failures: list[str] = []
        quiet = self.policy.quiet or not jobs
        with tqdm(total=len(todo), desc=label, unit="run", disable=quiet, dynamic_ncols=True) as bar:
            for other in self.policy.reuse:
                self._take_over(list(todo.values()), other, label)
            self._collect(todo, records, bar)
            while todo:
                before = len(todo)
                tasks = [self._task(job) for job in sorted(todo.values(), key=lambda job: -job.cost)]
                for ended in self.executor.run(tasks):
                    if ended is None:
                        bar.refresh()  # so that the clock moves although no run has finished
                        continue
                    job, outcome = ended[0].job, ended[1]
                    for note in outcome.notes:
                        bar.write(f"sam-masks: warning: {note}", file=sys.stderr)
                    if outcome.kind == "done":
                        del todo[job.run_id]
                        records[job.run_id] = self._record(job)
                        bar.update()
                    elif self._gives_up(job, outcome, tries, deaths):
                        del todo[job.run_id]
                        failures.append(f"{job}: {outcome.text}")
                self._collect(todo, records, bar)
                if len(todo) == before:  # all that is left is another driver's
                    time.sleep(_POLL_SECONDS)
        if failures:
            raise RunFailed(f"{len(failures)} of {len(jobs)} runs failed, the others are kept; first: {min(failures)}")
        return records

    def _task(self, job: Job) -> Task:
        policy = self.policy
        return Task(
            job,
            self.store.folder.absolute(),
            policy.device,
            policy.plugins,
            policy.checkpoint_epochs,
            policy.checkpoint_minutes,
            policy.workers,
            None if policy.tensorboard is None else policy.tensorboard.absolute(),
        )

    def _collect(self, todo: dict[str, Job], records: dict[str, RunRecord], bar: tqdm[Any]) -> None:
        """Take what is complete already; a damaged record is left to the process that does the run again."""
        for run_id, job in list(todo.items()):
            if not self.store.is_complete(job.name):
                continue
            try:
                records[run_id] = self._record(job)
            except InputError:
                continue
            del todo[run_id]
            bar.update()

    def _take_over(self, jobs: Sequence[Job], other: Path, label: str) -> None:
        """Copy those runs that another comparison has and this one does not; a damaged one is made again."""
        taken, source = 0, Store(other / "runs")
        for job in jobs:
            if self.store.is_complete(job.name):
                continue
            try:
                taken += self.store.take_over(job.name, source, job.arm, asdict(job.config))
            except InputError as error:
                tqdm.write(f"sam-masks: warning: not reused: {error}", file=sys.stderr)
        if taken:
            tqdm.write(f"sam-masks: {label}: {taken} of {len(jobs)} runs taken over from {other}", file=sys.stderr)

    def _record(self, job: Job) -> RunRecord:
        record = self.store.read(job.name, config=asdict(job.config))
        if record is None:
            raise InputError(f"the record of run {job.run_id} has gone from {self.store.folder}")
        return record

    def _gives_up(self, job: Job, outcome: Outcome, tries: Counter[str], deaths: Counter[str]) -> bool:
        """Whether a run that did not end well is not tried again.

        Raises:
            InputError: the user's error.
            KeyboardInterrupt: it was stopped from outside, on request.
        """
        if outcome.kind == "refused":
            raise InputError(f"arm {job.arm}: {outcome.text}")
        if outcome.kind == "interrupted":
            raise_interrupted(outcome)
        if outcome.kind == "failed":
            tries[job.run_id] += 1
            return tries[job.run_id] > self.policy.retries
        if outcome.kind == "died":
            deaths[job.run_id] += 1
            return deaths[job.run_id] > _MOST_DEATHS
        return False
