"""Eigenvalues by scipy's ARPACK, as a second opinion."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor

from analysis.eigen import EigenPairs, ordinal
from analysis.estimate import EigenResult
from analysis.krylov import rounding_of
from analysis.linear import SymmetricOperator, as_scipy, settings_of
from masks.errors import InputError, unknown_name


def eigsh(
    operator: SymmetricOperator,
    k: int = 5,
    *,
    end: Literal["largest", "smallest"] = "largest",
    tol: float = 1e-3,
    max_products: int = 1000,
    seed: int = 0,
    keep_vectors: bool = False,
) -> EigenPairs:
    """As :func:`analysis.eigen.eigenpairs`, by ``scipy.sparse.linalg.eigsh`` (ARPACK): a second opinion.

    It shares only the products. Residuals ``||A v - theta v||`` are computed here, with one product for each pair,
    their norms in float64. ARPACK takes at least ``max(2 k, 20) + 1`` products.

    Args:
        operator: as for :func:`analysis.eigen.eigenpairs`, as are the other arguments.
        k: below the dimension.
        end: "largest" or "smallest".
        tol: handed to ARPACK; ``converged`` says whether the residual meets it.
        max_products: most products that ARPACK may take, roughly: it stops between two restarts.
        seed: of the start vector.
        keep_vectors: also return the vectors.

    Raises:
        InputError: k not below the dimension, an unknown end, or ARPACK did not find k pairs.
    """
    if end not in ("largest", "smallest"):
        raise InputError(unknown_name("end", end, ("largest", "smallest")))
    if not 1 <= k < operator.dimension or not tol > 0:
        raise InputError(f"need 1 <= k < {operator.dimension}, the dimension, and tol > 0; got k={k} and tol={tol}")
    counted = _Counting(operator)
    settings = {**settings_of(operator), "method": "ARPACK", "seed": seed, "max_products": max_products}
    start = torch.randn(operator.dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    try:
        values, vectors = scipy_eigsh(
            as_scipy(counted),
            k,
            which="LA" if end == "largest" else "SA",
            tol=tol,
            maxiter=max(1, max_products // max(2 * k, 20)),
            v0=start.to(operator.dtype).numpy(),
        )
    except ArpackError as error:
        raise InputError(f"eigsh found no {k} eigenvalues of the {operator.name}: {error}") from error
    order = np.argsort(values)[:: -1 if end == "largest" else 1]
    results: list[EigenResult] = []
    for i, j in enumerate(order):
        v = torch.from_numpy(vectors[:, j].copy()).to(operator.device)
        value = float(values[j])
        rest = counted.matvec(v).double() - value * v.double()
        rounding = rounding_of(operator, float(np.abs(values).max()))
        residual = float(torch.linalg.vector_norm(rest) / torch.linalg.vector_norm(v.double())) + rounding
        name = f"{ordinal(i + 1)}{end} eigenvalue of the {operator.name}"
        vector = v if keep_vectors else None
        converged = residual <= tol * abs(value)
        n = int(settings.get("num_examples", 0))
        results.append(EigenResult(name, value, residual, counted.count, converged, tol, vector, n, settings))
    found = tuple(results)
    return EigenPairs(
        largest=found if end == "largest" else (),
        smallest=found if end == "smallest" else (),
        num_products=counted.count,
        num_products_check=0,
        complete=None,
        risk=None,
    )


class _Counting:
    def __init__(self, operator: SymmetricOperator) -> None:
        self.dtype, self.device, self.name = operator.dtype, operator.device, operator.name
        self.dimension, self.count, self._operator = operator.dimension, 0, operator

    def matvec(self, vector: Tensor) -> Tensor:
        self.count += 1
        return self._operator.matvec(vector)
