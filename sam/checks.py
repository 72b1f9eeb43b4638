"""Checks of what users give the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from masks.errors import InputError, unknown_name


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise :class:`InputError` unless the value is one of the choices."""
    if value not in choices:
        raise InputError(unknown_name(name, str(value), choices))


def is_number(value: Any) -> bool:
    """Whether this is an int or float; a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_rho(rho: Any) -> None:
    """Raise :class:`InputError` unless this is a radius.

    It may be a 0-dim tensor, so that it can change without a recompilation.
    """
    if not (is_number(rho) or isinstance(rho, Tensor)) or not 0 <= float(rho) < math.inf:
        raise InputError(f"rho must be a finite number >= 0, got {rho}")


def one_device(params: Iterable[Tensor]) -> list[torch.device]:
    """The device of all parameters, in a list; an empty one if there are none.

    Raises:
        InputError: they lie on several.
    """
    devices = sorted({p.device for p in params}, key=str)
    if len(devices) > 1:
        raise InputError(f"the parameters lie on several devices ({', '.join(map(str, devices))}); SAM needs one")
    return devices
