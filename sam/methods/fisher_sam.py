"""Fisher SAM: the ball of SAM measured by the Fisher information."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from masks.errors import InputError
from masks.params import ParamRow
from sam.method import Method
from sam.perturbation import Metric, Rule
from sam.registry import register_method


@dataclass(frozen=True)
class Fisher(Metric):
    """T = (1 + eta g^2)^(-1/2) per coordinate: the inverse root of a regularised diagonal Fisher.

    The Fisher is estimated by the square of the batch's mean gradient, which is what makes it free; it is not the
    mean of the squared per-example gradients.

    Args:
        eta: weight of the Fisher against the identity, >= 0; 0 is T = 1.

    Raises:
        InputError: ``eta`` is out of range.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise InputError(f"eta of fisher_sam must be a finite number >= 0, got {self.eta}")

    def scale(self, row: ParamRow, param: Tensor, weights: Tensor, gradient: Tensor | None = None) -> Tensor:
        """See :meth:`sam.perturbation.Metric.scale`.

        Raises:
            InputError: no gradient is given, as by sharpness metrics, whose ball depends on the weights alone.
        """
        if gradient is None:
            raise InputError(
                f"the Fisher metric needs the gradient at {row.name}, and here there is none (random directions, or a "
                "ball that must not depend on the batch); use the identity, elementwise or layerwise metric"
            )
        return gradient.square().mul_(self.eta).add_(1).rsqrt_()


@register_method(
    "fisher_sam",
    summary="SAM with the radius in units of the Fisher information",
    source="Kim et al. 2022, arXiv 2206.04920; formula from a public reimplementation, equation number unverified",
    passes="2",
    rho=0.1,
    tuned_on="radius and eta of a public reimplementation; the paper's own values were not at hand",
    limits=("not invariant to the scale of the loss: it reads unscaled gradients of the mean loss",),
)
def fisher_sam(*, eta: float = 1.0) -> Method:
    """``eps = rho F^-1 g / sqrt(g^T F^-1 g)``, ``F = 1 + eta g^2`` per coordinate, so that ``||F^(1/2) eps|| = rho``.

    Coordinates of large gradient get a smaller share of the radius than in SAM. Unlike SAM's, the direction depends
    on the scale of the loss, which must therefore be unscaled first; a sum in place of a mean changes the method.
    """
    return Method(rule=Rule(Fisher(eta)))
