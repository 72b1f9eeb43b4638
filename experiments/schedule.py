"""Base optimizers, learning-rate schedules and windows of epochs, as they are written in a configuration."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from masks.errors import InputError, unknown_name
from masks.options import Option, option_text, parse_options

_OWN = ("lr", "weight_decay")
"""Arguments that a run's own settings decide; the momentum of SGD besides."""
_NOT_OFFERED = ("params", "fused", "capturable", "differentiable")
"""Arguments that no run needs: decided by the device, or for CUDA graphs and derivatives of a step."""
_REFUSED = {
    "lbfgs": "its step is more than one gradient",
    "sparseadam": "it takes sparse gradients only",
    "adadelta": "it has a hyperparameter rho of its own, which would be taken for SAM's radius",
}


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
        options: arguments beside learning rate, weight decay and the momentum of SGD, those at their default left out.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> OptimizerSpec:
        """Read ``name[:option=value...]``, such as ``adamw:betas=0.9+0.95`` or ``sgd:nesterov=true``.

        Raises:
            InputError: an unknown class, one that SAM cannot be put around, or an option that the class does not have,
                that the run's settings decide, or that is of another type.
        """
        name, given = parse_options(text.lower(), "optimizer")
        classes = _optimizers()
        if name not in classes:
            raise InputError(unknown_name("optimizer", name, [known for known in classes if known not in _REFUSED]))
        if name in _REFUSED:
            raise InputError(f"optimizer {name} cannot be the base optimizer: {_REFUSED[name]}")
        hints, defaults = typing.get_type_hints(classes[name].__init__), inspect.signature(classes[name]).parameters
        own = {*_OWN, "momentum"} if name == "sgd" else {*_OWN}
        known = [key for key in defaults if key not in own.union(_NOT_OFFERED)]
        for key in given:
            if key in own:
                raise InputError(f"{key} is a setting of the run; leave it out of optimizer {text}")
            if key not in known:
                raise InputError(unknown_name(f"option of optimizer {name}", key, known))
        options = {
            key: Option(key, hints[key], defaults[key].default).convert(given[key], f"optimizer {name}")
            for key in sorted(given)
        }
        return cls(name, {key: value for key, value in options.items() if value != defaults[key].default})

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
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"optimizer {self}: {' '.join(str(error).split())}") from None
        return optimizer


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
