"""ESAM: a random part of the weights is perturbed, and the examples that suffer most from it make the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from masks.errors import InputError
from sam.memory import Memory
from sam.method import Ascent, Data, Method
from sam.passes import BatchPasses, Passes
from sam.perturbation import Perturbation, total_norm
from sam.registry import register_method
from sam.step import Ascended, Step

Unit = Literal["element", "tensor"]


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{name} of esam must lie in (0, 1], got {value}")


@dataclass(frozen=True)
class StochasticPerturbation(Ascent):
    """Stochastic weight perturbation: coordinates or tensors, each with probability beta.

    Raises:
        InputError: beta is not in (0, 1].
    """

    beta: float
    unit: Unit

    def __post_init__(self) -> None:
        _check_share("beta", self.beta)

    def __call__(self, step: Step, passes: Passes) -> Ascended:
        if self.unit == "element":
            return super().__call__(step, passes)
        draws = torch.rand(len(step.region.pieces), dtype=torch.float64, generator=step.memory.generator)
        kept = (draws < self.beta).tolist()
        if not any(kept):
            kept[int(draws.argmin())] = True
        rho = [radius / self.beta for radius, keep in zip(step.rho, kept, strict=True) if keep]
        return super().__call__(replace(step, region=step.region.only(kept), rho=rho), passes)

    def perturbation(self, step: Step, gradients: Sequence[Tensor]) -> Perturbation:
        found = super().perturbation(step, gradients)
        if self.unit == "tensor":
            return found
        values = [torch.where(self._draw(v, step.memory).to(v.device), v / self.beta, 0) for v in found.values]
        return Perturbation(values, None, total_norm(values).to(found.radius.device), found.finite)

    def _draw(self, like: Tensor, memory: Memory) -> Tensor:
        return torch.rand(like.shape, dtype=torch.float32, generator=memory.generator) < self.beta


@dataclass(frozen=True)
class SharpestExamples(Data):
    """Sharpness-sensitive data selection: the share gamma of the batch whose loss rises most from w to w + eps.

    ``max(1, round(gamma B))`` examples (halves to even), equal rises by position, in the order of the batch.

    Raises:
        InputError: gamma is not in (0, 1].
    """

    gamma: float
    batch = True

    def __post_init__(self) -> None:
        _check_share("gamma", self.gamma)

    def descending(self, passes: BatchPasses, memory: Memory) -> BatchPasses:
        assert passes.clean_losses is not None
        rise = passes.losses("inner") - passes.clean_losses
        count = max(1, round(self.gamma * len(rise)))
        order = torch.sort(rise, descending=True, stable=True).indices
        return passes.narrowed(order[:count].sort().values)


@register_method(
    "esam",
    summary="a random part of the mask is perturbed, and only the examples whose loss rises most are stepped with",
    source=(
        "Du et al. 2022, arXiv 2110.03141 (stochastic weight perturbation, data selection); formulas from secondary "
        "sources, algorithm number unverified: the paper's text was not at hand"
    ),
    passes="1 + gamma, and 1/3 (a forward pass) if gamma < 1; less under unit=tensor, whose first pass is restricted",
    num_passes=lambda beta, gamma, unit: 1 + gamma + (1 / 3 if gamma < 1 else 0),
    tuned_on="CIFAR-10 and CIFAR-100, ResNet-18 (the authors' script); beta = 0.5 for WideResNet and PyramidNet",
    limits=(
        "gamma < 1 needs step_on with the batch in one piece: a closure hides the batch, and so does Accumulated",
        "data-parallel training: every replica selects from its own shard",
        "replay_rng starts all passes from the same random state, but the final pass is on fewer examples: their "
        "dropout masks are not those that they had in the first",
        "random numbers are drawn on the CPU, unit=element one per masked coordinate and step: with large masks on an "
        "accelerator that costs more than a pass; unit=tensor draws one per tensor",
    ),
)
def esam(*, beta: float = 0.6, gamma: float = 0.5, unit: Unit = "element") -> Method:
    """``eps = rho/beta m g/||g||``, ``m ~ Bernoulli(beta)`` anew every step; final pass on the sharpest examples.

    unit=element, the paper: m per masked coordinate and ||g|| over the whole mask, so eps is that of ``sam`` in
    expectation and of norm about ``rho/sqrt(beta)``. unit=tensor, the authors' code: m per tensor, drawn before the
    first pass, which then computes the gradients of the drawn tensors only; ||m g|| instead of ||g||, so eps has norm
    exactly ``rho/beta`` and is larger than ``sam``'s in expectation (by about ``1/sqrt(beta)``); if no tensor is drawn,
    the one with the smallest draw is kept, where the code perturbs nothing.

    Of the batch the final pass sees ``max(1, round(gamma B))`` examples, those with the largest
    ``l(w + eps) - l(w)``; equal ones by position. The code compares strictly and so drops an example, all of them in a
    tie. With beta = gamma = 1 this is ``sam``, bit for bit, and there is no forward pass for the selection.
    BatchNorm normalises the selection on the whole batch, and the final pass on the selected part. (Formulas from
    secondary sources; the paper's text was not at hand.)
    """
    _check_share("beta", beta)
    _check_share("gamma", gamma)
    return Method(
        ascent=Ascent() if beta == 1 else StochasticPerturbation(beta, unit),
        data=Data() if gamma == 1 else SharpestExamples(gamma),
    )
