"""Friendly SAM: the ascent leaves out what the batches have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masks.errors import InputError
from sam.memory import Memory
from sam.method import OWN_MEMORY, Direction, Method
from sam.registry import register_method


@dataclass(frozen=True)
class Friendly(Direction):
    """d_t = g_t - sigma m_{t-1}, m_t = decay m_{t-1} + (1 - decay) g_t; at first d = m = g.

    Args:
        sigma: how much of the average is taken away, >= 0.
        decay: of the average, in [0, 1).

    Raises:
        InputError: a value is out of range.
    """

    sigma: float = 1.0
    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise InputError(f"sigma of friendly_sam must be a finite number >= 0, got {self.sigma}")
        if not 0 <= self.decay < 1:
            raise InputError(f"decay of friendly_sam must be at least 0 and less than 1, got {self.decay}")

    def __call__(self, gradient: Sequence[Tensor], memory: Memory) -> list[Tensor]:
        earlier = memory.get("mean_gradient")
        # The average is of g itself: towards g - sigma m it would settle at half the mean gradient.
        memory.running_mean("mean_gradient", gradient, 1 - self.decay)
        return list(gradient if earlier is None else torch._foreach_sub(list(gradient), earlier, alpha=self.sigma))


@register_method(
    "friendly_sam",
    summary="SAM along the batch's gradient less a running mean of gradients",
    source="Li et al. 2024, arXiv 2403.12350 (F-SAM); as in the authors' code, equation numbers unverified",
    passes="2",
    rho=0.2,
    state_per_masked=1,
    tuned_on="CIFAR-100, ResNet-18: the authors' log with decay 0.95 (81.43 %; 81.38 % with 0.6)",
    limits=(OWN_MEMORY,),
)
def friendly_sam(*, sigma: float = 1.0, decay: float = 0.95) -> Method:
    """``eps = rho d / ||d||``, ``d_t = g_t - sigma m_{t-1}``, ``m_t = decay m_{t-1} + (1 - decay) g_t``.

    The authors' code has three defaults of decay: 0.9 in the class, 0.95 on the command line, and 0.6 or 0.95 in its
    script; their best log is with 0.95. With sigma = 1, m_t in place of m_{t-1} would give the same eps. The running
    mean covers what the norm covers: the masked coordinates, or all parameters under ``norm_scope="full"``.
    """
    return Method(direction=Friendly(sigma, decay))
