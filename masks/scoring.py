"""Gradients to score coordinates by, taken on a copy of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from masks.context import MaskContext
from masks.errors import MaskError

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
    size = max(1, _CHUNK_BYTES // sum(p.numel() * p.element_size() for p in params))
    generator = context.generator("labels")
    for x, y in context.batches:
        targets = y if labels == "data" else _sampled_labels(model, x, generator)
        for xs, ys in zip(torch.split(x, size), torch.split(targets, size), strict=True):
            for gradients in _per_example(context, model, params, xs, ys):
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


def _per_example(
    context: MaskContext, model: nn.Module, params: list[Tensor], x: Tensor, y: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Per-example gradients with a leading batch dimension, in one or more chunks."""
    names = [row.name for row in context.table]

    def loss(values: tuple[Tensor, ...], xi: Tensor, yi: Tensor) -> Tensor:
        logits = functional_call(model, dict(zip(names, values, strict=True)), (xi[None],))
        return _losses(context, logits, yi[None]).sum()

    try:
        values = tuple(p.detach() for p in params)
        # The fused attention kernels have no batching rule: vmap would run them one example at a time.
        with sdpa_kernel(SDPBackend.MATH):
            gradients = vmap(grad(loss), in_dims=(None, 0, 0))(values, x, y)
        yield gradients
    except (RuntimeError, ValueError, NotImplementedError):
        # Data-dependent control flow, in-place updates, operations without a batching rule.
        for xi, yi in zip(x, y, strict=True):
            with torch.enable_grad():
                losses = _losses(context, model(xi[None]), yi[None])
                one = torch.autograd.grad(losses.sum(), params, allow_unused=True, materialize_grads=True)
            yield tuple(g[None] for g in one)


def _check_finite(context: MaskContext, scores: list[Tensor]) -> None:
    for row, score in zip(context.table, scores, strict=True):
        if not bool(torch.isfinite(score).all()):
            raise MaskError(f"the gradient of {row.name} on the scoring data is not finite: training has diverged")
