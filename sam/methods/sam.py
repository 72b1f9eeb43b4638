"""SAM: the gradient at the worst point of a ball, to first order."""

from __future__ import annotations

from typing import Literal

from sam.method import Method
from sam.perturbation import Rule
from sam.registry import register_method


@register_method(
    "sam",
    summary="the gradient at w + eps, eps along the gradient",
    source="Foret et al. 2021, arXiv 2010.01412, algorithm 1; under the mask norm: Mueller et al. 2023 (SAM-ON)",
    passes="2",
    tuned_on="CIFAR-10 and ImageNet (Foret et al. 2021); 0.1 on CIFAR-100",
)
def sam(*, p: Literal["2", "inf"] = "2") -> Method:
    """``eps = rho g / ||g||_2``, or ``rho sign(g)`` for p = inf."""
    return Method(rule=Rule.named("l2" if p == "2" else "linf"))
