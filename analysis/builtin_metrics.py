"""The built-in metrics: one registration each. Importing this module registers them."""

from __future__ import annotations

import math
from itertools import product

from analysis.average import Noise, average_sharpness
from analysis.eigen import eigenpairs
from analysis.estimate import Estimate
from analysis.flatness import relative_flatness
from analysis.gauss_newton import GaussNewtonOperator
from analysis.gradients import Labels, fisher_trace, gradient_norm
from analysis.metrics import Invariance, MetricContext, register_metric
from analysis.operator import CurvatureOperator, HessianOperator
from analysis.sharpness import Method, m_sharpness
from analysis.trace import Moments, moments
from sam.perturbation import Elementwise, Rule

ADAPTIVE = Elementwise(0.0, "adaptive")
"""c = |w| for every parameter, biases included: the normaliser that rescaling of ReLU neurons cannot fool."""

PRIMARY = "apgd_linf_adaptive_normalised@0.002"
"""The metric named beforehand, on which a verdict rests; every other one is secondary. With the defaults: logit-
normalised adaptive linf, Auto-PGD with 20 steps, m = 128, the middle radius of its grid."""

STEPS = 20

_GRIDS = {
    ("l2", False): (0.125, 0.25, 0.5, 1.0, 2.0),
    ("l2", True): (0.25, 0.5, 1.0, 2.0, 4.0),
    ("linf", False): (0.00025, 0.0005, 0.001, 0.002, 0.004),
    ("linf", True): (0.0005, 0.001, 0.002, 0.004, 0.008),
}
"""The radii of Andriushchenko et al. 2023 (four per network), joined and made five so that one is in the middle."""
_AVERAGE_GRID = (0.025, 0.05, 0.1, 0.2, 0.4)
_ANDRIUSHCHENKO = "Andriushchenko et al. 2023, arXiv 2302.07011"
_SEARCHES: dict[Method, tuple[str, str, float]] = {
    "one_step": ("one step", "Foret et al. 2021, arXiv 2010.01412", 1.3),
    "pgd": (f"{STEPS}-step projected gradient", _ANDRIUSHCHENKO, STEPS + 0.7),
    "apgd": (f"{STEPS}-step Auto-PGD", f"{_ANDRIUSHCHENKO}; Croce and Hein 2020, arXiv 2003.01690", STEPS + 0.3),
}


def _invariances(adaptive: bool, normalised: bool) -> tuple[Invariance, ...]:
    """Adaptive metrics see no rescaling of ReLU neurons; with normalised logits not that of the last layer either."""
    rescaling: tuple[Invariance, ...] = ("neuron_rescaling", "layer_rescaling") if adaptive else ()
    return (*rescaling, "logit_scale") if adaptive and normalised else rescaling


def _suffix(adaptive: bool, normalised: bool) -> str:
    return "_adaptive" * adaptive + "_normalised" * normalised


def _register_worst_case(method: Method, norm: str, adaptive: bool, normalised: bool) -> None:
    what, source, cost = _SEARCHES[method]
    p = 2 if norm == "l2" else math.inf
    rule = Rule(ADAPTIVE, p) if adaptive else Rule(p=p)

    @register_metric(
        f"{method}_{norm}{_suffix(adaptive, normalised)}",
        direction="sharper",
        invariances=_invariances(adaptive, normalised),
        source=source,
        cost=cost,
        grid=_GRIDS[norm, adaptive],
        convention=True,
        summary=f"worst-case m-sharpness, {what}, {norm}{', c = |w|' * adaptive}{', normalised logits' * normalised}",
    )
    def measure(context: MetricContext, rho: float) -> Estimate:
        return m_sharpness(
            context.model,
            context.batches,
            m=context.m,
            rho=rho,
            rule=rule,
            mask=context.mask,
            method=method,
            steps=1 if method == "one_step" else STEPS,
            normalise_logits=normalised,
            radius=context.radius,
            loss=context.loss,
        )


def _register_average(noise: Noise, adaptive: bool, normalised: bool) -> None:
    @register_metric(
        f"average_{noise}{_suffix(adaptive, normalised)}",
        direction="sharper",
        invariances=_invariances(adaptive, normalised),
        source=_ANDRIUSHCHENKO,
        cost=7.0,
        grid=_AVERAGE_GRID,
        summary=f"average-case sharpness, {noise}{', c = |w|' * adaptive}{', normalised logits' * normalised}",
    )
    def measure(context: MetricContext, rho: float) -> Estimate:
        return average_sharpness(
            context.model,
            context.batches,
            rho=rho,
            noise=noise,
            metric=ADAPTIVE if adaptive else None,
            pairs=context.pairs,
            mask=context.mask,
            seed=context.seed,
            normalise_logits=normalised,
            loss=context.loss,
        )


def _register_fisher(name: str, labels: Labels, cost: float) -> None:
    @register_metric(
        name,
        direction="sharper",
        source="Jastrzebski et al. 2021, arXiv 2012.14193; Kunstner et al. 2019, arXiv 1905.12558",
        cost=cost,
        summary=f"mean squared gradient norm per example, labels of the {labels}",
    )
    def measure(context: MetricContext) -> Estimate:
        return fisher_trace(
            context.model,
            context.batches,
            labels=labels,
            mask=context.mask,
            seed=context.seed,
            loss=context.loss,
        )


for _method, _norm, _adaptive, _normalised in product(_SEARCHES, ("l2", "linf"), (False, True), (False, True)):
    _register_worst_case(_method, _norm, _adaptive, _normalised)
