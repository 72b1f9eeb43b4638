"""Where runs execute: one interface, existing engines behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.worker import Outcome, Task


class Executor(ABC):
    """Runs tasks somewhere; a context manager, which stops what still runs when it is left by an exception."""

    @abstractmethod
    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome] | None]:
        """Do the tasks in about this order; every one is yielded once, as it ends.

        Yields:
            A task with its outcome, or None now and then while nothing ends, so that a clock can move.
        """

    @abstractmethod
    def stop(self) -> None:
        """Ask the tasks that run to save themselves and end, and drop the others."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()
