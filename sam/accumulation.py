"""Gradient accumulation: one step on a batch that does not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from masks.errors import InputError
from masks.region import Region
from sam.passes import LossFn, Passes, Role, Surroundings, fresh_gradients, per_example, restricted


@dataclass(frozen=True)
class Accumulated:
    """Micro-batches that make one batch: ``optimizer.step_on(loss_fn, Accumulated(micro_batches))``.

    Every pass of the step goes over all of them, one graph in memory at a time, and averages their gradients by their
    numbers of examples: there is one perturbation, that of the whole batch, as if it were computed at once. (A
    perturbation per micro-batch is another method, ``micro_batch_sam``.) Equal to the step on the whole batch to
    rounding, except that BatchNorm normalises each micro-batch by itself, and updates its running statistics once per
    micro-batch.

    Args:
        batches: what ``loss_fn`` takes, one item per micro-batch. It is read once per pass and must give the same
            items each time; random draws of the default generators while it is read are replayed if the step's are.

    Raises:
        InputError: a tensor, an iterator (which can be read only once), or nothing.
    """

    batches: Iterable[Any]

    def __post_init__(self) -> None:
        if isinstance(self.batches, Tensor) or not isinstance(self.batches, Iterable):
            raise InputError(f"Accumulated takes a sequence of micro-batches, got {type(self.batches).__name__}")
        if isinstance(self.batches, Iterator):
            raise InputError("Accumulated reads its micro-batches once per pass, an iterator only once; give a list")
        if isinstance(self.batches, Sized) and not len(self.batches):
            raise InputError("Accumulated needs at least one micro-batch, got none")


class AccumulatedPasses(Passes):
    """Passes of a per-example loss over micro-batches that make one batch."""

    def __init__(self, surroundings: Surroundings, loss_fn: LossFn, batch: Accumulated) -> None:
        super().__init__(surroundings)
        self._loss_fn, self._batches = loss_fn, batch.batches
        self._examples: int | None = None
        self._loss: Tensor | None = None

    def _shares(self) -> Iterator[tuple[Tensor, float]]:
        """For each micro-batch: its mean loss times its share of the examples so far, and the share of those before.

        So a running mean is ``mean * before + new``: the number of all examples need not be known, and in
        data-parallel training the last micro-batch's pass averages a finished mean.

        Raises:
            InputError: no micro-batch, or not as many examples as in the first pass.
        """
        seen = 0
        for item, last in _with_last(self._batches):
            with nullcontext() if last else self.surroundings.apart():
                losses = per_example(self._loss_fn(item))
                before, seen = seen / (seen + losses.numel()), seen + losses.numel()
                loss = losses.mean() * (losses.numel() / seen)
                value = loss.detach()
                self._loss = value + self._loss * before if before and self._loss is not None else value
                yield loss, before
        if not seen:
            raise InputError("Accumulated needs at least one micro-batch, got none")
        if self._examples not in (None, seen):
            raise InputError(
                f"Accumulated must give the same micro-batches in every pass; it gave {self._examples} examples in the "
                f"first and {seen} in a later one"
            )
        self._examples = seen

    def _gradients(self, region: Region, role: Role) -> tuple[Tensor | None, list[Tensor]]:
        mean: list[Tensor] = []
        for loss, before in self._shares():
            mean = _running_mean(mean, before, restricted(self._scaled(loss), region))
        return self._loss, mean

    def _backward(self, role: Role) -> Tensor | None:
        params = self.surroundings.params()
        with fresh_gradients(params):
            for loss, before in self._shares():
                gradients = [p.grad for p in params if p.grad is not None]
                if gradients:
                    torch._foreach_mul_(gradients, before)
                self._scaled(loss).backward()  # type: ignore[no-untyped-call]
            self._unscale()
        return self._loss


def _running_mean(mean: list[Tensor], before: float, new: tuple[Tensor, ...]) -> list[Tensor]:
    # Not in place: autograd may return one tensor for two parameters.
    return list(torch._foreach_add(new, mean, alpha=before)) if mean else list(new)


def _with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each item, and whether it is the last one."""
    rest = iter(items)
    for current in rest:
        for following in rest:
            yield current, False
            current = following
        yield current, True
