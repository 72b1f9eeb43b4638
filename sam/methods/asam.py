"""ASAM: SAM in a metric that adapts to the weights' own scale."""

from __future__ import annotations

from typing import Literal

from sam.method import Method
from sam.perturbation import BiasConvention, Rule
from sam.registry import register_method


@register_method(
    "asam",
    summary="SAM with the radius in units of the weights, elementwise or layerwise",
    source="Kwon et al. 2021, arXiv 2102.11600, algorithm 1, equations 5 and 6",
    passes="2",
    rho=0.5,
    tuned_on="CIFAR-10 (Kwon et al. 2021; elementwise, l2); 1.0 on CIFAR-100; other norms need other radii",
)
def asam(
    *,
    scale: Literal["elementwise", "layerwise"] = "elementwise",
    p: Literal["2", "inf"] = "2",
    eta: float | None = None,
    bias: BiasConvention = "identity",
) -> Method:
    """``eps = rho T^2 g / ||T g||_2``, or ``rho T sign(g)`` for p = inf.

    ``T = |w| + eta`` per coordinate (eta 0.01 unless set) or ``||W||_F + eta`` per tensor (eta 0); T = 1 for biases
    unless ``bias`` is "adaptive".
    """
    return Method(rule=Rule.named(f"{scale}_{'l2' if p == '2' else 'linf'}", eta=eta, bias=bias))
