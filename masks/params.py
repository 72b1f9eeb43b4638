"""The parameters of a model as an ordered table: what a mask is a mask over."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from masks.errors import MaskError, unknown_name

Role = Literal["norm_weight", "norm_bias", "bias", "weight", "other"]
ROLES: tuple[Role, ...] = get_args(Role)

# _NormBase is the common base of BatchNorm*, SyncBatchNorm and InstanceNorm*.
_norm_types: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def register_norm_type(cls: type[nn.Module]) -> type[nn.Module]:
    """Declare a class of modules as a normalization layer; usable as a decorator.

    Its parameters named ``weight`` (or of any other name but ``bias``) get the role ``norm_weight``, those
    named ``bias`` the role ``norm_bias``.

    Raises:
        MaskError: ``cls`` is not a subclass of ``torch.nn.Module``.
    """
    global _norm_types
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise MaskError(f"register_norm_type takes a subclass of torch.nn.Module, got {cls!r}")
    if cls not in _norm_types:
        _norm_types = (*_norm_types, cls)
    return cls


def norm_types() -> tuple[type[nn.Module], ...]:
    """The classes whose instances count as normalization layers."""
    return _norm_types


def norm_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The normalization layers of a model with their names, in module order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _norm_types))


@dataclass(frozen=True)
class ParamRow:
    """One parameter tensor.

    Attributes:
        name: its first name in ``model.named_parameters()``.
        shape: its shape.
        role: what it does, from the type of the module that owns it: ``norm_weight`` and ``norm_bias`` for
            normalization layers, ``bias`` for the biases of other modules, ``weight`` for their weights,
            ``other`` for parameters of containers (class tokens, position embeddings).
        module_name: the name of the owning module ("" for the model itself).
        module_type: the class name of the owning module.
        aliases: further names of the same tensor (tied weights).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    module_name: str
    module_type: str
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_norm(self) -> bool:
        return self.role in ("norm_weight", "norm_bias")

    @property
    def is_bias(self) -> bool:
        return self.role in ("bias", "norm_bias")


def _is_layer_of_torch(module: nn.Module) -> bool:
    bases = {cls.__module__ for cls in type(module).__mro__} - {"torch.nn.modules.module", "torch.nn.modules.container"}
    return any(base.startswith("torch.nn.") for base in bases)


def _role(module: nn.Module, local_name: str, shape: tuple[int, ...]) -> Role:
    if isinstance(module, _norm_types):
        return "norm_bias" if local_name == "bias" else "norm_weight"
    if len(shape) <= 1 and (local_name.startswith("bias") or local_name.endswith("bias")):
        return "bias"
    if isinstance(module, nn.MultiheadAttention) and local_name in ("bias_k", "bias_v"):  # of shape (1, 1, E)
        return "bias"
    # A layer of torch (or a subclass) or a leaf holds a layer's weight; a parameter put directly on a composite is
    # a token, a position embedding, a layer scale.
    if _is_layer_of_torch(module) or not any(True for _ in module.children()):
        return "weight" if len(shape) >= 2 or local_name.startswith("weight") else "other"
    return "other"


