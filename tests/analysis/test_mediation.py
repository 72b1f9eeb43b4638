"""Mediation against the regression of Judd, Kenny and McClelland, identities of confounding, and its own coverage."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from analysis.mediation import mediation, robustness_value, sign_agreement
from analysis.reliability import PairedRuns, paired_runs
from analysis.synthetic import CAUSE_R2, StudyDesign
from masks.errors import InputError


def study(design: StudyDesign, seed: int) -> PairedRuns:
    return paired_runs(design.draw(seed), metric="sharpness", arm="arm1", reference="arm0", chosen=design.chosen)


def made(x: np.ndarray, y: np.ndarray, repeats: np.ndarray | None = None) -> PairedRuns:
    """Two arms, the reference's radii first; the first one of each arm is the chosen one."""
    n, k = x.shape
    radii = np.tile(np.arange(1.0, k // 2 + 1), 2)
    repeats = np.stack([x, x]) if repeats is None else repeats
    return PairedRuns("m", "b", "a", n, radii, np.arange(k) >= k // 2, (0, k // 2), y, x, repeats)


# -- mediation ----------------------------------------------------------------------------------------------


def test_two_runs_per_seed_are_judd_kenny_and_mcclelland():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 2)) + np.array([0, 0.8])
    y = 1.5 * x + [0, 0.4] + rng.normal(size=(9, 1)) + 0.3 * rng.normal(size=(9, 2))
    got = mediation(made(x, y))
    dy, dx, sx = y[:, 1] - y[:, 0], x[:, 1] - x[:, 0], x.sum(axis=1)
    design = np.column_stack([np.ones(9), dx, sx - sx.mean()])
    direct, slope, half_difference = np.linalg.lstsq(design, dy, rcond=None)[0]
    assert got.slope.value == pytest.approx(slope)
    assert got.slope_difference.value == pytest.approx(2 * half_difference)
    assert got.direct.value == pytest.approx(direct)  # their intercept
    assert got.indirect.value == pytest.approx(slope * dx.mean())
    assert got.total.value == pytest.approx(dy.mean())
    assert got.total.value == pytest.approx(got.direct.value + got.indirect.value)
    assert got.share.value == pytest.approx(got.indirect.value / dy.mean())


def test_noise_free_coefficients_are_found_exactly():
    rng = np.random.default_rng(1)
    means = np.array([0.0, 0.3, 0.6, 0.5, 0.8, 1.1])
    x = means + 0.1 * rng.normal(size=(8, 6))
    centre = (x.mean(axis=0)[0] + x.mean(axis=0)[3]) / 2
    # A slope that changes along the sweep: exactly the model, linear within a cell.
    y = (1.2 - 0.8 * (x.mean(axis=0) - centre)) * (x - x.mean(axis=0)) + rng.normal(size=(8, 1)) + rng.normal(size=6)
    got = mediation(made(x, y))
    assert got.slope.value == pytest.approx(1.2)
    assert (got.slope.low, got.slope.high) == (pytest.approx(1.2), pytest.approx(1.2))
    assert got.slope_difference.value == pytest.approx(0, abs=1e-9)
    assert got.indirect.value == pytest.approx(1.2 * got.flattening.value)
    assert got.indirect.high - got.indirect.low > 0.99 * 1.2 * (got.flattening.high - got.flattening.low) > 0


def test_effects_of_seeds_and_cells_do_not_matter():
    rng = np.random.default_rng(2)
    runs = study(StudyDesign(seeds=8), 0)
    moved = replace(runs, gain=runs.gain + rng.normal(size=(8, 1)) + rng.normal(size=runs.gain.shape[1]))
    before, after = mediation(runs).slope, mediation(moved).slope
    assert (after.value, after.low) == (pytest.approx(before.value), pytest.approx(before.low))


def test_rho_acting_by_another_way_does_not_disturb_it():
    design = StudyDesign(mechanism="confounded_sweep", seeds=200, reliability=0.8, scope="cell")
    got = mediation(study(design, 0))
    assert got.total.value == pytest.approx(0.6, abs=0.06)
    assert got.indirect.value == pytest.approx(0, abs=0.06)


def test_a_common_cause_of_the_runs_looks_like_the_full_mechanism():
    got = mediation(study(StudyDesign(mechanism="confounded_runs", seeds=200, reliability=1.0, scope="cell"), 0))
    assert got.slope.value == pytest.approx(1.2, abs=0.1)


def test_errors_of_measurement_attenuate_and_are_corrected():
    design = StudyDesign(mechanism="full", seeds=300, reliability=0.6, scope="cell")
    runs = study(design, 0)
    corrected, attenuated = mediation(runs), mediation(replace(runs, repeats=np.stack([runs.flatness] * 2)))
    assert corrected.slope.value == pytest.approx(1.2, abs=0.12)
    assert attenuated.slope.value == pytest.approx(1.2 * 0.75, abs=0.1)  # two measurements: 2 * 0.6 / 1.6
    assert corrected.residual_ratio == pytest.approx(design.noise_sd / design.run_sd, rel=0.1)


def test_without_a_repeated_measurement_it_is_not_decided():
    runs = replace(study(StudyDesign(), 0), repeats=None)
    got = mediation(runs)
    assert not got.decided
    assert not got.corrected
    assert got.reason == "not decided: the reliability of sharpness was not measured (no column sharpness_repeat)"


def test_a_metric_of_nothing_is_not_decided():
    design = StudyDesign(seeds=8)
    runs = paired_runs(design.draw(1), metric="decoy", arm="arm1", reference="arm0", chosen=design.chosen)
    got = mediation(runs)
    assert "too little true variation" in got.reason
    assert got.indirect.low == -math.inf
    flat = mediation(made(np.ones((8, 4)), np.random.default_rng(0).normal(size=(8, 4))))
    assert not flat.decided
    assert math.isnan(flat.slope.value)
    assert (flat.robustness, flat.robustness_low) == (0.0, 0.0)


def test_share_only_where_the_total_gain_excludes_zero():
    small = mediation(study(StudyDesign(gain=0.01, noise_sd=1.0), 0))
    assert small.total.low <= 0 <= small.total.high
    assert small.share is None
    assert mediation(study(StudyDesign(gain=3.0), 0)).share is not None


def test_fewer_than_six_seeds_bound_nothing():
    got = mediation(study(StudyDesign(seeds=5), 0))
    assert not got.decided
    assert (got.total.low, got.indirect.high) == (-math.inf, math.inf)


# -- sensitivity to confounding -----------------------------------------------------------------------------


def residual(v: np.ndarray, *others: np.ndarray) -> np.ndarray:
    z = np.column_stack(others)
    return v - z @ np.linalg.lstsq(z, v, rcond=None)[0]


def test_bias_of_an_omitted_cause_is_exactly_the_formula():
    """With the cause's own partial R2 in the sample, the bound meets the change of the slope when it is included."""
    rng = np.random.default_rng(3)
    cause = rng.normal(size=(9, 2))
    x = 0.8 * cause + rng.normal(size=(9, 2)) + [0, 0.8]
    y = x + 1.5 * cause + rng.normal(size=(9, 2))
    got = mediation(made(x, y))
    dx, dy, du = (v[:, 1] - v[:, 0] for v in (x, y, cause))
    fixed = np.ones(9), x.sum(axis=1) - x.sum(axis=1).mean()
    full = np.linalg.lstsq(np.column_stack([dx, du, *fixed]), dy, rcond=None)[0][0]
    gain_r2 = np.corrcoef(residual(dy, dx, *fixed), residual(du, dx, *fixed))[0, 1] ** 2
    flatness_r2 = np.corrcoef(residual(dx, *fixed), residual(du, *fixed))[0, 1] ** 2
    wide = got.under_confounding(gain_r2, flatness_r2)
    bias = abs(got.slope.value - full) * abs(dx.mean())
    assert got.indirect.low - wide.low == pytest.approx(bias)
    assert wide.high - got.indirect.high == pytest.approx(bias)


@pytest.mark.parametrize("f", [0.05, 0.5, 1.0, 4.0])
def test_robustness_value_is_the_strength_that_makes_the_slope(f):
    r2 = robustness_value(f)
    assert 0 < r2 < 1
    assert math.sqrt(r2 * r2 / (1 - r2)) == pytest.approx(f)
    assert robustness_value(-f) == r2


def test_robustness_brings_estimate_and_interval_to_zero():
    got = mediation(study(StudyDesign(seeds=12, reliability=0.9, scope="cell", gain=1.5), 0))
    assert 0 < got.robustness_low < got.robustness < 1
    bias = got.indirect.low - got.under_confounding(got.robustness, got.robustness).low
    assert bias == pytest.approx(got.indirect.value)
    wide = got.under_confounding(got.robustness_low, got.robustness_low)
    assert got.indirect.low - wide.low == pytest.approx(got.slope.low * got.flattening.value)
    assert got.under_confounding(0, 0.5).low == got.indirect.low
    for bad in ((-0.1, 0.1), (0.1, 1.0), (1.1, 0.1), (math.nan, 0.1)):
        with pytest.raises(InputError, match="gain_r2"):
            got.under_confounding(*bad)


def test_calibration_in_brief():
    """Coverage with 8 seeds, and of the sensitivity analysis under confounding of the true strength."""
    inside: dict[str, list[bool]] = {"indirect": [], "direct": [], "confounded": [], "naive": []}
    for s in range(120):
        design = StudyDesign(mechanism="half", seeds=8, reliability=(0.6, 0.8, 0.9, 1.0)[s % 4], scope="cell")
        got = mediation(study(design, s))
        inside["indirect"].append(got.indirect.low <= 0.3 <= got.indirect.high)
        inside["direct"].append(got.direct.low <= 0.3 <= got.direct.high)
        design = replace(design, mechanism="confounded_all")
        got = mediation(study(design, s))
        wide = got.under_confounding(design.cause_gain_r2, CAUSE_R2)
        inside["confounded"].append(wide.low <= 0 <= wide.high)
        inside["naive"].append(got.indirect.low <= 0 <= got.indirect.high)
    for name in ("indirect", "direct", "confounded"):
        assert np.mean(inside[name]) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 120), name
    assert np.mean(inside["naive"]) < 0.5


