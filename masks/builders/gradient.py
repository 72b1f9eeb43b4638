"""Coordinates by the gradient of the mean loss."""

from __future__ import annotations

from torch import Tensor

from masks.context import MaskContext
from masks.registry import register_score
from masks.scoring import mean_gradient


@register_score(
    "gradient",
    summary="weights by |g|, the gradient of the mean loss on the scoring data",
    source="gradient criterion, as in Sparse SAM (Mi et al. 2022, arXiv 2210.05177)",
    needs_data=True,
)
def score_gradient(context: MaskContext) -> list[Tensor]:
    return [g.abs() for g in mean_gradient(context)]


@register_score(
    "snip",
    summary="weights by |w g|, the first-order effect of removing them",
    source="SNIP, Lee et al. 2019, arXiv 1810.02340, eq. 6",
    needs_data=True,
)
def score_snip(context: MaskContext) -> list[Tensor]:
    return [(w * g).abs() for w, g in zip(context.parameters(), mean_gradient(context), strict=True)]
