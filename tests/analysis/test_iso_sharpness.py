"""The iso-sharpness test against least squares, two-stage least squares, identities, and studies of known truth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.iso_sharpness import iso_sharpness
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
    assert got.reason.startswith("no overlap: not decided")
    assert got.low > got.high
    assert got.sweep is got.interpolated is None
    small = iso_sharpness(made(x + np.where(np.arange(12) >= 6, 0.3, 0.0), y))
    assert small.reason == (
        "overlap too small: not decided; the common range holds 3 radii of a and 3 of b, 3 of each are needed"
        if small.radii_arm < 3 else ""
    )  # fmt: skip
    smaller = iso_sharpness(made(x + np.where(np.arange(12) >= 6, 0.6, 0.0), y))
    assert "the common range holds 2 radii of a and 2 of b, 3 of each are needed" in smaller.reason


def test_one_radius_is_not_decided():
    x = np.random.default_rng(0).normal(size=(8, 2))
    got = iso_sharpness(made(x, x))
    assert not got.decided


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
