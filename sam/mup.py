"""Maximal update parametrization (muP): which tensor grows how with the width, its initialization and learning rates.

The parametrization is Yang and Hu 2021 (arXiv 2011.14522) in the exponents of Haas et al. 2024 (arXiv 2411.00075,
mu-P-squared), relative to a base width: with n = width / base width everything is as usual at n = 1.

| | input-like | hidden | output |
| --- | --- | --- | --- |
| standard deviation at the start | 1 | n^(-1/2) | n^(-1) |
| learning rate of SGD | n | 1 | n^(-1) |
| learning rate of AdamW | 1 | n^(-1) | n^(-1) |

Vectors as long as the width (biases, affine parameters of normalization layers) and position embeddings are
input-like. What does not grow, such as the last bias, has the initialization and the learning rate of the base width.
What muP asks of the forward pass is the model's own: attention logits divided by the head's width, not its root, if
heads grow wider.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from masks.errors import InputError, unknown_name
from masks.params import ParamRow, ParamTable

MupRole = Literal["input", "hidden", "output", "fixed"]
MupOptimizer = Literal["sgd", "adamw"]

_STD: dict[MupRole, float] = {"input": 0, "hidden": -0.5, "output": -1, "fixed": 0}
_LR: dict[MupOptimizer, dict[MupRole, float]] = {
    "sgd": {"input": 1, "hidden": 0, "output": -1, "fixed": 0},
    "adamw": {"input": 0, "hidden": -1, "output": -1, "fixed": 0},
}


@dataclass(frozen=True)
class MupShapes:
    """How a model grew from its base.

    Attributes:
        ratio: n, width / base width.
        roles: what each trainable tensor is, by name.
    """

    ratio: float
    roles: Mapping[str, MupRole] = field(repr=False, hash=False)

    def power(self, name: str, exponents: Mapping[MupRole, float]) -> float:
        """n to the exponent of a tensor's role."""
        return float(self.ratio ** exponents[self.roles[name]])


def mup_roles(model: nn.Module, base_model: nn.Module, *, roles: Mapping[str, MupRole] | None = None) -> MupShapes:
    """Compare the shapes of a model with those of the same model at the base width.

    A tensor that grows in both of its first two dimensions is hidden; a weight of a linear or convolutional layer that
    grows in the first one (outputs) is input, in the second one (inputs) output; vectors, embedding tables and
    tensors of shape (1, ..., width) are input; what does not grow is fixed.

    Args:
        model: the model to train.
        base_model: the same model at the base width; only its shapes are read.
        roles: roles of tensors by name, for those that shapes and layers do not tell.

    Raises:
        InputError: the models have not the same tensors, tensors grow by different factors, or the role of one is
            ambiguous and not given.
    """
    given = dict(roles or {})
    table, base = ParamTable.from_model(model), ParamTable.from_model(base_model)
    names = [row.name for row in table]
    if names != [row.name for row in base]:
        odd = next(iter(sorted(set(names) ^ {row.name for row in base})), "their order")
        raise InputError(f"the model and its base must have the same trainable tensors; they differ in {odd}")
    for name, wanted in given.items():
        if name not in names:
            raise InputError(unknown_name("parameter", name, names))
        if wanted not in get_args(MupRole):
            raise InputError(unknown_name("muP role", str(wanted), get_args(MupRole)))
    found: dict[str, MupRole] = {}
    ratios: dict[float, str] = {}
    for row, small in zip(table, base, strict=True):
        if len(row.shape) != len(small.shape):
            raise InputError(f"{row.name} has shape {row.shape}, and {small.shape} in the base model")
        grown = [i for i, (a, b) in enumerate(zip(row.shape, small.shape, strict=True)) if a != b]
        for i in grown:
            ratios.setdefault(row.shape[i] / small.shape[i], row.name)
        role = given.get(row.name) or _role(row, grown, model.get_submodule(row.module_name))
        if role is None:
            raise InputError(
                f"the muP role of {row.name} is ambiguous: shape {row.shape}, {small.shape} in the base model, in a "
                f"{row.module_type}{', tied to ' + row.aliases[0] if row.aliases else ''}; give it, as in "
                f"roles={{{row.name!r}: 'input'}}"
            )
        found[row.name] = role
    if len(ratios) > 1:
        (one, first), (two, second) = list(ratios.items())[:2]
        raise InputError(
            f"{first} grows by {one:g} and {second} by {two:g}; muP here needs one factor for the whole model"
        )
    return MupShapes(next(iter(ratios), 1.0), found)


