"""WSAM: the sharpness L(w + eps) - L(w) as a regularizer with a weight of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masks.errors import InputError
from sam.method import Combine, Method, Setting
from sam.registry import register_method
from sam.step import Step


@dataclass(frozen=True)
class WeightedSharpness(Combine):
    """g and the sharpness gradient ``g_adv - g``, the latter with weight ``a = gamma / (1 - gamma)``.

    Raises:
        InputError: gamma is not in [0, 1).
    """

    gamma: float
    decoupled: bool
    every_gradient = True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise InputError(f"gamma of wsam must lie in [0, 1), got {self.gamma}; the weight is gamma / (1 - gamma)")

    @property
    def weight(self) -> float:
        return self.gamma / (1 - self.gamma)

    def check(self, setting: Setting) -> None:
        base = setting.base
        if self.decoupled and setting.clip_grad_norm is not None:
            raise InputError(
                "decoupled wsam moves the weights by a (g_adv - g) besides the base optimizer's step, which "
                "clip_grad_norm would not reach; use decoupled=False, or no clip_grad_norm"
            )
        if self.decoupled and not all("lr" in group for group in base.param_groups):
            raise InputError(
                f"decoupled wsam moves by the learning rate lr of each group, and {type(base).__name__} has none; "
                "use decoupled=False"
            )

    @torch.no_grad()
    def combine(self, step: Step, clean: Sequence[Tensor]) -> None:
        pairs = [(p.grad, g) for p, g in zip(step.first_region.params, clean, strict=True) if p.grad is not None]
        gradients, clean = [grad for grad, _ in pairs], [g for _, g in pairs]
        sharpness = torch._foreach_sub(gradients, clean)
        if not self.decoupled:
            torch._foreach_add_(gradients, sharpness, alpha=self.weight - 1)
            return
        step.carried.extend(sharpness)
        for gradient, g in zip(gradients, clean, strict=True):
            # What is not finite stays, so that the step is skipped also where g itself is finite.
            gradient.copy_(torch.where(torch.isfinite(gradient), g, gradient))

    @torch.no_grad()
    def after(self, step: Step, finite: Tensor) -> None:
        if not self.decoupled:
            return
        params = [p for p in step.first_region.params if p.grad is not None]
        rates = {id(p): group["lr"] for group in step.base.param_groups for p in group["params"]}
        for param, sharpness in zip(params, step.carried, strict=True):
            if id(param) in rates:
                # A factor of 0 would not do for a skipped step: 0 times infinity is NaN.
                param.sub_(torch.where(finite, sharpness * (rates[id(param)] * self.weight), 0))


@register_method(
    "wsam",
    summary="L plus the sharpness L(w + eps) - L(w) with weight gamma / (1 - gamma), by default in a step of its own",
    source="Yue et al. 2023, arXiv 2305.15817",
    passes="2",
    tuned_on="the reference's note on a public port (gamma); the authors' code takes 0.88 and advises 0.8 to 0.95",
    limits=(
        "the first pass takes the gradient of every parameter, whatever the mask",
        "decoupled: only base optimizers whose groups have a learning rate lr, by which the sharpness step is scaled",
        "decoupled: clip_grad_norm is refused, because it would clip g and leave the sharpness step as it is",
    ),
)
def wsam(*, gamma: float = 0.9, decoupled: bool = True) -> Method:
    """With ``a = gamma / (1 - gamma)``, L + a (L(w + eps) - L), in one of two ways.

    Decoupled (the paper's method and the default of the authors' code): the base optimizer steps with g, so its
    momentum, second moments and weight decay never see the sharpness, and then ``w <- w - lr a (g_adv - g)`` with the
    learning rate of each group. Coupled (the paper's ablation): the base optimizer steps with
    ``a g_adv + (1 - a) g``; coupled with gamma = 0.5 is ``sam``, gamma = 0 the base optimizer at twice the cost.

    The authors' code clips both gradients to norm 1 by default; here nothing is clipped. A hook of the base optimizer
    sees, when decoupled, only g.
    """
    combine = WeightedSharpness(gamma, decoupled)
    return Method() if combine.weight == 1 and not decoupled else Method(combine=combine)
