"""All coordinates, or none."""

from __future__ import annotations

from masks.context import MaskContext
from masks.mask import Mask
from masks.registry import register_mask


@register_mask(
    "all", kind="natural", summary="every coordinate: plain SAM", source="Foret et al. 2021, arXiv 2010.01412"
)
def build_all(context: MaskContext, budget: None) -> Mask:
    return Mask(context.table, (True,) * len(context.table))


@register_mask("none", kind="natural", summary="no coordinate: the base optimizer", source="the control")
def build_none(context: MaskContext, budget: None) -> Mask:
    return Mask(context.table, (False,) * len(context.table))
