"""Gradients of single examples, all at once where the model allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


def per_example_gradients(
    model: nn.Module, params: Mapping[str, Tensor], loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """The gradient of each example's loss, with a leading dimension for the examples.

    By vmap; a model that it cannot run (data-dependent control flow, in-place updates, operations without a batching
    rule) or that needs more memory than there is goes through one example at a time: the same numbers, more slowly. An
    error of the model's own comes again there, and is raised.

    Args:
        model: in evaluation mode.
        params: the parameters by name, as ``model.named_parameters()`` has them.
        loss: per-example losses of (outputs, targets).
        x: inputs, shape (B, ...).
        y: targets, shape (B, ...).

    Yields:
        One tensor (b, *shape) per parameter: once for all examples, or once for each.
    """

    def one(values: tuple[Tensor, ...], xi: Tensor, yi: Tensor) -> Tensor:
        outputs = functional_call(model, dict(zip(params, values, strict=True)), (xi[None],))
        return loss(outputs, yi[None]).sum()

    gradients: tuple[Tensor, ...] | None = None
    try:
        # The fused attention kernels have no batching rule: vmap would run them one example at a time.
        # Outside of grad nothing needs a graph, which the other parameters would otherwise make.
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            gradients = vmap(grad(one), in_dims=(None, 0, 0))(tuple(p.detach() for p in params.values()), x, y)
    except (RuntimeError, ValueError, NotImplementedError):
        pass
    if gradients is not None:
        yield gradients
        return
    tensors = list(params.values())
    for xi, yi in zip(x, y, strict=True):
        with torch.enable_grad():
            total = loss(model(xi[None]), yi[None]).sum()
            found = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
        yield tuple(g[None] for g in found)
