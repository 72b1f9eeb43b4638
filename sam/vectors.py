"""Geometry of whole gradients: a list of tensors is one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two vectors, 0-dim float64, summed in float64; 0 of no tensors."""
    sums = [_product(x, y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)


def _product(x: Tensor, y: Tensor) -> Tensor:
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.float() * y.float() if half else x * y


def orthogonal(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """The component of ``a`` orthogonal to ``b``: ``a - (<a, b> / ||b||^2) b``; ``a`` itself where b is zero.

    One inner product over all tensors, not one per tensor; no device synchronisation on an accelerator.
    """
    squared = dot(b, b)
    along = torch.where(squared > 0, dot(a, b) / squared, 0.0)
    return [torch.addcmul(x, y, along.to(x.dtype), value=-1) for x, y in zip(a, b, strict=True)]
