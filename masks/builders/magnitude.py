"""Coordinates by the size of the weight."""

from __future__ import annotations

from torch import Tensor

from masks.context import MaskContext
from masks.registry import register_score


@register_score(
    "magnitude",
    summary="weights by |w|; at initialization this ranks layers by the scale of their initializer",
    source="magnitude pruning, Han et al. 2015, arXiv 1506.02626",
)
def score_magnitude(context: MaskContext) -> list[Tensor]:
    return [w.abs() for w in context.parameters()]
