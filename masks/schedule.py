"""When a mask is built: part of what a score mask is, because scores change during training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from masks.errors import MaskError

Kind = Literal["init", "after", "every"]
Unit = Literal["epoch", "step"]
_TEXT = re.compile(r"(after|every)=(\d+)(steps?|epochs?)?")


@dataclass(frozen=True)
class Schedule:
    """Points in training at which a mask is built, each at the start of an epoch or step.

    Attributes:
        kind: "init" builds once, before the first step. "after" builds once, after ``n`` epochs or steps;
            until then nothing is perturbed. "every" builds at the start and after every ``n``.
        n: see ``kind``; 0 for "init".
        unit: "epoch" or "step"; "epoch" for "init".

    Raises:
        MaskError: an unknown kind or unit; n is negative, or 0 for "every"; n or a unit for "init".
    """

    kind: Kind = "init"
    n: int = 0
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.unit not in get_args(Unit):
            raise MaskError(f"a schedule is init, after or every, in units of epoch or step; got {self!r}")
        if self.n < (self.kind == "every") or (self.kind == "init" and (self.n or self.unit != "epoch")):
            raise MaskError(f"schedule {self.kind!r} cannot have n={self.n} in units of {self.unit}")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read "init", "after=5", "every=2", "every=100steps".

        Raises:
            MaskError: anything else.
        """
        if text == "init":
            return cls()
        match = _TEXT.fullmatch(text)
        if not match:
            raise MaskError(f"unknown schedule {text!r}; write init, after=N or every=N, with N epochs or Nsteps")
        unit: Unit = "step" if (match[3] or "").startswith("step") else "epoch"
        return cls("after" if match[1] == "after" else "every", int(match[2]), unit)

    def __str__(self) -> str:
        return "init" if self.kind == "init" else f"{self.kind}={self.n}{'steps' if self.unit == 'step' else ''}"

    def due(self, epoch: int, step: int, *, epoch_start: bool) -> bool:
        """Whether the mask is built before this step.

        Args:
            epoch: epochs completed.
            step: steps completed, over all epochs.
            epoch_start: whether the step is the first of its epoch.
        """
        if self.kind == "init":
            return step == 0
        if self.unit == "epoch" and not epoch_start:
            return False
        done = epoch if self.unit == "epoch" else step
        return done == self.n if self.kind == "after" else done % self.n == 0


INIT = Schedule()
EVERY_EPOCH = Schedule("every", 1)
