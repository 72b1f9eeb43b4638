"""Gradients of single examples, all at once where the model allows it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


class OneByOneWarning(UserWarning):
    """Gradients of single examples are computed one by one, which is slow: vmap cannot run the model or its loss."""


def per_example_gradients(
    model: nn.Module, params: Mapping[str, Tensor], loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """The gradient of each example's loss, with a leading dimension for the examples.

    By vmap; a model or loss that it cannot run (data-dependent control flow, in-place updates, operations without a
    batching rule) or that needs more memory than there is goes through one example at a time: the same numbers, more
    slowly, and an :class:`OneByOneWarning` says so (once, as Python's warnings do). An error of the model's own comes
    again there, and is raised.

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
    reason = ""
    try:
        # The fused attention kernels have no batching rule: vmap would run them one example at a time.
        # Outside of grad nothing needs a graph, which the other parameters would otherwise make.
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            gradients = vmap(grad(one), in_dims=(None, 0, 0))(tuple(p.detach() for p in params.values()), x, y)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {error}"
    if gradients is not None:
        yield gradients
        return
    tensors = list(params.values())
    for i, (xi, yi) in enumerate(zip(x, y, strict=True)):
        with torch.enable_grad():
            total = loss(model(xi[None]), yi[None]).sum()
            found = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
        if i == 0 and len(x) > 1:  # not before: an error of the model's own is not vmap's
            warnings.warn(_one_by_one(model, reason), OneByOneWarning, stacklevel=2)
        yield tuple(g[None] for g in found)


def _one_by_one(model: nn.Module, reason: str) -> str:
    """The same text for every part of the data, so that it is shown once: without the numbers behind the first sentence
    of the reason."""
    sentence = " ".join(reason.split()).partition(". ")[0][:200].rstrip(".")
    return (
        f"gradients of single examples of {type(model).__name__} are computed one by one, with the same numbers but a "
        f"pass for each, as vmap cannot run model and loss ({sentence}); score fewer examples if this takes too long"
    )
