"""Base optimizers, learning-rate schedules and windows of epochs, as they are written in a configuration."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from masks.errors import InputError, unknown_name
from masks.options import option_text, parse_options

_OWN = ("lr", "weight_decay", "momentum", "params", "fused")
"""Arguments that a run's own settings decide."""


def _optimizers() -> dict[str, type[Optimizer]]:
    """The classes of torch.optim by lower-case name."""
    found = vars(torch.optim).items()
    return {
        name.lower(): cls
        for name, cls in found
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }


@dataclass(frozen=True)
class OptimizerSpec:
    """A base optimizer: a class of torch.optim and its options.

    Attributes:
        name: lower-case name of the class.
        options: arguments beside learning rate, weight decay and the momentum of SGD.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> OptimizerSpec:
        """Read ``name[:option=value...]``, such as ``adamw:betas=0.9+0.95`` or ``sgd:nesterov=true``.

        Raises:
            InputError: an unknown class, or an option that it does not have or that the run's settings decide.
        """
        name, given = parse_options(text, "optimizer")
        classes = _optimizers()
        if name.lower() not in classes:
            raise InputError(unknown_name("optimizer", name, classes))
        known = [key for key in inspect.signature(classes[name.lower()]).parameters if key not in _OWN]
        for key in given:
            if key not in known:
                raise InputError(unknown_name(f"option of optimizer {name}", key, known))
        return cls(name.lower(), {key: _value(value) for key, value in given.items()})

    def __str__(self) -> str:
        return self.name + "".join(f":{key}={option_text(value)}" for key, value in self.options.items())

    def build(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float, fused: bool
    ) -> Optimizer:
        """The optimizer.

        Args:
            groups: parameter groups; those that set ``weight_decay`` keep theirs.
            lr, momentum, weight_decay: the run's; momentum for SGD alone.
            fused: use the fused kernels where the class has them.

        Raises:
            InputError: the class refuses its arguments.
        """
        cls: Any = _optimizers()[self.name]
        known = inspect.signature(cls).parameters
        arguments = {"lr": lr, **self.options}
        if "weight_decay" in known:
            arguments["weight_decay"] = weight_decay
        elif weight_decay:
            raise InputError(f"optimizer {self.name} has no weight decay; set weight_decay to 0, got {weight_decay:g}")
        if self.name == "sgd":
            arguments["momentum"] = momentum
        if "fused" in known and fused:
            arguments["fused"] = True
        try:
            optimizer: Optimizer = cls(groups, **arguments)
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer {self}: {' '.join(str(error).split())}") from None
        return optimizer


def _value(text: str) -> Any:
    """A number, true, false, none, or several numbers joined by "+"."""
    if "+" in text.strip("+") and not re.search(r"e\+", text):
        return tuple(map(_value, text.split("+")))
    if text == "none":
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def scheduler(optimizer: Optimizer, kind: str, steps: int, warmup: int) -> LRScheduler:
    """The schedule of the learning rate, stepped after every step of the optimizer.

    Args:
        optimizer: whose groups it moves.
        kind: "cosine": to 0 over the steps after the warm-up; "step": times 0.1 after half and again after three
            quarters of all steps; "constant".
        steps: of the run.
        warmup: steps in which the rate grows linearly, from ``1 / (warmup + 1)`` of its peak.
    """
    after: LRScheduler
    if kind == "cosine":
        after = CosineAnnealingLR(optimizer, T_max=steps - warmup)
    elif kind == "step":
        after = MultiStepLR(optimizer, [steps // 2 - warmup, 3 * steps // 4 - warmup])
    else:
        after = ConstantLR(optimizer, factor=1.0)
    if not warmup:
        return after
    first = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [first, after], milestones=[warmup])


@dataclass(frozen=True)
class Window:
    """Epochs from ``start`` to before ``end``; all of them if ``end`` is None.

    Attributes:
        start: first epoch, from 0.
        end: first epoch after it.
    """

    start: int = 0
    end: int | None = None

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read ``START..END``, ``START..``, ``..END`` or nothing.

        Raises:
            InputError: anything else, or an empty window.
        """
        match = re.fullmatch(r"(\d*)\.\.(\d*)", text)
        if text and not match:
            raise InputError(f"sam_epochs must be START..END, got {text!r}")
        start, end = (match[1], match[2]) if match else ("", "")
        found = cls(int(start or 0), int(end) if end else None)
        if found.end is not None and found.end <= found.start:
            raise InputError(f"sam_epochs {text} holds no epoch")
        return found

    def __str__(self) -> str:
        return "" if self == Window() else f"{self.start}..{'' if self.end is None else self.end}"

    def __contains__(self, epoch: int) -> bool:
        return self.start <= epoch and (self.end is None or epoch < self.end)
