"""A radius that follows the learning rate."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer

from masks.errors import InputError


class RadiusFollowsLR:
    """``rho = rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min)`` for every group, by its own lr.

    The schedule of GSAM (Zhuang et al. 2022, arXiv 2203.08065, section 5; usable with every method). It is set at
    construction and by every :meth:`step`, which belongs after the learning-rate scheduler's::

        radius = RadiusFollowsLR(optimizer, rho_max=0.1, rho_min=0.02, lr_max=0.1)
        ...
        optimizer.step_on(loss_fn, batch)
        scheduler.step()
        radius.step()

    It keeps no state: radii are saved with the optimizer's groups, and follow from the learning rates anyway. Learning
    rates outside the range, as in a warm-up from 0, count as its nearest end, so that rho never leaves its own range;
    the authors' code extrapolates.

    Args:
        optimizer: a :class:`sam.SAM`; its groups' ``rho`` is overwritten.
        rho_max: radius at ``lr_max``.
        rho_min: radius at ``lr_min``, at most ``rho_max``.
        lr_max: the largest learning rate of the schedule.
        lr_min: the smallest.

    Raises:
        InputError: a range that is empty, reversed, negative or not finite.
    """

    def __init__(
        self, optimizer: Optimizer, rho_max: float, rho_min: float, lr_max: float, lr_min: float = 0.0
    ) -> None:
        if not 0 <= rho_min <= rho_max < math.inf:
            raise InputError(
                f"the radii must satisfy 0 <= rho_min <= rho_max, got rho_min={rho_min}, rho_max={rho_max}"
            )
        if not 0 <= lr_min < lr_max < math.inf:
            raise InputError(f"the rates must satisfy 0 <= lr_min < lr_max, got lr_min={lr_min}, lr_max={lr_max}")
        self._optimizer = optimizer
        self._rho, self._lr = (rho_min, rho_max), (lr_min, lr_max)
        self.step()

    def step(self) -> None:
        """Set every group's radius from its learning rate."""
        (rho_min, rho_max), (lr_min, lr_max) = self._rho, self._lr
        for group in self._optimizer.param_groups:
            share = min(max((float(group["lr"]) - lr_min) / (lr_max - lr_min), 0.0), 1.0)
            rho = rho_min + (rho_max - rho_min) * share
            if isinstance(group.get("rho"), Tensor):  # in place: a compiled step holds this tensor
                group["rho"].fill_(rho)
            else:
                group["rho"] = rho
