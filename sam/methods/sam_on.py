"""SAM-ON: SAM of the normalization layers' parameters alone."""

from __future__ import annotations

from typing import Literal

from sam.method import Method
from sam.perturbation import BiasConvention, Rule
from sam.registry import register_method


@register_method(
    "sam_on",
    summary="SAM or ASAM under the mask norm; a name for the pair",
    source="Mueller et al. 2023, arXiv 2306.04226",
    passes="2",
    rho=0.5,
    tuned_on="WRN-28-10 on CIFAR-100, read off a figure: l2 1.0, elementwise l2 10, layerwise l2 0.5, "
    "elementwise linf 0.1",
    limits=("its mask is norm: any other is refused; take sam or asam under it",),
    preset=lambda **_: {"mask": "norm", "norm_scope": "masked"},
)
def sam_on(
    *,
    rule: Literal["l2", "linf", "elementwise_l2", "elementwise_linf", "layerwise_l2", "layerwise_linf"] = "l2",
    eta: float | None = None,
    bias: BiasConvention = "identity",
) -> Method:
    """eps as in ``sam`` or ``asam``, over the affine parameters of all normalization layers; ``||T^-1 eps|| = rho``.

    The ablations of the paper are settings of a run: the complement (sam or asam under the mask no_norm), a window of
    epochs (sam_epochs), frozen normalization parameters and training them alone (trainable).
    """
    return Method(rule=Rule.named(rule, eta=eta, bias=bias))
