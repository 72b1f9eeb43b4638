"""LookSAM: SAM at every k-th step; in between, the part of its gradient that changes slowly is used again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masks.errors import InputError
from sam.method import Combine, Method, When
from sam.perturbation import total_norm
from sam.registry import register_method
from sam.step import Step
from sam.vectors import orthogonal


@dataclass(frozen=True)
class EveryK(When):
    """Steps 0, k, 2k, ...

    Raises:
        InputError: k is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k must be a whole number >= 1, got {self.k}")

    def due(self, step: int) -> bool:
        return step % self.k == 0


@dataclass(frozen=True)
class ReuseVertical(Combine):
    """Remember g_v of g_adv orthogonal to g; between, add it to g at alpha times g's length.

    Raises:
        InputError: alpha is negative or not finite.
    """

    alpha: float
    every_gradient = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise InputError(f"alpha of looksam must be a finite number >= 0, got {self.alpha}")

    @torch.no_grad()
    def combine(self, step: Step, clean: Sequence[Tensor]) -> None:
        params = step.first_region.params
        perturbed = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        vertical = orthogonal(perturbed, clean)
        # A gradient that the base optimizer does not hold may be infinite in a step that is taken.
        step.memory.put("vertical", vertical, "all", valid=torch.isfinite(total_norm(vertical)))

    @torch.no_grad()
    def between(self, step: Step) -> None:
        vertical = step.memory.get("vertical")
        if vertical is None:  # no due step yet
            return
        gradients = [p.grad for p in step.first_region.params]
        length = total_norm(vertical)
        factor = self.alpha * total_norm([g for g in gradients if g is not None])
        factor = torch.where(length > 0, factor / length, 0.0)
        for gradient, v in zip(gradients, vertical, strict=True):
            if gradient is not None:
                gradient.addcmul_(v, factor.to(v.dtype))


@register_method(
    "looksam",
    summary="SAM at every k-th step; in between g plus the remembered part of g_adv orthogonal to g",
    source="Liu et al. 2022, arXiv 2203.02714, algorithm 1 (LookSAM, without the layer-wise scaling of Look-LayerSAM)",
    passes="1 + 1/k",
    num_passes=lambda k, alpha: 1 + 1 / k,
    state_per_parameter=1,
    tuned_on="ImageNet, ViT (Liu et al. 2022, unverified)",
    rho=0.1,
    limits=(
        "in the steps that perturb, the first pass takes the gradient of every parameter, whatever the mask",
        "k counts steps from the first one of the run, also those outside a window of epochs: in a window that opens "
        "later up to k - 1 steps of the base optimizer come first",
    ),
)
def looksam(*, k: int = 5, alpha: float = 0.7) -> Method:
    """Steps 0, k, 2k, ...: SAM, and ``g_v = g_adv - (<g, g_adv> / ||g||^2) g`` is remembered.

    Other steps: ``g + alpha (||g|| / ||g_v||) g_v``. Inner product and norms are over all parameters, also outside the
    mask; published ports take them per tensor. k = 1 is ``sam``.
    """
    return Method(combine=ReuseVertical(alpha), when=EveryK(k))
