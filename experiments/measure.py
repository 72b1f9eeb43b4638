"""What is measured on the final weights of a run: test accuracy, once, and sharpness."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from analysis import HessianOperator, lambda_max, m_sharpness
from experiments.train import Trained, batches_of, correct, sample_of
from masks.errors import InputError
from sam.perturbation import Rule


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured at the end of every run of a report.

    Args:
        images: training images, with their labels as given, that curvature and sharpness are taken on; drawn with
            the seed, the same in every arm.
        sharpness_m: micro-batch size m of the worst-case m-sharpness.
        sharpness_rho: its radius, l2 over all parameters, the same for every arm.
    """

    images: int = 256
    sharpness_m: int = 64
    sharpness_rho: float = 0.1

    def __post_init__(self) -> None:
        if self.images < 1 or self.sharpness_m < 1:
            raise InputError(f"images and sharpness_m must be at least 1, got {self.images} and {self.sharpness_m}")
        if not (math.isfinite(self.sharpness_rho) and self.sharpness_rho > 0):
            raise InputError(f"sharpness_rho must be a positive finite number, got {self.sharpness_rho}")


def measure(trained: Trained, config: MeasureConfig, device: torch.device) -> dict[str, Any]:
    """Read the test images, once, and measure curvature and sharpness on the training images.

    Returns:
        Plain values: ``test_correct`` (one 0 or 1 per test image), ``test_index``, ``test_accuracy``,
        ``lambda_max``, ``m_sharpness``; a metric that cannot be taken on a diverged model is ``{"error": why}``.
    """
    split = trained.split
    right = correct(trained.model, split.test_x.to(device), split.test_y.to(device))
    batches = batches_of(*sample_of(split, config.images, trained.config.seed, device), 256)
    return {
        "test_accuracy": right.double().mean().item(),
        "test_correct": "".join("1" if r else "0" for r in right.tolist()),
        "test_index": split.test_index.tolist() if not split.test_is_shared else None,
        "lambda_max": _guarded(lambda: _lambda_max(trained, batches)),
        "m_sharpness": _guarded(lambda: _m_sharpness(trained, batches, config)),
    }


def _guarded(metric: Any) -> dict[str, Any]:
    try:
        value: dict[str, Any] = metric()
    except InputError as error:
        return {"error": str(error)}
    return value


def _lambda_max(trained: Trained, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    with HessianOperator(trained.model, batches) as operator:
        found = lambda_max(operator)
    return {key: value for key, value in asdict(found).items() if key != "vector"}


def _m_sharpness(
    trained: Trained, batches: list[tuple[torch.Tensor, torch.Tensor]], config: MeasureConfig
) -> dict[str, Any]:
    found = m_sharpness(trained.model, batches, m=config.sharpness_m, rho=config.sharpness_rho, rule=Rule())
    return asdict(found)
