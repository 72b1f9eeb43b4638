"""What a method remembers from step to step: averages on the masked coordinates, a step count, a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from masks.errors import InputError


class Memory:
    """Lists of tensors by name, changed only by steps whose gradients were finite.

    Attributes:
        steps: steps taken, skipped ones included.
        resets: how often a change of the mask made what was remembered meaningless, and it was dropped.
        generator: source of everything random in a method, on the CPU.
    """

    def __init__(self, seed: int) -> None:
        self.steps = 0
        self.resets = 0
        self.generator = torch.Generator().manual_seed(seed)
        self._tensors: dict[str, list[Tensor]] = {}
        self._pending: dict[str, list[Tensor]] = {}

    def get(self, name: str) -> list[Tensor] | None:
        """What was remembered under a name, or None; do not change it in place."""
        return self._tensors.get(name)

    def put(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Remember tensors from the next :meth:`commit` on."""
        self._pending[name] = list(tensors)

    def commit(self, finite: Tensor) -> None:
        """Keep what was put, unless ``finite`` (0-dim bool) is False; no synchronisation on an accelerator."""
        for name, new in self._pending.items():
            old = self._tensors.get(name)
            if finite.device.type == "cpu":
                if not bool(finite):
                    continue
                self._tensors[name] = new
            elif old is None:
                self._tensors[name] = [torch.where(finite, t, 0) for t in new]
            else:
                self._tensors[name] = [torch.where(finite, t, o) for t, o in zip(new, old, strict=True)]
        self._pending.clear()

    def reset(self) -> None:
        """Drop all tensors: the coordinates that they belong to have changed."""
        self._pending.clear()
        if self._tensors:
            self._tensors.clear()
            self.resets += 1

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(t.numel() * t.element_size() for tensors in self._tensors.values() for t in tensors)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and copies of the tensors."""
        return {
            "steps": self.steps,
            "resets": self.resets,
            "generator": self.generator.get_state(),
            "tensors": {name: [t.clone() for t in tensors] for name, tensors in self._tensors.items()},
        }

    def check(self, state: Any) -> None:
        """Refuse what :meth:`load_state_dict` could not load.

        Raises:
            InputError: not a state of this class.
        """
        kinds = {"steps": int, "resets": int, "generator": Tensor, "tensors": dict}
        if not isinstance(state, dict) or not all(isinstance(state.get(k), t) for k, t in kinds.items()):
            raise InputError(f"the checkpoint's method state needs the keys {', '.join(sorted(kinds))}")

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Load what :meth:`state_dict` returned, its tensors onto ``device``."""
        self.steps, self.resets = state["steps"], state["resets"]
        self.generator.set_state(state["generator"].cpu())
        self._tensors = {name: [t.to(device).clone() for t in tensors] for name, tensors in state["tensors"].items()}
        self._pending.clear()
