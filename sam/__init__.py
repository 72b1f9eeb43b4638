"""How weights are perturbed: one sharpness-aware optimizer for any mask, rule and base optimizer."""

from sam.optimizer import SAM, NonFiniteError, StepStats
from sam.perturbation import Elementwise, Identity, Layerwise, Metric, Perturbation, Rule, perturb

__all__ = [
    "SAM",
    "Elementwise",
    "Identity",
    "Layerwise",
    "Metric",
    "NonFiniteError",
    "Perturbation",
    "Rule",
    "StepStats",
    "perturb",
]
