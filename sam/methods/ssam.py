"""Sparse SAM: SAM under a Fisher mask that is rebuilt, or under a mask that evolves."""

from __future__ import annotations

from typing import Literal

from masks.errors import InputError
from sam.method import Method
from sam.registry import register_method

_LIMITS = (
    "its mask and norm_scope=full are its own, and others are refused: under them it is sam by name",
    "no p = infinity: the gradient is normalised over all parameters",
    "the first pass computes every gradient",
)


def _check_every(every: int) -> None:
    if every < 1:
        raise InputError(f"every must be at least 1 epoch, got {every}")


@register_method(
    "ssam_f",
    summary="SAM under the mask of the largest empirical Fisher scores, rebuilt every so many epochs",
    source="Mi et al. 2022, arXiv 2210.05177, algorithm 2",
    passes="2",
    rho=0.1,
    tuned_on="CIFAR-10 with ResNet-18 (published scripts); 0.2 on CIFAR-100 with WRN, 0.7 on ImageNet with ResNet-50",
    limits=_LIMITS,
    preset=lambda *, every, **_: {"mask": f"fisher@every={every}", "norm_scope": "full"},
)
def ssam_f(*, every: int = 1) -> Method:
    """``eps = m * rho g / ||g||``, the norm over all parameters, m the mask ``fisher`` rebuilt every ``every`` epochs.

    Give the run a density (the paper's is 0.5), or it matches the norm mask's count. The published code starts with an
    empty mask and adds the last training gradient to the first Fisher score; this does neither.
    """
    _check_every(every)
    return Method()


@register_method(
    "ssam_d",
    summary="SAM under a mask that drops and grows coordinates every so many epochs",
    source="Mi et al. 2022, arXiv 2210.05177, algorithm 3",
    passes="2",
    rho=0.1,
    tuned_on="CIFAR-10 with ResNet-18, 0.2 on CIFAR-100 with WRN, 0.7 on ImageNet with ResNet-50: radii of the "
    "published scripts for ssam_f; those of ssam_d itself are not known here",
    limits=_LIMITS,
    preset=lambda *, every, drop, grow, drop_rate, **_: {
        "mask": f"dynamic:drop={drop}:grow={grow}:drop_rate={drop_rate}@every={every}",
        "norm_scope": "full",
    },
)
def ssam_d(
    *,
    every: int = 1,
    drop: Literal["gradient", "magnitude", "random"] = "gradient",
    grow: Literal["gradient", "magnitude", "random"] = "random",
    drop_rate: float = 0.5,
) -> Method:
    """``eps = m * rho g / ||g||``, the norm over all parameters, m the mask ``dynamic``: at every update as many
    coordinates are grown as are dropped, ``min(round(d k), N - k)`` of k, with d falling to 0 by a cosine.

    The published code drops more than it grows at densities above a half, so that its live set shrinks.
    """
    _check_every(every)
    if not 0 <= drop_rate <= 1:
        raise InputError(f"drop_rate must lie between 0 and 1, got {drop_rate}")
    return Method()
