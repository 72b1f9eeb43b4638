"""Symmetric matrices that are known only through products with vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor


class SymmetricOperator(Protocol):
    """A symmetric matrix of shape (dimension, dimension) that can be multiplied with vectors."""

    @property
    def name(self) -> str: ...
    @property
    def dimension(self) -> int: ...

    dtype: torch.dtype
    device: torch.device

    def matvec(self, vector: Tensor) -> Tensor: ...


def settings_of(operator: SymmetricOperator) -> Mapping[str, Any]:
    """What the operator says of itself (:attr:`analysis.operator.CurvatureOperator.settings`); else nothing."""
    found: Mapping[str, Any] = getattr(operator, "settings", {})
    return found


def as_scipy(operator: SymmetricOperator) -> LinearOperator:
    """Any such operator for ``scipy.sparse.linalg``."""

    def multiply(vector: NDArray[Any]) -> NDArray[Any]:
        given = torch.from_numpy(np.ascontiguousarray(vector).reshape(-1)).to(operator.device, operator.dtype)
        return np.asarray(operator.matvec(given).cpu().numpy())

    size, dtype = operator.dimension, torch.empty(0, dtype=operator.dtype).numpy().dtype
    return LinearOperator(shape=(size, size), matvec=multiply, rmatvec=multiply, dtype=dtype)
