"""A mask that evolves: at every update some coordinates are dropped and as many others grown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from masks.budget import Budget
from masks.builders.random import draw, mask_of_flat
from masks.context import MaskContext
from masks.errors import MaskError
from masks.mask import Mask
from masks.registry import register_mask
from masks.schedule import EVERY_EPOCH
from masks.scoring import mean_gradient
from masks.select import check_scores, top_k

Criterion = Literal["gradient", "magnitude", "random"]


def exchanged(num_kept: int, numel: int, drop_rate: float, progress: float) -> int:
    """How many coordinates an update drops, and grows: ``min(round(d k), N - k)``.

    ``d = drop_rate (1 + cos(pi progress)) / 2`` falls from ``drop_rate`` to 0 over training.
    """
    rate = drop_rate * (1 + math.cos(math.pi * progress)) / 2
    return min(round(rate * num_kept), numel - num_kept)


@register_mask(
    "dynamic",
    kind="budgeted",
    summary="starts random; at every update drops the lowest of its coordinates and grows as many others",
    source="SSAM-D, Mi et al. 2022, arXiv 2210.05177",
    needs_data=True,
    schedule=EVERY_EPOCH,
)
def build_dynamic(
    context: MaskContext,
    budget: Budget,
    *,
    drop: Criterion = "gradient",
    grow: Criterion = "random",
    drop_rate: float = 0.5,
) -> Mask:
    """From ``context.previous``: n live coordinates die, and n that were dead before live; see :func:`exchanged`.

    Dropped are those with the smallest |g| or |w|, grown those with the largest, equal ones by position, or either
    at random; g is the gradient of the mean loss on the scoring data, where the published code takes the last batch's.
    No coordinate is dropped and grown in one update, and the number of live ones stays exactly the budget; the
    published code drops more than it grows above a density of one half, and its live set shrinks.

    Raises:
        MaskError: a drop rate outside [0, 1], or a previous mask of another size.
    """
    if not 0 <= drop_rate <= 1:
        raise MaskError(f"drop_rate must lie between 0 and 1, got {drop_rate}")
    previous, table = context.previous, context.table
    if previous is None:
        return mask_of_flat(table, draw(torch.arange(table.numel), budget.num_kept, context.generator("dynamic")))
    if previous.num_kept != budget.num_kept:
        raise MaskError(
            f"a dynamic mask keeps its size: the previous one keeps {previous.num_kept}, the budget {budget.num_kept}"
        )
    flat = torch.cat([part.reshape(-1) for part in previous.dense("cpu")])
    live, dead = flat.nonzero().squeeze(1), (~flat).nonzero().squeeze(1)
    count = exchanged(len(live), len(flat), drop_rate, context.progress)
    # A stream of its own for every update: the mask before it says which one this is.
    streams = {purpose: context.generator("dynamic", purpose, previous.digest()) for purpose in ("drop", "grow")}
    scores = {kind: _scores(context, kind) for kind in {drop, grow} - {"random"}} if count else {}
    dropped = _chosen(live, count, scores.get(drop), streams["drop"], largest=False)
    grown = _chosen(dead, count, scores.get(grow), streams["grow"], largest=True)
    flat[dropped], flat[grown] = False, True
    return mask_of_flat(table, flat.nonzero().squeeze(1))


def _scores(context: MaskContext, kind: str) -> Tensor:
    tensors: Sequence[Tensor] = mean_gradient(context) if kind == "gradient" else context.parameters()
    check_scores(context.table, tensors)
    return torch.cat([t.detach().abs().reshape(-1).cpu() for t in tensors])


def _chosen(
    candidates: Tensor, count: int, scores: Tensor | None, generator: torch.Generator, *, largest: bool
) -> Tensor:
    if scores is None:
        return draw(candidates, count, generator)
    return candidates[top_k(scores[candidates], count, largest=largest)]
