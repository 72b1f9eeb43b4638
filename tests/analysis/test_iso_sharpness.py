"""The iso-sharpness test against least squares, two-stage least squares, identities, and studies of known truth."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.iso_sharpness import NEAREST_RADII, _polygon, iso_sharpness
from analysis.reliability import PairedRuns, paired_runs
from analysis.synthetic import StudyDesign
from benchmarks.verdict_calibration import naive_ancova


def study(design: StudyDesign, seed: int) -> PairedRuns:
    return paired_runs(design.draw(seed), metric="sharpness", arm="arm1", reference="arm0", chosen=design.chosen)


def made(x: np.ndarray, y: np.ndarray, repeats: np.ndarray | None = None) -> PairedRuns:
    """Runs with the reference's radii first; the middle one of each arm is the chosen one."""
    n, k = x.shape
    half = k // 2
    radii = np.tile(np.arange(1.0, half + 1), 2)
    return PairedRuns("m", "b", "a", n, radii, np.arange(k) >= half, (half // 2, half + half // 2), y, x, repeats)


def exact(direct: float = 0.7, slope: float = 1.3, curve: float = -0.4, interaction: float = 0.0, runs_sd: float = 0.0):
    """A study without noise in the gain; flatness varies between runs only as asked for."""
    rng = np.random.default_rng(0)
    means = np.concatenate([np.arange(6) * 0.3, np.arange(6) * 0.3 + 0.5])
    x = means + runs_sd * rng.normal(size=(8, 12))
    low, high = means[6], means[5]
    arm = np.where(np.arange(12) >= 6, 0.5, -0.5)
    centred = x - (low + high) / 2
    y = rng.normal(size=(8, 1)) + direct * arm + slope * centred + curve * centred**2 + interaction * arm * centred
    return x, y, low, high


def test_noise_free_coefficients_are_found_exactly():
    x, y, low, high = exact(interaction=0.25)
    got = iso_sharpness(made(x, y, np.stack([x, x])))
    assert got.decided
    assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))
    assert (got.radii_reference, got.radii_arm) == (4, 4)
    total = (y[:, 9] - y[:, 3]).mean()
    for fit in (got.sweep, got.retest):
        assert fit.direct.value == pytest.approx(0.7)
        assert fit.slope.value == pytest.approx(1.3)
        assert fit.interaction.value == pytest.approx(0.25)
        assert (fit.direct.low, fit.direct.high) == (pytest.approx(0.7), pytest.approx(0.7))
        for part, truth in ((fit.indirect, total - 0.7), (fit.share, 1 - 0.7 / total)):
            assert (part.low, part.value, part.high) == pytest.approx((truth, truth, truth))
    assert got.interpolated.value == pytest.approx(0.7, abs=0.02)  # chords of a parabola


def dense(runs: PairedRuns, instrument: str) -> np.ndarray:
    """(arm, slope, interaction, curve) with seed dummies, row by row, by two-stage least squares."""
    x, n = runs.flatness, runs.n
    rows, z_rows, y = [], [], []
    mean = x.mean(axis=0)
    centre = (max(mean[runs.in_arm == a].min() for a in (0, 1)) + min(mean[runs.in_arm == a].max() for a in (0, 1))) / 2
    for s in range(n):
        m = np.delete(x, s, axis=0).mean(axis=0)
        low = max(m[runs.in_arm].min(), m[~runs.in_arm].min())
        high = min(m[runs.in_arm].max(), m[~runs.in_arm].max())
        for c in range(x.shape[1]):
            if low <= m[c] <= high:
                arm = 0.5 if runs.in_arm[c] else -0.5
                fixed = [arm * (m[c] - centre), (m[c] - centre) ** 2, *np.eye(n)[s]]
                rows.append([arm, x[s, c], *fixed])
                z_rows.append([arm, m[c] if instrument == "sweep" else x[s, c], *fixed])
                y.append(runs.gain[s, c])
    r, z = np.array(rows), np.array(z_rows)
    fitted = z @ np.linalg.lstsq(z, r, rcond=None)[0]
    return np.linalg.lstsq(fitted, np.array(y), rcond=None)[0][:4]


