"""The affine parameters of normalization layers, and everything else."""

from __future__ import annotations

from typing import Literal

from masks.context import MaskContext
from masks.errors import MaskError
from masks.mask import Mask
from masks.registry import register_mask

SOURCE = "Mueller et al. 2023 (SAM-ON), arXiv 2306.04226"


def _require_norm(context: MaskContext, name: str) -> None:
    if not any(row.is_norm for row in context.table):
        raise MaskError(
            f"mask {name}: none of the model's {len(context.table)} trainable tensors belongs to a normalization "
            "layer; declare the class of a layer of your own with masks.register_norm_type"
        )


@register_mask(
    "norm", kind="natural", summary="affine parameters of normalization layers, by module type", source=SOURCE
)
def build_norm(context: MaskContext, budget: None, *, part: Literal["both", "weights", "biases"] = "both") -> Mask:
    _require_norm(context, "norm")
    wanted = {"both": ("norm_weight", "norm_bias"), "weights": ("norm_weight",), "biases": ("norm_bias",)}[part]
    keep = tuple(row.role in wanted for row in context.table)
    if not any(keep):
        raise MaskError(f"mask norm: the model's normalization layers have no {part}")
    return Mask(context.table, keep)


@register_mask("no_norm", kind="natural", summary="everything but normalization layers", source=SOURCE)
def build_no_norm(context: MaskContext, budget: None) -> Mask:
    _require_norm(context, "no_norm")
    return Mask(context.table, tuple(not row.is_norm for row in context.table))
