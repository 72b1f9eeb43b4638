"""From gradients, parameters and a mask to the perturbation and its norm. Nothing here keeps a state.

Notation: w the masked weights, g their gradient, T the diagonal normaliser of a metric, rho the radius.
Every rule solves ``max <g, eps>`` subject to ``||T^-1 eps||_p <= rho`` over the mask:

- p = 2: ``eps = rho T^2 g / ||T g||_2``
- p = inf: ``eps = rho T sign(g)``

T = 1 is SAM (Foret et al. 2021, arXiv 2010.01412, eq. 2); T depending on w is ASAM (Kwon et al. 2021,
arXiv 2102.11600, eqs. 5 and 6).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from masks.errors import InputError, unknown_name
from masks.params import ParamRow, ParamTable
from masks.region import Region, storage_order
from sam.mup import MupRole

NormScope = Literal["masked", "full"]
BiasConvention = Literal["identity", "adaptive"]


@dataclass(frozen=True)
class Metric(ABC):
    """The diagonal normaliser T of a rule."""

    @abstractmethod
    def scale(self, row: ParamRow, param: Tensor, weights: Tensor, gradient: Tensor | None = None) -> Tensor | None:
        """T for one tensor.

        Args:
            row: the tensor's description.
            param: the whole tensor, also where the mask keeps part of it.
            weights: its values at the kept coordinates, in the form of :meth:`masks.region.Piece.gather`.
            gradient: the gradient of the loss there; None where there is no one gradient, as in random directions.

        Returns:
            A tensor that broadcasts against ``weights``, or None for T = 1.
        """

    def radius_factor(self, row: ParamRow) -> float:
        """What the radius of one tensor is multiplied by; it does not enter the norm."""
        return 1.0

    def check(self, table: ParamTable) -> None:  # noqa: B027, most metrics have a T for everything
        """Refuse parameters for which it has no T.

        Raises:
            InputError: these are some, or the metric must be made for a model first.
        """

    def prepared(self, model: nn.Module, base_model: nn.Module, roles: Mapping[str, MupRole] | None) -> Metric:
        """The metric made for a model, where it needs one; see :meth:`sam.method.Method.prepared`."""
        return self


@dataclass(frozen=True)
class Identity(Metric):
    """T = 1: plain SAM."""

    def scale(self, row: ParamRow, param: Tensor, weights: Tensor, gradient: Tensor | None = None) -> Tensor | None:
        return None


def _check_adaptive(metric: Elementwise | Layerwise) -> None:
    eta, bias = metric.eta, metric.bias
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta < math.inf:
        raise InputError(f"eta must be a finite number >= 0, got {eta}")
    object.__setattr__(metric, "eta", float(eta))  # 0 and 0.0 are one rule, also as text
    if bias not in ("identity", "adaptive"):
        raise InputError(unknown_name("bias convention", str(bias), ["identity", "adaptive"]))


@dataclass(frozen=True)
class Elementwise(Metric):
    """T = |w| + eta per coordinate (Kwon et al. 2021, section 4: element-wise ASAM).

    Args:
        eta: floor; the paper's code takes 0.01. With 0, weights that are exactly 0 never move.
        bias: "identity" takes T = 1 for biases, the betas of normalization layers included, as the paper's
            code does; "adaptive" treats them like weights.
    """

    eta: float = 0.01
    bias: BiasConvention = "identity"

    def __post_init__(self) -> None:
        _check_adaptive(self)

    def scale(self, row: ParamRow, param: Tensor, weights: Tensor, gradient: Tensor | None = None) -> Tensor | None:
        if row.is_bias and self.bias == "identity":
            return None
        return weights.abs().add_(self.eta)


@dataclass(frozen=True)
class Layerwise(Metric):
    """T = ||W||_F + eta, one number per tensor, taken from the whole tensor (layer-wise ASAM).

    Args:
        eta: floor, default 0.
        bias: see :class:`Elementwise`.
    """

    eta: float = 0.0
    bias: BiasConvention = "identity"

    def __post_init__(self) -> None:
        _check_adaptive(self)

    def scale(self, row: ParamRow, param: Tensor, weights: Tensor, gradient: Tensor | None = None) -> Tensor | None:
        if row.is_bias and self.bias == "identity":
            return None
        return (total_norm([param]) + self.eta).to(param.dtype)


@dataclass(frozen=True)
class Rule:
    """A metric and a norm: how a gradient becomes a perturbation.

    Args:
        metric: T.
        p: 2 or infinity.

    Raises:
        InputError: p is neither.
    """

    metric: Metric = Identity()
    p: float = 2

    def __post_init__(self) -> None:
        if self.p not in (2, math.inf):
            raise InputError(f"p must be 2 or infinity, got {self.p}")
        object.__setattr__(self, "p", 2 if self.p == 2 else math.inf)  # 2 and 2.0 are one rule, also as text

    @classmethod
    def named(cls, name: str, *, eta: float | None = None, bias: BiasConvention = "identity") -> Rule:
        """The rule of a name in ``RULE_NAMES``.

        Args:
            name: "l2", "linf", or either with the prefix "elementwise_" or "layerwise_".
            eta: floor of an adaptive metric; None takes the metric's default.
            bias: bias convention of an adaptive metric.

        Raises:
            InputError: unknown name, or ``eta`` or ``bias`` given for a rule without a metric.
        """
        if name not in RULE_NAMES:
            raise InputError(unknown_name("rule", name, RULE_NAMES))
        metric_name, _, norm = name.rpartition("_")
        p = 2 if norm == "l2" else math.inf
        if not metric_name:
            if eta is not None or bias != "identity":
                raise InputError(f"rule {name!r} takes neither eta nor a bias convention; an adaptive rule does")
            return cls(Identity(), p)
        metric = Elementwise if metric_name == "elementwise" else Layerwise
        return cls(metric(bias=bias) if eta is None else metric(eta, bias), p)


RULE_NAMES = ("l2", "linf", "elementwise_l2", "elementwise_linf", "layerwise_l2", "layerwise_linf")


@dataclass(frozen=True, eq=False)
class Perturbation:
    """A perturbation of a region, ``eps = multiplier * directions``: eps itself need not lie in memory.

    Attributes:
        directions: one tensor per piece of the region, in the piece's form; they may be the gradients themselves.
        multiplier: 0-dim, in their dtype; None for 1.
        radius: ``||eps||_2`` up to roundings of eps, 0-dim float64.
        finite: whether the gradient was finite, 0-dim bool; where it was not, eps is zero.
    """

    directions: list[Tensor]
    multiplier: Tensor | None
    radius: Tensor
    finite: Tensor

    @property
    def values(self) -> list[Tensor]:
        """eps, one tensor per piece of the region, in the piece's form."""
        if self.multiplier is None or not self.directions:
            return self.directions
        return list(torch._foreach_mul(self.directions, self.multiplier))