# -- sign agreement -----------------------------------------------------------------------------------------


def brute(gain: list[int], flatness: list[int]) -> dict[float, float]:
    """Distribution of the share of agreement over all pairings, ties counting half."""
    out: dict[float, float] = {}
    for order in itertools.permutations(range(len(gain))):
        share = sum((1 + np.sign(gain[i]) * np.sign(flatness[j])) / 2 for i, j in enumerate(order)) / len(gain)
        out[round(share, 9)] = out.get(round(share, 9), 0) + 1 / math.factorial(len(gain))
    return out


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=40)
def test_sign_agreement_is_the_enumeration_of_all_pairings(pairs):
    gain, flatness = [a for a, _ in pairs], [b for _, b in pairs]
    got = sign_agreement(gain, flatness)
    assert got.agree == sum(a * b > 0 for a, b in pairs)
    assert got.ties == sum(a * b == 0 for a, b in pairs)
    assert got.agreement == pytest.approx((got.agree + got.ties / 2) / len(pairs))
    chance = brute(gain, flatness)
    assert got.implied == pytest.approx(sum(share * p for share, p in chance.items()))
    far = abs(got.agreement - got.implied)
    expected = sum(p for share, p in chance.items() if abs(share - got.implied) >= far - 1e-9)
    assert got.p == pytest.approx(expected)
    assert sum(p for share, p in chance.items() if share < got.null_low - 1e-9) <= 0.025
    assert sum(p for share, p in chance.items() if share > got.null_high + 1e-9) <= 0.025