_NOISES: tuple[Noise, ...] = ("gaussian", "uniform")
for _noise, _adaptive, _normalised in product(_NOISES, (False, True), (False, True)):
    _register_average(_noise, _adaptive, _normalised)
_register_fisher("fisher_trace_empirical", "data", 2.0)
_register_fisher("fisher_trace_true", "model", 2.3)


@register_metric("gradient_norm", direction="sharper", source="Zhao et al. 2022, arXiv 2202.03599", cost=1.0)
def _gradient_norm(context: MetricContext) -> Estimate:
    """norm of the gradient of the mean loss"""
    return gradient_norm(context.model, context.batches, mask=context.mask, loss=context.loss)


@register_metric(
    "gradient_norm_adaptive",
    direction="sharper",
    invariances=("neuron_rescaling", "layer_rescaling"),
    source="Kwon et al. 2021, arXiv 2102.11600",
    cost=1.0,
)
def _gradient_norm_adaptive(context: MetricContext) -> Estimate:
    """norm of |w| times the gradient of the mean loss"""
    return gradient_norm(context.model, context.batches, metric=ADAPTIVE, mask=context.mask, loss=context.loss)


DEFLATED = 5
"""Eigenpairs that the trace and its like are deflated by, or fewer for smaller models."""


def _eigenvalue(context: MetricContext, operator: CurvatureOperator, k: int = 1) -> Estimate:
    """The k-th largest eigenvalue; from the second on it is checked that none was passed over."""
    found = eigenpairs(operator, k, seed=context.seed)
    pair = found.largest[-1]
    return Estimate(
        name=pair.name,
        value=pair.value,
        standard_error=None,
        n=pair.n,
        settings={
            **pair.settings,
            "error_kind": "residual: an eigenvalue lies within value +- error",
            "residual": pair.residual,
            "num_products": found.num_products,
            "converged": pair.converged,
            "complete": found.complete,
            "tol": pair.tol,
        },
    )


def _hessian(context: MetricContext, *, scaled: bool = False) -> HessianOperator:
    return HessianOperator(
        context.model, context.batches, mask=context.mask, loss=context.loss, scale="abs" if scaled else None
    )


@register_metric("lambda_max", direction="sharper", source="Keskar et al. 2017, arXiv 1609.04836", cost=20.0)
def _lambda_max(context: MetricContext) -> Estimate:
    """largest eigenvalue of the Hessian of the mean loss"""
    with _hessian(context) as operator:
        return _eigenvalue(context, operator)


@register_metric("lambda_5", direction="sharper", source="Ghorbani et al. 2019, arXiv 1901.10159", cost=40.0)
def _lambda_5(context: MetricContext) -> Estimate:
    """fifth largest eigenvalue of the Hessian of the mean loss"""
    with _hessian(context) as operator:
        return _eigenvalue(context, operator, 5)


@register_metric(
    "lambda_max_adaptive",
    direction="sharper",
    invariances=("neuron_rescaling", "layer_rescaling"),
    source="Kwon et al. 2021, arXiv 2102.11600",
    cost=20.0,
)
def _lambda_max_adaptive(context: MetricContext) -> Estimate:
    """largest eigenvalue of C H C, C = diag(|w|)"""
    with _hessian(context, scaled=True) as operator:
        return _eigenvalue(context, operator)


@register_metric("lambda_max_gauss_newton", direction="sharper", source="Martens 2020, arXiv 1412.1193", cost=20.0)
def _lambda_max_gauss_newton(context: MetricContext) -> Estimate:
    """largest eigenvalue of the Gauss-Newton matrix of the mean loss"""
    with GaussNewtonOperator(context.model, context.batches, mask=context.mask, loss=context.loss) as operator:
        return _eigenvalue(context, operator)


def _moments(context: MetricContext) -> Moments:
    """Of the Hessian, with 20 probes, deflated by the Ritz vectors of the outermost eigenvalues."""
    with _hessian(context) as operator:
        k = min(DEFLATED, operator.dimension)
        pairs = eigenpairs(operator, k, seed=context.seed, check=False, keep_vectors=True).largest
        return moments(operator, seed=context.seed, deflate=pairs)


@register_metric("trace", direction="sharper", source="Hutchinson 1990; Yao et al. 2020, arXiv 1912.07145", cost=70.0)
def _trace(context: MetricContext) -> Estimate:
    """trace of the Hessian of the mean loss, by Hutchinson's estimator, deflated"""
    return _moments(context).trace


@register_metric("frobenius_norm", direction="sharper", source="Hutchinson 1990", cost=70.0)
def _frobenius_norm(context: MetricContext) -> Estimate:
    """Frobenius norm of the Hessian of the mean loss: the root of the sum of its squared eigenvalues"""
    return _moments(context).frobenius


@register_metric("effective_rank", direction="sharper", source="(tr H)^2 / ||H||_F^2, as analysis.moments", cost=70.0)
def _effective_rank(context: MetricContext) -> Estimate:
    """effective rank of the Hessian of the mean loss: in how many directions it curves, not how much"""
    return _moments(context).effective_rank


@register_metric(
    "relative_flatness",
    direction="sharper",
    invariances=("layer_rescaling",),
    source="Petzka et al. 2021, arXiv 2001.00939",
    cost=20.0,
    masked=False,
)
def _relative_flatness(context: MetricContext) -> Estimate:
    """relative flatness of the last layer's weight"""
    return relative_flatness(context.model, context.batches, draws=context.draws, seed=context.seed, loss=context.loss)
