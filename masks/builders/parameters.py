"""Whole tensors by name, module type, role or depth."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from typing import Literal

from masks.context import MaskContext
from masks.errors import MaskError, unknown_name
from masks.mask import Mask
from masks.params import ROLES, ParamRow, ParamTable
from masks.registry import register_mask

Layer = Literal["any", "first", "classifier"]


@register_mask(
    "parameters",
    kind="natural",
    summary="whole tensors that meet every given condition (pattern, module_type, role, layer, depth)",
    source="a control of this project; SAM-ON's depth ablations restrict by block",
)
def build_parameters(
    context: MaskContext,
    budget: None,
    *,
    pattern: str = "*",
    module_type: str = "*",
    role: tuple[str, ...] = (),
    layer: Layer = "any",
    depth: str = "1/1",
) -> Mask:
    """Options: ``pattern`` and ``module_type`` are shell patterns for the parameter's name and its module's
    class; ``role`` any of the roles of ``ParamRow``; ``layer`` the first or last module with a weight matrix;
    ``depth`` "i/n", the i-th of n consecutive groups of the modules that own parameters.
    """
    for name in role:
        if name not in ROLES:
            raise MaskError(unknown_name("role", name, ROLES))
    in_layer, in_depth = _in_layer(context.table, layer), _in_depth(context.table, depth)
    keep = tuple(
        fnmatch.fnmatchcase(row.name, pattern)
        and fnmatch.fnmatchcase(row.module_type, module_type)
        and (not role or row.role in role)
        and in_layer(row)
        and in_depth(row)
        for row in context.table
    )
    if not any(keep):
        raise MaskError(
            f"mask parameters: none of the {len(keep)} tensors meets pattern={pattern} module_type={module_type} "
            f"role={'+'.join(role) or 'any'} layer={layer} depth={depth}"
        )
    return Mask(context.table, keep)


def _in_layer(table: ParamTable, layer: Layer) -> Callable[[ParamRow], bool]:
    if layer == "any":
        return lambda row: True
    modules = [row.module_name for row in table if row.role == "weight" and len(row.shape) >= 2]
    if not modules:
        raise MaskError(f"mask parameters: layer={layer} needs a weight matrix, and the model has none")
    wanted = modules[0] if layer == "first" else modules[-1]
    return lambda row: row.module_name == wanted


def _in_depth(table: ParamTable, depth: str) -> Callable[[ParamRow], bool]:
    match = re.fullmatch(r"(\d+)/(\d+)", depth)
    modules = list(dict.fromkeys(row.module_name for row in table))
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= len(modules):
        raise MaskError(f"mask parameters: depth must be i/n with 1 <= i <= n <= {len(modules)}, got {depth!r}")
    i, n = int(match[1]), int(match[2])
    wanted = set(modules[len(modules) * (i - 1) // n : len(modules) * i // n])
    return lambda row: row.module_name in wanted
