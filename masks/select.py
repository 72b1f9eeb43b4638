"""Exact selection of k coordinates by score, the same on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masks.errors import BuilderError, MaskError
from masks.mask import Part
from masks.params import ParamTable
from masks.ranking import Ranking


def check_scores(table: ParamTable, scores: Sequence[Tensor]) -> None:
    """Raise unless there is one score per coordinate and none is NaN.

    Raises:
        BuilderError: which tensor is wrong, and how.
    """
    if not isinstance(scores, Sequence):
        raise BuilderError(f"a score function must return a list of tensors, got {type(scores).__name__}")
    if len(scores) != len(table):
        raise BuilderError(f"a score function must return {len(table)} tensors (one per parameter), got {len(scores)}")
    for row, score in zip(table, scores, strict=True):
        if not isinstance(score, Tensor) or tuple(score.shape) != row.shape:
            got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise BuilderError(f"the scores of {row.name} must have shape {row.shape}, got {got}")
        if not score.dtype.is_floating_point:
            raise BuilderError(f"the scores of {row.name} must be floating point, got {score.dtype}")
        if row.numel and bool(torch.isnan(score.max())):  # the maximum of what holds a NaN is NaN: one reading
            nans = int(torch.isnan(score).sum())
            raise BuilderError(f"{nans} of {row.numel} scores of {row.name} are NaN")


def top_k(scores: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """Exactly ``k`` of the entries of a flat tensor: the largest, equal ones by lowest index.

    Only comparisons decide, so the same scores give the same selection on every device.

    Args:
        scores: shape (n,), floating point, no NaN.
        k: how many, 0 <= k <= n.
        largest: False selects the smallest.

    Returns:
        Boolean tensor of shape (n,) with ``k`` True entries.
    """
    n = scores.numel()
    if not 0 <= k <= n:
        raise MaskError(f"cannot select {k} of {n} coordinates")
    if k in (0, n):
        return torch.full((n,), k == n, dtype=torch.bool, device=scores.device)
    return Ranking([scores], largest=largest).best(k)[0]


def select(
    table: ParamTable,
    scores: Sequence[Tensor],
    num_kept: int,
    *,
    largest: bool = True,
    per_layer: bool = False,
    eligible: Sequence[bool] | None = None,
) -> tuple[Part, ...]:
    """Keep exactly ``num_kept`` coordinates of a model by score.

    Args:
        table: the parameters.
        scores: one tensor per row, of the row's shape.
        num_kept: how many coordinates.
        largest: keep the largest scores (else the smallest).
        per_layer: give every eligible tensor the same density (counts by the largest-remainder method, so
            that they add up to exactly ``num_kept``) instead of ranking all coordinates together.
        eligible: per row, whether its coordinates may be kept; default all.

    Returns:
        One :data:`~masks.mask.Part` per row.

    Raises:
        MaskError: scores of wrong shape or NaN, or fewer eligible coordinates than asked for.
    """
    check_scores(table, scores)
    allowed = [True] * len(table) if eligible is None else list(eligible)
    if len(allowed) != len(table):
        raise MaskError(f"eligible must say of each of {len(table)} tensors whether it is, got {len(allowed)} entries")
    rows = [i for i, ok in enumerate(allowed) if ok]
    available = sum(table.rows[i].numel for i in rows)
    if num_kept > available:
        raise MaskError(f"cannot keep {num_kept} coordinates: only {available} of {table.numel} are eligible")
    parts: list[Part] = [False] * len(table)
    if not rows or not num_kept:
        return tuple(parts)
    if per_layer:
        counts = proportional_counts([table.rows[i].numel for i in rows], num_kept)
        for i, count in zip(rows, counts, strict=True):
            parts[i] = top_k(scores[i].reshape(-1), count, largest=largest).reshape(table.rows[i].shape)
        return tuple(parts)
    if num_kept == available:
        return tuple(allowed)
    keep = Ranking([scores[i] for i in rows], largest=largest).best(num_kept)
    for i, part in zip(rows, keep, strict=True):
        parts[i] = part.reshape(table.rows[i].shape)
    return tuple(parts)


def proportional_counts(sizes: Sequence[int], total: int) -> list[int]:
    """Split ``total`` in proportion to ``sizes``, exactly: floors first, then the largest remainders.

    Equal remainders go to the first. Up to a total of ``sum(sizes)`` no count exceeds its size.
    """
    numel = sum(sizes)
    counts = [size * total // numel for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(sizes[i] * total % numel), i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
