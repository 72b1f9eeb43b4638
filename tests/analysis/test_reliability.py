"""Studies as arrays, and test-retest reliability against the analysis of variance and its own coverage."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from analysis.reliability import paired_runs, reliability, run_grid
from analysis.synthetic import SHARE, StudyDesign
from masks.errors import InputError

DESIGN = StudyDesign(seeds=6, radii=3)


@pytest.fixture
def frame() -> pd.DataFrame:
    return DESIGN.draw(0)


def paired(frame: pd.DataFrame, **changes):
    settings = {"metric": "sharpness", "arm": "arm1", "reference": "arm0", "chosen": DESIGN.chosen} | changes
    return paired_runs(frame, **settings)


# -- the study ----------------------------------------------------------------------------------------------


def test_grid_is_the_frame_whatever_its_order(frame):
    shuffled = frame.sample(frac=1, random_state=1).reset_index(drop=True)
    grid = run_grid(shuffled, ["test_error", "sharpness"])
    assert grid.seeds == tuple(range(6))
    assert len(grid.cells) == 6
    for i, seed in enumerate(grid.seeds):
        for j, (arm, rho) in enumerate(grid.cells):
            row = frame[(frame.seed == seed) & (frame.arm == arm) & (frame.rho == rho)]
            assert grid.values["sharpness"][i, j] == row.sharpness.item()


def test_paired_runs_have_the_units_of_the_verdict(frame):
    runs = paired(frame)
    at = frame[frame.rho == DESIGN.chosen["arm0"]].set_index(["arm", "seed"])
    error = at.test_error["arm0"] - at.test_error["arm1"]
    assert runs.contrast(runs.gain) == pytest.approx(100 * error.to_numpy())
    logs = (np.log(at.sharpness) + np.log(at.sharpness_repeat)) / 2
    assert runs.contrast(runs.flatness) == pytest.approx((logs["arm0"] - logs["arm1"]).to_numpy())
    assert runs.in_arm.sum() == 3
    assert runs.repeats.shape == (2, 6, 6)
    assert paired(frame.drop(columns="sharpness_repeat")).repeats is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="test_error"), "unknown column 'test_error'"),
        (lambda f: f.iloc[1:], "1 runs are missing: 35 of 6 seeds x 6 .* for one arm0 at rho = 0.02, seed 0;"),
        (lambda f: pd.concat([f, f.iloc[:2]]), "2 of 38 runs have the arm, seed and rho of another"),
        (lambda f: f.assign(test_error=100 * f.test_error), "fraction from 0 to 1"),
        (lambda f: f.assign(sharpness=f.sharpness.where(f.seed > 0)), "sharpness: 6 of 36 runs have no finite"),
        (lambda f: f.assign(sharpness=f.sharpness - f.sharpness.median()), "18 of 36 values are not positive"),
        (lambda f: f.assign(rho=math.nan), "column rho must hold finite numbers"),
        (lambda f: f.assign(sharpness="high"), "column sharpness must hold numbers"),
        (lambda f: f[f.seed == 0], "at least 2 seeds"),
        (lambda f: f.iloc[:0], "unknown arm 'arm0'"),
    ],
)
def test_studies_that_cannot_be_judged_are_refused(frame, change, message):
    with pytest.raises(InputError, match=message):
        paired(change(frame))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "arm0"}, "compared with itself"),
        ({"arm": "arm7"}, "unknown arm 'arm7'; did you mean"),
        ({"chosen": {}}, "arm0 has 3 radii; name the one"),
        ({"chosen": {"arm0": 0.02, "arm1": 0.5}}, "arm arm1 was not run at rho = 0.5, only at 0.02,"),
    ],
)
def test_contrasts_that_do_not_exist_are_refused(frame, change, message):
    with pytest.raises(InputError, match=message):
        paired(frame, **change)


# -- reliability --------------------------------------------------------------------------------------------


def anova_icc(first: np.ndarray, second: np.ndarray) -> float:
    """ICC(C,1) from the two-way table of runs by measurements, by sums of squares."""
    table = np.stack([first, second], axis=1)
    runs = 2 * ((table.mean(axis=1) - table.mean()) ** 2).sum() / (len(first) - 1)
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    error = (rest**2).sum() / (len(first) - 1)
    return (runs - error) / (runs + error)


def test_pooled_reliability_is_the_intraclass_correlation(frame):
    got = reliability(frame, "sharpness", scope="pooled")
    first, second = np.log(frame.sharpness.to_numpy()), np.log(frame.sharpness_repeat.to_numpy())
    assert got.value == pytest.approx(anova_icc(first, second), rel=1e-12)
    assert got.error_sd == pytest.approx((first - second).std(ddof=1) / math.sqrt(2), rel=1e-12)
    assert got.max_correlation == pytest.approx(math.sqrt(got.value))
    assert (got.scale, got.n_runs, got.df) == ("log", 36, 35)


def test_a_shift_between_the_subsets_does_not_count(frame):
    shifted = frame.assign(sharpness_repeat=3 * frame.sharpness_repeat)
    for scope in ("pooled", "within_seed", "within_cell"):
        a, b = reliability(frame, "sharpness", scope=scope), reliability(shifted, "sharpness", scope=scope)
        assert (a.value, a.low) == (pytest.approx(b.value), pytest.approx(b.low))


def test_metrics_that_are_not_positive_stay_raw(frame):
    signed = frame.assign(sharpness=frame.sharpness - 2, sharpness_repeat=frame.sharpness_repeat - 2)
    assert reliability(signed, "sharpness").scale == "raw"


def test_perfect_and_absent_reliability(frame):
    same = reliability(frame.assign(sharpness_repeat=frame.sharpness), "sharpness")
    assert (same.value, same.low, same.high, same.error_sd) == (1.0, 1.0, 1.0, 0.0)
    assert abs(reliability(StudyDesign(seeds=60).draw(1), "decoy").value) < 0.1


@pytest.mark.parametrize(("scope", "of"), [("within_seed", "sweep"), ("within_cell", "cell")])
@pytest.mark.parametrize("truth", [0.6, 0.9])
def test_the_interval_covers_what_the_studies_were_drawn_with(scope, of, truth):
    design = StudyDesign(seeds=8, radii=4, reliability=truth, scope=of)
    found = [reliability(design.draw(s), "sharpness", scope=scope) for s in range(200)]
    assert np.median([f.value for f in found]) == pytest.approx(truth, abs=0.03)
    assert np.mean([f.low <= truth <= f.high for f in found]) >= 0.905
    assert np.mean([f.error_sd for f in found]) == pytest.approx(design.error_sd, rel=0.02)


def test_reliability_bounds_the_correlation():
    design = StudyDesign(seeds=300, radii=4, noise_sd=1e-6, seed_sd=0, reliability=0.6)
    runs = paired(design.draw(0), chosen=design.chosen)
    x, y = runs.repeats[0], runs.gain
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    assert np.corrcoef(x.ravel(), y.ravel())[0, 1] == pytest.approx(math.sqrt(0.6), abs=0.02)


def test_bad_reliability_is_refused(frame):
    with pytest.raises(InputError, match="sharpness is the same in all runs"):
        reliability(frame.assign(sharpness=1.0, sharpness_repeat=1.0), "sharpness")
    with pytest.raises(InputError, match="unknown scope"):
        reliability(frame, "sharpness", scope="seed")
    with pytest.raises(InputError, match="confidence"):
        reliability(frame, "sharpness", confidence=1.0)
    with pytest.raises(InputError, match="unknown column 'weight_norm_repeat'"):
        reliability(frame, "weight_norm")
    with pytest.raises(InputError, match="1 seeds x 6 pairs"):
        reliability(frame[frame.seed == 0], "sharpness", scope="within_cell")


# -- the synthetic studies themselves -----------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", SHARE)
@pytest.mark.parametrize("curvature", [0.0, -0.8])
def test_synthetic_studies_have_the_gain_and_flattening_they_say(mechanism, curvature):
    design = StudyDesign(mechanism=mechanism, seeds=4000, radii=3, curvature=curvature, reliability=0.9)
    runs = paired(design.draw(1), chosen=design.chosen)
    gain, flatness = runs.contrast(runs.gain), runs.contrast(runs.flatness)
    assert gain.mean() == pytest.approx(design.gain, abs=4 * gain.std() / 4000**0.5)
    assert flatness.mean() == pytest.approx(design.flattening, abs=4 * flatness.std() / 4000**0.5)


def test_synthetic_designs_are_checked():
    for bad in ({"mechanism": "magic"}, {"reliability": 0.0}, {"scope": "run"}, {"arms": 1}, {"seeds": 0}):
        with pytest.raises(InputError):
            StudyDesign(**bad)
    with pytest.raises(InputError, match="needs a flattening"):
        StudyDesign(flattening=0.0)
    assert StudyDesign(flattening=0.0, mechanism="none").slope == 0.0
    three = StudyDesign(arms=3).draw(0)
    assert sorted(three.arm.unique()) == ["arm0", "arm1", "arm2"]


def test_a_synthetic_baseline_is_the_reference_at_its_chosen_radius():
    whole, lone = StudyDesign(seeds=4), StudyDesign(seeds=4, baseline=True)
    frame, left = whole.draw(0), lone.draw(0)
    kept = frame[(frame.arm == "arm1") | (frame.rho == whole.chosen["arm0"])]
    assert (left.drop(columns="rho") == kept.drop(columns="rho")).all(axis=None)
    assert set(left.rho[left.arm == "arm0"]) == {0.0} == {lone.chosen["arm0"]}
    assert lone.chosen["arm1"] == whole.chosen["arm1"]


def test_synthetic_test_errors_are_counts_of_images():
    design = StudyDesign(seeds=4, test_images=700)
    counts = 700 * design.draw(0).test_error
    assert counts.to_numpy() == pytest.approx(counts.round().to_numpy(), abs=1e-9)
    assert (design.draw(0).test_error - StudyDesign(seeds=4).draw(0).test_error).abs().max() <= 0.5 / 700 + 1e-12
