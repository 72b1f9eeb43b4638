"""VaSSO: the ascent follows a running mean of gradients, whose variance is smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from masks.errors import InputError
from sam.memory import Memory
from sam.method import OWN_MEMORY, Direction, Method
from sam.registry import register_method


@dataclass(frozen=True)
class VarianceSuppressed(Direction):
    """d_t = (1 - theta) d_{t-1} + theta g_t; at first d = g.

    Args:
        theta: weight of the batch's gradient, in (0, 1].

    Raises:
        InputError: ``theta`` is out of range.
    """

    theta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.theta <= 1:
            raise InputError(f"theta of vasso must be greater than 0 and at most 1, got {self.theta}")

    def __call__(self, gradient: Sequence[Tensor], memory: Memory) -> list[Tensor]:
        return memory.running_mean("direction", gradient, self.theta)


@register_method(
    "vasso",
    summary="SAM along a running mean of gradients",
    source="Li and Giannakis 2023, arXiv 2309.15639 (VaSSO); as in the authors' code, equation numbers unverified",
    passes="2",
    rho=0.2,
    state_per_masked=1,
    tuned_on="CIFAR-100, WRN-28-10: the authors' script",
    limits=(OWN_MEMORY,),
)
def vasso(*, theta: float = 0.9) -> Method:
    """``eps = rho d_t / ||d_t||``, ``d_t = (1 - theta) d_{t-1} + theta g_t``.

    The authors' code takes theta = 0.9, close to SAM. The running mean covers what the norm covers: the masked
    coordinates, or all parameters under ``norm_scope="full"``.
    """
    return Method(direction=VarianceSuppressed(theta))
