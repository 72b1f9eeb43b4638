"""Stochastic Lanczos quadrature: masses, moments and densities of known spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.operator import HessianOperator
from analysis.spectrum import spectral_density
from analysis.trace import moments, rademacher
from masks.errors import InputError


class Dense:
    name = "test matrix"
    device = torch.device("cpu")

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.dtype, self.dimension = matrix, matrix.dtype, len(matrix)

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector


def symmetric(eigenvalues: list[float] | np.ndarray, seed: int = 0) -> Tensor:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))
    return torch.from_numpy(q * np.asarray(eigenvalues) @ q.T)


def test_quadrature_is_exact_for_the_vector_it_used(case):
    """``sum tau theta^p = z^T H^p z / P`` for p < 2 steps, the zeroth being the weights' sum."""
    with HessianOperator(case.model, case.batches) as operator:
        found = spectral_density(operator, num_vectors=2, num_steps=6, seed=3)
        assert operator.num_products == found.num_products == 12
    generator = torch.Generator().manual_seed(3)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        z = rademacher(len(case.hessian), generator)
        power = z
        for p in range(12):
            assert weights @ nodes**p == pytest.approx(float(z @ power) / len(z), rel=1e-9, abs=1e-12)
            power = case.hessian @ power
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert (weights >= 0).all()


def test_moments_of_a_network(case):
    """The first is tr / P: Hutchinson's estimate from the same vectors, and within the error of the dense one."""
    with HessianOperator(case.fresh(torch.float32), case.batches) as operator:
        found = spectral_density(operator, num_vectors=8, num_steps=12)
        trace = moments(operator, num_probes=8).trace
    size = len(case.hessian)
    first, second = found.moment(1), found.moment(2)
    assert found.moment(0).value == pytest.approx(1, abs=1e-12)
    assert first.value == pytest.approx(trace.value / size, rel=1e-5)
    assert first.standard_error == pytest.approx(trace.standard_error / size, rel=1e-4)
    assert abs(first.value - float(case.hessian.trace()) / size) < 4 * first.standard_error
    assert abs(second.value - float(case.hessian.square().sum()) / size) < 4 * second.standard_error


def test_full_number_of_steps_finds_the_spectrum():
    values = np.array([-2.0, -1.0, 0.5, 1.0, 3.0, 7.0])
    found = spectral_density(Dense(symmetric(values)), num_vectors=3, num_steps=50)
    for nodes in found.nodes:
        np.testing.assert_allclose(nodes, values, atol=1e-10)
    assert found.num_products == 18


def test_shares_are_exact_for_a_diagonal_matrix():
    """A vector of signs has the same weight on every eigenvector."""
    matrix = torch.diag(torch.tensor([-2.0, -1.0, 0.5, 1.0, 3.0, 7.0], dtype=torch.float64))
    found = spectral_density(Dense(matrix), num_vectors=3, num_steps=50)
    for low, high, count in [(-9.0, 0.0, 2), (0.4, 1.1, 2), (0.6, 8.0, 3), (4.0, 5.0, 0)]:
        share = found.mass(low, high)
        assert share.value == pytest.approx(count / 6, abs=1e-12)
        assert share.standard_error == pytest.approx(0, abs=1e-12)
    assert found.mass().value == pytest.approx(1, abs=1e-12)


def test_weights_stay_right_over_many_steps():
    """Without reorthogonalisation ghosts would split the top eigenvalue's weight over several nodes."""
    values = np.concatenate([np.linspace(0, 1, 199), [1000.0]])
    matrix = symmetric(values)
    found = spectral_density(Dense(matrix), num_vectors=4, num_steps=100)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        assert (nodes > 2).sum() == 1
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert nodes[-1] == pytest.approx(1000, rel=1e-12)
        assert len(nodes) == 100


@pytest.mark.slow
def test_share_of_eigenvalues():
    """40 % negative; over seeds the standard error is calibrated."""
    values = np.concatenate([np.linspace(-2, -1, 16), np.linspace(1, 5, 24)])
    operator = Dense(symmetric(values))
    z = []
    for seed in range(80):
        mass = spectral_density(operator, num_vectors=12, num_steps=12, seed=seed).mass(high=0.0)
        z.append((mass.value - 0.4) / mass.standard_error)
    assert 0.7 < np.var(z) * 9 / 11 < 1.5
    assert abs(np.mean(z)) < 0.4


def test_density_integrates_to_one_and_follows_the_spectrum():
    """A uniform spectrum on [0, 1] has density 1 inside and 0 outside."""
    found = spectral_density(Dense(symmetric(np.linspace(0, 1, 300))), num_vectors=10, num_steps=20)
    grid = np.linspace(-1, 2, 3001)
    density = found.density(grid)
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(density[(grid > 0.2) & (grid < 0.8)], 1, atol=0.15)
    assert density[(grid < -0.3) | (grid > 1.3)].max() < 1e-3
    narrow = found.density([found.nodes[0][0]], sigma=1e-9)
    assert narrow[0] == pytest.approx(found.weights[0][0] / 10 / (1e-9 * np.sqrt(2 * np.pi)), rel=1e-6)


def test_degenerate_matrices():
    for matrix, value in [(torch.zeros(9, 9), 0.0), (3 * torch.eye(9), 3.0)]:
        found = spectral_density(Dense(matrix), num_vectors=2)
        assert found.num_products == 2
        assert found.moment(1).value == pytest.approx(value, rel=1e-6)
        assert found.mass(value - 0.1, value + 0.1).value == pytest.approx(1)
    with pytest.raises(InputError, match="sigma must be positive"):
        spectral_density(Dense(torch.zeros(9, 9)), num_vectors=1).density([0.0])


def test_bad_input_is_refused():
    operator = Dense(symmetric([1.0, 2.0]))
    for kwargs in ({"num_vectors": 0}, {"num_steps": 0}):
        with pytest.raises(InputError, match="at least 1"):
            spectral_density(operator, **kwargs)
    with pytest.raises(InputError, match="not be negative"):
        spectral_density(operator).moment(-1)
    with pytest.raises(InputError, match="not finite"):
        spectral_density(Dense(torch.full((4, 4), torch.nan)))
