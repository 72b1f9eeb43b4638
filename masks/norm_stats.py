"""Running statistics of normalization layers: keep them still, or re-estimate them in a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from masks.errors import MaskError
from masks.params import norm_modules


def statistics(model: nn.Module) -> list[Tensor]:
    """The buffers of all normalization layers (running mean and variance, number of batches)."""
    return [b for _, module in norm_modules(model) for b in module.buffers(recurse=False)]


class SavedStatistics:
    """A copy of these buffers, to be put back.

    Args:
        buffers: as from :func:`statistics`.
    """

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers, self._saved = buffers, [torch.empty_like(b) for b in buffers]
        if buffers:
            torch._foreach_copy_(self._saved, buffers)

    @torch.no_grad()
    def restore_unless(self, keep: Tensor) -> None:
        """Put the copy back, in place, where ``keep`` (0-dim bool) is False; nothing is read from an accelerator."""
        if not self.buffers or (keep.device.type == "cpu" and bool(keep)):
            return
        before = [torch.where(keep, b, s) for b, s in zip(self.buffers, self._saved, strict=True)]
        torch._foreach_copy_(self.buffers, before)


@contextmanager
def frozen_statistics(buffers: list[Tensor]) -> Iterator[None]:
    """Undo every change of these buffers on exit, in place, also after an exception.

    Copying works for every layer, momentum (None included) and compiled model; setting the momentum to 0
    does not: a cumulative average still counts, and a NaN in the batch still enters.
    """
    saved = [torch.empty_like(b) for b in buffers]
    if buffers:
        torch._foreach_copy_(saved, buffers)
    try:
        yield
    finally:
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(buffers, saved)


def reestimated_copy(model: nn.Module, inputs: Iterable[Tensor]) -> nn.Module:
    """A copy of the model in evaluation mode with running statistics averaged over these batches.

    The model itself is left as it is: parameters, buffers, gradients, mode. Only normalization layers with
    running statistics run in training mode, so dropout draws nothing.

    Args:
        model: any module that ``copy.deepcopy`` can copy.
        inputs: batches of inputs; their statistics are averaged with equal weight per batch.

    Raises:
        MaskError: the model cannot be copied; or it has running statistics and there is no batch, one of a
            single example, or a layer whose statistics cannot be reset.
    """
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise MaskError(f"the model cannot be copied for scoring: {error}") from None
    twin.zero_grad(set_to_none=True)
    twin.eval()
    tracking = []
    for name, module in norm_modules(twin):
        if getattr(module, "running_mean", None) is None:
            continue
        if not (hasattr(module, "momentum") and hasattr(module, "reset_running_stats")):
            raise MaskError(
                f"the running statistics of {name} ({type(module).__name__}) cannot be re-estimated: its class needs "
                "momentum and reset_running_stats(), as torch's BatchNorm has them"
            )
        tracking.append(module)
    if not tracking:
        return twin
    momenta = [m.momentum for m in tracking]
    for module in tracking:
        module.reset_running_stats()  # type: ignore[operator]
        module.train()
    batches = 0
    with torch.no_grad():
        for x in inputs:
            batches += 1
            for module in tracking:
                # InstanceNorm knows no cumulative average (momentum=None): weigh each batch 1/n by hand.
                module.momentum = 1.0 / batches  # type: ignore[assignment]
            try:
                twin(x)
            except ValueError as error:  # torch's "more than 1 value per channel", for a batch of one example
                raise MaskError(
                    f"running statistics cannot be re-estimated on a batch of shape {tuple(x.shape)}: {error}"
                ) from error
    if not batches:
        raise MaskError("running statistics can only be re-estimated on at least one batch; none was given")
    for module, momentum in zip(tracking, momenta, strict=True):
        module.momentum = momentum
        module.eval()
    return twin
