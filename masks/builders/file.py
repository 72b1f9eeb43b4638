"""A mask from a file."""

from __future__ import annotations

from masks.context import MaskContext
from masks.errors import MaskError
from masks.mask import Mask
from masks.registry import register_mask


@register_mask("file", kind="natural", summary="a mask written by Mask.save (option path)", source="yours")
def build_file(context: MaskContext, budget: None, *, path: str = "") -> Mask:
    if not path:
        raise MaskError("mask file needs its option path: file:path=FILE.npz")
    return Mask.load(path, context.table)
