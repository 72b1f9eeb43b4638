"""Momentum-SAM: the perturbation is read off the base optimizer's momentum and costs no pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from masks.errors import InputError
from masks.region import Region
from sam.method import Ascent, Method, Setting
from sam.passes import Passes
from sam.perturbation import RegionVector
from sam.registry import register_method
from sam.step import Ascended, Step

_BUFFERS = ("momentum_buffer", "exp_avg")


@dataclass(frozen=True)
class AgainstMomentum(Ascent):
    """One pass, at ``w - rho v / ||v||``, v the momentum buffer of the base optimizer; at w while there is none."""

    def check(self, setting: Setting) -> None:
        base = setting.base
        for group in base.param_groups:
            if not (group.get("momentum", 0) > 0 or group.get("betas", (0,))[0] > 0):
                raise InputError(
                    f"momentum_sam perturbs along the base optimizer's momentum, and this {type(base).__name__} has "
                    "none; give it momentum > 0, or take Adam or AdamW"
                )

    def __call__(self, step: Step, passes: Passes) -> Ascended:
        counted = step.whole if step.full_norm and step.whole is not None else None
        along = _descent(step.base, step.region)
        if along is None:  # the first step
            return Ascended.unperturbed(passes.backward("only"), step.region.params[0].device)
        found = step.perturb(along, norm_over=None if counted is None else _descent(step.base, counted))
        with step.moved(found.directions, found.multiplier):
            perturbed = passes.backward("only")
        return Ascended(None, perturbed, found.radius, found.finite)


def _descent(base: Optimizer, region: Region) -> RegionVector | None:
    """-v over a region, zero where a parameter has had no gradient yet; None before the base's first step."""
    velocity = [_momentum(base, p) for p in region.params]
    if all(v is None for v in velocity):
        return None
    full = [torch.zeros_like(p) if v is None else v for v, p in zip(velocity, region.params, strict=True)]
    return RegionVector(region, torch._foreach_neg(region.gather(full)))


def _momentum(base: Optimizer, param: Tensor) -> Tensor | None:
    state: dict[str, Any] = base.state.get(param, {})
    for name in _BUFFERS:
        if isinstance(state.get(name), Tensor):
            buffer: Tensor = state[name]
            return buffer
    if state:
        raise InputError(
            f"momentum_sam found no momentum in {type(base).__name__}: its state has {', '.join(sorted(state))}, not "
            f"{' or '.join(_BUFFERS)}"
        )
    return None


@register_method(
    "momentum_sam",
    summary="one pass only: the gradient at w - rho v/||v||, v the base optimizer's momentum",
    source="Becker et al. 2024, arXiv 2401.12033 (MSAM), algorithm 1",
    passes="1",
    rho=3.0,
    tuned_on="CIFAR-100 and ImageNet, all parameters: the authors' README (SGD and AdamW)",
    limits=(
        "base optimizers without momentum (SGD with momentum 0, Adagrad): refused, there is nothing to perturb along",
        "L(w) is never computed: the statistics of a step have NaN for it",
        "running statistics are those at w + eps, whatever norm_statistics says: there is no other pass",
    ),
)
def momentum_sam() -> Method:
    """``g = grad L(w + eps)``, ``eps = -rho v / ||v||``, v before this step's update; then the base optimizer steps.

    v is torch's ``momentum_buffer`` (or Adam's ``exp_avg``): an average of *gradients*, so that the base moves by
    -lr v, and eps points *along the last update*, ahead of w, as Nesterov's look-ahead does. This is the sign of the
    paper's algorithm 1 and of its code, for SGD and AdamW. On a quadratic ``L(w + eps) - L(w) = -rho <g, u> +
    rho^2/2 u^T H u`` with u = v/||v||: it is an ascent where the radius reaches past the minimum along v (rho > 2
    <g, u> / u^T H u, in particular wherever the momentum has overshot and <g, u> <= 0), and a descent before that.
    The radius is therefore much larger than SAM's.

    The published code stores the perturbed weights between steps and needs a call before evaluation and
    checkpoints; here eps is added at the start of a step and taken away within it. It also decays the perturbed
    weights; here the restored ones. The first step, without a momentum yet, is the base optimizer's.
    """
    return Method(ascent=AgainstMomentum())
