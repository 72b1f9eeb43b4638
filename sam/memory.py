"""What a method remembers from step to step: averages, a step count, a generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from masks.errors import InputError
from sam.checks import check_choice

Coordinates = Literal["counted", "all"]
"""To what a tensor list belongs: the coordinates that the norm counts (the masked ones, all of them under
``norm_scope="full"``), or all, one tensor per parameter."""

Shapes = Mapping[Coordinates, Sequence[Sequence[int]]]


def readable(value: Tensor) -> bool:
    """Whether reading a scalar waits for nothing, as on a CPU; elsewhere decisions are left to the device."""
    return value.device.type == "cpu"


@dataclass(frozen=True, eq=False)
class _Entry:
    tensors: list[Tensor]
    coordinates: Coordinates
    valid: Tensor | None  # whether the tensors mean anything, 0-dim bool; None: they do


class Memory:
    """Lists of tensors by name, changed only by steps that were taken.

    The tensors are in the form of :meth:`masks.region.Region.gather`, which does not depend on the memory layout of the
    parameters. On an accelerator nothing is read: a name exists from the first :meth:`put` on, with zeros until a step
    was taken.

    Attributes:
        steps: steps begun, skipped ones included.
        resets: how often a change of the mask made what was remembered meaningless, and it was dropped.
        generator: source of everything random in a method, on the CPU.
        replica: rank and number of the replicas, where each remembers something of its own (an ascent along the
            gradient of its own shard); else None.
    """

    def __init__(self, seed: int) -> None:
        self.steps = 0
        self.resets = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.replica: tuple[int, int] | None = None
        self._kept: dict[str, _Entry] = {}
        self._pending: dict[str, _Entry] = {}

    def get(self, name: str) -> list[Tensor] | None:
        """What was remembered under a name, or None; do not change it in place."""
        entry = self._kept.get(name)
        return None if entry is None else entry.tensors

    def put(
        self,
        name: str,
        tensors: Sequence[Tensor],
        coordinates: Coordinates = "counted",
        *,
        valid: Tensor | None = None,
    ) -> None:
        """Remember tensors from the next :meth:`commit` on, if that finds the step taken and ``valid`` is not False."""
        self._pending[name] = _Entry(list(tensors), coordinates, valid)

    def running_mean(self, name: str, new: Sequence[Tensor], weight: float) -> list[Tensor]:
        """``old + weight (new - old)``, at first ``new``, which is put under this name; as new tensors."""
        old = self._kept.get(name)
        # Copied at first: the caller's tensors may be buffers that the next pass writes to.
        mean = [t.clone() for t in new] if old is None else list(torch._foreach_lerp(old.tensors, list(new), weight))
        if old is not None and old.valid is not None:
            mean = [torch.where(old.valid, m, t) for m, t in zip(mean, new, strict=True)]
        self.put(name, mean)
        return mean

    def discard(self) -> None:
        """Forget what was put since the last :meth:`commit`, as by a step that raised."""
        self._pending.clear()

    def commit(self, taken: Tensor) -> None:
        """Keep what was put, unless ``taken`` (0-dim bool) is False; no synchronisation on an accelerator."""
        for name, new in self._pending.items():
            keep = taken if new.valid is None else taken & new.valid
            if readable(keep):
                if bool(keep):
                    self._kept[name] = _Entry(new.tensors, new.coordinates, None)
                continue
            old = self._kept.get(name)
            before: Sequence[Tensor | int] = [0] * len(new.tensors) if old is None else old.tensors
            tensors = [torch.where(keep, t, o) for t, o in zip(new.tensors, before, strict=True)]
            # Once valid, always: None, which was loaded, stays.
            valid = keep if old is None else None if old.valid is None else old.valid | keep
            self._kept[name] = _Entry(tensors, new.coordinates, valid)
        self._pending.clear()

    def fit(self, shapes: Shapes, *, same_mask: bool) -> None:
        """Drop what belongs to coordinates that are no longer those of the mask, and count that in ``resets``.

        Args:
            shapes: what the coordinates are now, one shape per tensor.
            same_mask: whether the coordinates that the norm counts are still the same ones.
        """
        self._pending.clear()
        kept = {
            name: entry
            for name, entry in self._kept.items()
            if (same_mask or entry.coordinates == "all") and _fits(entry.tensors, shapes[entry.coordinates])
        }
        self.resets += len(kept) < len(self._kept)
        self._kept = kept

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(t.numel() * t.element_size() for entry in self._kept.values() for t in entry.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and copies of the tensors."""
        kept = {name: e for name, e in self._kept.items() if e.valid is None or bool(e.valid)}
        return {
            "steps": self.steps,
            "resets": self.resets,
            "generator": self.generator.get_state(),
            "replica": list(self.replica) if self.replica and kept else [],
            "coordinates": {name: entry.coordinates for name, entry in kept.items()},
            "tensors": {name: [t.clone() for t in entry.tensors] for name, entry in kept.items()},
        }

    def check(self, state: Any, shapes: Shapes) -> None:
        """Refuse what :meth:`load_state_dict` could not load.

        Args:
            state: what should be loaded.
            shapes: as in :meth:`fit`, under the mask of the checkpoint.

        Raises:
            InputError: not a state of this class, tensors of other shapes, or what another replica remembers.
        """
        kinds = {
            "steps": int,
            "resets": int,
            "generator": Tensor,
            "replica": list,
            "coordinates": dict,
            "tensors": dict,
        }
        if not isinstance(state, dict) or not all(isinstance(state.get(k), t) for k, t in kinds.items()):
            raise InputError(f"the checkpoint's method state needs the keys {', '.join(sorted(kinds))}")
        if state["coordinates"].keys() != state["tensors"].keys():
            raise InputError("the checkpoint's method state names other tensors than it holds")
        for name, tensors in state["tensors"].items():
            coordinates = state["coordinates"][name]
            check_choice("coordinates of the method state", coordinates, get_args(Coordinates))
            wanted = shapes[coordinates]
            if not isinstance(tensors, list) or not all(isinstance(t, Tensor) for t in tensors):
                raise InputError(f"the checkpoint's {name} must be a list of tensors")
            if not _fits(tensors, wanted):
                where = next(
                    (i for i, (t, s) in enumerate(zip(tensors, wanted, strict=False)) if not _fits([t], [s])), "-"
                )
                raise InputError(
                    f"the checkpoint's {name} does not fit: {len(tensors)} tensors, {len(wanted)} needed; the first of "
                    f"another shape is number {where}; the file is damaged or of another mask"
                )
        here = list(self.replica or [])
        if state["tensors"] and state["replica"] != here:
            raise InputError(
                f"the checkpoint's {', '.join(state['tensors'])} is of {_replica(state['replica'])}, and this is "
                f"{_replica(here)}: with ascent_gradient=replica every rank remembers its own gradients and must save "
                "and load a state_dict of its own"
            )

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Load what :meth:`state_dict` returned, its tensors onto ``device``; :meth:`check` it first."""
        self.steps, self.resets = state["steps"], state["resets"]
        self.generator.set_state(state["generator"].cpu())
        self._kept = {
            name: _Entry([t.to(device).clone() for t in tensors], state["coordinates"][name], None)
            for name, tensors in state["tensors"].items()
        }
        self._pending.clear()


def _fits(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> bool:
    return [tuple(t.shape) for t in tensors] == [tuple(shape) for shape in shapes]


def _replica(replica: Sequence[int]) -> str:
    return f"rank {replica[0]} of {replica[1]}" if replica else "no replica"
