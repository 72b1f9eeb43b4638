"""The mask relative_magnitude, a plugin of sam-masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masks import MaskContext, register_score


@register_score(
    "relative_magnitude",
    summary="weights by |w| relative to the mean |w| of their tensor",
    source="yours: a paper with its equation, or a note",
)
def score(context: MaskContext, *, power: float = 1.0) -> Sequence[Tensor]:
    """s_i = |w_i| / m^power, with m the mean of |w| over the tensor that holds w_i; 0 in a tensor of zeros.

    A power of 0 is the mask magnitude; a power of 1 does not depend on the scale of a tensor.
    """
    scores = []
    for w in context.parameters():
        mean = w.abs().mean()
        scores.append(w.abs() / torch.where(mean > 0, mean, 1) ** power)  # a bias of zeros must not score 0 / 0
    return scores
