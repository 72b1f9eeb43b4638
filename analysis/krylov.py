"""Lanczos iteration with full reorthogonalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from analysis.linear import SymmetricOperator
from masks.errors import InputError

Floats = NDArray[np.float64]

_ROUNDING = 8
"""Rounding error of a product in units of eps ||A||: float32 products of small networks measured 4 to 5."""


class Lanczos:
    """An orthonormal basis Q of a Krylov space and the tridiagonal ``T = Q^T A Q``, one product per step.

    The basis is kept in the operator's dtype; coefficients and norms are accumulated in float64: a float32 norm of
    1e7 entries on a CPU is off by 4e-4.

    Args:
        operator: A.
        start: first vector, any length but 0, shape (dimension,), float64.
        against: orthonormal vectors V, shape (dimension,) each: the matrix is then ``(I - V V^T) A (I - V V^T)`` on
            the complement of V. Needs fewer of them than dimensions.
        norm: a lower bound of ||A|| if one is known, for the allowance for rounding.

    Attributes:
        basis: vectors so far that A was multiplied with.
        values: eigenvalues of T (the Ritz values), ascending.
        coefficients: its eigenvectors, in columns.
        beta: length of what the last product left outside of the basis.
        rounding: error of a product, an estimate from the dtype.
    """

    def __init__(
        self, operator: SymmetricOperator, start: Tensor, *, against: Sequence[Tensor] = (), norm: float = 0.0
    ) -> None:
        self._operator, self._against, self._norm = operator, list(against), norm
        first = start.to(operator.device, torch.float64, copy=True)
        _orthogonalise(first, self._against)
        self._next, self.beta = first, float(torch.linalg.vector_norm(first))
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self.basis: list[Tensor] = []
        self.values: Floats = np.empty(0)
        self.coefficients: Floats = np.empty((0, 0))
        self.rounding = 0.0

    def step(self) -> None:
        """One product and one basis vector more.

        Raises:
            InputError: the product is not finite.
        """
        if self.basis:
            self._betas.append(self.beta)
        self.basis.append((self._next / self.beta).to(self._operator.dtype))
        self._next = self._operator.matvec(self.basis[-1]).to(torch.float64)
        alpha, self.beta = _orthogonalise(self._next, [*self._against, *self.basis])
        if not np.isfinite([alpha, self.beta]).all():
            raise InputError(f"product {len(self.basis)} with the {self._operator.name} is not finite")
        self._alphas.append(alpha)
        self.values, self.coefficients = eigh_tridiagonal(np.array(self._alphas), np.array(self._betas))
        norm = max(self._norm, float(np.abs(self.values).max()))
        self.rounding = rounding_of(self._operator, norm)

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant, up to rounding: another step would follow noise."""
        return self._full or self.beta <= self.rounding

    @property
    def _full(self) -> bool:
        return len(self.basis) + len(self._against) == self._operator.dimension

    @property
    def residuals(self) -> Floats:
        """``||A y - theta y||`` of each Ritz pair, ``beta |s_m|`` (Parlett 1998, section 13.2), without rounding."""
        return np.asarray(self.beta * np.abs(self.coefficients[-1]))

    def vector(self, i: int) -> Tensor:
        """The Ritz vector of ``values[i]``, shape (dimension,), in the operator's dtype."""
        out = torch.zeros_like(self.basis[0], dtype=torch.float64)
        for q, weight in zip(self.basis, self.coefficients[:, i], strict=True):
            out.add_(q.to(torch.float64), alpha=float(weight))
        return out.to(self._operator.dtype)

    def risk(self, bound: float, sign: int = 1) -> float:
        """How improbable it is that an eigenvalue beyond ``bound`` was missed.

        An eigenvector z of eigenvalue mu has the component ``p_j(mu) <z, q_0>`` on basis vector j, where p_j are the
        Lanczos polynomials, ``beta_j p_j = (mu - alpha_j) p_(j-1) - beta_(j-1) p_(j-2)``. All components together have
        at most length 1, hence ``|<z, q_0>| <= (sum_j p_j(mu)^2)^(-1/2)``, which for a random start in n dimensions
        has at most probability ``(2 n / pi)^(1/2)`` times that. Beyond all Ritz values the ``|p_j|`` grow outwards, so
        that ``mu = bound`` is the worst case (van Dorsselaer, Hochstenbach, van der Vorst 2000, Computing
        probabilistic bounds for extreme eigenvalues of symmetric matrices with the Lanczos method).

        Args:
            bound: beyond all Ritz values, or the answer is 1.
            sign: 1 for eigenvalues above the bound, -1 for those below.

        Returns:
            A bound of the probability over the start vector, if that was drawn uniformly.
        """
        if (sign * (bound - self.values) < 0).any():
            return 1.0
        if self._full:
            return 0.0
        last = max(self.beta, self.rounding)
        if not last:
            return 0.0
        before, now, total, beta_before = 0.0, 1.0, 1.0, 0.0
        for alpha, beta in zip(self._alphas, [*self._betas, last], strict=True):
            before, now = now, ((bound - alpha) * now - beta_before * before) / beta
            beta_before = beta
            total += now * now
            if total > 1e100:
                return 0.0
        n = self._operator.dimension - len(self._against)
        return min(1.0, math.sqrt(2 * n / (math.pi * total)))


def rounding_of(operator: SymmetricOperator, norm: float) -> float:
    """The error to expect of a product with a unit vector, for ``||A|| = norm``."""
    return _ROUNDING * torch.finfo(operator.dtype).eps * norm


def _orthogonalise(w: Tensor, basis: Sequence[Tensor]) -> tuple[float, float]:
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