_ZERO = 1e-30  # rho / norm must stay a float32
_CHUNK = 512
_LONG = 2048


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all entries of all tensors, 0-dim float64 on their device.

    On CPUs, torch's float32 norm of 1e7 entries is wrong by 4e-4, and asking it for float64 costs five times
    as much: long tensors are summed in chunks of 512, the chunks in float64 (relative error about 1e-8, for
    entries with short mantissas, whose rounding errors do not cancel, up to 1e-6).
    Squares leave the range of float32 where entries are below 1e-19 or above 1e19; on CPUs the entries are
    then divided by the largest one first, on accelerators the result is 0 or infinite.
    """
    norm = _norm(tensors)
    if norm.device.type != "cpu" or _TINY_SQUARES < norm < _HUGE_SQUARES:
        return norm
    largest = torch.stack([torch.stack(torch.aminmax(t)).abs().max().double() for t in tensors if t.numel()] or [norm])
    scale = largest.max()
    if scale == 0 or not torch.isfinite(scale):
        return scale
    return _norm([t.double() / scale for t in tensors]) * scale


_TINY_SQUARES, _HUGE_SQUARES = 1e-15, 1e17


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    short: list[Tensor] = []
    norms: list[Tensor] = []
    for tensor in tensors:
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        if tensor.numel() <= _LONG or tensor.device.type != "cpu":
            short.append(tensor)
            continue
        flat = storage_order(tensor)
        even = flat.numel() // _CHUNK * _CHUNK
        norms.append(torch.linalg.vector_norm(flat[:even].view(-1, _CHUNK), dim=1))
        short.append(flat[even:])
    norms.append(torch.stack(torch._foreach_norm(short)))
    norm: Tensor = torch.linalg.vector_norm(torch.cat(norms).double())
    return norm


def _times(tensors: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
    return [t if s is None else t * s for t, s in zip(tensors, scales, strict=True)]


@dataclass(frozen=True, eq=False)
class RegionVector:
    """What is ascended along: a vector over the coordinates of a region.

    Attributes:
        region: the coordinates.
        values: one tensor per piece, in the piece's form (:meth:`masks.region.Region.gather`); not changed.
        gradient: the gradient in the same form, for metrics that depend on it; None where there is none.
        weights: whole tensors to take T from, one per piece; None for the parameters as they are.
    """

    region: Region
    values: Sequence[Tensor]
    gradient: Sequence[Tensor] | None = None
    weights: Sequence[Tensor] | None = None

    def scales(self, metric: Metric) -> list[Tensor | None]:
        """T of every piece."""
        if isinstance(metric, Identity):  # before the weights are gathered for it
            return [None] * len(self.values)
        gradients: Sequence[Tensor | None] = self.gradient or [None] * len(self.values)
        tensors = self.weights or [piece.param for piece in self.region.pieces]
        return [
            metric.scale(piece.row, tensor, piece.gather(tensor), gradient)
            for piece, tensor, gradient in zip(self.region.pieces, tensors, gradients, strict=True)
        ]


def perturb(
    rule: Rule,
    region: Region,
    gradients: Sequence[Tensor],
    rho: Sequence[float | Tensor] | float,
    *,
    whole: Region | None = None,
    whole_gradients: Sequence[Tensor] = (),
) -> Perturbation:
    """The perturbation of the masked weights along their gradient; see :func:`perturb_along`.

    Args:
        rule: metric and norm.
        region: the mask bound to the model.
        gradients: the gradient of every tensor that the mask touches (whole tensors, one per piece); they are
            not changed.
        rho: see :func:`perturb_along`.
        whole: for ``norm_scope="full"``: the region of all parameters, over which the norm is then taken
            (Mi et al. 2022, Sparse SAM), so that ``||T^-1 eps|| <= rho``.
        whole_gradients: the gradients of ``whole``.
    """
    masked = region.gather(gradients)
    norm_over = None
    if whole is not None:
        values = whole.gather(whole_gradients)
        norm_over = RegionVector(whole, values, values)
    return perturb_along(rule, RegionVector(region, masked, masked), rho, norm_over=norm_over)


def perturb_along(
    rule: Rule,
    along: RegionVector,
    rho: Sequence[float | Tensor] | float,
    *,
    norm_over: RegionVector | None = None,
    differentiable: bool = False,
) -> Perturbation:
    """The perturbation along a direction; no device synchronisation on an accelerator.

    A zero direction (norm below 1e-30) gives no move and no NaN; a non-finite one gives no move and
    ``finite`` = False.

    Args:
        rule: metric and norm.
        along: the masked coordinates and the direction d.
        rho: radius, or one radius per piece: the norm is always one over all pieces, and piece i moves by
            ``rho_i T^2 d / ||T d||``.
        norm_over: what the norm ``||T d||`` is taken over, if not over ``along``.
        differentiable: keep autograd's record, where the direction (or ``weights`` of the vectors)
            asks for derivatives; that of a zero direction is zero.
    """
    with torch.set_grad_enabled(differentiable):
        return _perturb_along(rule, along, rho, norm_over)


def _perturb_along(
    rule: Rule, along: RegionVector, rho: Sequence[float | Tensor] | float, norm_over: RegionVector | None
) -> Perturbation:
    factors = [rule.metric.radius_factor(piece.row) for piece in along.region.pieces]
    radii = list(rho) if isinstance(rho, Sequence) else [rho] * len(factors)
    radii = [radius if factor == 1 else radius * factor for radius, factor in zip(radii, factors, strict=True)]
    scales = along.scales(rule.metric)
    scaled = _times(along.values, scales)  # T d
    if norm_over is None:
        norm = total_norm(scaled)
    else:
        norm = total_norm(_times(norm_over.values, norm_over.scales(rule.metric)))
    if rule.p == 2:
        # 1 / norm where there is a direction, else 0: no epsilon, so the radius is rho to rounding.
        inverse = torch.where(norm > _ZERO, norm.clamp(min=_ZERO).reciprocal(), 0.0)  # clamped for its derivative
        directions = _times(scaled, scales)
    else:
        inverse = torch.ones_like(norm)
        directions = _times([d.sign() for d in along.values], scales)
    finite = torch.isfinite(norm)
    multipliers = _factors(inverse, radii, directions)
    if not directions:
        return Perturbation([], None, torch.zeros_like(norm), finite)
    if torch.is_grad_enabled() or any(m is not multipliers[0] for m in multipliers):
        values = _where(finite, torch._foreach_mul(directions, multipliers))
        return Perturbation(values, None, total_norm(values).to(norm.device), finite)
    plain = norm_over is None and rule.p == 2 and all(scale is None for scale in scales)
    length = norm if plain else total_norm(directions).to(norm.device)
    radius = torch.where(finite, multipliers[0].double() * length, 0.0)
    return Perturbation(_where(finite, directions), multipliers[0], radius, finite)


def _factors(inverse: Tensor, radii: Sequence[float | Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """``rho_i / norm`` in the dtype of each tensor; one 0-dim tensor per distinct radius."""
    made: dict[object, Tensor] = {}
    out = []
    for rho, tensor in zip(radii, like, strict=True):
        key = (id(rho) if isinstance(rho, Tensor) else rho, tensor.dtype)
        if key not in made:
            made[key] = (inverse * rho).to(tensor.dtype)
        out.append(made[key])
    return out


def _where(condition: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    if condition.device.type == "cpu":  # reading a CPU scalar costs nothing; a copy of every tensor would
        return list(tensors) if bool(condition) else [torch.zeros_like(t) for t in tensors]
    return [torch.where(condition, t, 0) for t in tensors]
