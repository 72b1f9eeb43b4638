"""Eigenvalues of symmetric operators that are known only through products with vectors."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from analysis.estimate import EigenResult
from masks.errors import InputError

_MIN_STEPS = 4
"""A small residual earlier than this may only say that most of the random start vector lies in one large
eigenspace (a Hessian plus weight decay); networks' Hessians take 5 products and more anyhow."""

_ROUNDING = 8
"""Rounding error of a product in units of eps ||A||: float32 products of small networks measured 4 to 5."""


class SymmetricOperator(Protocol):
    """A symmetric matrix of shape (dimension, dimension) that can be multiplied with vectors."""

    @property
    def name(self) -> str: ...
    @property
    def dimension(self) -> int: ...

    dtype: torch.dtype
    device: torch.device

    def matvec(self, vector: Tensor) -> Tensor: ...


def lambda_max(
    operator: SymmetricOperator,
    *,
    tol: float = 1e-3,
    max_products: int = 100,
    seed: int = 0,
    keep_vector: bool = False,
) -> EigenResult:
    """The algebraically largest eigenvalue, by Lanczos with full reorthogonalisation.

    Stops when the residual ``beta_m |s_m|`` (Parlett 1998, The Symmetric Eigenvalue Problem, section 13.2) of
    the largest Ritz pair, plus an allowance for rounding, is at most ``tol |theta|``. The error of the value is
    at most the residual and, where the next eigenvalue lies a gap away, about residual^2 / gap. That the
    eigenvalue found is the *largest* rests on the random start vector, as for every Krylov method.

    The basis is kept: up to ``max_products`` vectors of the operator's dimension and dtype. Coefficients and
    norms are accumulated in float64: a float32 norm of 1e7 entries on a CPU is off by 4e-4.

    Args:
        operator: e.g. :class:`analysis.operator.HessianOperator`.
        tol: relative tolerance of the residual.
        max_products: most products with the operator.
        seed: of the start vector, which is drawn on the CPU and is the same on every device.
        keep_vector: also return the Ritz vector.

    Raises:
        InputError: a tolerance that is not positive, fewer than one product, a product that is not finite.
    """
    if not tol > 0 or max_products < 1:
        raise InputError(f"tol must be positive and max_products at least 1, got {tol} and {max_products}")
    basis = [_start(operator, seed)]
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        w = operator.matvec(basis[-1]).to(torch.float64)
        alpha, beta = _orthogonalise(w, basis)
        if not np.isfinite([alpha, beta]).all():
            raise InputError(f"product {len(basis)} with the {operator.name} is not finite")
        alphas.append(alpha)
        thetas, vectors = eigh_tridiagonal(np.array(alphas), np.array(betas))
        rounding = _ROUNDING * torch.finfo(operator.dtype).eps * float(np.abs(thetas).max())
        value = float(thetas[-1])
        residual = beta * abs(float(vectors[-1, -1])) + rounding
        # Within rounding the Krylov space is invariant: another step would follow noise.
        exhausted = len(basis) == operator.dimension or beta <= rounding
        converged = exhausted or (len(basis) >= _MIN_STEPS and residual <= tol * abs(value))
        if converged or len(basis) >= max_products:
            break
        betas.append(beta)
        basis.append((w / beta).to(operator.dtype))
    return EigenResult(
        name=f"largest eigenvalue of the {operator.name}",
        value=value,
        residual=residual,
        num_products=len(basis),
        converged=converged,
        tol=tol,
        vector=_combine(basis, vectors[:, -1]).to(operator.dtype) if keep_vector else None,
    )


def _start(operator: SymmetricOperator, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(operator.dimension, generator=generator, dtype=torch.float64)
    start /= torch.linalg.vector_norm(start)
    return start.to(operator.device, operator.dtype)


def _orthogonalise(w: Tensor, basis: list[Tensor]) -> tuple[float, float]:
    """Make w (float64, in place) orthogonal to the basis; its coefficient on the last vector, and what is left.

    Twice, since one pass leaves an error of eps ||w|| / ||rest||; "twice is enough" (Parlett 1998, section 6.9).
    """
    alpha = torch.zeros((), dtype=torch.float64, device=w.device)
    for _ in range(2):
        for q in reversed(basis):
            q64 = q.to(torch.float64)
            coefficient = torch.dot(q64, w)
            w.sub_(coefficient * q64)
            if q is basis[-1]:
                alpha += coefficient
    return float(alpha), float(torch.linalg.vector_norm(w))


def _combine(basis: list[Tensor], weights: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Tensor:
    out = torch.zeros(basis[0].shape, dtype=torch.float64, device=basis[0].device)
    for q, weight in zip(basis, weights, strict=True):
        out.add_(q.to(torch.float64), alpha=float(weight))
    return out
