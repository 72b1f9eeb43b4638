"""Sign-flip intervals and equivalence tests against enumeration in exact arithmetic and their own rates."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from analysis.equivalence import (
    equivalence,
    seed_contributions,
    seed_sets,
    set_means,
    set_ratios,
    sign_flip_interval,
    signed_ratios,
    typical_interval,
    typical_p,
)
from analysis.stats import mean_interval, sign_flip_p
from masks.errors import InputError

# -- sets of seeds ------------------------------------------------------------------------------------------


def test_sets_are_all_non_empty_ones():
    got = {tuple(row) for row in seed_sets(5).astype(int)}
    assert got == set(itertools.product((0, 1), repeat=5)) - {(0,) * 5}
    assert seed_sets(14).shape == (2**14 - 1, 14)


def test_many_seeds_get_random_sets_that_are_always_the_same():
    sets = seed_sets(20)
    assert sets.shape == (2**14 - 1, 20)
    assert sets.mean() == pytest.approx(0.5, abs=0.01)
    assert sets is seed_sets(20)
    with pytest.raises(InputError):
        seed_sets(0)


def brute_p(p: list[Fraction], q: list[Fraction], theta: Fraction, side: int = 0) -> Fraction:
    """Share of the 2^n sign patterns of p - theta q whose sum is as extreme; one-sided for side = 1 or -1."""
    d = [a - theta * b for a, b in zip(p, q, strict=True)]
    total, n = sum(d), len(d)
    hits = 0
    for signs in itertools.product((1, -1), repeat=n):
        flipped = sum(s * x for s, x in zip(signs, d, strict=True))
        hits += abs(flipped) >= abs(total) if not side else side * flipped >= side * total
    return Fraction(hits, 2**n)


@pytest.mark.parametrize("seed", range(8))
def test_interval_holds_exactly_what_sign_flips_do_not_reject(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(6, 9))
    p = [Fraction(int(v), 700) for v in rng.integers(-9, 15, n)]  # ties, as with 700 test images
    q = [Fraction(int(v), 7) for v in rng.integers(1, 9, n)] if seed % 2 else [Fraction(1)] * n
    values = set_ratios(np.array(p, dtype=float), np.array(q, dtype=float))
    got = typical_interval(values, estimate=float(sum(p) / sum(q)), n=n, name="ratio")
    alpha, tiny = Fraction(1, 20), Fraction(1, 10**9)
    low, high = (Fraction(end).limit_denominator(10**6) for end in (got.low, got.high))
    assert (float(low), float(high)) == (pytest.approx(got.low, rel=1e-12), pytest.approx(got.high, rel=1e-12))
    assert brute_p(p, q, low) > alpha
    assert brute_p(p, q, high) > alpha
    assert brute_p(p, q, low - tiny, 1) <= alpha / 2
    assert brute_p(p, q, high + tiny, -1) <= alpha / 2


@given(st.lists(st.integers(-4, 6), min_size=1, max_size=9), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
@settings(deadline=None, max_examples=60)
def test_decisions_of_interval_and_p_value_agree(counts, confidence):
    x = np.array(counts) / 512  # exact in binary, so that ties are ties in every implementation
    p = sign_flip_p(x)
    assert typical_p(set_means(x)) == pytest.approx(p, abs=1e-12)
    interval = sign_flip_interval(x, confidence=confidence)
    assert (interval.low > 0 or interval.high < 0) == (p <= 1 - confidence + 1e-12)


@given(
    st.lists(st.tuples(st.integers(525, 540), st.integers(530, 545)), min_size=6, max_size=10),
    st.sampled_from([0.9, 0.95, 0.9969]),
    st.sampled_from([0.0, 0.3, -0.3, 0.5]),
)
@settings(deadline=None, max_examples=150)
def test_a_tie_with_the_null_is_inside_the_interval_whatever_rounding_says(pairs, confidence, null):
    """Accuracies over 600 images, in percent: sets of seeds often have a mean of exactly the null."""
    means = set_means(np.array([100 * (a / 600 - b / 600) for a, b in pairs]))
    interval = typical_interval(means, estimate=0.0, n=len(pairs), name="gain", confidence=confidence)
    attained = 2 * math.floor((1 - confidence) / 2 * 2 ** len(pairs) + 1e-9) / 2 ** len(pairs)
    assert (interval.low > null or interval.high < null) == (typical_p(means, null) <= attained)


def test_an_end_at_zero_is_zero():
    """These twelve gave an end of 7e-15 and a claim that held."""
    correct = (
        [558, 552, 550, 566, 561, 546, 554, 562, 551, 562, 537, 552],
        [543, 540, 527, 556, 555, 547, 539, 553, 518, 546, 544, 544],
    )
    gains = 100 * (np.array(correct[0]) / 600 - np.array(correct[1]) / 600)
    assert sign_flip_interval(gains, confidence=1 - 0.05 / 16).low == 0


def test_interval_by_hand():
    # n = 6: 64 patterns, 0.025 * 64 = 1.6, so the extreme set means: the least and the greatest value.
    got = sign_flip_interval([1.0, 2.0, 3.0, 4.0, 5.0, 9.0], name="gain")
    assert (got.name, got.value, got.low, got.high, got.n) == ("gain", 4.0, 1.0, 9.0, 6)
    # p of a zero mean is 4 / 64 = 0.0625, so that 0 is inside at 1 - 0.061 and outside at 1 - 0.063.
    assert sign_flip_p([-1.0, 2.0, 3.0, 4.0, 5.0, 9.0]) == 0.0625
    assert sign_flip_interval([-1.0, 2.0, 3.0, 4.0, 5.0, 9.0], confidence=0.939).low == -1.0
    assert sign_flip_interval([-1.0, 2.0, 3.0, 4.0, 5.0, 9.0], confidence=0.937).low == 0.5
    few = sign_flip_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (few.low, few.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("draw", ["laplace", "normal", "uniform"])
def test_interval_covers_exactly(draw):
    rng, inside = np.random.default_rng(1), []
    for _ in range(3000):
        i = sign_flip_interval(getattr(rng, draw)(size=8) - (0.5 if draw == "uniform" else 0))
        inside.append(i.low <= 0 <= i.high)
    assert np.mean(inside) == pytest.approx(1 - 12 / 256, abs=0.013)


def test_a_ratio_whose_denominator_may_be_zero_is_unbounded():
    rng = np.random.default_rng(0)
    p, q = rng.normal(1, 1, 8), rng.normal(0.1, 1, 8)
    values = set_ratios(p, q)
    assert (np.isnan(values) == (seed_sets(8) @ q <= 0)).all()
    interval = typical_interval(values, estimate=1.0, n=8, name="ratio")
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert typical_p(values) > 0.05


def test_sets_without_an_estimate_count_to_both_tails():
    values = set_means(np.arange(1.0, 9.0))
    order = np.argsort(values)
    values[order[100:103]] = np.nan
    interval = typical_interval(values, estimate=4.5, n=8, name="x")
    left = np.sort(values[np.isfinite(values)])
    assert (interval.low, interval.high) == (left[2], left[-3])  # of 6 in each tail 3 are taken


# -- linear moments -----------------------------------------------------------------------------------------


def regression(rng: np.random.Generator, n: int = 7, rows: int = 5, k: int = 3):
    x = rng.normal(size=(n, rows, k))
    y = x @ np.arange(1.0, k + 1) + rng.normal(size=(n, rows))
    return x, y, np.einsum("srj,srk->sjk", x, x), np.einsum("srj,sr->sj", x, y)


def test_contributions_are_the_scores_of_the_fit_under_the_null():
    x, y, moments, targets = regression(np.random.default_rng(2))
    n, _, k = x.shape
    flat_x, flat_y = x.reshape(-1, k), y.ravel()
    theta = np.linalg.lstsq(flat_x, flat_y, rcond=None)[0]
    for index in range(k):
        p, q = seed_contributions(moments, targets, index)
        assert p.sum() == pytest.approx(theta[index], rel=1e-10)
        assert q.sum() == pytest.approx(1, rel=1e-10)
        rest = np.delete(flat_x, index, axis=1)
        own = flat_x[:, index] - rest @ np.linalg.lstsq(rest, flat_x[:, index], rcond=None)[0]
        for null in (-1.0, 0.5, 3.0):
            y0 = flat_y - null * flat_x[:, index]
            residual = y0 - rest @ np.linalg.lstsq(rest, y0, rcond=None)[0]
            score = (own * residual).reshape(n, -1).sum(axis=1) / (own**2).sum()
            stretched = score.mean() + math.sqrt(n / (n - 1)) * (score - score.mean())
            assert p - null * q == pytest.approx(stretched, abs=1e-10)


def test_coefficients_that_cannot_be_told_apart_are_refused():
    x, _, _, targets = regression(np.random.default_rng(0))
    x[..., 2] = 2 * x[..., 1]
    with pytest.raises(np.linalg.LinAlgError, match="told apart"):
        seed_contributions(np.einsum("srj,srk->sjk", x, x), targets, 0)
    with pytest.raises(np.linalg.LinAlgError):
        seed_contributions(np.zeros((4, 1, 1)), np.ones((4, 1)), 0)


# -- equivalence --------------------------------------------------------------------------------------------


def test_tost_is_two_t_tests():
    x = np.array([0.05, -0.1, 0.12, 0.02, -0.04, 0.11])
    got = equivalence(x, margin=0.2, method="t")
    low = scipy_stats.ttest_1samp(x, -0.2, alternative="greater").pvalue
    high = scipy_stats.ttest_1samp(x, 0.2, alternative="less").pvalue
    assert (got.p_not_worse, got.p_equivalent) == (pytest.approx(low), pytest.approx(max(low, high)))
    assert got.interval == mean_interval(x, name="mean gain", confidence=0.9)
    assert got.equivalent
    assert got.not_worse


@pytest.mark.parametrize("seed", range(12))
def test_sign_flip_tost_by_enumeration(seed):
    rng = np.random.default_rng(seed)  # sets whose mean is the margin, up to rounding, must count as ties
    x = [Fraction(int(v), 700) for v in rng.integers(-6, 9, 7)]
    got = equivalence(np.array(x, dtype=float), margin=1 / 700)
    ones = [Fraction(1)] * 7
    low, high = brute_p(x, ones, Fraction(-1, 700), 1), brute_p(x, ones, Fraction(1, 700), -1)
    assert (got.p_not_worse, got.p_equivalent) == (pytest.approx(float(low)), pytest.approx(float(max(low, high))))


@given(
    st.lists(st.integers(-5, 9), min_size=2, max_size=9),
    st.integers(1, 6),
    st.sampled_from(["t", "sign_flip"]),
)
@settings(deadline=None, max_examples=80)
def test_decision_agrees_with_its_interval(counts, margin, method):
    got = equivalence(np.array(counts) / 10, margin=margin / 10 + (0.003 if method == "t" else 0), method=method)
    assert got.not_worse == (got.interval.low > -got.margin)
    assert got.equivalent == (max(-got.interval.low, got.interval.high) < got.margin)
    assert got.equivalent <= got.not_worse


@pytest.mark.parametrize("method", ["t", "sign_flip"])
def test_equivalence_is_claimed_wrongly_no_more_often_than_alpha(method):
    rng = np.random.default_rng(3)
    found = [equivalence(rng.normal(0.3, 0.1, 8), margin=0.3, method=method) for _ in range(1000)]
    assert np.mean([f.equivalent for f in found]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
    worse = [equivalence(rng.normal(-0.3, 0.3, 8), margin=0.3, method=method).not_worse for _ in range(1000)]
    assert np.mean(worse) == pytest.approx(0.05, abs=0.021)


def test_no_variation_and_one_seed():
    same = equivalence([0.25] * 6, margin=0.3, method="t")
    assert (same.equivalent, same.p_equivalent) == (True, 0.0)
    assert not equivalence([0.5] * 6, margin=0.3, method="t").equivalent
    for method in ("t", "sign_flip"):
        one = equivalence([0.0], margin=0.3, method=method)
        assert (one.equivalent, one.not_worse) == (False, False)
        assert one.p_equivalent >= 0.5


def test_an_interval_that_includes_zero_is_no_equivalence():
    x = np.array([-1.0, 1.2, -0.8, 0.9, -1.1, 1.0, -0.9, 1.1])
    assert sign_flip_p(x) > 0.5
    assert not equivalence(x).equivalent


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [[1.0]]])
def test_bad_gains_are_refused(bad):
    for function in (equivalence, sign_flip_interval):
        with pytest.raises(InputError):
            function(bad)


@pytest.mark.parametrize("setting", [{"margin": 0}, {"margin": math.inf}, {"alpha": 0.5}, {"method": "z"}])
def test_bad_settings_are_refused(setting):
    with pytest.raises(InputError):
        equivalence([1.0, 2.0], **setting)
    with pytest.raises(InputError, match="confidence"):
        sign_flip_interval([1.0, 2.0], confidence=95)


def test_ratios_need_totals_of_the_right_sign():
    parts, totals = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 0.0, -1.0, 8.0])
    assert signed_ratios(parts, totals, 0.1) == pytest.approx([0.5, math.nan, math.nan, 0.5], nan_ok=True)
    assert signed_ratios(parts, totals, -5.0) == pytest.approx([math.nan, math.nan, -3.0, math.nan], nan_ok=True)
