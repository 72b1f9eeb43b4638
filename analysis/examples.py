"""The data of a measurement: micro-batches, a digest, and whether two passes over them agree."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.evaluation import losses, place, precision_of
from masks.context import Batch, LossFn
from masks.errors import InputError


def micro_batches(batches: Sequence[Batch], m: int) -> tuple[list[Batch], int]:
    """Complete micro-batches of m examples in the order of the data, and how many examples are left over.

    Raises:
        InputError: fewer than m examples.
    """
    x, y = joined(batches)
    n = len(x) // m
    if not n:
        raise InputError(f"m-sharpness with m={m} needs at least {m} examples, got {len(x)}")
    return list(zip(torch.split(x[: n * m], m), torch.split(y[: n * m], m), strict=True)), len(x) - n * m


def joined(batches: Sequence[Batch]) -> Batch:
    """All inputs and all targets, in order.

    Raises:
        InputError: batches whose examples differ in shape, type or device.
    """
    for what, parts in zip(("inputs", "targets"), zip(*batches, strict=True), strict=True):
        for i, part in enumerate(parts):
            if (part.shape[1:], part.dtype, part.device) != (parts[0].shape[1:], parts[0].dtype, parts[0].device):
                raise InputError(
                    f"the {what} of batch {i} are {part.dtype} of shape {tuple(part.shape)} on {part.device}, those of "
                    f"batch 0 {parts[0].dtype} of shape {tuple(parts[0].shape)} on {parts[0].device}"
                )
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return x, y


def data_digest(batches: Sequence[Batch]) -> str:
    """Hex SHA-256 of the examples and their targets in order, however they are cut into batches."""
    digest = hashlib.sha256()
    for parts in zip(*batches, strict=True):
        for (shape, dtype), alike in groupby(parts, key=lambda t: (tuple(t.shape[1:]), t.dtype)):
            tensors = list(alike)
            digest.update(f"{(sum(map(len, tensors)), *shape)} {dtype}".encode())
            for tensor in tensors:
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_function(
    model: nn.Module, batches: Sequence[Batch], loss: LossFn, *, batch_statistics: bool = False
) -> tuple[Tensor, ...]:
    """Refuse a model or loss whose value is not one fixed function of the weights, computed in their precision.

    Two passes without gradients over all batches, 2/3 of the work of one gradient. They find random augmentation inside
    the model and dropout that ignores the evaluation mode, whatever they draw from (differences of rounding, sums in
    another order on accelerators, pass), half precision anywhere inside, also where it is cast back, and BatchNorm that
    normalizes by the batch in evaluation mode.

    Args:
        model: the model, in :func:`analysis.evaluation.evaluation_mode`.
        batches: the data, moved to the model's device and precision.
        loss: per-example loss.
        batch_statistics: normalization by the batch was asked for.

    Returns:
        The losses of each batch, float64.

    Raises:
        InputError: two passes whose losses differ by more than rounding, half precision, batch statistics that were not
            asked for; or as :func:`analysis.evaluation.losses`.
    """
    first = first_pass(model, batches, loss, batch_statistics=batch_statistics)
    dtype, device = precision_of(model)
    for i, (given, known) in enumerate(zip(batches, first, strict=True)):
        with torch.no_grad():
            check_agreement(i, known, losses(model, place(given, dtype, device), loss, dtype, "at the given weights"))
    return first


def first_pass(
    model: nn.Module, batches: Sequence[Batch], loss: LossFn, *, batch_statistics: bool = False
) -> tuple[Tensor, ...]:
    """The first half of :func:`check_function`, one pass without gradients, for those who make the second one anyway.

    Args, Returns, Raises:
        As :func:`check_function`, but that nothing is compared yet: hand the losses of each batch, as they come out of
        the second pass, to :func:`check_agreement`.
    """
    dtype, device = precision_of(model)
    if not batch_statistics:
        _check_statistics(model)
    out = []
    for given in batches:
        with torch.no_grad(), _NoHalfPrecision():  # type: ignore[no-untyped-call]
            out.append(losses(model, place(given, dtype, device), loss, dtype, "at the given weights").double())
    return tuple(out)


def check_agreement(i: int, first: Tensor, second: Tensor) -> None:
    """Refuse losses of batch i, shape (B,), that differ between two passes at the same weights by more than rounding.

    Args:
        i: which batch, for the error's text.
        first: from :func:`first_pass`.
        second: in the model's precision, which sets the tolerance; its graph is not used.

    Raises:
        InputError: they differ.
    """
    tolerance, second = _TOLERANCE[second.dtype], second.detach().double()
    differ = (first - second).abs() > tolerance * (1 + first.abs())
    if bool(differ.any()):
        j = int((first - second).abs().argmax())
        raise InputError(
            f"data that differ between passes: {int(differ.sum())} of {len(first)} examples of batch {i} have "
            f"another loss in a second pass at the same weights (example {j}: {float(first[j]):.6g}, then "
            f"{float(second[j]):.6g}); turn off random augmentation inside the model and dropout that stays on in "
            "evaluation mode"
        )


_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def _check_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise InputError(
                f"{name or 'the model'} ({type(module).__name__}) keeps no running statistics: it normalizes by the "
                "batch in evaluation mode too, so that values depend on how the data are cut; only the curvature "
                'operators measure that, with statistics="batch"'
            )


class _NoHalfPrecision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at the first operation that yields half precision, below autocast and autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                raise InputError(
                    f"{str(value.dtype).removeprefix('torch.')} inside the model or the loss (operation {func}): "
                    "sharpness and curvature need float32 or float64 throughout; turn autocast inside the model off"
                )
        return out
