"""Published ways to perturb under a mask, written plainly from their papers and public descriptions, to compare with.

Each does the move to w + eps and back, from gradients that are in ``.grad``; none restricts a pass to the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RHO = 0.05

MoveAndBack = Callable[[], None]


@torch.no_grad()
def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


def sam(params: Sequence[Tensor]) -> MoveAndBack:
    """SAM (Foret et al. 2021), tensor by tensor, with a copy of all weights."""

    @torch.no_grad()
    def move_and_back() -> None:
        scale = RHO / (_norm([p.grad for p in params]) + 1e-12)
        saved = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad * scale)
        for p, before in zip(params, saved, strict=True):
            p.copy_(before)

    return move_and_back


def sam_on(params: Sequence[Tensor], is_norm: Sequence[bool]) -> MoveAndBack:
    """SAM-ON (Mueller et al. 2023): normalization layers alone move, but all weights are copied."""
    moved = [p for p, norm in zip(params, is_norm, strict=True) if norm]

    @torch.no_grad()
    def move_and_back() -> None:
        scale = RHO / (_norm([p.grad for p in moved]) + 1e-12)
        saved = [p.clone() for p in params]
        for p in moved:
            p.add_(p.grad * scale)
        for p, before in zip(params, saved, strict=True):
            p.copy_(before)

    return move_and_back


def ssam(params: Sequence[Tensor], masks: Sequence[Tensor]) -> MoveAndBack:
    """Sparse SAM (Mi et al. 2022): eps of all weights times a mask of zeros and ones, subtracted to go back."""
    factors = [mask.to(p.dtype) for p, mask in zip(params, masks, strict=True)]

    @torch.no_grad()
    def move_and_back() -> None:
        scale = RHO / (_norm([p.grad for p in params]) + 1e-12)
        eps = []
        for p, factor in zip(params, factors, strict=True):
            eps.append(p.grad * scale * factor)
            p.add_(eps[-1])
        for p, move in zip(params, eps, strict=True):
            p.sub_(move)

    return move_and_back
