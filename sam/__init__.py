"""How weights are perturbed: one sharpness-aware optimizer for any mask, method and base optimizer."""

from sam.accumulation import Accumulated
from sam.captured import CapturedStep
from sam.method import Ascent, Combine, Data, Direction, Method, When
from sam.mup import MupShapes, mup_init_, mup_param_groups, mup_roles
from sam.optimizer import SAM, NonFiniteError, StepStats
from sam.perturbation import (
    Elementwise,
    Identity,
    Layerwise,
    Metric,
    Perturbation,
    RegionVector,
    Rule,
    perturb,
    perturb_along,
)
from sam.radius import RadiusFollowsLR
from sam.registry import MethodInfo, MethodSpec, build_method, list_methods, method_info, register_method

__all__ = [
    "SAM",
    "Accumulated",
    "Ascent",
    "CapturedStep",
    "Combine",
    "Data",
    "Direction",
    "Elementwise",
    "Identity",
    "Layerwise",
    "Method",
    "MethodInfo",
    "MethodSpec",
    "Metric",
    "MupShapes",
    "NonFiniteError",
    "Perturbation",
    "RadiusFollowsLR",
    "RegionVector",
    "Rule",
    "StepStats",
    "When",
    "build_method",
    "list_methods",
    "method_info",
    "mup_init_",
    "mup_param_groups",
    "mup_roles",
    "perturb",
    "perturb_along",
    "register_method",
]
