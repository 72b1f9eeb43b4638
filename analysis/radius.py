"""What one radius means for masks of different sizes."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from analysis.evaluation import whole_mask
from masks.errors import InputError, unknown_name
from masks.mask import Mask
from masks.region import Region
from sam.perturbation import Rule, total_norm

Radius = Literal["same", "rms", "relative"]
RADII: tuple[Radius, ...] = get_args(Radius)


def masked_radius(model: nn.Module, mask: Mask, rule: Rule, rho: float, convention: Radius) -> float:
    """The radius of the ball on the mask, from that of the ball over all P trainable coordinates.

    - "same": rho.
    - "rms": ``rho sqrt(|s| / P)`` for l2, so that the root mean square of ``delta / c`` over the coordinates
      that move is the same for every mask; rho for linf, where it is so already.
    - "relative": ``rho ||s w / c||_p / ||w / c||_p``, so that the ball is as large relative to the weights
      that move, both in the norm of the rule, as rho is to all weights. For elementwise ``c = |w|`` this is "rms" up
      to weights that are zero, for plain linf the largest weight decides. Coordinates with c = 0 do not count.

    Raises:
        InputError: an unknown convention, a rho that is not positive and finite, or weights that are all zero.
    """
    if convention not in RADII:
        raise InputError(unknown_name("radius convention", str(convention), RADII))
    if isinstance(rho, bool) or not (math.isfinite(rho) and rho > 0):
        raise InputError(f"rho must be a positive finite number, got {rho}")
    if convention == "same":
        return rho
    if convention == "rms":
        return rho * math.sqrt(mask.num_kept / mask.numel) if rule.p == 2 else rho
    masked, every = (_size_of_weights(Region(s, model), rule) for s in (mask, whole_mask(model)))
    if not masked > 0:
        raise InputError("radius convention 'relative': the weights on the mask are all zero; use 'same' or 'rms'")
    return rho * masked / every


def _size_of_weights(region: Region, rule: Rule) -> float:
    """``||w / c||_p`` over the region."""
    parts: list[Tensor] = []
    for piece, w in zip(region.pieces, region.weights(), strict=True):
        scale = rule.metric.scale(piece.row, piece.param, w)
        parts.append(w if scale is None else torch.where(scale != 0, w / scale, 0.0))
    if rule.p == 2:
        return float(total_norm(parts))
    return max(float(part.abs().max()) for part in parts if part.numel())
