"""The registry of metrics: names for what can be measured on a model, and how to measure several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from analysis.estimate import Estimate
from analysis.radius import Radius
from masks.context import Batch, LossFn, cross_entropy
from masks.errors import InputError, unknown_name
from masks.mask import Mask

Direction = Literal["sharper", "flatter"]
Invariance = Literal["neuron_rescaling", "layer_rescaling", "logit_scale"]
INVARIANCES: tuple[Invariance, ...] = get_args(Invariance)

MIDDLE = "middle"


@dataclass(frozen=True, eq=False)
class MetricContext:
    """What a metric is given.

    Attributes:
        model: the model.
        batches: (inputs, targets).
        mask: the coordinates; None for all trainable parameters.
        m: micro-batch size of worst-case sharpness.
        radius: radius convention of worst-case sharpness.
        pairs: antithetic pairs of average-case sharpness.
        draws: draws of relative flatness.
        seed: seed of everything random.
        loss: per-example loss.
    """

    model: nn.Module
    batches: Sequence[Batch]
    mask: Mask | None = None
    m: int = 128
    radius: Radius = "same"
    pairs: int = 10
    draws: int = 100
    seed: int = 0
    loss: LossFn = cross_entropy


@dataclass(frozen=True)
class MetricInfo:
    """A registered metric.

    Attributes:
        name: its name.
        direction: what a larger value means.
        invariances: changes of the weights that leave the function (for "logit_scale": the predictions) and the value
            the same. "neuron_rescaling": the incoming weights of single ReLU neurons times k > 0, the outgoing ones
            divided by k; "layer_rescaling": the same with one k for all neurons of a layer; "logit_scale": the last
            layer times k > 0. Biases that take no part in it excepted.
        source: where it is defined.
        cost: about how many gradients (forward and backward) of all data one value takes; the check that two passes
            agree (:func:`analysis.examples.check_function`) comes on top with 1/3 of one, or 2/3 where the value takes
            no loss at the weights that could serve as the second.
        grid: its radii, ascending; empty for a metric without a radius.
        masked: whether it can be restricted to a mask.
        convention: whether the radius convention of a mask enters it.
        summary: one line.
    """

    name: str
    direction: Direction
    invariances: tuple[Invariance, ...]
    source: str
    cost: float
    grid: tuple[float, ...]
    masked: bool
    convention: bool
    summary: str

    @property
    def middle(self) -> float:
        """The middle radius of the grid."""
        return self.grid[len(self.grid) // 2]


MetricFn = Callable[..., Estimate]
_metrics: dict[str, tuple[MetricInfo, MetricFn]] = {}


def register_metric(
    name: str,
    *,
    direction: Direction,
    invariances: Sequence[Invariance] = (),
    source: str,
    cost: float,
    grid: Sequence[float] = (),
    masked: bool = True,
    convention: bool = False,
    summary: str | None = None,
) -> Callable[[MetricFn], MetricFn]:
    """Register a metric; usable as a decorator.

    The function takes a :class:`MetricContext` and, if there is a grid, a radius, and returns an :class:`Estimate`.

    Args:
        name: without "@" and ",".
        direction, invariances, source, cost, grid, masked, convention: see :class:`MetricInfo`.
        summary: one line; None for the first line of the function's docstring.

    Raises:
        InputError: a name that is taken or not usable, an unknown direction or invariance, a grid that is not an odd
            number of positive radii in ascending order.
    """
    if not name or set("@, \t\n") & set(name):
        raise InputError(f"a metric's name must not be empty or hold '@', ',' or blanks, got {name!r}")
    if direction not in get_args(Direction):
        raise InputError(unknown_name("direction", str(direction), get_args(Direction)))
    for invariance in invariances:
        if invariance not in INVARIANCES:
            raise InputError(unknown_name("invariance", str(invariance), INVARIANCES))
    radii = tuple(float(rho) for rho in grid)
    if radii and (len(radii) % 2 == 0 or list(radii) != sorted(set(radii)) or radii[0] <= 0):
        raise InputError(f"the grid of metric {name} must be an odd number of ascending positive radii, got {radii}")

    def decorate(fn: MetricFn) -> MetricFn:
        if name in _metrics:
            raise InputError(f"metric {name!r} is already registered")
        text = summary if summary is not None else next(iter((fn.__doc__ or name).strip().splitlines()))
        info = MetricInfo(name, direction, tuple(invariances), source, cost, radii, masked, convention, text)
        _metrics[name] = info, fn
        return fn

    return decorate


def list_metrics() -> tuple[MetricInfo, ...]:
    """All registered metrics, by name."""
    return tuple(_metrics[name][0] for name in sorted(_metrics))


def metric_info(name: str) -> MetricInfo:
    """The metric of that name.

    Raises:
        InputError: no such metric; the nearest names are offered.
    """
    if name not in _metrics:
        raise InputError(unknown_name("metric", name, _metrics))
    return _metrics[name][0]


def resolve(names: Sequence[str]) -> list[str]:
    """Names in full, each once, in the order given.

    A metric with a grid of radii is ``name@rho``; ``name`` alone stands for its whole grid, ``name@middle`` for the
    middle radius.

    Raises:
        InputError: no names, an unknown one, or a radius that is no positive number or that the metric does not take.
    """
    if isinstance(names, str) or not names:
        raise InputError(f"names must be a non-empty list of metrics, got {names!r}")
    out: list[str] = []
    for given in names:
        name, at, text = given.partition("@")
        info = metric_info(name)
        if at and not info.grid:
            raise InputError(f"metric {name} takes no radius, got {given!r}")
        if not info.grid:
            out.append(name)
        elif not at:
            out += [_at(name, rho) for rho in info.grid]
        else:
            out.append(_at(name, info.middle if text == MIDDLE else _radius(given, text)))
    return list(dict.fromkeys(out))


def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str],
    *,
    mask: Mask | None = None,
    on_result: Callable[[str, Estimate], None] | None = None,
    **settings: Any,
) -> dict[str, Estimate]:
    """Measure several metrics on a model.

    Args:
        model: the model, float32 or float64; left as it was.
        batches: the data, a list of (inputs, targets).
        names: metrics, see :func:`resolve`.
        mask: the coordinates; None for all trainable parameters.
        on_result: called with every name and estimate as soon as there is one, so that nothing is lost on interruption.
        settings: further fields of :class:`MetricContext`: m, radius, pairs, draws, seed, loss.

    Returns:
        By full name (``name@rho`` for a metric with radii), in the order of the names.

    Raises:
        InputError: unknown names or settings (before anything is measured), a metric that does not apply, and whatever
            the metrics raise.
    """
    out: dict[str, Estimate] = {}
    for name, measure in measurements(model, batches, names, mask=mask, **settings):
        out[name] = measure()
        if on_result is not None:
            on_result(name, out[name])
    return out


def measurements(
    model: nn.Module, batches: Sequence[Batch], names: Sequence[str], *, mask: Mask | None = None, **settings: Any
) -> Iterator[tuple[str, Callable[[], Estimate]]]:
    """The metrics by full name, each as a function that measures it; for :func:`evaluate` one after the other.

    Raises:
        InputError: unknown names or settings, at once; the functions raise as the metrics do.
    """
    known = [field for field in MetricContext.__dataclass_fields__ if field not in ("model", "batches", "mask")]
    for key in settings:
        if key not in known:
            raise InputError(unknown_name("setting", key, known))
    context = MetricContext(model, batches, mask, **settings)
    return iter([(name, _bound(name, context)) for name in resolve(names)])


def _bound(full_name: str, context: MetricContext) -> Callable[[], Estimate]:
    name, at, text = full_name.partition("@")
    info, fn = _metrics[name]

    def measure() -> Estimate:
        if context.mask is not None and not info.masked:
            raise InputError(f"metric {name} does not apply to a mask; measure it without one")
        return fn(context, float(text)) if at else fn(context)

    return measure


def _at(name: str, rho: float) -> str:
    return f"{name}@{rho!r}"


def _radius(given: str, text: str) -> float:
    try:
        rho = float(text)
    except ValueError:
        rho = 0.0
    if not 0 < rho < float("inf"):
        raise InputError(f"{given!r}: the radius after @ must be a positive number or {MIDDLE!r}, got {text!r}")
    return rho
