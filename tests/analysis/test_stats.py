"""Intervals and tests against hand-computed values, brute force, and their own coverage."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis.stats import (
    accuracy_interval,
    compare_paired,
    effect_size,
    holm,
    mean_interval,
    min_sign_flip_p,
    seeds_needed,
    sign_flip_p,
)
from masks.errors import InputError

# -- mean_interval ------------------------------------------------------------------------------------------


def test_t_interval_by_hand():
    # n = 4, mean 5, s^2 = 20/3, t_{3, 0.975} = 3.182446 (table).
    got = mean_interval([2.0, 4.0, 6.0, 8.0], name="error")
    half = 3.182446305284263 * math.sqrt(20 / 3 / 4)
    assert (got.name, got.value, got.n, got.df, got.confidence) == ("error", 5.0, 4, 3, 0.95)
    assert got.standard_error == pytest.approx(math.sqrt(20 / 3 / 4), rel=1e-14)
    assert (got.low, got.high) == (pytest.approx(5 - half, rel=1e-12), pytest.approx(5 + half, rel=1e-12))
    assert mean_interval([2.0, 4.0, 6.0, 8.0], confidence=0.99).high == pytest.approx(5 + 5.840909 * half / 3.182446)


def test_t_interval_covers_at_its_level():
    rng = np.random.default_rng(0)
    inside = [(i := mean_interval(rng.normal(3.0, 2.0, 4), confidence=0.9)).low <= 3.0 <= i.high for _ in range(2000)]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)


def test_one_seed_and_equal_seeds():
    one = mean_interval([0.25])
    assert (one.value, one.n) == (0.25, 1)
    assert all(math.isnan(v) for v in (one.low, one.high, one.standard_error, one.df))
    same = mean_interval([0.25] * 5)
    assert (same.low, same.high, same.standard_error) == (0.25, 0.25, 0.0)


@pytest.mark.parametrize("bad", [[1.0, math.nan], [math.inf], [], [[1.0, 2.0]], 3.0])
@pytest.mark.parametrize("function", [mean_interval, sign_flip_p, holm])
def test_values_that_are_not_a_list_of_finite_numbers_are_refused(function, bad):
    with pytest.raises(InputError):
        function(bad)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, math.nan])
def test_confidence_must_be_a_probability(confidence):
    for call in (mean_interval, lambda v, **k: accuracy_interval([[0, 1], [1, 1]], **k)):
        with pytest.raises(InputError, match="confidence"):
            call([1.0, 2.0], confidence=confidence)


# -- accuracy_interval --------------------------------------------------------------------------------------


def loops(y: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of seeds, items and residual, summed entry by entry."""
    n, items = y.shape
    grand = sum(y.flat) / (n * items)
    row = [sum(y[s]) / items for s in range(n)]
    column = [sum(y[:, i]) / n for i in range(items)]
    ms_row = items * sum((r - grand) ** 2 for r in row) / (n - 1)
    ms_column = n * sum((c - grand) ** 2 for c in column) / (items - 1)
    rest = sum((y[s, i] - row[s] - column[i] + grand) ** 2 for s in range(n) for i in range(items))
    return ms_row, ms_column, rest / ((n - 1) * (items - 1))


def simulate(rng: np.random.Generator, n: int, items: int, seed_sd: float, item_sd: float, noise: float, mu: float):
    z = mu + seed_sd * rng.normal(size=(n, 1)) + item_sd * rng.normal(size=(1, items))
    truth = scipy_stats.norm.cdf(mu / math.sqrt(seed_sd**2 + item_sd**2 + noise**2))
    return z + noise * rng.normal(size=(n, items)) > 0, truth