@pytest.mark.parametrize("how", ["sweep", "retest"])
def test_fits_are_two_stage_least_squares(how):
    runs = study(StudyDesign(mechanism="half", curvature=-0.8), 3)
    runs = replace(runs, repeats=np.stack([runs.flatness] * 2))  # without error "retest" is least squares
    fit = getattr(iso_sharpness(runs), how)
    expected = dense(runs, how)
    assert [fit.direct.value, fit.slope.value, fit.interaction.value] == pytest.approx(list(expected[:3]), rel=1e-8)


def test_retest_is_the_method_of_moments_with_the_measured_error_variance():
    """S_x1x2 = S_xbar^2 - S_d^2 / 4: what is taken off is the variance of the error of the mean of two."""
    runs = study(StudyDesign(reliability=0.6), 0)
    first, second = runs.repeats
    mean, difference = (first + second) / 2, first - second
    assert (first * second).sum() == pytest.approx((mean**2).sum() - (difference**2).sum() / 4)
    attenuated = iso_sharpness(replace(runs, repeats=np.stack([runs.flatness] * 2)))
    assert iso_sharpness(runs).retest.slope.value > attenuated.retest.slope.value


def test_errors_of_measurement_manufacture_an_effect_of_the_mask_and_the_corrections_undo_it():
    design = StudyDesign(mechanism="full", seeds=200, reliability=0.6, gain=1.5)
    runs = study(design, 0)
    got = iso_sharpness(runs)
    assert naive_ancova(runs).low > 0.5
    for fit in (got.sweep, got.retest):
        assert abs(fit.direct.value) < 0.2
        assert fit.slope.value == pytest.approx(3.0, abs=0.3)


def test_common_causes_within_a_cell_do_not_disturb_the_sweep():
    design = StudyDesign(mechanism="confounded_runs", seeds=200, run_sd=0.3, reliability=1.0)
    got = iso_sharpness(study(design, 0))
    assert got.sweep.direct.value == pytest.approx(0.6, abs=0.06)
    assert got.sweep.slope.value == pytest.approx(0.0, abs=0.1)
    assert got.retest.slope.low > 0.2


def test_arms_without_overlap_are_not_decided():
    x, y, _, _ = exact()
    apart = x + np.where(np.arange(12) >= 6, 3.0, 0.0)
    got = iso_sharpness(made(apart, y))
    assert not got.decided
    assert got.reason == (
        "no overlap: not decided; every radius of b is flatter than every radius of a, by at least 2.00 log units, so "
        "that mask and sharpness cannot be told apart; extend their sweeps towards each other"
    )
    assert got.low > got.high
    assert got.sweep is got.interpolated is None
    smaller = iso_sharpness(made(x + np.where(np.arange(12) >= 6, 0.6, 0.0), y))
    assert smaller.reason == (
        "overlap too small: not decided; the common range holds 2 radii of a and 2 of b, 2 of each and 5 in all are "
        "needed"
    )


@pytest.mark.parametrize(
    ("centre", "scale", "counts"), [(0.75, 0.9, (4, 6)), (0.75, 0.5, (2, 6)), (0.9, 0.3, (1, 6)), (1.3, 0.9, (3, 4))]
)
def test_five_radii_of_which_two_of_each_are_enough(centre, scale, counts):
    """The arm's sweep within the reference's: the fit stays exact down to two radii of one arm."""
    x, _, _, _ = exact(runs_sd=0.01)
    x[:, 6:] = centre + scale * (x[:, 6:] - 1.25)
    y = 2 * x - 0.4 * (x - 0.7) ** 2 + np.where(np.arange(12) >= 6, 0.7, 0.0)
    got = iso_sharpness(made(x, y))
    assert (got.radii_reference, got.radii_arm) == counts
    assert got.decided == (min(counts) >= 2)
    if got.decided:
        assert got.sweep.direct.value == pytest.approx(0.7, abs=0.02)


