"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from analysis.estimate import Estimate
from analysis.krylov import Floats, Lanczos
from analysis.linear import SymmetricOperator, settings_of
from analysis.trace import rademacher
from masks.errors import InputError


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of the P eigenvalues as point masses: a Gauss quadrature for each random vector.

    Attributes:
        name: of which operator.
        nodes: for each vector the Ritz values, ascending, shape (steps,).
        weights: for each vector their masses, which add up to 1, shape (steps,).
        num_products: with the operator, all together.
        dimension: P.
        seed: of the vectors.
        settings: of the operator: data, mask, statistics, precision.
    """

    name: str
    nodes: tuple[Floats, ...]
    weights: tuple[Floats, ...]
    num_products: int
    dimension: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def moment(self, power: int) -> Estimate:
        """The mean over eigenvalues of ``lambda^power``, ``tr(A^power) / P``, with its standard error over the vectors.

        For each vector z it is exactly ``z^T A^power z / P`` for powers below twice the number of steps.

        Raises:
            InputError: a negative power.
        """
        if power < 0:
            raise InputError(f"power must not be negative, got {power}")
        samples = np.array([w @ x**power for x, w in zip(self.nodes, self.weights, strict=True)])
        return self._estimate(f"moment {power} of the {self.name}", samples)

    def mass(self, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """The share of eigenvalues in ``[low, high]``, with its standard error over the vectors.

        The standard error does not cover the error of the quadrature: a cut through a dense part of the spectrum is off
        by up to the weight of the nodes next to it.
        """
        pairs = zip(self.nodes, self.weights, strict=True)
        samples = np.array([w[(x >= low) & (x <= high)].sum() for x, w in pairs])
        return self._estimate(f"share in [{low:g}, {high:g}] of the {self.name}", samples)

    def density(self, at: ArrayLike, *, sigma: float | None = None) -> Floats:
        """The density at the given points, each mass widened to a normal distribution; its integral is 1.

        Args:
            at: shape (n,).
            sigma: standard deviation of the normal distributions; None for the range of the nodes over their number
                per vector, which is what the quadrature resolves.

        Returns:
            Shape (n,), in units of 1 / eigenvalue.

        Raises:
            InputError: a sigma that is not positive, or none given where all nodes coincide.
        """
        x, w = np.concatenate(self.nodes), np.concatenate(self.weights) / len(self.nodes)
        width = float(x.max() - x.min()) / max(map(len, self.nodes)) if sigma is None else sigma
        if not width > 0:
            raise InputError(f"sigma must be positive, got {width}: give one where all eigenvalues are equal")
        offsets = (np.asarray(at, dtype=np.float64)[:, None] - x) / width
        return np.asarray(np.exp(-(offsets**2) / 2) @ w / (width * math.sqrt(2 * math.pi)))

    def _estimate(self, name: str, samples: Floats) -> Estimate:
        n = len(samples)
        error = float(samples.std(ddof=1)) / math.sqrt(n) if n > 1 else None
        settings = {
            **self.settings,
            "method": "stochastic Lanczos quadrature",
            "num_products": self.num_products,
            "num_steps": max(map(len, self.nodes)),
            "seed": self.seed,
        }
        return Estimate(name, float(samples.mean()), error, n, settings)


def spectral_density(
    operator: SymmetricOperator, *, num_vectors: int = 4, num_steps: int = 80, seed: int = 0
) -> SpectralDensity:
    """Stochastic Lanczos quadrature (Golub and Welsch 1969; Ubaru, Chen, Saad 2017; Ghorbani et al. 2019).

    For a Rademacher vector z of length ``P^(1/2)``, ``z^T f(A) z / P`` has the mean ``tr f(A) / P``; Lanczos from z
    with full reorthogonalisation gives its Gauss quadrature, nodes the Ritz values and weights the squared first
    components of the eigenvectors of the tridiagonal matrix.

    Args:
        operator: A.
        num_vectors: number of random vectors.
        num_steps: Lanczos steps, and products, for each; fewer where the Krylov space is exhausted. The basis of one
            vector is kept at a time: num_steps vectors of the operator's dimension and dtype.
        seed: of the vectors, which are drawn on the CPU.

    Raises:
        InputError: fewer than one vector or step, a product that is not finite.
    """
    if num_vectors < 1 or num_steps < 1:
        raise InputError(f"num_vectors and num_steps must be at least 1, got {num_vectors} and {num_steps}")
    generator = torch.Generator().manual_seed(seed)
    nodes: list[Floats] = []
    weights: list[Floats] = []
    for _ in range(num_vectors):
        run = Lanczos(operator, rademacher(operator.dimension, generator))
        run.step()
        while not run.exhausted and len(run.basis) < num_steps:
            run.step()
        nodes.append(run.values)
        weights.append(run.coefficients[0] ** 2)
    return SpectralDensity(
        name=f"spectrum of the {operator.name}",
        nodes=tuple(nodes),
        weights=tuple(weights),
        num_products=sum(map(len, nodes)),
        dimension=operator.dimension,
        seed=seed,
        settings=settings_of(operator),
    )