def _role(row: ParamRow, grown: list[int], module: nn.Module) -> MupRole | None:
    if not grown:
        return "fixed"
    if grown == [0, 1]:
        return "hidden"
    if len(grown) > 1 or row.aliases:  # a tied embedding is input and output at once
        return None
    if len(row.shape) == 1:
        return "input"
    if isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd):
        return {0: "input", 1: "output"}.get(grown[0])  # type: ignore[return-value]
    table = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    broadcast = len(row.shape) >= 3 and row.shape[0] == 1
    return "input" if (table or broadcast) and grown[0] == len(row.shape) - 1 else None


@torch.no_grad()
def mup_init_(model: nn.Module, base_model: nn.Module, *, roles: Mapping[str, MupRole] | None = None) -> None:
    """Scale a model's initial weights, in place, to those of muP.

    Each tensor is multiplied so that its root mean square is that of the base model's tensor times n^0, n^(-1/2) or
    n^(-1), whatever distribution the two models were drawn from; tensors that are zero stay zero. At the base width
    nothing changes.

    Args:
        model: the model, as initialised.
        base_model: the same model at the base width, as initialised.
        roles: see :func:`mup_roles`.

    Raises:
        InputError: as :func:`mup_roles`; a tensor is zero in the model and not in its base.
    """
    shapes = mup_roles(model, base_model, roles=roles)
    if shapes.ratio == 1:
        return
    bases = dict(base_model.named_parameters())
    for name in shapes.roles:
        param = model.get_parameter(name)
        now, wanted = _rms(param), _rms(bases[name]) * shapes.power(name, _STD)
        if now == 0 and wanted:
            raise InputError(f"{name} is zero, and in the base model it is not; initialise both in the same way")
        if now:
            param.mul_(wanted / now)


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def mup_param_groups(
    model: nn.Module,
    base_model: nn.Module,
    lr: float,
    *,
    optimizer: MupOptimizer,
    weight_decay: float = 0.0,
    roles: Mapping[str, MupRole] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups with the learning rates of muP, one per role that occurs.

    Args:
        model: the model.
        base_model: the same model at the base width.
        lr: learning rate at the base width.
        optimizer: "sgd" (also with momentum) or "adamw"; the epsilon of the latter must stay small against gradients,
            which fall as 1/n.
        weight_decay: at the base width; divided by the factor of the learning rate, so that a step shrinks the weights
            by the same share at every width.
        roles: see :func:`mup_roles`.

    Returns:
        Groups with the keys ``params``, ``lr``, ``weight_decay`` and ``role``, for ``torch.optim.SGD`` or ``AdamW``.

    Raises:
        InputError: as :func:`mup_roles`; an unknown optimizer.
    """
    if optimizer not in _LR:
        raise InputError(unknown_name("muP optimizer", str(optimizer), _LR))
    shapes = mup_roles(model, base_model, roles=roles)
    groups: list[dict[str, Any]] = []
    for role, exponent in _LR[optimizer].items():
        params = [model.get_parameter(name) for name, found in shapes.roles.items() if found == role]
        if params:
            factor = float(shapes.ratio**exponent)
            groups.append({"params": params, "lr": lr * factor, "weight_decay": weight_decay / factor, "role": role})
    return groups
