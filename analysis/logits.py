"""Losses of normalised logits, which do not see the scale of the last layer."""

from __future__ import annotations

import torch
from torch import Tensor

from analysis.evaluation import describe_loss
from masks.context import LossFn
from masks.errors import InputError

_SMALLEST = 1e-10


def normalise(logits: Tensor) -> Tensor:
    """``(f - mean_k f) / max(||f - mean_k f||_2, 1e-10)`` per example: (B, classes) to (B, classes).

    Without a temperature (Andriushchenko et al. 2023, arXiv 2302.07011, section 4.1).

    Raises:
        InputError: not a matrix of at least two classes.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise InputError(
            f"logit normalisation needs outputs of shape (examples, classes) with at least 2 classes, got shape "
            f"{tuple(logits.shape)}; measure without it"
        )
    centred = logits - logits.mean(dim=1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return centred / norm.clamp(min=_SMALLEST)


def of_normalised(loss: LossFn) -> LossFn:
    """The loss of the normalised logits, at perturbed weights as well."""

    def normalised(logits: Tensor, targets: Tensor) -> Tensor:
        return loss(normalise(logits), targets)

    return normalised


def chosen_loss(loss: LossFn, normalise_logits: bool) -> tuple[LossFn, str]:
    """The loss to take, and what it adds to a metric's name."""
    if normalise_logits:
        return of_normalised(loss), f", normalised logits{describe_loss(loss)}"
    return loss, describe_loss(loss)
