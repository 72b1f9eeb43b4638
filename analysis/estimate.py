"""What a measurement returns: the number together with what is needed to judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from analysis.notebook import eigen_html


@dataclass(frozen=True)
class Estimate:
    """A mean over units of data.

    Attributes:
        name: the metric in full, with every choice that changes the number.
        value: the mean.
        standard_error: of the mean over the ``n`` units of this one model and data set (not over seeds);
            None for ``n`` = 1.
        n: number of units.
        settings: how it was computed, in plain values.
    """

    name: str
    value: float
    standard_error: float | None
    n: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class EigenResult:
    """An approximate eigenvalue of a symmetric operator.

    Attributes:
        name: which eigenvalue of which operator.
        value: theta.
        residual: bound on ``||A v - theta v||_2`` for the unit Ritz vector v, rounding included: at least one
            eigenvalue of A lies within ``value +- residual``.
        num_products: products with the operator that it took.
        converged: whether ``residual <= tol * |value|``, or the Krylov space was exhausted, in which case the
            value is exact up to rounding.
        tol: the tolerance asked for.
        vector: v, shape (dimension,), if it was asked for. Its sign is arbitrary.
        n: number of examples that the operator is a mean over; 0 where it does not say.
        settings: on which data, mask, statistics and precision, from which seed, in plain values.
    """

    name: str
    value: float
    residual: float
    num_products: int
    converged: bool
    tol: float
    vector: Tensor | None = field(default=None, compare=False, repr=False)
    n: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def _repr_html_(self) -> str:
        return eigen_html([self])


@dataclass(frozen=True)
class Interval:
    """A mean with a confidence interval.

    Attributes:
        name: what it is the mean of, and over what.
        value: the mean.
        low: lower end; nan where the data cannot give one.
        high: upper end, likewise.
        confidence: 0.95 for a 95 % interval.
        standard_error: of the mean; nan where the data cannot give one.
        df: degrees of freedom of the t quantile; nan where no t quantile was used.
        n: number of seeds.
    """

    name: str
    value: float
    low: float
    high: float
    confidence: float
    standard_error: float
    df: float
    n: int


@dataclass(frozen=True)
class PairedComparison:
    """One contrast of two arms, paired by seed.

    Attributes:
        name: the contrast.
        mean_difference: mean over seeds of the differences.
        low: lower end of its t interval (nan for one seed).
        high: upper end, likewise.
        confidence: of that interval; not adjusted for the number of contrasts.
        p: two-sided sign-flip p value.
        p_holm: the same after Holm's adjustment over the whole family of contrasts.
        n: number of seeds.
        effect_size: Cohen's d_z, see :func:`analysis.stats.effect_size`.
    """

    name: str
    mean_difference: float
    low: float
    high: float
    confidence: float
    p: float
    p_holm: float
    n: int
    effect_size: float
