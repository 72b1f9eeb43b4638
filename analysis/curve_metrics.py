"""Metrics that keep a whole curve in their settings: spectral density and loss slices, for a report's figures."""

from __future__ import annotations

import math

import numpy as np

from analysis.estimate import Estimate
from analysis.landscape import Slice, loss_slice, random_direction
from analysis.metrics import MetricContext, register_metric
from analysis.operator import HessianOperator
from analysis.spectrum import SpectralDensity, spectral_density
from masks.errors import InputError

VECTORS, STEPS = 2, 40
CURVE = tuple(float(a) for a in np.linspace(-1, 1, 21))
PLANE = tuple(float(a) for a in np.linspace(-1, 1, 11))


@register_metric(
    "spectrum",
    direction="sharper",
    source="Ghorbani et al. 2019, arXiv 1901.10159",
    cost=VECTORS * STEPS * 1.0,
    summary="root mean square of the Hessian's eigenvalues; keeps their density for the report",
)
def _spectrum(context: MetricContext) -> Estimate:
    with HessianOperator(context.model, context.batches, mask=context.mask, loss=context.loss) as operator:
        steps = min(STEPS, operator.dimension)
        found = spectral_density(operator, num_vectors=VECTORS, num_steps=steps, seed=context.seed)
    square = found.moment(2)
    root = math.sqrt(square.value)
    error = None if square.standard_error is None or not root else square.standard_error / (2 * root)
    return Estimate(
        name=f"root mean square eigenvalue, {found.name}",
        value=root,
        standard_error=error,
        n=VECTORS,
        settings={
            **found.settings,
            "error_kind": "standard error over random vectors, to first order",
            "seed": context.seed,
            "dimension": found.dimension,
            "nodes": [x.tolist() for x in found.nodes],
            "weights": [w.tolist() for w in found.weights],
        },
    )


def read_spectrum(settings: dict[str, object]) -> SpectralDensity:
    """The density that the metric ``spectrum`` kept, from plain values as a record has them.

    Raises:
        InputError: settings of something else.
    """
    try:
        nodes, weights = (
            tuple(np.array(part, dtype=np.float64) for part in settings[key])  # type: ignore[attr-defined]
            for key in ("nodes", "weights")
        )
        return SpectralDensity(
            name=str(settings["name"]),
            nodes=nodes,
            weights=weights,
            num_products=sum(map(len, nodes)),
            dimension=int(settings["dimension"]),  # type: ignore[call-overload]
            seed=int(settings["seed"]),  # type: ignore[call-overload]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not the settings of a spectrum: {type(error).__name__} {error}") from None


def _rise(context: MetricContext, axes: tuple[tuple[float, ...], ...]) -> Estimate:
    """Mean over the points of the slice of the loss there minus that at the weights themselves."""
    directions = [
        random_direction(context.model, mask=context.mask, seed=2 * context.seed + i, vectors="scaled")
        for i in range(len(axes))
    ]
    found = loss_slice(context.model, context.batches, directions, axes, loss=context.loss)
    values = np.array(found.values)
    middle = values[tuple(size // 2 for size in values.shape)]
    return Estimate(
        name=f"mean rise of the loss from the weights, {found.name}, filter-normalised, from -1 to 1",
        value=float((values - middle).mean()),
        standard_error=None,
        n=found.settings["num_examples"],
        settings={
            **{key: value for key, value in found.settings.items() if key != "moved"},
            "seed": context.seed,
            "axes": [list(axis) for axis in found.axes],
            "values": values.tolist(),
        },
    )


_LI = "Li et al. 2018, arXiv 1712.09913"


@register_metric("slice_1d", direction="sharper", invariances=("layer_rescaling",), source=_LI, cost=len(CURVE) / 3)
def _slice_1d(context: MetricContext) -> Estimate:
    """mean rise of the loss along a filter-normalised random direction; keeps the curve for the report"""
    return _rise(context, (CURVE,))


@register_metric(
    "slice_2d", direction="sharper", invariances=("layer_rescaling",), source=_LI, cost=len(PLANE) ** 2 / 3
)
def _slice_2d(context: MetricContext) -> Estimate:
    """mean rise of the loss on a plane of two such directions; keeps the surface for the report"""
    return _rise(context, (PLANE, PLANE))


def read_slice(settings: dict[str, object]) -> Slice:
    """The slice that ``slice_1d`` or ``slice_2d`` kept, from plain values as a record has them.

    Raises:
        InputError: settings of something else.
    """
    try:
        axes = tuple(tuple(float(a) for a in axis) for axis in settings["axes"])  # type: ignore[attr-defined]
        values = np.array(settings["values"], dtype=np.float64)
        if values.shape != tuple(map(len, axes)):
            raise ValueError(f"{values.shape} values on axes of {tuple(map(len, axes))} points")
        kept = tuple(values.tolist()) if len(axes) == 1 else tuple(map(tuple, values.tolist()))
        return Slice(str(settings["name"]), axes, kept, {"num_examples": settings["num_examples"]})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not the settings of a slice: {type(error).__name__} {error}") from None
