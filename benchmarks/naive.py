"""Published ways to perturb under a mask, written plainly, to compare with: each does what its authors' code does.

Each is the move to w + eps, from gradients that are in ``.grad``, and the way back; none restricts a pass to the mask.
What the authors keep from step to step is kept here, too, since fresh memory costs. Their base optimizer's step and the
clearing of gradients are left out.
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
    """SAM (Foret et al. 2021) as in davda54/sam: tensor by tensor, eps is made, added and kept, and subtracted to go
    back. No weight is copied; w comes back up to rounding."""
    return _subtracting(params, None, 1e-12)


def ssam(params: Sequence[Tensor], masks: Sequence[Tensor]) -> Moves:
    """Sparse SAM (Mi et al. 2022) as in Mi-Peng/Sparse-Sharpness-Aware-Minimization: as :func:`sam`, with eps of all
    weights, normalised over all, times a mask of zeros and ones in the type and layout of the weights."""
    return _subtracting(params, [torch.empty_like(p).copy_(m) for p, m in zip(params, masks, strict=True)], 1e-7)


def _subtracting(params: Sequence[Tensor], factors: Sequence[Tensor] | None, floor: float) -> Moves:
    kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def move() -> None:
        scale = RHO / (_norm([p.grad for p in params]) + floor)
        for i, p in enumerate(params):
            eps = p.grad * scale
            if factors is not None:
                eps = eps * factors[i]
            p.add_(eps)
            kept[i] = eps

    @torch.no_grad()
    def back() -> None:
        for i, p in enumerate(params):
            p.sub_(kept[i])

    return move, back


def sam_on(params: Sequence[Tensor], is_norm: Sequence[bool]) -> Moves:
    """SAM-ON (Mueller et al. 2023) as in mueller-mp/SAM-ON, plain L2: every weight is copied, those of normalization
    layers are moved, by an eps whose memory is kept, and their ``.data`` becomes the copy to go back.

    Parameters that moved lie elsewhere afterwards: see :func:`settling`.
    """
    copies: dict[int, Tensor] = {}
    eps: dict[int, Tensor] = {}
    moved = [i for i, norm in enumerate(is_norm) if norm]

    @torch.no_grad()
    def move() -> None:
        for i, p in enumerate(params):
            copies[i] = p.data.clone()
        scale = RHO / (_norm([params[i].grad for i in moved]) + 1e-16)
        for i in moved:
            if i not in eps:
                eps[i] = params[i].detach().clone()
            params[i].add_(eps[i].copy_(params[i].grad).mul_(scale))

    @torch.no_grad()
    def back() -> None:
        for i in moved:
            params[i].data = copies[i]

    return move, back


def settling(params: Sequence[Tensor]) -> Callable[[], None]:
    """A function that puts parameters back to where they lie now, with the values that they then have: what else is
    measured on them may hold on to their memory."""
    homes = [p.data for p in params]

    def settle() -> None:
        for p, home in zip(params, homes, strict=True):
            if p.data_ptr() != home.data_ptr():
                p.data = home.copy_(p.data)

    return settle