def test_crossed_interval_is_the_formula():
    y, _ = simulate(np.random.default_rng(1), 6, 40, 0.5, 1.0, 0.5, 1.0)
    a, b, r = loops(y.astype(float))
    assert min(a, b) > r  # no truncation here
    rows, columns = y.mean(1), y.mean(0)
    variance = rows.var(ddof=1) / 6 + columns.var(ddof=1) / 40 - r / (6 * 40)
    assert variance == pytest.approx((a + b - r) / 240, rel=1e-12)
    df = (a + b - r) ** 2 / (a**2 / 5 + b**2 / 39 + r**2 / (5 * 39))
    got = accuracy_interval(y)
    assert got.value == y.mean()
    assert got.standard_error == pytest.approx(math.sqrt(variance), rel=1e-12)
    assert got.df == pytest.approx(max(df, 5), rel=1e-12)
    odds, p = got.value / (1 - got.value), got.value
    factor = math.exp(scipy_stats.t.ppf(0.975, got.df) * math.sqrt(variance) / (p * (1 - p)))
    assert got.low == pytest.approx(odds / factor / (1 + odds / factor), rel=1e-12)
    assert got.high == pytest.approx(odds * factor / (1 + odds * factor), rel=1e-12)
    assert got.name == "accuracy over 6 seeds and 40 shared test examples"


def test_negative_components_are_taken_as_zero():
    # Items of equal difficulty: the columns' means agree, the residual carries all.
    y = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=float)
    a, b, r = loops(y)
    assert (a, b) == (0.0, 0.0)
    got = accuracy_interval(y)
    assert got.standard_error == pytest.approx(math.sqrt(r / 16))
    assert got.df == pytest.approx(9)
    # Now the seeds differ, the items still do not.
    y = np.kron(np.eye(4), np.ones((1, 3)))
    y[3] = 1
    a, b, r = loops(y)
    assert a > r > b
    got = accuracy_interval(y)
    assert got.standard_error == pytest.approx(math.sqrt(a / 48))
    assert got.df == pytest.approx(3)


@pytest.mark.parametrize(
    ("n", "items", "seed_sd", "item_sd", "noise", "mu"),
    [
        (3, 200, 0.05, 1.0, 0.3, 1.5),  # the test sample dominates: the usual case
        (5, 200, 0.05, 1.0, 0.3, 0.0),
        (5, 500, 0.5, 0.3, 0.3, 0.0),  # the seeds dominate
        (5, 100, 0.0, 0.0, 1.0, 1.0),  # neither: the components are noise around 0
        (8, 100, 0.2, 1.0, 0.5, 1.0),
        (5, 700, 0.1, 1.0, 0.3, 2.2),  # 98 % accurate
        (10, 700, 0.05, 1.0, 0.3, 2.6),  # 99.4 % accurate, four errors
    ],
)
def test_crossed_interval_covers(n, items, seed_sd, item_sd, noise, mu):
    rng, inside = np.random.default_rng(0), []
    for _ in range(600):
        y, truth = simulate(rng, n, items, seed_sd, item_sd, noise, mu)
        got = accuracy_interval(y)
        inside.append(got.low <= truth <= got.high)
    assert 0.925 <= np.mean(inside) <= 0.995


