"""Whether a solution is flat, and whether a difference is more than noise. Nothing here trains."""

from analysis.eigen import lambda_max
from analysis.estimate import EigenResult, Estimate, Interval, PairedComparison
from analysis.operator import HessianOperator
from analysis.sharpness import m_sharpness
from analysis.stats import (
    accuracy_interval,
    compare_paired,
    holm,
    mean_interval,
    min_sign_flip_p,
    seeds_needed,
    sign_flip_p,
)

__all__ = [
    "EigenResult",
    "Estimate",
    "HessianOperator",
    "Interval",
    "PairedComparison",
    "accuracy_interval",
    "compare_paired",
    "holm",
    "lambda_max",
    "m_sharpness",
    "mean_interval",
    "min_sign_flip_p",
    "seeds_needed",
    "sign_flip_p",
]
