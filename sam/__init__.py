"""How weights are perturbed: one sharpness-aware optimizer for any mask, method and base optimizer."""

from sam.method import Ascent, Combine, Data, Direction, Method, When
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
from sam.registry import MethodInfo, MethodSpec, build_method, list_methods, method_info, register_method

__all__ = [
    "SAM",
    "Ascent",
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
    "NonFiniteError",
    "Perturbation",
    "RegionVector",
    "Rule",
    "StepStats",
    "When",
    "build_method",
    "list_methods",
    "method_info",
    "perturb",
    "perturb_along",
    "register_method",
]
