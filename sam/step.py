"""What the slots of a method work with during one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from masks.region import Region
from sam.memory import Memory
from sam.passes import BatchPasses, Passes
from sam.perturbation import Perturbation, RegionVector, perturb_along

if TYPE_CHECKING:
    from sam.method import Method


@dataclass(frozen=True, eq=False)
class Ascended:
    """What the passes of a step gave; ``.grad`` holds the gradient at w + eps.

    Attributes:
        loss: L(w), as the closure returned it or 0-dim; None where no pass was at w.
        perturbed_loss: L(w + eps).
        radius: ||eps||_2, 0-dim float64.
        finite: whether the gradients of the ascent were finite, 0-dim bool.
        clean: the gradient at w of every parameter, where the method needs it.
    """

    loss: Any
    perturbed_loss: Any
    radius: Tensor
    finite: Tensor
    clean: Sequence[Tensor] = ()

    @classmethod
    def unperturbed(cls, loss: Any, device: torch.device) -> Ascended:
        """A step whose only pass was at w."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(loss, loss, zero, torch.ones((), dtype=torch.bool, device=device))

    @classmethod
    def averaged(cls, found: Sequence[Ascended], weights: Sequence[float | None]) -> Ascended:
        """What the parts of a batch gave, weighted by their size; the radius is the mean one."""
        shares = [1.0 if weight is None else weight for weight in weights]

        def mean(values: Iterable[Tensor]) -> Tensor:
            return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum()

        return cls(
            mean(part.loss for part in found),
            mean(part.perturbed_loss for part in found),
            mean(part.radius for part in found),
            torch.stack([part.finite for part in found]).all(),
        )


@dataclass(frozen=True, eq=False)
class StepStats:
    """What one step did; 0-dim tensors on the model's device, read without a synchronisation until you do.

    Attributes:
        loss: L(w), of the first pass (of the only pass under an empty mask); NaN, and so ``ascent``, where a method
            has no pass at w (Momentum-SAM).
        perturbed_loss: L(w + eps), of the second pass; equal to ``loss`` under an empty mask.
        radius: ||eps||_2 over all perturbed coordinates, also for rules whose own norm is another.
        finite: whether the step was taken; False if a gradient was not finite and the step was skipped.
    """

    loss: Tensor
    perturbed_loss: Tensor
    radius: Tensor
    finite: Tensor

    @property
    def ascent(self) -> Tensor:
        """Ascent strength ``L(w + eps) - L(w)`` on the step's batch."""
        return self.perturbed_loss - self.loss

    @classmethod
    def of(cls, found: Ascended, finite: Tensor) -> StepStats:
        """From what the passes gave, and whether the step was taken."""
        device = found.radius.device
        perturbed = torch.as_tensor(found.perturbed_loss, device=device).detach()
        if found.loss is None:
            return cls(torch.full_like(perturbed, math.nan), perturbed, found.radius, finite)
        return cls(torch.as_tensor(found.loss, device=device).detach(), perturbed, found.radius, finite)


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a method under a mask.

    Attributes:
        method: the method.
        region: the masked coordinates.
        whole: all parameters, where the norm is taken over them or the method needs every gradient; else None.
        full_norm: whether the norm is taken over ``whole``.
        rho: the radius of every piece of ``region``.
        memory: what the method remembers.
        base: the base optimizer.
        zero_grad: clears all gradients.
        carried: what :meth:`sam.method.Combine.combine` leaves for ``after``.
    """

    method: Method
    region: Region
    whole: Region | None
    full_norm: bool
    rho: Sequence[float | Tensor]
    memory: Memory
    base: Optimizer
    zero_grad: Callable[[], None]
    carried: list[Tensor] = field(default_factory=list)

    @property
    def first_region(self) -> Region:
        """The tensors whose gradients the first pass computes."""
        return self.whole or self.region

    @property
    def keeps_clean(self) -> bool:
        return self.method.combine.every_gradient

    def masked(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """From one tensor per parameter of ``first_region`` to the values at the masked coordinates."""
        touched = gradients if self.whole is None else [gradients[piece.position] for piece in self.region.pieces]
        return self.region.gather(touched)

    def perturbation(self, gradients: Sequence[Tensor]) -> Perturbation:
        """eps from the gradients of ``first_region``; the method remembers what it must."""
        masked = self.masked(gradients)
        if not self.full_norm or self.whole is None:
            values = self.method.direction(masked, self.memory)
            return self.perturb(RegionVector(self.region, values, masked))
        counted = self.whole.gather(gradients)
        direction = self.method.direction(counted, self.memory)
        along = RegionVector(self.region, self.masked(direction), masked)
        return self.perturb(along, norm_over=RegionVector(self.whole, direction, counted))

    def perturb(self, along: RegionVector, *, norm_over: RegionVector | None = None) -> Perturbation:
        """eps along a direction by the method's rule, at the step's radii."""
        factor = self.method.direction.radius_factor
        rho = self.rho if factor == 1 else [radius * factor for radius in self.rho]
        return perturb_along(self.method.rule, along, rho, norm_over=norm_over)

    @contextmanager
    def moved(self, values: list[Tensor], multiplier: Tensor | None = None) -> Iterator[None]:
        """Inside, the weights are w + eps; on the way out, whatever happens, w again.

        Args:
            values: eps, or its directions; the list is emptied, so that nothing holds its memory through the next pass.
            multiplier: of the directions; None for 1.
        """
        try:
            with self.region.moved(values, multiplier):
                # Autocast keeps low-precision copies of the weights it has seen, changed in place since or not.
                torch.clear_autocast_cache()
                yield
        finally:
            torch.clear_autocast_cache()

    def descend(self, passes: Passes) -> Any:
        """The final pass: its gradient is in ``.grad``; returns its loss."""
        if isinstance(passes, BatchPasses):
            passes = self.method.data.descending(passes, self.memory)
        return passes.backward()
