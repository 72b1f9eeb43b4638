"""Gradients to score coordinates by, taken on a copy of the model."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from masks.context import MaskContext
from masks.errors import MaskError
from masks.per_example import per_example_gradients

Labels = Literal["data", "model"]
_CHUNK_BYTES = 2**28


@torch.enable_grad()
def mean_gradient(context: MaskContext) -> list[Tensor]:
    """Gradient of the mean loss over all examples of the context, one tensor per row.

    Raises:
        MaskError: no data, a loss that is not one value per example, or a gradient that is not finite.
    """
    model = context.scoring_model()
    params = context.table.tensors(model)
    total = [torch.zeros_like(p, requires_grad=False) for p in params]
    count = 0
    for x, y in context.batches:
        losses = _losses(context, model(x), y)
        gradients = torch.autograd.grad(losses.sum(), params, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(total, gradients)
        count += len(losses)
    torch._foreach_div_(total, count)
    _check_finite(context, total)
    return total


def mean_squared_gradients(context: MaskContext, labels: Labels) -> list[Tensor]:
    """Mean over examples of the squared per-example gradient: the diagonal of the Fisher information.

    ``F_i = 1/N sum_n (d l(x_n, y_n) / d w_i)^2``. With the data's labels this is the empirical Fisher; with
    labels sampled from the model's softmax (one per example, from the context's own random stream) it is an
    unbiased estimate of the true one (Kunstner et al. 2019, arXiv 1905.12558).

    Per-example gradients come from vmap in chunks of at most 256 MiB; where vmap cannot run the model, from
    one example at a time.

    Raises:
        MaskError: no data, a loss that is not one value per example, or a gradient or output that is not
            finite.
    """
    model = context.scoring_model()
    params = context.table.tensors(model)
    total = [torch.zeros_like(p, requires_grad=False) for p in params]
    count = 0
    named = dict(zip((row.name for row in context.table), params, strict=True))
    loss = partial(_losses, context)
    size = max(1, _CHUNK_BYTES // sum(p.numel() * p.element_size() for p in params))
    generator = context.generator("labels")
    for x, y in context.batches:
        targets = y if labels == "data" else _sampled_labels(model, x, generator)
        for xs, ys in zip(torch.split(x, size), torch.split(targets, size), strict=True):
            for gradients in per_example_gradients(model, named, loss, xs, ys):
                torch._foreach_add_(total, [g.square().sum(0) for g in gradients])
            count += len(xs)
    torch._foreach_div_(total, count)
    _check_finite(context, total)
    return total


def _losses(context: MaskContext, logits: Tensor, y: Tensor) -> Tensor:
    losses = context.loss(logits, y)
    if losses.shape != y.shape[:1]:
        raise MaskError(
            f"the loss must return one value per example (reduction='none'): for {len(y)} examples it returned "
            f"shape {tuple(losses.shape)}"
        )
    return losses


def _sampled_labels(model: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        probabilities = model(x).softmax(1).double().cpu()
    if not bool(torch.isfinite(probabilities).all()):
        raise MaskError("the model's outputs on the scoring data are not finite: training has diverged")
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(x.device)


def _check_finite(context: MaskContext, scores: list[Tensor]) -> None:
    for row, score in zip(context.table, scores, strict=True):
        if not bool(torch.isfinite(score).all()):
            raise MaskError(f"the gradient of {row.name} on the scoring data is not finite: training has diverged")
