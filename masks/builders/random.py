"""Random coordinates: anywhere, or spread over depth as the normalization layers are."""

from __future__ import annotations

import torch
from torch import Tensor

from masks.budget import Budget
from masks.context import MaskContext
from masks.errors import MaskError
from masks.mask import Mask
from masks.params import ParamTable
from masks.registry import register_mask
from masks.select import proportional_counts


def mask_of_flat(table: ParamTable, kept: Tensor) -> Mask:
    """The mask of coordinates given by their position in the flattened model."""
    flat = torch.zeros(table.numel, dtype=torch.bool)
    flat[kept] = True
    parts = torch.split(flat, [row.numel for row in table])
    return Mask(table, tuple(part.reshape(row.shape) for row, part in zip(table, parts, strict=True)))


def draw(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of the candidates, uniformly, without replacement."""
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]]


@register_mask(
    "random", kind="budgeted", summary="coordinates drawn uniformly from the whole model", source="the control"
)
def build_random(context: MaskContext, budget: Budget, *, exclude_norm: bool = False) -> Mask:
    table = context.table
    allowed = torch.cat([torch.full((row.numel,), not (exclude_norm and row.is_norm)) for row in table])
    candidates = allowed.nonzero().squeeze(1)
    if len(candidates) < budget.num_kept:
        raise MaskError(f"cannot keep {budget.num_kept} coordinates: only {len(candidates)} are eligible")
    return mask_of_flat(table, draw(candidates, budget.num_kept, context.generator("random")))


@register_mask(
    "random_depth",
    kind="budgeted",
    summary="random weights outside the normalization layers, spread over depth as those layers are",
    source="a control of this project",
)
def build_random_depth(context: MaskContext, budget: Budget) -> Mask:
    """For each normalization tensor with c entries, c entries of the smallest enclosing module with enough.

    They are drawn uniformly, without replacement, from the module's parameters outside normalization layers.
    For a budget other than the norm mask's count, the c are scaled (largest remainders).
    """
    table = context.table
    norms = [row for row in table if row.is_norm]
    if not norms:
        raise MaskError("mask random_depth follows normalization layers, and the model has none")
    free = torch.cat([torch.full((row.numel,), not row.is_norm) for row in table])
    if int(free.sum()) < budget.num_kept:
        raise MaskError(f"cannot keep {budget.num_kept} coordinates: only {int(free.sum())} lie outside norm layers")
    generator = context.generator("random_depth")
    kept: list[Tensor] = []
    for row, count in zip(norms, proportional_counts([row.numel for row in norms], budget.num_kept), strict=True):
        candidates = _smallest_enclosing(table, free, row.module_name, count)
        drawn = draw(candidates, count, generator)
        free[drawn] = False
        kept.append(drawn)
    return mask_of_flat(table, torch.cat(kept))


def _smallest_enclosing(table: ParamTable, free: Tensor, module_name: str, count: int) -> Tensor:
    """Flat indices of the free coordinates of the innermost module around ``module_name`` that has enough."""
    while True:
        prefix = module_name + "." if module_name else ""
        inside = torch.zeros_like(free)
        for row, offset in zip(table, table.offsets, strict=True):
            if row.name.startswith(prefix):
                inside[offset : offset + row.numel] = True
        candidates = (free & inside).nonzero().squeeze(1)
        if len(candidates) >= count or not module_name:
            return candidates
        module_name = module_name.rpartition(".")[0]
