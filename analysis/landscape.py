"""The loss along directions in the space of weights: curves and slices.

A direction is a dict of tensors by parameter name, each of the shape of its parameter; parameters that are not named do
not move. :meth:`analysis.operator.HessianOperator.unflatten` makes one of an eigenvector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from analysis.evaluation import (
    check_batches,
    check_mask,
    describe_loss,
    evaluation_mode,
    losses,
    place,
    precision_of,
    whole_mask,
)
from analysis.examples import check_function, data_digest
from analysis.gradients import mean_gradient
from masks.context import Batch, LossFn, cross_entropy
from masks.errors import InputError, unknown_name
from masks.mask import Mask, Provenance
from masks.norm_stats import reestimated_copy
from masks.params import ParamTable
from masks.region import Region
from sam.perturbation import total_norm

Direction = Mapping[str, Tensor]
Vectors = Literal["fixed", "scaled"]
Statistics = Literal["kept", "reestimated"]


@dataclass(frozen=True)
class Slice:
    """The loss on a grid of points ``w + a d_1 (+ b d_2)``.

    Attributes:
        name: what it is, in full.
        axes: the coordinates along every direction.
        values: mean losses; for two directions one row per coordinate of the first.
        settings: how it was computed, in plain values.
    """

    name: str
    axes: tuple[tuple[float, ...], ...]
    values: tuple[float, ...] | tuple[tuple[float, ...], ...]
    settings: Mapping[str, Any]


def gradient_direction(
    model: nn.Module, batches: Sequence[Batch], *, mask: Mask | None = None, loss: LossFn = cross_entropy
) -> dict[str, Tensor]:
    """The gradient of the mean loss on the mask, of norm 1.

    Raises:
        InputError: a gradient that is zero or not finite, an empty mask.
        MaskError: the mask is of another model.
    """
    mask = whole_mask(model) if mask is None else mask
    check_mask(mask)
    region = Region(mask, model)
    values = region.gather(mean_gradient(model, check_batches(batches), region, loss))
    norm = float(total_norm(values))
    if not 0 < norm < math.inf:
        raise InputError(f"the gradient has norm {norm:g}: it gives no direction")
    full = region.scatter([v / norm for v in values])
    return {piece.row.name: t for piece, t in zip(region.pieces, full, strict=True)}


def random_direction(
    model: nn.Module, *, mask: Mask | None = None, seed: int = 0, vectors: Vectors = "fixed"
) -> dict[str, Tensor]:
    """A filter-normalised random direction (Li et al. 2018, arXiv 1712.09913, section 4).

    Standard normal, every filter (row) f of a weight of two or more dimensions scaled to the norm of the weight's
    own: ``d_f <- d_f ||w_f|| / ||d_f||``. The same seed draws the same noise for all models of one architecture,
    whatever the mask.

    Args:
        model: the model.
        mask: the coordinates that move, applied before the scaling; None for all trainable parameters.
        seed: seed of the direction, which is drawn on the CPU and is the same on every device.
        vectors: tensors of one dimension, biases and the parameters of normalization layers: "fixed" (as in the paper)
            or "scaled", each as one filter.

    Raises:
        InputError: an empty mask; a direction that is zero, as with "fixed" and a mask of normalization layers.
        MaskError: the mask is of another model.
    """
    if vectors not in get_args(Vectors):
        raise InputError(unknown_name("treatment of vectors", str(vectors), get_args(Vectors)))
    mask = whole_mask(model) if mask is None else mask
    check_mask(mask)
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    tensors = mask.table.tensors(model)
    for row, param, part, count in zip(mask.table, tensors, mask.parts, mask.counts, strict=True):
        noise = torch.randn(row.shape, generator=generator, dtype=torch.float32).to(param.device, param.dtype)
        is_filtered = len(row.shape) >= 2
        if not count or not (is_filtered or vectors == "scaled"):
            continue
        weight = param.detach()
        if isinstance(part, Tensor):
            keep = part.to(param.device)
            noise, weight = torch.where(keep, noise, 0), torch.where(keep, weight, 0)
        filters = len(noise) if is_filtered else 1
        norms = torch.linalg.vector_norm(noise.reshape(filters, -1), dim=1, keepdim=True)
        wanted = torch.linalg.vector_norm(weight.reshape(filters, -1), dim=1, keepdim=True)
        factor = torch.where(norms > 0, wanted / norms, 0.0)
        out[row.name] = (noise.reshape(filters, -1) * factor).reshape(row.shape)
    if not any(bool(t.any()) for t in out.values()):
        raise InputError(
            "the random direction is zero: the mask keeps no weight of two or more dimensions that is not zero; "
            'for biases and normalization layers pass vectors="scaled"'
        )
    return out


def direction_between(model: nn.Module, target: Mapping[str, Tensor], *, mask: Mask | None = None) -> dict[str, Tensor]:
    """From the model's weights to those of a checkpoint: ``d = s (w_target - w)``, so that t = 1 is the target.

    Buffers are not part of it: running statistics stay those of the model, see ``statistics`` in :func:`loss_slice`.

    Args:
        model: the model.
        target: a state dict of the same architecture.
        mask: the coordinates that move; None for all trainable parameters.

    Raises:
        InputError: the checkpoint lacks a parameter or has another shape, or does not differ on the mask.
        MaskError: the mask is of another model.
    """
    mask = whole_mask(model) if mask is None else mask
    check_mask(mask)
    out: dict[str, Tensor] = {}
    tensors = mask.table.tensors(model)
    for row, param, part, count in zip(mask.table, tensors, mask.parts, mask.counts, strict=True):
        if not count:
            continue
        if row.name not in target:
            raise InputError(unknown_name("parameter of the checkpoint", row.name, target))
        there = target[row.name].detach().to(param.device, param.dtype)
        if there.shape != param.shape:
            raise InputError(
                f"the checkpoint is of another model: {row.name} has shape {tuple(there.shape)} there, "
                f"{tuple(param.shape)} here"
            )
        difference = there - param.detach()
        out[row.name] = torch.where(part.to(param.device), difference, 0) if isinstance(part, Tensor) else difference
    if not any(bool(t.any()) for t in out.values()):
        raise InputError("the checkpoint has the same weights on the mask: there is no direction between them")
    return out


def loss_slice(
    model: nn.Module,
    batches: Sequence[Batch],
    directions: Sequence[Direction],
    axes: Sequence[Sequence[float]],
    *,
    statistics: Statistics = "kept",
    loss: LossFn = cross_entropy,
) -> Slice:
    """The mean loss at ``w + a d_1``, or on the grid ``w + a d_1 + b d_2``.

    Every point starts from the saved weights, which are put back bit for bit; the model is otherwise left as it was,
    see :func:`analysis.evaluation.evaluation_mode`.

    Args:
        model: the model, float32 or float64.
        batches: the data, a list of (inputs, targets); every example has the same weight.
        directions: one or two.
        axes: the coordinates along each of them.
        statistics: running statistics of normalization layers: "kept" as they are at w, or "reestimated" at every
            point on the batches, in a copy.
        loss: per-example loss, ``(logits, targets) -> (B,)``.

    Raises:
        InputError: directions or axes that do not fit, a loss that is not finite or differs between two passes.
    """
    if statistics not in get_args(Statistics):
        raise InputError(unknown_name("treatment of statistics", str(statistics), get_args(Statistics)))
    points = _checked_axes(directions, axes)
    dtype, device = precision_of(model)
    batches = [place(batch, dtype, device) for batch in check_batches(batches)]
    moves = [_checked(model, direction) for direction in directions]
    table = ParamTable.from_model(model)
    moving = [i for i, row in enumerate(table) if any(row.name in move for move in moves)]
    region = Region(Mask.of_rows(table, moving, Provenance("slice")), model)
    saved = region.save()

    def at(*coordinates: float) -> float:
        where = f"at {', '.join(f'{c:g}' for c in coordinates)} along the direction{'s'[: len(coordinates) - 1]}"
        with _at_point(region, saved, moves, coordinates):
            moved = model if statistics == "kept" else reestimated_copy(model, (x for x, _ in batches))
            return _mean_loss(moved, batches, loss, dtype, where)

    with evaluation_mode(model), torch.no_grad():
        check_function(model, batches, loss)
        if len(points) == 1:
            values: Any = tuple(at(a) for a in points[0])
        else:
            values = tuple(tuple(at(a, b) for b in points[1]) for a in points[0])
    num = sum(len(x) for x, _ in batches)
    return Slice(
        name=(
            f"mean loss over {num} examples along {len(moves)} direction{'s'[: len(moves) - 1]}, evaluation-mode "
            f"normalization, statistics {statistics}{describe_loss(loss)}"
        ),
        axes=points,
        values=values,
        settings={
            "num_examples": num,
            "statistics": statistics,
            "moved": [sorted(name for name, t in move.items() if bool(t.any())) for move in moves],
            "norms": [float(total_norm(list(move.values()))) for move in moves],
            "data_digest": data_digest(batches),
            "dtype": str(dtype).removeprefix("torch."),
        },
    )


def _checked_axes(directions: Sequence[Direction], axes: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    if len(directions) not in (1, 2) or len(axes) != len(directions):
        raise InputError(
            f"a slice needs one or two directions and as many axes, got {len(directions)} directions and "
            f"{len(axes)} axes"
        )
    points = tuple(tuple(float(a) for a in axis) for axis in axes)
    if not all(points) or not all(math.isfinite(a) for axis in points for a in axis):
        raise InputError("every axis must be a non-empty list of finite numbers")
    return points


def _checked(model: nn.Module, direction: Direction) -> dict[str, Tensor]:
    table = ParamTable.from_model(model)
    params = {row.name: p for row, p in zip(table, table.tensors(model), strict=True)}
    out: dict[str, Tensor] = {}
    for name, tensor in direction.items():
        if name not in params:
            raise InputError(unknown_name("parameter", name, params))
        if tensor.shape != params[name].shape:
            raise InputError(
                f"the direction of {name} has shape {tuple(tensor.shape)}, the parameter {tuple(params[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the direction of {name} is not finite")
        out[name] = tensor.detach().to(params[name].device, params[name].dtype)
    if not any(bool(t.any()) for t in out.values()):
        raise InputError("the direction is zero")
    return out


@contextmanager
def _at_point(
    region: Region, saved: Sequence[Tensor], moves: Sequence[Direction], coordinates: Sequence[float]
) -> Iterator[None]:
    try:
        for coordinate, move in zip(coordinates, moves, strict=True):
            if coordinate:
                for piece in region.pieces:
                    if piece.row.name in move:
                        piece.param.add_(move[piece.row.name], alpha=coordinate)
        yield
    finally:
        region.restore(saved)


def _mean_loss(model: nn.Module, batches: Sequence[Batch], loss: LossFn, dtype: torch.dtype, where: str) -> float:
    total = sum(float(losses(model, batch, loss, dtype, where).double().sum()) for batch in batches)
    return total / sum(len(x) for x, _ in batches)
