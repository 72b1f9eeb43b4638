"""Lanczos against dense eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.eigen import lambda_max
from analysis.operator import HessianOperator
from masks.errors import InputError
from masks.mask import Mask
from masks.params import ParamTable


class Dense:
    """A matrix, or a diagonal, as an operator that remembers the vectors it was given."""

    name = "test matrix"
    device = torch.device("cpu")

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.dtype, self.seen = matrix, matrix.dtype, []

    @property
    def dimension(self) -> int:
        return len(self.matrix)

    def matvec(self, vector: Tensor) -> Tensor:
        self.seen.append(vector)
        return self.matrix * vector if self.matrix.dim() == 1 else self.matrix @ vector


def symmetric(eigenvalues: list[float] | np.ndarray, seed: int = 0) -> Tensor:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))
    return torch.from_numpy(q * np.asarray(eigenvalues) @ q.T)


def top(hessian: Tensor) -> float:
    return float(torch.linalg.eigvalsh(hessian)[-1])  # torch: numpy would take all cores


def test_network_float64_is_right_within_its_residual(case):
    with HessianOperator(case.model, case.batches) as operator:
        result = lambda_max(operator, keep_vector=True)
    want = top(case.hessian)
    assert result.converged
    assert abs(result.value - want) <= result.residual <= 1e-3 * want
    true = float((case.hessian @ result.vector - result.value * result.vector).norm())
    assert result.residual == pytest.approx(true, rel=1e-6)
    assert float(result.vector.norm()) == pytest.approx(1, abs=1e-14)
    assert result.name.startswith(
        "largest eigenvalue of the Hessian of the mean loss over 150 examples, all parameters"
    )


def test_network_float32_at_the_default_tolerance(case):
    want, counts = top(case.hessian), []
    with HessianOperator(case.fresh(torch.float32), case.batches) as operator:
        for seed in range(5):
            result = lambda_max(operator, seed=seed)
            counts.append(result.num_products)
            assert result.converged
            assert result.value == pytest.approx(want, rel=1e-5)
        assert operator.num_products == sum(counts)
    # A start vector that happens to be almost orthogonal to the top eigenvector takes a few more.
    assert sorted(counts)[2] <= 8, counts
    assert max(counts) <= 12, counts


def test_masked_network(conv_case):
    table = ParamTable.from_model(conv_case.model)
    mask = Mask(table, tuple(row.is_norm for row in table))
    keep = torch.cat([part.flatten() for part in mask.dense()])
    with HessianOperator(conv_case.model, conv_case.batches, mask=mask) as operator:
        result = lambda_max(operator, tol=1e-8)
    assert result.value == pytest.approx(top(conv_case.hessian[keep][:, keep]), rel=1e-12)


def test_largest_means_algebraically_largest():
    result = lambda_max(Dense(symmetric([-50.0, -3.0, 0.1, 0.5, 1.0, 2.0] + [0.0] * 20)))
    assert result.value == pytest.approx(2.0, rel=1e-6)
    assert lambda_max(Dense(symmetric([-4.0, -3.0, -2.5, -2.0, -1.0]))).value == pytest.approx(-1.0, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4, 1e-8])
def test_residual_bounds_the_error(seed, tol):
    matrix = symmetric(np.random.default_rng(seed).normal(size=60), seed)
    result = lambda_max(Dense(matrix), tol=tol, seed=seed, keep_vector=True)
    true = float((matrix @ result.vector - result.value * result.vector).norm())
    assert true <= result.residual <= true * (1 + 1e-4) + 1e-13
    assert result.residual <= tol * result.value or result.num_products == 60
    # Some eigenvalue lies that near; at these tolerances it is the largest one.
    assert abs(torch.linalg.eigvalsh(matrix) - result.value).min() <= result.residual
    if tol <= 1e-2:
        assert abs(top(matrix) - result.value) <= result.residual


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tol", [1e-6, 1e-300])
def test_residual_includes_float32_rounding(seed, tol):
    matrix = symmetric(np.random.default_rng(seed).normal(size=60), seed).float()
    matrix = (matrix + matrix.T) / 2
    result = lambda_max(Dense(matrix), tol=tol, seed=seed)
    assert abs(top(matrix.double()) - result.value) <= result.residual <= 1e-5 * result.value
    assert result.num_products <= 60


def test_basis_stays_orthogonal():
    operator = Dense(symmetric(np.geomspace(1e-8, 1e4, 80)))
    result = lambda_max(operator, tol=1e-300)
    basis = torch.stack(operator.seen)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-13, rtol=0)
    assert result.value == pytest.approx(1e4, rel=1e-12)


def test_long_float32_vectors_lose_nothing():
    """torch's float32 norm of 3e6 entries is off by 1e-5 to 1e-4 on a CPU."""
    diagonal = torch.zeros(3_000_000)
    diagonal[::1000] = torch.linspace(0.0, 1.0, 3000)
    diagonal[17] = 4.0
    result = lambda_max(Dense(diagonal))
    assert result.converged
    assert result.value == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("matrix", [[[3.0]], [[-3.0]], [[2.0, 1.0], [1.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]]])
