"""What is perturbed: parameter tables, masks at exact counts, and the registry of mask builders."""

from masks.budget import Budget
from masks.context import Batch, LossFn, MaskContext, cross_entropy
from masks.errors import BuilderError, InputError, MaskError, MaskFileError
from masks.mask import LayerCount, Mask, Part, Provenance
from masks.options import Option
from masks.params import ParamRow, ParamTable, Role, register_norm_type
from masks.per_example import OneByOneWarning
from masks.region import Region
from masks.registry import (
    MaskInfo,
    broken_plugins,
    build_mask,
    installed_plugins,
    list_masks,
    load_plugin,
    mask_info,
    register_mask,
    register_score,
)
from masks.schedule import Schedule
from masks.select import select, top_k
from masks.spec import MaskSpec

__all__ = [
    "Batch",
    "Budget",
    "BuilderError",
    "InputError",
    "LayerCount",
    "LossFn",
    "Mask",
    "MaskContext",
    "MaskError",
    "MaskFileError",
    "MaskInfo",
    "MaskSpec",
    "OneByOneWarning",
    "Option",
    "ParamRow",
    "ParamTable",
    "Part",
    "Provenance",
    "Region",
    "Role",
    "Schedule",
    "broken_plugins",
    "build_mask",
    "cross_entropy",
    "installed_plugins",
    "list_masks",
    "load_plugin",
    "mask_info",
    "register_mask",
    "register_norm_type",
    "register_score",
    "select",
    "top_k",
]
