"""What TensorBoard shows of a run while it trains (extra ``[tensorboard]``); the record does not depend on it.

A run that goes on from a checkpoint writes all its points again, from the first one, after an event that makes readers
forget those of earlier attempts: none is lost, whatever was unwritten when an attempt died, and none is there twice.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from experiments.store import writing_to
from masks.errors import InputError

if TYPE_CHECKING:
    from experiments.train import Epoch, MaskBuild


def check_tensorboard() -> None:
    """Refuse to log where the package is missing.

    Raises:
        InputError: it is.
    """
    if find_spec("tensorboard") is None:
        raise InputError("tensorboard needs the package of this name: pip install 'sam-masks[tensorboard]'")


def folder_name(*parts: str) -> str:
    """The parts of a run's name as the name of a folder."""
    return "_".join(re.sub(r"[^\w.=+@-]+", "-", part) for part in parts)


class Board:
    """Points of one run by steps done; a context manager.

    Args:
        folder: of its event files, made if it is not there.

    Raises:
        InputError: the package is missing, or the folder cannot be written to; so every method.
    """

    def __init__(self, folder: Path) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with writing_to(folder):
            self._writer = SummaryWriter(str(folder), purge_step=0)

    def epoch(self, step: int, epoch: Epoch, lr: float) -> None:
        """Means over an epoch that ended after ``step`` steps, and the learning rate of its last step."""
        values = {"loss": epoch.loss, "ascent": epoch.ascent, "radius": epoch.radius, "lr": lr}
        for name, value in values.items():
            if value is not None:
                self._add(f"train/{name}", value, step)

    def build(self, build: MaskBuild) -> None:
        """How many coordinates a mask keeps."""
        self._add("mask/coordinates", build.num_kept, build.step)

    def accuracy(self, step: int, value: float) -> None:
        """Of the validation images, after the last epoch."""
        self._add("validation/accuracy", value, step)

    def _add(self, tag: str, value: float, step: int) -> None:
        with writing_to(self.folder):
            self._writer.add_scalar(tag, value, step)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with writing_to(self.folder):
            self._writer.close()
