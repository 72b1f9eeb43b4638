"""Checkpoints of unfinished runs: bitwise the same training, interrupted or not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.checkpoint import save_checkpoint
from experiments.store import writing_to
from masks.errors import InputError

VERSION = 2


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
        run: name of the run; the checkpoint of another one is refused.
        world_size: processes that train it together.
        made_by: what must not change in the middle of a run, such as the version of the code; a checkpoint that
            was made by something else is not used.
        notes: what was found wrong with the file, for the user.
    """

    path: Path
    every: int = 0
    minutes: float = float("inf")
    stop: Callable[[], bool] = _never
    run: str = ""
    world_size: int = 1
    made_by: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
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
        head = {"version": VERSION, "of": self.run, "world_size": self.world_size, "made_by": self.made_by}
        with writing_to(self.path.parent):
            save_checkpoint(self.path, {**head, **state})
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """What was saved, or None: nothing, or a file that cannot be used, see ``notes``.

        Raises:
            InputError: it is of another run.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found = state["version"], state["of"], state["made_by"]
            world_size = state["world_size"] if found[0] == VERSION else self.world_size
        except Exception as error:  # the restricted unpickler raises whatever a damaged file leads it into
            self._ignore(f"is damaged ({type(error).__name__})")
            return None
        if world_size != self.world_size:
            raise InputError(
                f"{self.path} is the checkpoint of a run of {world_size} processes, and this one has "
                f"{self.world_size}; start {world_size} to go on, or move it away to start anew"
            )
        if found[1] != self.run:
            raise InputError(f"{self.path} is the checkpoint of another run ({found[1]}); move it away to start anew")
        if found[0] != VERSION or found[2] != self.made_by:
            self._ignore("was made by another version of the code or on another kind of device")
            return None
        return dict(state)

    def _ignore(self, why: str) -> None:
        self.notes.append(f"the checkpoint {self.path} {why}; the run starts anew")


def rng_state(device: torch.device) -> list[torch.Tensor]:
    """The default generators' states: CPU, and the device's own."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng_state(states: list[torch.Tensor], device: torch.device) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
