"""Whether a solution is flat, and whether a difference is more than noise. Nothing here trains.

A function that has its module's name is taken from there: ``from analysis.verdict import verdict``; so
``analysis.verdict`` is the module.
"""

from analysis.arpack import eigsh
from analysis.association import Association, associations
from analysis.average import average_sharpness
from analysis.builtin_metrics import PRIMARY
from analysis.curve_metrics import read_slice, read_spectrum
from analysis.eigen import EigenPairs, eigenpairs, lambda_max
from analysis.equivalence import Equivalence
from analysis.estimate import EigenResult, Estimate, Interval, PairedComparison
from analysis.fisher import EmpiricalFisherOperator, FisherOperator
from analysis.flatness import relative_flatness
from analysis.gauss_newton import GaussNewtonOperator
from analysis.gradients import fisher_trace, gradient_norm
from analysis.iso_sharpness import IsoSharpness
from analysis.landscape import Slice, direction_between, gradient_direction, loss_slice, random_direction
from analysis.low_rank_trace import hutch_pp, xtrace
from analysis.mediation import Mediation, SignAgreement, sign_agreement
from analysis.metrics import (
    MetricContext,
    MetricInfo,
    evaluate,
    list_metrics,
    measurements,
    metric_info,
    register_metric,
)
from analysis.operator import HessianOperator
from analysis.reliability import PairedRuns, Reliability, paired_runs
from analysis.sharpness import m_sharpness
from analysis.spectrum import SpectralDensity, spectral_density
from analysis.stats import (
    accuracy_interval,
    compare_paired,
    effect_size,
    holm,
    mean_interval,
    min_sign_flip_p,
    seeds_needed,
    sign_flip_p,
)
from analysis.trace import Moments, moments, trace_breakdown
from analysis.verdict import Verdict, verdicts

__all__ = [
    "PRIMARY",
    "Association",
    "EigenPairs",
    "EigenResult",
    "EmpiricalFisherOperator",
    "Equivalence",
    "Estimate",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "Interval",
    "IsoSharpness",
    "Mediation",
    "MetricContext",
    "MetricInfo",
    "Moments",
    "PairedComparison",
    "PairedRuns",
    "Reliability",
    "SignAgreement",
    "Slice",
    "SpectralDensity",
    "Verdict",
    "accuracy_interval",
    "associations",
    "average_sharpness",
    "compare_paired",
    "direction_between",
    "effect_size",
    "eigenpairs",
    "eigsh",
    "evaluate",
    "fisher_trace",
    "gradient_direction",
    "gradient_norm",
    "holm",
    "hutch_pp",
    "lambda_max",
    "list_metrics",
    "loss_slice",
    "m_sharpness",
    "mean_interval",
    "measurements",
    "metric_info",
    "min_sign_flip_p",
    "moments",
    "paired_runs",
    "random_direction",
    "read_slice",
    "read_spectrum",
    "register_metric",
    "relative_flatness",
    "seeds_needed",
    "sign_agreement",
    "sign_flip_p",
    "spectral_density",
    "trace_breakdown",
    "verdicts",
    "xtrace",
]
