"""Relative flatness of one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from analysis.estimate import Estimate
from analysis.evaluation import check_batches, describe_loss, precision_of
from analysis.examples import data_digest
from analysis.operator import HessianOperator
from masks.context import Batch, LossFn, cross_entropy
from masks.errors import InputError
from masks.mask import Mask, Provenance
from masks.params import ParamTable


def relative_flatness(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    layer: str | None = None,
    draws: int = 100,
    seed: int = 0,
    loss: LossFn = cross_entropy,
) -> Estimate:
    """Relative flatness of a layer (Petzka et al. 2021, arXiv 2001.00939, definition 3).

    ``kappa = sum_{s,s'} <w_s, w_s'> tr(H_{s,s'})`` over pairs of rows of the weight W (d_out x d_in; the filters of a
    convolution are flattened), ``H_{s,s'}`` the Hessian block of two rows. Larger is sharper, despite the name.

    Estimated without bias from one Hessian product per draw: ``v^T H v`` with ``v = (W g) z^T`` for independent
    vectors g and z of d_in random signs, since ``E[(W g)(W g)^T] = W W^T`` and ``E[z z^T] = I``.

    Args:
        model: the model, float32 or float64.
        batches: the data, a list of (inputs, targets).
        layer: name of the weight, such as "head.weight"; None for the last one, the classifier of most models.
        draws: number of draws.
        seed: seed of the signs, which are drawn on the CPU and are the same on every device.
        loss: per-example loss, ``(logits, targets) -> (B,)``.

    Returns:
        The mean with its Monte-Carlo standard error over the draws (None for one).

    Raises:
        InputError: no draws, a layer that is no matrix of weights, a loss that is not finite or differs between two
            passes.
        MaskError: no such parameter.
    """
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")
    table = ParamTable.from_model(model)
    index = _layer(table, layer)
    row = table.rows[index]
    mask = Mask.of_rows(table, [index], Provenance("layer"))
    weight = table.tensors(model)[index].detach().flatten(1)
    batches = check_batches(batches)
    dtype, device = precision_of(model)
    generator = torch.Generator().manual_seed(seed)
    width = weight.shape[1]
    values: list[float] = []
    with HessianOperator(model, batches, mask=mask, loss=loss) as operator:
        for _ in range(draws):
            g, z = (torch.randint(2, (2, width), generator=generator) * 2 - 1).to(device, dtype)
            v = torch.outer(weight @ g, z).reshape(-1)
            values.append(float(torch.dot(v.double(), operator.matvec(v).double())))
    return Estimate(
        name=(f"relative flatness of {row.name}, {draws} draws, evaluation-mode normalization{describe_loss(loss)}"),
        value=float(np.mean(values)),
        standard_error=float(np.std(values, ddof=1)) / math.sqrt(draws) if draws > 1 else None,
        n=draws,
        settings={
            "error_kind": "Monte-Carlo standard error",
            "layer": row.name,
            "shape": list(row.shape),
            "draws": draws,
            "seed": seed,
            "num_examples": sum(len(x) for x, _ in batches),
            "data_digest": data_digest(batches),
            "dtype": str(dtype).removeprefix("torch."),
        },
    )


def _layer(table: ParamTable, name: str | None) -> int:
    """The position of the weight of that name, or of the last one."""
    if name is not None:
        index = table.index(name)
        if len(table.rows[index].shape) < 2:
            raise InputError(f"relative flatness needs a matrix of weights; {name} has shape {table.rows[index].shape}")
        return index
    weights = [i for i, row in enumerate(table) if row.role == "weight" and len(row.shape) >= 2]
    if not weights:
        raise InputError("relative flatness does not apply: the model has no matrix of weights")
    return weights[-1]
