"""Coordinates by the diagonal of the Fisher information."""

from __future__ import annotations

from torch import Tensor

from masks.context import MaskContext
from masks.registry import register_score
from masks.scoring import Labels, mean_squared_gradients


@register_score(
    "fisher",
    summary="weights by the diagonal Fisher information (labels=data: empirical, labels=model: true)",
    source="SSAM-F, Mi et al. 2022, arXiv 2210.05177",
    needs_data=True,
)
def score_fisher(context: MaskContext, *, labels: Labels = "data") -> list[Tensor]:
    return mean_squared_gradients(context, labels)
