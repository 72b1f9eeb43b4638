"""How much the loss rises on average when the weights are disturbed at random."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from analysis.estimate import Estimate
from analysis.evaluation import (
    check_batches,
    check_mask,
    describe_mask,
    evaluation_mode,
    losses,
    place,
    precision_of,
    whole_mask,
)
from analysis.examples import check_function, data_digest
from analysis.logits import chosen_loss
from masks.context import Batch, LossFn, cross_entropy
from masks.errors import InputError, unknown_name
from masks.mask import Mask
from masks.region import Region
from sam.perturbation import Identity, Metric

Noise = Literal["gaussian", "uniform"]
NOISES: tuple[Noise, ...] = get_args(Noise)


def average_sharpness(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    rho: float,
    noise: Noise = "gaussian",
    metric: Metric | None = None,
    pairs: int = 10,
    mask: Mask | None = None,
    seed: int = 0,
    normalise_logits: bool = False,
    loss: LossFn = cross_entropy,
) -> Estimate:
    """Average-case sharpness (Andriushchenko et al. 2023, arXiv 2302.07011, section 3).

    ``S = E_z[L(w + rho s c z)] - L(w)``, s the mask, c the normaliser (1, |w| + eta, ...), z standard normal or
    uniform on [-1, 1] in every coordinate: rho is the standard deviation, or half the width, *per coordinate*, not
    divided by the number of coordinates. To second order ``S = rho^2 / 2 tr(C H C)`` (a third of it for uniform
    noise), ``C = diag(s c)``. With ReLU that holds only while no unit switches: the kinks within reach of the noise add
    a term of the same order in rho, which the Hessian does not hold (measured at rho = 0.001: 45 % on top for a small
    BatchNorm CNN, three times the trace for a small MLP).

    Every z is taken with -z (antithetic pairs, which removes the first order exactly). Each batch has noise of its
    own, which for the same cost has a smaller error than one noise for all. The noise depends on the seed, the
    position of the batch and of the pair and the shapes of the tensors that the mask touches, and on nothing else:
    models of the same architecture, measured with the same seed and mask, meet the same noise.

    Args:
        model: the model, float32 or float64.
        batches: the data, a list of (inputs, targets); every example has the same weight, however they are cut.
        rho: standard deviation or half width, in units of ``delta / c``.
        noise: distribution of z.
        metric: the normaliser; None for 1.
        pairs: pairs (z, -z) for every batch; ``2 pairs + 1`` passes over the data.
        mask: the coordinates that move; None for all trainable parameters.
        seed: seed of the noise, which is drawn on the CPU and is the same on every device.
        normalise_logits: take the loss of centred logits of norm 1, see :func:`analysis.logits.normalise`.
        loss: per-example loss, ``(logits, targets) -> (B,)``.

    Returns:
        The mean with its Monte-Carlo standard error (None for one pair) over n = pairs x batches draws. It may be
        negative.

    Raises:
        InputError: a radius or number of pairs that is not positive, an empty mask, a loss that is not finite, losses
            that differ between two passes.
        MaskError: the mask is of another model.
    """
    if not (math.isfinite(rho) and rho > 0) or pairs < 1:
        raise InputError(f"rho must be a positive finite number and pairs at least 1, got rho={rho} and pairs={pairs}")
    if noise not in NOISES:
        raise InputError(unknown_name("noise", str(noise), NOISES))
    metric = Identity() if metric is None else metric
    mask = whole_mask(model) if mask is None else mask
    check_mask(mask)
    dtype, _ = precision_of(model)
    batches = check_batches(batches)
    digest = data_digest(batches)
    taken, loss_name = chosen_loss(loss, normalise_logits)
    rises = _rises(model, batches, taken, Region(mask, model), metric, rho, noise, pairs, seed)
    weights = np.array([len(x) for x, _ in batches]) / sum(len(x) for x, _ in batches)
    # Stratified by batch: the batches are not a sample here, only the noise is.
    variance = float(weights**2 @ rises.var(axis=1, ddof=1)) / pairs if pairs > 1 else math.nan
    shape = "" if isinstance(metric, Identity) else f" {metric!r}"
    return Estimate(
        name=(
            f"average-case sharpness, {noise}{shape}, rho={rho:g}, {pairs} antithetic pairs per batch, "
            f"{describe_mask(mask)}, evaluation-mode normalization{loss_name}"
        ),
        value=float(weights @ rises.mean(axis=1)),
        standard_error=math.sqrt(variance) if pairs > 1 else None,
        n=rises.size,
        settings={
            "error_kind": "Monte-Carlo standard error",
            "noise": noise,
            "metric": repr(metric),
            "rho": rho,
            "pairs": pairs,
            "seed": seed,
            "normalise_logits": normalise_logits,
            "num_examples": sum(len(x) for x, _ in batches),
            "num_batches": len(batches),
            "data_digest": digest,
            "mask_digest": mask.digest(),
            "num_kept": mask.num_kept,
            "dtype": str(dtype).removeprefix("torch."),
        },
    )


def _rises(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: LossFn,
    region: Region,
    metric: Metric,
    rho: float,
    noise: Noise,
    pairs: int,
    seed: int,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean of the rises at z and -z, shape (batches, pairs)."""
    dtype, device = precision_of(model)
    scales = [metric.scale(p.row, p.param, w) for p, w in zip(region.pieces, region.weights(), strict=True)]
    saved = region.save()
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[Tensor]:
        """rho c z."""
        z = [_draw(noise, p.row.shape, generator).to(device, dtype) for p in region.pieces]
        return [rho * v if c is None else rho * c * v for v, c in zip(region.gather(z), scales, strict=True)]

    rises = np.empty((len(batches), pairs))
    with evaluation_mode(model), torch.no_grad():
        check_function(model, batches, loss)
        for i, given in enumerate(batches):
            batch = place(given, dtype, device)
            clean = _mean(losses(model, batch, loss, dtype, "at the given weights"))
            for j in range(pairs):
                delta = draw()
                total = 0.0
                for signed in (delta, [-d for d in delta]):
                    with _moved(region, signed, saved):
                        total += _mean(losses(model, batch, loss, dtype, f"at noise of size {rho:g}"))
                rises[i, j] = total / 2 - clean
    return rises


def _draw(noise: Noise, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """z for a whole tensor in float32, so that neither the mask's form nor the precision changes it."""
    if noise == "gaussian":
        return torch.randn(shape, generator=generator, dtype=torch.float32)
    return torch.rand(shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


@contextmanager
def _moved(region: Region, delta: Sequence[Tensor], saved: Sequence[Tensor]) -> Iterator[None]:
    try:
        region.add_(delta)
        yield
    finally:
        region.restore(saved)
