"""Eigenvalues at the ends of the spectrum of symmetric operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from analysis.estimate import EigenResult
from analysis.krylov import Lanczos
from analysis.linear import SymmetricOperator, settings_of
from analysis.notebook import eigen_html
from masks.errors import InputError, unknown_name

End = Literal["largest", "smallest", "both"]
_SIGNS = {"largest": (1,), "smallest": (-1,), "both": (1, -1)}

_MIN_STEPS = 4
"""A small residual earlier than this may only say that most of the random start vector lies in one large
eigenspace (a Hessian plus weight decay); networks' Hessians take 5 products and more anyhow."""

_RISK = 1e-3


@dataclass(frozen=True)
class EigenPairs:
    """Eigenvalues at one or both ends of a spectrum, each end from the outside in.

    Attributes:
        largest: in descending order; empty if not asked for.
        smallest: in ascending order, likewise.
        num_products: with the operator, all together.
        num_products_check: of these, after the eigenvalues were found: those of the deflation check.
        complete: whether the check passed, None without one. Then, with probability at least ``1 - risk`` over the
            start vectors, no eigenvalue was passed over: with R twice the root of the summed squares of the residuals,
            the i-th eigenvalue from the end lies no further in than ``theta_i - R``, and no further out than
            ``theta_i + R`` or, if that is more, ``theta_k + max(tol |theta_k|, residual_k) + R``. As a rule all are
            far closer: see :func:`eigenpairs`.
        risk: that probability; None without a check.
    """

    largest: tuple[EigenResult, ...]
    smallest: tuple[EigenResult, ...]
    num_products: int
    num_products_check: int
    complete: bool | None
    risk: float | None

    def _repr_html_(self) -> str:
        words = {None: "not checked", True: "checked: none was passed over", False: "NOT CHECKED TO THE END"}
        return eigen_html(
            [*self.largest, *self.smallest], f"{self.num_products} products in all; {words[self.complete]}"
        )


@dataclass(frozen=True)
class _Pair:
    value: float
    residual: float
    converged: bool
    products: int
    vector: Tensor


def lambda_max(
    operator: SymmetricOperator,
    *,
    tol: float = 1e-3,
    max_products: int = 100,
    seed: int = 0,
    keep_vector: bool = False,
) -> EigenResult:
    """The algebraically largest eigenvalue: :func:`eigenpairs` for one pair and without the check.

    That the eigenvalue found is the *largest* then rests on the random start vector.
    """
    found = eigenpairs(
        operator, 1, tol=tol, max_products=max_products, seed=seed, check=False, keep_vectors=keep_vector
    )
    return found.largest[0]


def eigenpairs(
    operator: SymmetricOperator,
    k: int = 5,
    *,
    end: End = "largest",
    tol: float = 1e-3,
    max_products: int = 200,
    seed: int = 0,
    check: bool | None = None,
    keep_vectors: bool = False,
) -> EigenPairs:
    """The k algebraically largest or smallest eigenvalues, or both, by Lanczos with full reorthogonalisation.

    A pair is converged when its residual ``beta_m |s_m|`` (Parlett 1998, The Symmetric Eigenvalue Problem, section
    13.2) plus an allowance for rounding is at most ``tol |theta|``. Some eigenvalue lies within the residual, and where
    the others are a gap away the error is about residual^2 / gap.

    One run sees each multiple eigenvalue once, and may pass over one of a cluster. The check runs Lanczos again from a
    new start vector, in the complement of the pairs found, until the probability of a missed eigenvalue beyond
    ``theta_k`` and its slack ``max(tol |theta_k|, residual_k)`` is below 1e-3 (:meth:`analysis.krylov.Lanczos.risk`).
    What it finds there is taken in, and the check is made anew. When a run's space is exhausted before k pairs are
    found (multiple eigenvalues), the next run searches its complement.

    The basis is kept: up to ``max_products`` vectors of the operator's dimension and dtype.

    Args:
        operator: e.g. :class:`analysis.operator.HessianOperator`.
        k: number of eigenvalues at each end.
        end: "largest", "smallest" or "both" (from the same products).
        tol: relative tolerance of each residual.
        max_products: most products with the operator, the check included.
        seed: of the start vectors, which are drawn on the CPU and are the same on every device.
        check: whether to make sure that none was passed over; None for "if k > 1".
        keep_vectors: also return the Ritz vectors.

    Raises:
        InputError: a tolerance that is not positive, k outside 1..dimension, fewer products than k, a product that is
            not finite.
    """
    if not tol > 0 or max_products < 1:
        raise InputError(f"tol must be positive and max_products at least 1, got {tol} and {max_products}")
    if end not in _SIGNS:
        raise InputError(unknown_name("end", end, _SIGNS))
    if not 1 <= k <= operator.dimension or max_products < k:
        raise InputError(
            f"need 1 <= k <= {operator.dimension}, the dimension, and max_products >= k; "
            f"got k={k} and max_products={max_products}"
        )
    search = _Search(operator, k, _SIGNS[end], tol, max_products, seed)
    check = k > 1 if check is None else check
    complete = search.find(check)
    ends = {sign: search.results(sign, keep_vectors) for sign in _SIGNS[end]}
    return EigenPairs(
        largest=ends.get(1, ()),
        smallest=ends.get(-1, ()),
        num_products=search.products,
        num_products_check=search.products_check,
        complete=complete if check else None,
        risk=search.risk if check else None,
    )


