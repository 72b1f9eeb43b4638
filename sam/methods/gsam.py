"""GSAM: the part of the gradient at w that the perturbed gradient does not see is ascended along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masks.errors import InputError
from sam.method import Combine, Method
from sam.registry import register_method
from sam.step import Step
from sam.vectors import orthogonal


@dataclass(frozen=True)
class SurrogateGap(Combine):
    """``g_adv - alpha g_perp`` with g_perp the component of g orthogonal to g_adv.

    Raises:
        InputError: alpha is negative or not finite.
    """

    alpha: float
    every_gradient = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise InputError(f"alpha of gsam must be a finite number >= 0, got {self.alpha}")

    @torch.no_grad()
    def combine(self, step: Step, clean: Sequence[Tensor]) -> None:
        pairs = [(p.grad, g) for p, g in zip(step.first_region.params, clean, strict=True) if p.grad is not None]
        perturbed = [grad for grad, _ in pairs]
        torch._foreach_add_(perturbed, orthogonal([g for _, g in pairs], perturbed), alpha=-self.alpha)


@register_method(
    "gsam",
    summary="SAM that also closes the gap L(w + eps) - L(w), by ascent along g orthogonal to the perturbed gradient",
    source="Zhuang et al. 2022, arXiv 2203.08065, algorithm 1",
    passes="2",
    tuned_on="ImageNet (alpha of the authors' PyTorch example, unverified in the paper); tune alpha and rho together",
    limits=(
        "the first pass takes the gradient of every parameter, whatever the mask",
        "the radius follows the learning rate, as in the paper, only with sam.RadiusFollowsLR; else it is constant",
    ),
)
def gsam(*, alpha: float = 0.4) -> Method:
    """``g_adv - alpha (g - (<g, g_adv> / ||g_adv||^2) g_adv)``: the clean gradient g is the one that is decomposed.

    The step descends the perturbed loss, and ascends L along the directions that leave the perturbed loss as it is to
    first order; so the gap between the two shrinks. The inner product is one over all parameters, also outside the
    mask. With alpha = 0 and a constant radius this is ``sam``. The authors' code adds up the final gradients of all
    processes instead of averaging them.
    """
    return Method(combine=SurrogateGap(alpha)) if alpha else Method()
