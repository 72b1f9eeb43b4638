"""mu-P-squared: the radius of each layer follows its width, so that every layer is perturbed at every width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from masks.errors import InputError
from masks.params import ParamRow, ParamTable
from sam.method import Method
from sam.mup import MupRole, MupShapes, mup_roles
from sam.perturbation import Metric, Rule
from sam.registry import register_method

NormWeights = Literal["paper", "balanced"]

_MOVE: dict[MupRole, float] = {"input": 1, "hidden": 0, "output": -1, "fixed": 0}
_NORM: dict[NormWeights, dict[MupRole, float]] = {
    "paper": {"input": 0.5, "hidden": -0.5, "output": -1.5, "fixed": 0},
    "balanced": {"input": 0.5, "hidden": 0, "output": -0.5, "fixed": 0},
}


@dataclass(frozen=True)
class WidthScale(Metric):
    """T = s_l per tensor, and a radius factor that makes ``eps_l = rho_l g_l / ||(s_l g_l)_l||``.

    Args:
        norm_weights: s_l, see :func:`mup_sam`.
        base_width: what the caller builds the base model with; only recorded.
        shapes: roles and ratio; None until :meth:`prepared`.
    """

    norm_weights: NormWeights = "paper"
    base_width: int | None = None
    shapes: MupShapes | None = None

    def __post_init__(self) -> None:
        if self.base_width is not None and self.base_width < 1:
            raise InputError(f"base_width of mup_sam must be at least 1, got {self.base_width}")

    def prepared(self, model: nn.Module, base_model: nn.Module, roles: Mapping[str, MupRole] | None) -> WidthScale:
        """The metric for a model; see :func:`sam.mup.mup_roles` for arguments and errors."""
        return replace(self, shapes=mup_roles(model, base_model, roles=roles))

    def check(self, table: ParamTable) -> None:
        known = self._known().roles
        missing = [row.name for row in table if row.name not in known]
        if missing:
            raise InputError(f"mup_sam was prepared for another model, without {missing[0]}; prepare it for this one")

    def _known(self) -> MupShapes:
        if self.shapes is None:
            raise InputError(
                "mup_sam must know what each tensor is to the width: use the method that "
                "build_method('mup_sam').prepared(model, base_model) returns"
            )
        return self.shapes

    def scale(self, row: ParamRow, param: Tensor, weights: Tensor, gradient: Tensor | None = None) -> Tensor | None:
        scale = self._known().power(row.name, _NORM[self.norm_weights])
        if scale == 1:
            return None
        return torch.full((), scale, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)

    def radius_factor(self, row: ParamRow) -> float:
        shapes = self._known()
        # The rule multiplies the direction by T^2: taken out again.
        return shapes.power(row.name, _MOVE) / shapes.power(row.name, _NORM[self.norm_weights]) ** 2


@register_method(
    "mup_sam",
    summary="SAM whose radius of each layer follows the width (mu-P-squared), so that radii transfer across widths",
    source="Haas et al. 2024, arXiv 2411.00075; exponents as in the first author's code, equation numbers unverified",
    passes="2",
    tuned_on="tune rho at the base width, where this is sam",
    limits=(
        "needs the same model at the base width, and refuses tensors whose role that does not tell",
        "is mu-P-squared only with the initialization and learning rates of muP: sam.mup_init_, sam.mup_param_groups",
        "with norm_weights=paper the radius is independent of the width only if the mask keeps input-like tensors "
        "(biases and affine parameters are); take balanced for others",
    ),
    needs_model=True,
)
def mup_sam(*, base_width: int | None = None, norm_weights: NormWeights = "paper") -> Method:
    """``eps_l = rho_l g_l / ||(s_l g_l)_l||_2`` with n = width / base width and

    - ``rho_l = rho n, rho, rho / n`` for input-like, hidden and output tensors, rho for those that do not grow;
    - ``s_l = n^(1/2), n^(-1/2), n^(-3/2)`` ("paper": input-like tensors alone decide in the limit) or
      ``n^(1/2), 1, n^(-1/2)`` ("balanced": every layer counts at every width), 1 for those that do not grow.

    In the notation of the paper rho_l = rho n^(-d - d_l), s_l = n^(-d_l), d = -1/2, d_l = -1/2, 1/2, 3/2. For tensors
    that do not grow, such as the last bias, both exponents are derived here: their gradient does not depend on n.

    The method is complete only after :meth:`sam.method.Method.prepared`; ``base_width`` tells a trainer which base
    model to hand to it.
    """
    return Method(rule=Rule(WidthScale(norm_weights, base_width)))