def test_tiny_dimensions(matrix, dtype):
    matrix = torch.tensor(matrix, dtype=dtype)
    result = lambda_max(Dense(matrix))
    assert result.converged
    assert result.num_products <= len(matrix)
    assert result.value == pytest.approx(top(matrix.double()), rel=1e-6)
    assert abs(result.value - top(matrix.double())) <= result.residual <= 1e-5 * abs(result.value)


def test_zero_matrix():
    result = lambda_max(Dense(torch.zeros(7, 7)), keep_vector=True)
    assert (result.value, result.residual, result.converged, result.num_products) == (0.0, 0.0, True, 1)
    assert float(result.vector.norm()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invariant_subspace_ends_the_iteration(dtype):
    result = lambda_max(Dense(symmetric([2.0] * 20 + [-1.0] * 20 + [0.5] * 10).to(dtype)), tol=1e-300)
    assert result.converged
    assert result.num_products == 3
    assert abs(result.value - 2.0) <= result.residual <= 1e-4
    rank_one = lambda_max(Dense(symmetric([5.0] + [0.0] * 30).to(dtype)))
    assert rank_one.num_products == 2
    assert rank_one.value == pytest.approx(5.0, rel=1e-6)


def test_a_shifted_bulk_is_not_taken_for_the_top():
    """Hessian plus weight decay: at the first step the residual is already below 1e-3 of the Ritz value 1."""
    diagonal = torch.ones(4_000_000)
    diagonal[123] = 2.0
    result = lambda_max(Dense(diagonal))
    assert result.value == pytest.approx(2.0, rel=1e-5)


def test_running_out_of_products_is_reported():
    result = lambda_max(Dense(symmetric(np.linspace(-1, 1, 50))), max_products=2)
    assert not result.converged
    assert result.num_products == 2
    assert abs(np.linspace(-1, 1, 50) - result.value).min() <= result.residual
    one = lambda_max(Dense(symmetric(np.linspace(-1, 1, 50))), max_products=1)
    assert (one.num_products, one.converged) == (1, False)


def test_a_value_below_rounding_is_not_called_converged():
    """lambda_max = 1e-7 next to -1 cannot be resolved in float32."""
    diagonal = -torch.rand(300, generator=torch.Generator().manual_seed(0))
    diagonal[0] = 1e-7
    result = lambda_max(Dense(diagonal))
    assert not result.converged
    assert abs(result.value - 1e-7) <= result.residual


def test_seed_decides_the_start_and_global_randomness_does_not():
    matrix = symmetric(np.linspace(0, 1, 40))
    a = lambda_max(Dense(matrix), seed=1)
    state = torch.get_rng_state()
    torch.randn(3)
    b = lambda_max(Dense(matrix), seed=1)
    assert a == b
    assert lambda_max(Dense(matrix), seed=2).value != a.value
    torch.set_rng_state(state)
    lambda_max(Dense(matrix))
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="product 1 with the test matrix is not finite"):
        lambda_max(Dense(torch.full((4, 4), torch.nan)))
    for kwargs in ({"tol": 0.0}, {"tol": -1.0}, {"tol": float("nan")}, {"max_products": 0}):
        with pytest.raises(InputError, match="tol must be positive"):
            lambda_max(Dense(torch.eye(3)), **kwargs)
