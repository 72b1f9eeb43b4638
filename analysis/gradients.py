"""Norms of gradients, of the mean loss and per example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from analysis.estimate import Estimate
from analysis.evaluation import (
    check_batches,
    check_mask,
    describe_loss,
    describe_mask,
    evaluation_mode,
    losses,
    place,
    precision_of,
    whole_mask,
)
from analysis.examples import check_agreement, data_digest, first_pass
from masks.context import Batch, LossFn, cross_entropy
from masks.errors import InputError, unknown_name
from masks.mask import Mask
from masks.per_example import per_example_gradients
from masks.region import Region
from sam.perturbation import Identity, Metric, total_norm

Labels = Literal["data", "model"]
LABELS: tuple[Labels, ...] = get_args(Labels)

_CHUNK_BYTES = 2**27


def gradient_norm(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    metric: Metric | None = None,
    mask: Mask | None = None,
    loss: LossFn = cross_entropy,
) -> Estimate:
    """``||s c grad L(w)||_2`` of the mean loss over all examples; c = 1, or the normaliser of a metric.

    Exact for these data: no standard error. One gradient.

    Raises:
        InputError: an empty mask, or a loss or gradient that is not finite or differs between two passes.
        MaskError: the mask is of another model.
    """
    metric = Identity() if metric is None else metric
    mask = whole_mask(model) if mask is None else mask
    check_mask(mask)
    batches = check_batches(batches)
    region = Region(mask, model)
    total = mean_gradient(model, batches, region, loss)
    scales = [metric.scale(p.row, p.param, w) for p, w in zip(region.pieces, region.weights(), strict=True)]
    scaled = [g if c is None else g * c for g, c in zip(region.gather(total), scales, strict=True)]
    what = "gradient norm" if isinstance(metric, Identity) else f"gradient norm scaled by {metric!r}"
    return Estimate(
        name=f"{what}, {describe_mask(mask)}, evaluation-mode normalization{describe_loss(loss)}",
        value=float(total_norm(scaled)),
        standard_error=None,
        n=sum(len(x) for x, _ in batches),
        settings={
            "error_kind": "none: exact for these data",
            "metric": repr(metric),
            **_settings(batches, mask, precision_of(model)[0]),
        },
    )


def mean_gradient(model: nn.Module, batches: Sequence[Batch], region: Region, loss: LossFn) -> list[Tensor]:
    """The gradient of the mean loss over all examples, one whole tensor per piece of the region.

    Raises:
        InputError: a loss or gradient that is not finite, does not depend on the weights, or differs between two
            passes.
    """
    dtype, device = precision_of(model)
    total = [torch.zeros_like(p) for p in region.params]
    count = sum(len(x) for x, _ in batches)
    with evaluation_mode(model):
        for i, (given, first) in enumerate(zip(batches, first_pass(model, batches, loss), strict=True)):
            values = losses(model, place(given, dtype, device), loss, dtype, "at the given weights")
            check_agreement(i, first, values)
            _check_depends(values)
            gradients = torch.autograd.grad(values.sum() / count, region.params, materialize_grads=True)
            torch._foreach_add_(total, list(gradients))
    if not all(bool(torch.isfinite(g).all()) for g in total):
        raise InputError("the gradient of the loss is not finite at the given weights")
    return [g.detach() for g in total]


def fisher_trace(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    labels: Labels = "data",
    mask: Mask | None = None,
    seed: int = 0,
    loss: LossFn = cross_entropy,
) -> Estimate:
    """The trace of the Fisher information: the mean over examples of the squared per-example gradient norm.

    ``tr F = E_x E_y ||s grad -log p(y | x)||^2``. With ``labels="data"`` y is the example's label: the *empirical*
    Fisher, which is not a curvature (Kunstner et al. 2019, arXiv 1905.12558). With ``labels="model"`` y is drawn
    from the model's softmax, once per example, from the seed's own stream: an unbiased estimate of the true one.

    Gradients per example come from vmap, in chunks; where vmap cannot run the model, from one example at a time.

    Returns:
        The mean with its standard error over the N examples as a sample (with drawn labels, their noise included).

    Raises:
        InputError: an unknown choice of labels, an empty mask, a loss or gradient that is not finite, losses that
            differ between two passes; for ``labels="model"`` outputs that are not (examples, classes).
        MaskError: the mask is of another model.
    """
    if labels not in LABELS:
        raise InputError(unknown_name("labels", str(labels), LABELS))
    mask = whole_mask(model) if mask is None else mask
    check_mask(mask)
    dtype, device = precision_of(model)
    batches = check_batches(batches)
    region = Region(mask, model)
    generator = torch.Generator().manual_seed(seed)
    named = {piece.row.name: p for piece, p in zip(region.pieces, region.params, strict=True)}
    size = max(1, _CHUNK_BYTES // sum(p.numel() * p.element_size() for p in region.params))
    squares: list[Tensor] = []
    with evaluation_mode(model):
        known = first_pass(model, batches, loss)
        for i, given in enumerate(batches):
            x, y = place(given, dtype, device)
            # Outside vmap, also since norms through a forward pass without gradients would come out as 0.
            values = losses(model, (x, y), loss, dtype, "at the given weights")
            check_agreement(i, known[i], values)
            _check_depends(values)
            y = y if labels == "data" else _sampled_labels(model, x, generator)
            for xs, ys in zip(torch.split(x, size), torch.split(y, size), strict=True):
                squares += [_squared_norms(g, region) for g in per_example_gradients(model, named, loss, xs, ys)]
    values = torch.cat(squares)
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise InputError(f"the gradient of the loss is not finite for {bad} of {len(values)} examples")
    n = len(values)
    which = "empirical (labels of the data)" if labels == "data" else "true (labels drawn from the model)"
    return Estimate(
        name=f"Fisher trace, {which}, {describe_mask(mask)}, evaluation-mode normalization{describe_loss(loss)}",
        value=float(values.mean()),
        standard_error=float(values.std()) / math.sqrt(n) if n > 1 else None,
        n=n,
        settings={
            "error_kind": "standard error over examples",
            "labels": labels,
            "seed": seed if labels == "model" else None,
            **_settings(batches, mask, dtype),
        },
    )


def _settings(batches: Sequence[Batch], mask: Mask, dtype: torch.dtype) -> dict[str, object]:
    return {
        "num_examples": sum(len(x) for x, _ in batches),
        "data_digest": data_digest(batches),
        "mask_digest": mask.digest(),
        "num_kept": mask.num_kept,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _check_depends(values: Tensor) -> None:
    if not values.requires_grad:
        raise InputError("the loss does not depend on any trainable parameter (a forward pass without gradients?)")


@torch.no_grad()
def _sampled_labels(model: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """One label per example, by inversion: models that are alike draw the same labels from the same seed."""
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise InputError(
            "the true Fisher needs outputs of shape (examples, classes); measure the empirical one (labels of the data)"
        )
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the model's outputs are not finite at the given weights")
    below = logits.double().softmax(1).cumsum(1).cpu()
    u = torch.rand(len(x), 1, generator=generator, dtype=torch.float64) * below[:, -1:]
    return (below <= u).sum(1).to(x.device)


def _squared_norms(gradients: tuple[Tensor, ...], region: Region) -> Tensor:
    """Over the kept coordinates, shape (examples,), float64, on the CPU."""
    total = torch.zeros(len(gradients[0]), dtype=torch.float64)
    for gradient, piece in zip(gradients, region.pieces, strict=True):
        part = region.mask.parts[piece.position]
        if isinstance(part, Tensor):
            gradient = torch.where(part.to(gradient.device), gradient, 0)
        total += gradient.flatten(1).double().square().sum(1).cpu()
    return total
