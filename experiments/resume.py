"""Checkpoints of unfinished runs: bitwise the same training, interrupted or not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.checkpoint import save_checkpoint
from masks.errors import InputError

VERSION = 1


class Interrupted(Exception):
    """Training was asked to stop; its checkpoint is kept."""


def _never() -> bool:
    return False


@dataclass
class Checkpointing:
    """When and where a run in progress is saved.

    Attributes:
        path: the file, replaced as a whole each time.
        every: epochs between checkpoints; 0 for none by epochs.
        minutes: minutes between checkpoints, counted on the wall; infinity for none by time.
        stop: asked after every step; once it is true, the run is saved and :class:`Interrupted` raised.
    """

    path: Path
    every: int = 0
    minutes: float = float("inf")
    stop: Callable[[], bool] = _never
    _saved: float = field(default_factory=time.monotonic, repr=False)

    def due(self, epochs_done: int, *, epoch_end: bool) -> bool:
        """Whether to save now."""
        by_epochs = epoch_end and self.every > 0 and epochs_done % self.every == 0
        return by_epochs or time.monotonic() - self._saved > 60 * self.minutes

    def save(self, state: dict[str, Any]) -> None:
        """Write the file.

        Raises:
            InputError: it cannot be written.
        """
        try:
            save_checkpoint(self.path, {"version": VERSION, **state})
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError where the disk is full
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(f"cannot write the checkpoint {self.path}: {reason}") from None
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """What was saved, or None: nothing, or a file that is damaged, which is then not used."""
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:  # the restricted unpickler raises whatever a damaged file leads it into
            return None
        return state if isinstance(state, dict) and state.get("version") == VERSION else None


def rng_state(device: torch.device) -> list[torch.Tensor]:
    """The default generators' states: CPU, and the device's own."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng_state(states: list[torch.Tensor], device: torch.device) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