def test_one_radius_each_is_not_decided():
    x = np.random.default_rng(0).normal(size=(8, 2))
    got = iso_sharpness(made(x, x))
    assert got.reason == "no sweep: not decided; a and b have one radius each, 3 of one are needed"


# -- an arm with a single radius, the baseline -------------------------------------------------------------


def against_one(x: np.ndarray, y: np.ndarray, at: int, flip: bool = False) -> PairedRuns:
    """Cell ``at`` is the reference's only one (the arm's, if flipped), the others the other arm's."""
    one = np.arange(x.shape[1]) == at
    other = int(np.flatnonzero(~one)[0])
    cells = (other, at) if flip else (at, other)
    radii = np.where(one, 0.0, np.arange(x.shape[1]))
    return PairedRuns("m", "b", "a", len(x), radii, one if flip else ~one, cells, y, x, np.stack([x, x]))


@pytest.mark.parametrize("flip", [False, True])
def test_against_a_single_radius_the_curve_is_read_off_exactly(flip):
    rng = np.random.default_rng(4)
    x = np.array([0.1, 0.4, 0.8, 1.3, 0.6]) + 0.001 * rng.normal(size=(8, 5))
    lone = np.arange(5) == 4
    y = rng.normal(size=(8, 1)) + 1.3 * x - 0.4 * x**2 + np.where(lone, 0.0, 0.7)
    got = iso_sharpness(against_one(x, y, 4, flip))
    assert got.decided
    assert (got.radii_reference, got.radii_arm) == ((4, 1) if flip else (1, 4))
    assert got.low == got.high == pytest.approx(x[:, 4].mean())
    for fit in (got.sweep, got.retest):
        assert fit.direct.value == pytest.approx(-0.7 if flip else 0.7, abs=2e-3)
        assert math.isnan(fit.interaction.value)
        assert (fit.interaction.low, fit.interaction.high) == (-math.inf, math.inf)
    straight = np.interp(x[:, 4].mean(), x.mean(axis=0)[:4], y.mean(axis=0)[:4]) - y.mean(axis=0)[4]
    assert got.interpolated.value == pytest.approx(-straight if flip else straight)


def test_only_the_nearest_radii_are_read_off():
    rng = np.random.default_rng(5)
    x = np.array([-5.0, 0.1, 0.4, 0.8, 1.3, 6.0, 0.6]) + 0.01 * rng.normal(size=(8, 7))
    y = 1.3 * x + np.where(np.arange(7) == 6, 0.0, 0.7)
    got = iso_sharpness(against_one(x, y, 6))
    y[:, [0, 5]] += 10 * rng.normal(size=(8, 2))
    far = iso_sharpness(against_one(x, y, 6))
    assert far.radii_arm == NEAREST_RADII == 4
    assert (far.sweep.direct, far.sweep.slope) == (got.sweep.direct, got.sweep.slope)


def test_a_single_radius_outside_the_sweep_or_a_short_sweep_is_not_decided():
    x = np.array([0.1, 0.4, 0.8, 1.5]) + np.zeros((8, 1))
    assert iso_sharpness(against_one(x, x, 3)).reason == (
        "no overlap: not decided; every radius of a is flatter than every radius of b, by at least 0.70 log units, so "
        "that mask and sharpness cannot be told apart; compare b with an arm that has a sweep too"
    )
    short = iso_sharpness(against_one(x[:, :3], x[:, :3], 1))
    assert short.reason == (
        "overlap too small: not decided; a has a single radius, so that 3 of b are needed, got 2"
    )  # fmt: skip


def test_against_a_single_radius_in_brief():
    """Coverage of the truth with 8 seeds, and that it decides."""
    inside = []
    for s in range(100):
        truth = ("full", "half", "none")[s % 3]
        fit = iso_sharpness(study(StudyDesign(mechanism=truth, baseline=True, scope="cell"), s)).sweep
        direct = {"full": 0.0, "half": 0.3, "none": 0.6}[truth]
        inside.append(fit is not None and fit.direct.low <= direct <= fit.direct.high)
    assert np.mean(inside) >= 0.95 - 0.06