def test_all_better_and_all_flatter_prove_nothing():
    got = sign_agreement([0.3] * 8, [0.1] * 8)
    assert (got.agreement, got.implied, got.p) == (1.0, 1.0, 1.0)
    assert (got.null_low, got.null_high) == (1.0, 1.0)


def test_sign_agreement_without_ties_is_fishers_test_with_clopper_and_pearsons_interval():
    gain = [1, 1, 1, 1, 1, -1, -1, -1, -1, 1]
    flatness = [1, 1, 1, 1, -1, -1, -1, -1, 1, 1]
    got = sign_agreement(gain, flatness)
    assert got.p == pytest.approx(scipy_stats.fisher_exact([[5, 1], [1, 3]]).pvalue)
    exact = scipy_stats.binomtest(8, 10).proportion_ci(method="exact")
    assert (got.low, got.high) == (pytest.approx(exact.low), pytest.approx(exact.high))


@pytest.mark.parametrize(("gain", "flatness"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([[1.0]], [[1.0]])])
def test_bad_signs_are_refused(gain, flatness):
    with pytest.raises(InputError, match="as many finite numbers"):
        sign_agreement(gain, flatness)
    with pytest.raises(InputError, match="confidence"):
        sign_agreement([1.0], [1.0], confidence=0)
