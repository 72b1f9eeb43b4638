"""Scaled losses: float16 training with torch's GradScaler."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from masks.errors import InputError


def check_scaler(scaler: object, on_nonfinite: str, params: Iterable[Tensor]) -> None:
    """Refuse what is not a scaler, and what does not go with one.

    Raises:
        InputError: either; a float16 parameter, for one, whose unscaled gradients would underflow.
    """
    if not isinstance(scaler, GradScaler):
        raise InputError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if on_nonfinite == "raise":
        raise InputError('on_nonfinite="raise" with a scaler: infinities are how a scaler finds its scale; use "skip"')
    if any(p.dtype == torch.float16 for p in params):
        raise InputError("a scaler goes with float32 parameters under autocast; some parameters are float16")


class LossScaling:
    """What a step does with a GradScaler: scaled losses, unscaled gradients, one ``update``.

    Only the scaler's public interface is used, and nothing is read from the device.

    Args:
        scaler: the scaler.
        device: where the parameters lie.
    """

    def __init__(self, scaler: GradScaler, device: torch.device) -> None:
        self._scaler = scaler
        self._one = torch.ones((), device=device)
        # A parameter of its own through which the scaler is told whether the step was finite: the gradients of a
        # step come from several passes, which its unscale_ does not know.
        self._flag = nn.Parameter(torch.zeros((), device=device))
        self._told = torch.optim.SGD([self._flag], lr=0.0)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of the loss from those of the scaled loss; new tensors."""
        return list(torch._foreach_mul(gradients, self._inverse())) if gradients else []

    def unscale_(self, gradients: list[Tensor]) -> None:
        """The same in place."""
        if gradients:
            torch._foreach_mul_(gradients, self._inverse())

    def _inverse(self) -> Tensor:
        return self.scale(self._one).double().reciprocal().float()

    def update(self, finite: Tensor) -> None:
        """Move the scale after a step; ``finite`` (0-dim bool) says whether the gradients of all passes were."""
        self._flag.grad = torch.where(finite, 0.0, torch.inf)
        self._scaler.unscale_(self._told)
        self._scaler.update()
