"""Published ways to perturb under a mask, written plainly from their papers and public descriptions, to compare with.

Each is the move to w + eps, from gradients that are in ``.grad``, and the way back; none restricts a pass to the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RHO = 0.05

Moves = tuple[Callable[[], None], Callable[[], None]]
"""There and back."""


@torch.no_grad()
def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


def sam(params: Sequence[Tensor]) -> Moves:
    """SAM (Foret et al. 2021), tensor by tensor, with a copy of all weights."""

    return _with_copies(params, params)


def sam_on(params: Sequence[Tensor], is_norm: Sequence[bool]) -> Moves:
    """SAM-ON (Mueller et al. 2023): normalization layers alone move, but all weights are copied."""
    return _with_copies(params, [p for p, norm in zip(params, is_norm, strict=True) if norm])


def _with_copies(params: Sequence[Tensor], moved: Sequence[Tensor]) -> Moves:
    saved: list[Tensor] = []

    @torch.no_grad()
    def move() -> None:
        scale = RHO / (_norm([p.grad for p in moved]) + 1e-12)
        saved.extend(p.clone() for p in params)
        for p in moved:
            p.add_(p.grad * scale)

    @torch.no_grad()
    def back() -> None:
        for p, before in zip(params, saved, strict=True):
            p.copy_(before)
        saved.clear()

    return move, back


def ssam(params: Sequence[Tensor], masks: Sequence[Tensor]) -> Moves:
    """Sparse SAM (Mi et al. 2022): eps of all weights times a mask of zeros and ones, subtracted to go back."""
    factors = [mask.to(p.dtype) for p, mask in zip(params, masks, strict=True)]
    eps: list[Tensor] = []

    @torch.no_grad()
    def move() -> None:
        scale = RHO / (_norm([p.grad for p in params]) + 1e-12)
        for p, factor in zip(params, factors, strict=True):
            eps.append(p.grad * scale * factor)
            p.add_(eps[-1])

    @torch.no_grad()
    def back() -> None:
        for p, e in zip(params, eps, strict=True):
            p.sub_(e)
        eps.clear()

    return move, back
