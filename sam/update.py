"""The update: the base optimizer steps with what the passes left in ``.grad``, if that is finite."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from masks.errors import InputError
from sam.checks import is_number
from sam.perturbation import total_norm
from sam.precision import LossScaling

OnNonFinite = Literal["skip", "raise"]


class NonFiniteError(ArithmeticError):
    """A gradient was not finite and ``on_nonfinite="raise"``; the weights are those before the step."""


class Update:
    """Clips, checks, steps.

    Args:
        base: the base optimizer.
        on_nonfinite: whether a step with a non-finite gradient is skipped or an error.
        clip_grad_norm: largest Euclidean norm of the gradient over all parameters of the base optimizer; longer
            ones are scaled down. None leaves them.

    Raises:
        InputError: ``clip_grad_norm`` is not positive.
    """

    def __init__(self, base: Optimizer, on_nonfinite: OnNonFinite, clip_grad_norm: float | None) -> None:
        if clip_grad_norm is not None and not (is_number(clip_grad_norm) and 0 < clip_grad_norm < math.inf):
            raise InputError(f"clip_grad_norm must be a finite number > 0, or None, got {clip_grad_norm}")
        self._base: Any = base
        self._on_nonfinite = on_nonfinite
        self._clip_grad_norm = clip_grad_norm
        self.base_state_changed()

    def base_state_changed(self) -> None:
        """Note which parameters have a state: until then a fused optimizer cannot be told to skip a step."""
        self._stepped = {id(p) for p, state in self._base.state.items() if state}

    @torch.no_grad()
    def __call__(self, finite: Tensor, scaling: LossScaling | None) -> Tensor:
        """Step unless a gradient is not finite; returns whether that happened, 0-dim bool.

        Args:
            finite: whether the gradients of the ascent were finite, 0-dim bool.
            scaling: told whether all were.

        Raises:
            NonFiniteError: one was not, and ``on_nonfinite="raise"``.
        """
        groups = self._base.param_groups
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        norm = total_norm([p.grad for p in params])
        finite = finite & torch.isfinite(norm).to(finite.device)
        if scaling is not None:
            scaling.update(finite)
        if self._on_nonfinite == "raise" and not bool(finite):
            raise NonFiniteError("a gradient is not finite (nan or infinite); the weights are those before the step")
        if self._clip_grad_norm is not None:
            clip_grads_with_norm_(params, self._clip_grad_norm, norm)
        fused = getattr(self._base, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in groups)
        stepped = {id(p) for p in params}
        if fused and stepped <= self._stepped:
            # The protocol of torch.amp.GradScaler: fused kernels read found_inf and do nothing where it is 1.
            self._base.found_inf, self._base.grad_scale = (~finite).float(), None
            try:
                self._base.step()
            finally:
                del self._base.found_inf, self._base.grad_scale
        elif bool(finite):
            self._base.step()
            self._stepped |= stepped
        return finite
