"""Lanczos against dense eigenvalues."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.arpack import eigsh
from analysis.eigen import EigenPairs, eigenpairs, lambda_max
from analysis.krylov import Lanczos
from analysis.operator import HessianOperator
from benchmarks.curvature import krylov_limit
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


# -- several eigenvalues ------------------------------------------------------------------------------------


def ends(hessian: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    values = torch.linalg.eigvalsh(hessian.double()).numpy()
    return values[::-1][:k], values[:k]


def values_of(results: tuple) -> np.ndarray:
    return np.array([r.value for r in results])


def right(found: EigenPairs, matrix: Tensor, k: int) -> None:
    """Each within the bound that :class:`EigenPairs` states, k-th by k-th."""
    for results, exact in zip((found.largest, found.smallest), ends(matrix, k), strict=True):
        sign = 1 if results is found.largest else -1
        if not results:
            continue
        r = 2 * float(np.sqrt(sum(x.residual**2 for x in results)))
        slack = max(results[-1].tol * abs(results[-1].value), results[-1].residual)
        for result, value in zip(results, exact, strict=True):
            out = max(sign * result.value, sign * results[-1].value + slack) + r
            assert sign * result.value - r <= sign * value <= out, (result.value, value)


def test_top_five_of_a_network_in_float32(case):
    """Errors below 1e-5, with at most one product more than any stop of any Krylov method: 14 to 22 on these nets.

    The target was 15; from these start vectors no method that multiplies one vector at a time can do it on two of them.
    """
    exact, counts, spent = ends(case.hessian, 5)[0], [], 0
    with HessianOperator(case.fresh(torch.float32), case.batches) as operator:
        for seed in range(3):
            found = eigenpairs(operator, 5, seed=seed)
            assert found.complete
            assert found.risk <= 1e-3
            assert all(r.converged for r in found.largest)
            np.testing.assert_allclose(values_of(found.largest), exact, rtol=1e-5)
            assert found.num_products_check <= 14
            counts.append(found.num_products - found.num_products_check)
            assert found.largest[0].num_products == counts[-1]
            assert counts[-1] <= krylov_limit(case.hessian, exact, seed) + 1
            before, spent = spent, operator.num_products
            assert found.num_products == spent - before  # nothing is left out of the count
        if case.name != "vit":  # whose fifth and sixth differ by a fifth only
            assert min(counts) <= 15
        unchecked = eigenpairs(operator, 5, check=False)
        assert (unchecked.complete, unchecked.risk, unchecked.num_products_check) == (None, None, 0)
        assert unchecked.num_products == counts[0]
    assert found.largest[1].name.startswith("2nd largest eigenvalue of the Hessian of the mean loss")
    assert found.smallest == ()


def test_separated_top_five_takes_at_most_fifteen():
    """Five outliers above a bulk, as Hessians of trained networks with five classes have."""
    bulk = np.linspace(-0.05, 0.3, 500)
    matrix = symmetric(np.concatenate([[9.0, 6.0, 4.0, 2.5, 1.5], bulk])).float()
    matrix = (matrix + matrix.T) / 2
    for seed in range(5):
        found = eigenpairs(Dense(matrix), 5, seed=seed)
        assert found.num_products - found.num_products_check <= 15
        np.testing.assert_allclose(values_of(found.largest), [9.0, 6.0, 4.0, 2.5, 1.5], rtol=1e-5)


def test_both_ends_of_a_network_in_float64(case):
    with HessianOperator(case.model, case.batches) as operator:
        found = eigenpairs(operator, 2, end="both", tol=1e-4, keep_vectors=True)
        bottom = eigenpairs(operator, 2, end="smallest", check=False)
    assert found.complete
    right(found, case.hessian, 2)
    np.testing.assert_allclose(values_of(found.largest), ends(case.hessian, 2)[0], rtol=1e-6)
    np.testing.assert_allclose(values_of(found.smallest), ends(case.hessian, 2)[1], rtol=1e-6)
    np.testing.assert_allclose(values_of(bottom.smallest), ends(case.hessian, 2)[1], rtol=1e-5)
    for result in (*found.largest, *found.smallest):
        true = float((case.hessian @ result.vector - result.value * result.vector).norm())
        assert true <= result.residual * (1 + 1e-6) <= 1.1e-4 * abs(result.value)


CLUSTERS = {
    "pairs": [10.0, 10.0, 7.0, 7.0, 7.0, 3.0],
    "close": [10.0, 9.9999, 9.9998, 9.9997, 5.0, 4.9999],
    "double below": [10.0, 8.0, 6.0, 4.0, 2.0, 2.0],
    "all equal": [5.0] * 6,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("seed", range(2))
def test_the_kth_is_the_kth_in_clusters(cluster, seed, dtype):
    bulk = np.linspace(-1, 1, 150)
    matrix = symmetric(np.concatenate([CLUSTERS[cluster], bulk]), seed).to(dtype)
    matrix = (matrix + matrix.T) / 2
    found = eigenpairs(Dense(matrix), 5, seed=seed)
    assert found.complete
    right(found, matrix, 5)
    np.testing.assert_allclose(values_of(found.largest), CLUSTERS[cluster][:5], rtol=1e-3)


def test_without_the_check_copies_are_missed():
    """What the check is for: one Krylov space holds one vector of each eigenspace."""
    matrix = symmetric(np.concatenate([[10.0, 10.0, 7.0, 7.0, 7.0, 3.0], np.linspace(-1, 1, 150)]))
    blind = eigenpairs(Dense(matrix), 3, check=False)
    assert all(r.converged for r in blind.largest)
    np.testing.assert_allclose(values_of(blind.largest), [10, 7, 3], rtol=1e-3)
    np.testing.assert_allclose(values_of(eigenpairs(Dense(matrix), 3).largest), [10, 10, 7], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_matrices(dtype):
    for values in ([0.0] * 12, [3.0] * 12, [5.0] + [0.0] * 11, [5.0, 5.0, 0.0, 0.0, -2.0, -2.0], [1.0], [-1.0, 2.0]):
        matrix = symmetric(values).to(dtype)
        k = min(3, len(values))
        found = eigenpairs(Dense((matrix + matrix.T) / 2), k, end="both", check=True)
        np.testing.assert_allclose(values_of(found.largest), sorted(values)[::-1][:k], atol=1e-5)
        np.testing.assert_allclose(values_of(found.smallest), sorted(values)[:k], atol=1e-5)
        assert found.complete
        assert found.num_products <= 3 * len(values)


def test_the_risk_bounds_how_often_a_hidden_eigenvalue_stays_hidden():
    """Start vectors for which the Lanczos run has not seen an eigenvalue of 1.2 above [0, 1] must be that rare."""
    values = np.concatenate([np.linspace(0, 1, 199), [1.2]])
    operator = Dense(torch.from_numpy(values))
    for steps, bound in [(4, 1.19), (6, 1.19), (8, 1.1)]:
        risks = []
        for seed in range(200):
            start = torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            run = Lanczos(operator, start)
            for _ in range(steps):
                run.step()
            risks.append(run.risk(bound))  # 1 where it was seen
        for level in (0.5, 0.3, 0.1):
            assert np.mean(np.array(risks) <= level) <= level + 3 * np.sqrt(level * (1 - level) / 200)
    # Where nothing is hidden the risk falls, and its mirror image is the same.
    start = torch.randn(199, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run, mirror = Lanczos(Dense(operator.matrix[:-1]), start), Lanczos(Dense(-operator.matrix[:-1]), start)
    risks = []
    for _ in range(16):
        run.step()
        mirror.step()
        risks.append(run.risk(1.2))
        assert mirror.risk(-1.2, -1) == pytest.approx(risks[-1], rel=1e-6)
    assert all(b <= a for a, b in pairwise(risks))
    assert risks[-1] < 1e-4


@pytest.mark.parametrize("tol", [3e-2, 1e-2])
def test_residuals_of_later_runs_include_what_the_earlier_left(tol):
    """Each run searches the complement of pairs that are no exact eigenvectors."""
    matrix = symmetric(np.concatenate([[10.0, 10.0, 7.0, 7.0, 7.0, 3.0], np.linspace(-1, 1, 150)]))
    for seed in range(10):
        for result in eigenpairs(Dense(matrix), 5, tol=tol, seed=seed, keep_vectors=True).largest:
            true = float((matrix @ result.vector - result.value * result.vector).norm())
            assert true <= result.residual * (1 + 1e-6)


def test_rounding_in_the_complement_is_that_of_the_whole_matrix():
    """Products there still pass through the entries of a float32 matrix of norm 1e6."""
    matrix = symmetric(np.concatenate([[1e6], np.linspace(0, 1, 99)])).float()
    matrix = (matrix + matrix.T) / 2
    top_vector = torch.linalg.eigh(matrix.double()).eigenvectors[:, -1].float()
    start = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = Lanczos(Dense(matrix), start, against=[top_vector], norm=1e6)
    run.step()
    q = run.basis[0]
    error = float((matrix.double() @ q.double() - (matrix @ q).double()).norm())
    assert error <= run.rounding <= 1e3 * error


def test_the_check_leaves_equals_of_the_kth_alone():
    """A second eigenvalue of 2 does not belong to the five; only what lies beyond the slack must be ruled out."""
    matrix = symmetric(np.concatenate([[10.0, 8.0, 6.0, 4.0, 2.0, 2.0], np.linspace(-1, 1, 150)]))
    found = eigenpairs(Dense(matrix), 5)
    assert found.complete
    assert found.num_products_check <= 15  # 18, were it to search for what equals the fifth


def test_the_risks_of_independent_runs_multiply():
    """In float32 one run leaves a risk of 5e-3 that 5 + its slack is hidden behind 5; the second makes it 3e-5."""
    found = eigenpairs(Dense(5 * torch.eye(50)), 3)
    assert found.complete
    assert found.risk < 1e-4
    assert (found.num_products, found.num_products_check) == (5, 2)


def test_too_few_products_is_reported():
    matrix = symmetric(np.linspace(-1, 1, 80))
    found = eigenpairs(Dense(matrix), 5, max_products=9)
    assert found.complete is False
    assert found.num_products == 9
    assert not found.largest[-1].converged
    assert len(found.largest) == 5
    late = eigenpairs(Dense(symmetric([9.0, 8.0, 7.0, *np.linspace(-1, 1, 80)])), 3, max_products=11)
    assert all(r.converged for r in late.largest)
    assert late.complete is False
    assert late.risk > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_eigsh_agrees_and_measures_its_own_residuals(end, dtype):
    matrix = symmetric(np.concatenate([[9.0, 6.0, 4.0], np.linspace(-3, 1, 100) ** 3])).to(dtype)
    matrix = (matrix + matrix.T) / 2
    operator = Dense(matrix)
    found = eigsh(operator, 3, end=end, keep_vectors=True)
    results = found.largest if end == "largest" else found.smallest
    assert len(results) == 3 == len(found.largest) + len(found.smallest)
    assert found.num_products == len(operator.seen) >= 23
    np.testing.assert_allclose(values_of(results), ends(matrix, 3)[0 if end == "largest" else 1], rtol=1e-5)
    for result in results:
        assert result.converged
        true = float((matrix.double() @ result.vector.double() - result.value * result.vector.double()).norm())
        assert true <= result.residual <= 1e-3 * abs(result.value)
    assert results[1].name == f"2nd {end} eigenvalue of the test matrix"


def test_eigenpairs_and_eigsh_refuse_bad_input():
    operator = Dense(symmetric([1.0, 2.0, 3.0]))
    for call, text in [
        (lambda: eigenpairs(operator, 0), "need 1 <= k <= 3"),
        (lambda: eigenpairs(operator, 4), "need 1 <= k <= 3"),
        (lambda: eigenpairs(operator, 3, max_products=2), "max_products >= k"),
        (lambda: eigenpairs(operator, 2, tol=0.0), "tol must be positive"),
        (lambda: eigenpairs(operator, 2, end="top"), "unknown end 'top'"),
        (lambda: eigsh(operator, 3), "need 1 <= k < 3"),
        (lambda: eigsh(operator, 1, end="both"), "unknown end 'both'"),
        (lambda: eigsh(Dense(symmetric(np.linspace(0, 1, 200))), 5, tol=1e-12, max_products=30), "eigsh found no 5"),
    ]:
        with pytest.raises(InputError, match=text):
            call()
