"""The data of a measurement: micro-batches, a digest, and whether two passes over them agree."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from analysis.evaluation import losses
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
    for tensor in joined(batches):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_repeatable(model: nn.Module, batch: Batch, loss: LossFn, dtype: torch.dtype) -> None:
    """Refuse a model or loss that gives two passes over the same batch at the same weights different losses.

    Random augmentation inside the model and dropout that ignores the evaluation mode are found here, whatever
    they draw from; differences of rounding (sums in another order on accelerators) pass.

    Args:
        model: the model, in :func:`analysis.evaluation.evaluation_mode`.
        batch: inputs and targets, placed.
        loss: per-example loss.
        dtype: of the parameters.

    Raises:
        InputError: the losses differ by more than rounding; or as :func:`analysis.evaluation.losses`.
    """
    with torch.no_grad():
        first, second = (losses(model, batch, loss, dtype, "at the given weights").double() for _ in range(2))
    differ = (first - second).abs() > _TOLERANCE[dtype] * (1 + first.abs())
    if bool(differ.any()):
        i = int((first - second).abs().argmax())
        raise InputError(
            f"data that differ between passes: {int(differ.sum())} of {len(first)} examples have another loss in a "
            f"second pass at the same weights (example {i}: {float(first[i]):.6g}, then {float(second[i]):.6g}); turn "
            "off random augmentation inside the model and dropout that stays on in evaluation mode"
        )


_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