def test_interpolation_is_over_all_sets_of_seeds_and_those_without_overlap_count_to_both_tails():
    rng = np.random.default_rng(7)
    x, y, _, _ = exact(runs_sd=0.05)
    x, y = x[:7], y[:7] + 0.2 * rng.normal(size=(7, 12))
    x[0, 6:] += 1.6  # this seed alone has no overlap
    values = []
    for chosen in itertools.product((False, True), repeat=7):
        if any(chosen):
            mx, my = x[list(chosen)].mean(axis=0), y[list(chosen)].mean(axis=0)
            low, high = max(mx[:6].min(), mx[6:].min()), min(mx[:6].max(), mx[6:].max())
            if low <= high:
                grid = np.linspace(low, high, 33)
                values.append(np.mean(np.interp(grid, mx[6:], my[6:]) - np.interp(grid, mx[:6], my[:6])))
    lost, values = 127 - len(values), np.sort(values)
    assert lost == 1
    got = iso_sharpness(made(x, y), confidence=0.9).interpolated
    tail = 6 - lost  # 0.05 x 128 = 6.4 of each tail
    assert (got.low, got.high) == (pytest.approx(values[tail - 1]), pytest.approx(values[-tail]))


def test_polygons_are_numpys():
    rng = np.random.default_rng(6)
    x, y, grid = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), np.sort(rng.uniform(-2, 2, size=(5, 9)))
    for row in range(5):
        order = x[row].argsort()
        inside = np.clip(grid[row], x[row].min(), x[row].max())
        expected = np.interp(inside, x[row][order], y[row][order])
        assert _polygon(inside[None], x[[row]], y[[row]])[0] == pytest.approx(expected)
    assert _polygon(np.array([[2.0]]), np.array([[2.0]]), np.array([[5.0]])) == 5.0
    assert _polygon(np.array([[1.0]]), np.array([[1.0, 1.0, 2.0]]), np.array([[3.0, 3.0, 9.0]])) == 3.0


def test_collinear_designs_are_not_decided():
    x, y, _, _ = exact()
    flat = np.where(np.arange(12) >= 6, 1.0, 1.0) * np.ones_like(x)
    got = iso_sharpness(made(flat, y))
    assert not got.decided
    assert "cannot be told apart" in got.reason


def test_share_only_where_the_total_gain_excludes_zero():
    x, y, _, _ = exact(runs_sd=0.05)
    rng = np.random.default_rng(1)
    noisy = iso_sharpness(made(x, y + 5 * rng.normal(size=y.shape)))
    assert noisy.sweep.share is None
    assert iso_sharpness(made(x, y)).sweep.share is not None
    assert iso_sharpness(made(x, y)).retest is None


def test_too_few_seeds_give_unbounded_intervals():
    got = iso_sharpness(study(StudyDesign(seeds=5), 0))
    assert got.sweep.direct.low == -math.inf
    assert got.sweep.p_direct > 0.05


def test_lines_at_equal_sharpness_are_interpolated_exactly():
    x, y, _, _ = exact(curve=0.0)
    assert iso_sharpness(made(x, y)).interpolated.value == pytest.approx(0.7, rel=1e-9)


def test_calibration_in_brief():
    """Coverage of "no effect of the mask", 8 and 12 seeds: the full simulation is benchmarks/verdict_calibration."""
    inside: dict[str, list[bool]] = {"sweep": [], "retest": [], "naive": []}
    for seeds in (8, 12):
        design = StudyDesign(mechanism="full", seeds=seeds, reliability=0.6, gain=1.5)
        for s in range(90):
            runs = study(design, s)
            got = iso_sharpness(runs)
            inside["naive"].append(naive_ancova(runs).low <= 0)
            for name, fit in (("sweep", got.sweep), ("retest", got.retest)):
                if fit is not None:
                    inside[name].append(fit.direct.low <= 0 <= fit.direct.high)
    assert np.mean(inside["sweep"]) >= 0.95 - 0.045
    assert np.mean(inside["retest"]) >= 0.95 - 0.045
    assert np.mean(inside["naive"]) <= 0.6