class _Search:
    """Runs of Lanczos, each in the complement of the pairs that those before have found."""

    def __init__(
        self, operator: SymmetricOperator, k: int, signs: Sequence[int], tol: float, max_products: int, seed: int
    ) -> None:
        self._operator, self._k, self._signs, self._tol, self._max_products = operator, k, signs, tol, max_products
        self._generator = torch.Generator().manual_seed(seed)
        self._settings = {**settings_of(operator), "method": "Lanczos", "seed": seed, "max_products": max_products}
        self._locked: list[_Pair] = []
        self.products = self.products_check = 0
        self.risk = 1.0

    def find(self, check: bool) -> bool:
        """Search and, if asked to, check; whether the check passed."""
        while len(self._locked) < self._operator.dimension:
            checking = len(self._locked) >= self._k
            if checking and not check:
                return False
            if self.products == self._max_products:
                return False
            run = self._new_run()
            if self._run(run, checking):
                return True
        self.risk = 0.0
        return True

    def results(self, sign: int, keep_vectors: bool) -> tuple[EigenResult, ...]:
        word = "largest" if sign > 0 else "smallest"
        return tuple(
            EigenResult(
                name=f"{ordinal(i + 1)}{word} eigenvalue of the {self._operator.name}",
                value=pair.value,
                residual=pair.residual,
                num_products=pair.products,
                converged=pair.converged,
                tol=self._tol,
                vector=pair.vector if keep_vectors else None,
                n=int(self._settings.get("num_examples", 0)),
                settings=self._settings,
            )
            for i, pair in enumerate(self._ranked(sign)[: self._k])
        )

    def _ranked(self, sign: int) -> list[_Pair]:
        return sorted(self._locked, key=lambda pair: -sign * pair.value)

    def _new_run(self) -> Lanczos:
        start = torch.randn(self._operator.dimension, generator=self._generator, dtype=torch.float64)
        norm = max((abs(pair.value) for pair in self._locked), default=0.0)
        return Lanczos(self._operator, start, against=[pair.vector for pair in self._locked], norm=norm)

    def _run(self, run: Lanczos, checking: bool) -> bool:
        """Iterate until there is something to lock; whether the check has passed."""
        before = self.risk
        bounds = {sign: self._bound(sign) for sign in self._signs} if checking else {}
        # The pairs found before are no exact eigenvectors: R bounds what they leave of A y outside of the complement.
        outside = math.hypot(*(pair.residual for pair in self._locked))
        while True:
            run.step()
            self.products += 1
            self.products_check += checking
            wanted = self._beyond(run, bounds) if checking else self._outermost(run)
            residuals = np.hypot(run.residuals, outside) + run.rounding
            good = run.exhausted | (residuals <= self._tol * np.abs(run.values))
            if checking and not wanted:
                risk = before * sum(run.risk(bounds[sign], sign) for sign in self._signs)
                settled = risk <= _RISK
            else:
                risk = 1.0
                enough = len(run.basis) >= _MIN_STEPS and len(wanted) + len(self._locked) >= self._k
                settled = enough and bool(good[wanted].all())
            if settled or run.exhausted or self.products == self._max_products:
                break
        self.risk = risk
        if checking and not wanted and risk <= _RISK:
            return True
        for i in range(len(run.values)) if run.exhausted else wanted:
            pair = _Pair(float(run.values[i]), float(residuals[i]), bool(good[i]), self.products, run.vector(i))
            self._locked.append(pair)
        return False

    def _bound(self, sign: int) -> float:
        """Beyond which an eigenvalue would belong to the k."""
        last = self._ranked(sign)[self._k - 1]
        return last.value + sign * max(self._tol * abs(last.value), last.residual)

    def _beyond(self, run: Lanczos, bounds: dict[int, float]) -> list[int]:
        return [i for i, v in enumerate(run.values) if any(s * (v - bound) > 0 for s, bound in bounds.items())]

    def _outermost(self, run: Lanczos) -> list[int]:
        """Which of the run's Ritz values are among the k outermost, with the pairs found before."""
        found: set[int] = set()
        for sign in self._signs:
            keys = [(sign * p.value, -1) for p in self._locked] + [(sign * v, i) for i, v in enumerate(run.values)]
            found |= {i for _, i in sorted(keys, reverse=True)[: self._k] if i >= 0}
        return sorted(found)


def ordinal(i: int) -> str:
    """``"2nd "``, ``"3rd "``, ...; nothing for 1."""
    if i == 1:
        return ""
    suffix = "th" if 10 <= i % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(i % 10, "th")
    return f"{i}{suffix} "