def test_seeds_alone_would_not_cover():
    """Why accuracy_interval exists: the spread between seeds knows nothing of the test sample they share."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(400):
        y, truth = simulate(rng, 5, 200, 0.05, 1.0, 0.3, 1.0)
        got = mean_interval(y.mean(1))
        inside.append(got.low <= truth <= got.high)
    assert np.mean(inside) < 0.75


def test_constant_matrix_gets_the_exact_binomial_interval():
    got = accuracy_interval(np.ones((5, 100), dtype=bool))
    assert (got.value, got.high) == (1.0, 1.0)
    assert got.low == pytest.approx(0.025 ** (1 / 100), rel=1e-12)
    assert math.isnan(got.df)
    none = accuracy_interval(np.zeros((5, 100)))
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 100), rel=1e-12)


def test_accuracy_of_one_seed_has_no_interval():
    one = accuracy_interval([[1, 0, 1, 1]])
    assert (one.value, one.n) == (0.75, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)


@pytest.mark.parametrize("bad", [[0, 1, 1], [[1], [0]], [[0.5, 1.0]], [[1.0, math.nan]], np.zeros((0, 4))])
def test_correctness_must_be_a_matrix_of_zeros_and_ones(bad):
    with pytest.raises(InputError, match="correct must"):
        accuracy_interval(bad)


# -- sign flips ---------------------------------------------------------------------------------------------


def brute_force(d: list[Fraction]) -> Fraction:
    """Share of the 2^n sign patterns whose mean is at least as far from 0, in exact arithmetic."""
    n, observed = len(d), abs(sum(d))
    hits = sum(abs(sum(s * x for s, x in zip(signs, d, strict=True))) >= observed
               for signs in itertools.product((1, -1), repeat=n))  # fmt: skip
    return Fraction(hits, 2**n)


def test_sign_flip_by_hand():
    assert sign_flip_p([1.0, 2.0, 3.0]) == 0.25  # only +++ and ---
    assert sign_flip_p([1.0, 2.0, -1.0]) == 0.75  # |T| >= 2: +-4 once, +-2 twice each
    assert sign_flip_p([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]) == 2 / 64


@pytest.mark.parametrize("seed", range(6))
def test_sign_flip_is_the_brute_force(seed):
    rng = np.random.default_rng(seed)
    counts = [int(v) for v in rng.integers(-3, 6, size=rng.integers(2, 10))]  # many ties, as with 700 test images
    d = [Fraction(c, 700) for c in counts]
    assert sign_flip_p([float(x) for x in d]) == pytest.approx(float(brute_force(d)), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_sign_flips_of_accuracies_count_ties(seed):
    """Accuracies of 600 images, in points: two sums that are equal are not so in floats, least of all near 0."""
    rng = np.random.default_rng(seed)
    right = rng.integers(-12, 13, size=10)
    right[-1] -= right.sum() - rng.integers(-2, 3)  # a sum near 0, where rounding is large beside it
    points = 100 * (0.9 + right / 600) - 90
    assert sign_flip_p(points) == pytest.approx(float(brute_force([Fraction(int(x)) for x in right])), abs=1e-12)
    assert sign_flip_p(points / 100) == sign_flip_p(1e6 * points) == sign_flip_p(points)


def test_sign_flips_count_ties_that_lie_where_rounding_turns():
    """Means that are multiples of 2^-13 of the largest difference end in a 5 at the 13th digit."""
    counts = [1024, -999, 18, -29, 14, 32, -14, -5]
    points = 100 * (0.9 + np.array(counts) / 10_000) - 90
    assert sign_flip_p(points) == pytest.approx(float(brute_force([Fraction(x) for x in counts])), abs=1e-12)


def test_sign_flip_edges():
    assert sign_flip_p([0.3]) == 1.0
    assert sign_flip_p([0.0] * 6) == 1.0
    assert sign_flip_p([0.0, 0.0, 1.0]) == 1.0
    for n in (2, 5, 8, 16):
        assert sign_flip_p(np.arange(1.0, n + 1)) == min_sign_flip_p(n) == 2.0 ** (1 - n)


def test_sign_flip_by_monte_carlo_beyond_16():
    d = np.random.default_rng(0).normal(0.75, 1.0, 18)
    flips = np.array(list(itertools.product((1.0, -1.0), repeat=18)))
    exact = float((np.abs(flips @ d) >= abs(d.sum()) - 1e-12).mean())
    got = sign_flip_p(d, seed=3)
    assert 0.01 < exact < 0.2
    assert got == pytest.approx(exact, abs=4 * math.sqrt(exact / 99_999) * 2)
    assert got == sign_flip_p(d, seed=3)
    assert got != sign_flip_p(d, seed=4)
    assert sign_flip_p(np.ones(40)) == 2 / 100_000  # never 0


def test_sign_flip_holds_its_level():
    rng = np.random.default_rng(0)
    p = np.array([sign_flip_p(rng.normal(size=7)) for _ in range(600)])
    assert (p <= 0.05).mean() == pytest.approx(6 / 128, abs=0.025)


# -- families -----------------------------------------------------------------------------------------------


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.9, 0.6]), [1.0, 1.0, 1.0])
    np.testing.assert_allclose(holm([0.02]), [0.02])
    for bad in ([-0.1], [1.5]):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            holm(bad)


def test_holm_rejects_exactly_where_the_step_down_procedure_does():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.uniform(0, 0.1, size=rng.integers(1, 7))
        order, rejected = np.argsort(p), set()
        for step, i in enumerate(order):
            if p[i] > 0.05 / (len(p) - step):
                break
            rejected.add(int(i))
        assert set(np.flatnonzero(holm(p) <= 0.05)) == rejected


def test_holm_controls_the_family_error_and_no_adjustment_does_not():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(2000, 6))
    assert np.mean([holm(row).min() <= 0.05 for row in p]) < 0.065
    assert (p.min(1) <= 0.05).mean() > 0.2


def test_seeds_needed():
    assert [seeds_needed(k) for k in (1, 2, 6, 10)] == [6, 7, 8, 9]
    assert seeds_needed(1, alpha=0.5) == 2
    assert seeds_needed(1, alpha=0.0625) == 5  # reached with equality
    for k in range(1, 12):
        n = seeds_needed(k, 0.05)
        assert holm([2.0 ** (1 - n)] * k).min() <= 0.05 < holm([2.0 ** (2 - n)] * k).min()
    for bad in ((0, 0.05), (1, 0.0), (1, 1.0)):
        with pytest.raises(InputError):
            seeds_needed(*bad)
    with pytest.raises(InputError):
        min_sign_flip_p(0)


def test_family_of_paired_contrasts():
    d = {
        "norm - all": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "random - all": [1.0, -1.0, 2.0, -2.0, 0.5, -0.5],
        "one": [0.0] * 6,
    }
    norm, random, zero = compare_paired(d)
    assert (norm.name, norm.n, norm.p, norm.p_holm) == ("norm - all", 6, 2 / 64, 6 / 64)
    interval = mean_interval(d["norm - all"])
    assert (norm.mean_difference, norm.low, norm.high) == (3.5, interval.low, interval.high)
    assert (random.mean_difference, random.p, random.p_holm) == (0.0, 1.0, 1.0)
    assert (zero.p, zero.low, zero.high) == (1.0, 0.0, 0.0)
    assert norm.effect_size == pytest.approx(3.5 / math.sqrt(3.5))
    assert random.effect_size == 0.0
    assert math.isnan(zero.effect_size)
    single = compare_paired({"a": [0.5]})[0]
    assert (single.p, single.p_holm, single.n) == (1.0, 1.0, 1)
    assert math.isnan(single.low)
    with pytest.raises(InputError, match="no contrast"):
        compare_paired({})
    with pytest.raises(InputError, match="b: 1 of 2 values are not finite"):
        compare_paired({"a": [0.5, 1.0], "b": [math.nan, 1.0]})


def test_effect_size_by_hand():
    # Mean 5, s^2 = 20/3: the t statistic is d_z sqrt(n).
    d = [2.0, 4.0, 6.0, 8.0]
    assert effect_size(d) == pytest.approx(5 / math.sqrt(20 / 3), rel=1e-14)
    assert effect_size(d) * 2 == pytest.approx(scipy_stats.ttest_1samp(d, 0).statistic)
    assert effect_size([-v for v in d]) == -effect_size(d)
    for same in ([0.3], [0.1] * 7, [0.0, 0.0]):
        assert math.isnan(effect_size(same))
    with pytest.raises(InputError):
        effect_size([])


@pytest.mark.parametrize(("n", "excess"), [(6, 0.19), (8, 0.13)])
def test_effect_size_is_as_much_too_large_as_it_says(n, excess):
    rng = np.random.default_rng(n)
    found = [effect_size(rng.normal(1.0, 1.0, n)) for _ in range(4000)]
    assert np.mean(found) == pytest.approx(1 + excess, abs=0.035)