@dataclass(frozen=True)
class ParamTable:
    """The parameters of a model in module order, each tensor once.

    The coordinates of all rows, each tensor in C order, one row after the other, are numbered 0 to
    ``numel - 1``: the *flat index* that breaks ties and that mask files store.

    Attributes:
        rows: one row per tensor.
        frozen_numel: coordinates of the model that are not in the table because they do not require a
            gradient.
    """

    rows: tuple[ParamRow, ...]
    frozen_numel: int = 0

    @classmethod
    def from_model(cls, model: nn.Module, *, include_frozen: bool = False) -> ParamTable:
        """Read the table off a model.

        Args:
            model: any module.
            include_frozen: also list parameters with ``requires_grad=False``. Only to count them: a mask
                over such a table does not fit the trainable one.

        Raises:
            MaskError: the model has no eligible coordinate, or a lazy parameter that has no shape yet.
        """
        names: dict[int, list[str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(param), []).append(name)
        rows: list[ParamRow] = []
        frozen = 0
        for name, param in model.named_parameters():
            if isinstance(param, nn.parameter.UninitializedParameter):
                raise MaskError(f"parameter {name} is lazy and has no shape; run one batch through the model first")
            if not param.requires_grad and not include_frozen:
                frozen += param.numel()
                continue
            module_name, _, local = name.rpartition(".")
            module = model.get_submodule(module_name)
            rows.append(
                ParamRow(
                    name=name,
                    shape=tuple(param.shape),
                    role=_role(module, local, tuple(param.shape)),
                    module_name=module_name,
                    module_type=type(module).__name__,
                    aliases=tuple(n for n in names[id(param)] if n != name),
                )
            )
        if not any(row.numel for row in rows):
            raise MaskError(f"the model has no trainable parameter ({frozen} frozen coordinates)")
        return cls(tuple(rows), frozen)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ParamRow]:
        return iter(self.rows)

    @property
    def numel(self) -> int:
        """Number of eligible coordinates: the denominator of every density."""
        return sum(row.numel for row in self.rows)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Flat index of the first coordinate of each row."""
        out, total = [], 0
        for row in self.rows:
            out.append(total)
            total += row.numel
        return tuple(out)

    def index(self, name: str) -> int:
        """The position of the row called ``name``.

        Raises:
            MaskError: no such row; the nearest names are offered.
        """
        for i, row in enumerate(self.rows):
            if row.name == name:
                return i
        raise MaskError(unknown_name("parameter", name, [row.name for row in self.rows]))

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """The parameters of ``model`` in the order of the rows.

        Raises:
            MaskError: the model does not have a parameter of the table, or has it with another shape or
                frozen.
        """
        params = dict(model.named_parameters())
        out: list[Tensor] = []
        for row in self.rows:
            param = params.get(row.name)
            if param is None:
                raise MaskError(f"the model has no parameter {row.name}, which the mask's table lists")
            if tuple(param.shape) != row.shape:
                raise MaskError(f"parameter {row.name} has shape {tuple(param.shape)}, the mask's table {row.shape}")
            if not param.requires_grad:
                raise MaskError(f"parameter {row.name} is frozen; rebuild the mask on the model as it is trained")
            out.append(param)
        return out

    def digest(self) -> str:
        """Hex SHA-256 of names and shapes in order: which model's parameters these are."""
        text = json.dumps([(row.name, row.shape) for row in self.rows])
        return hashlib.sha256(text.encode()).hexdigest()

    def check_same(self, other: ParamTable, what: str) -> None:
        """Raise unless ``other`` lists the same names and shapes in the same order.

        Raises:
            MaskError: the first difference, by name.
        """
        if self is other:
            return
        for mine, theirs in zip(self.rows, other.rows, strict=False):
            if (mine.name, mine.shape) != (theirs.name, theirs.shape):
                raise MaskError(f"{what}: parameter {mine.name} {mine.shape} here, {theirs.name} {theirs.shape} there")
        if len(self) != len(other):
            raise MaskError(f"{what}: {len(self)} trainable tensors here, {len(other)} there")


def rows_matching(
    table: ParamTable, *, role: Sequence[Role] | None = None, module_name: str | None = None
) -> list[int]:
    """Positions of the rows of these roles inside the module of that name (itself included)."""
    prefix = "" if not module_name else module_name + "."
    return [
        i
        for i, row in enumerate(table.rows)
        if (role is None or row.role in role)
        and (not prefix or row.module_name == module_name or row.name.startswith(prefix))
    ]


def model_digest(model: nn.Module) -> str:
    """Hex SHA-256 of all parameters and buffers of the state dict: the state in which a mask was built.

    Raises:
        MaskError: the model is on the meta device and has no values.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise MaskError(f"{name} is on the meta device and has no values; build the model on a real one")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
