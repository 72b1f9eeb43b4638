"""Rank correlations against scipy, brute force over groups, and explicit resampling."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from analysis import association
from analysis.association import adjusted, associations, secondary_metrics
from analysis.stats import holm
from analysis.synthetic import StudyDesign
from masks.errors import InputError

DESIGN = StudyDesign(seeds=5, radii=3, arms=3)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """With ties in both columns."""
    drawn = DESIGN.draw(0)
    return drawn.assign(sharpness=drawn.sharpness.round(1), test_error=drawn.test_error.round(3))


def find(found, coefficient, scope, metric="sharpness", target="test_error"):
    (one,) = [f for f in found if (f.metric, f.target, f.coefficient) == (metric, target, coefficient)
              and f.scope.startswith(scope)]  # fmt: skip
    return one


@pytest.fixture(scope="module")
def found(frame):
    return associations(frame, ["sharpness", "decoy"], resamples=199)


def by_group(frame: pd.DataFrame, keys: list[str], coefficient) -> float:
    values = [coefficient(g.sharpness, g.test_error)[0] for _, g in frame.groupby(keys) if g.sharpness.nunique() > 1]
    return float(np.nanmean(values))


NAMES = [("kendall", scipy_stats.kendalltau), ("spearman", scipy_stats.spearmanr)]


@pytest.mark.parametrize(("name", "scipy_one"), NAMES)
def test_values_are_scipys(frame, found, name, scipy_one):
    assert find(found, name, "pooled").value == pytest.approx(scipy_one(frame.sharpness, frame.test_error)[0])
    assert find(found, name, "within_seed").value == pytest.approx(by_group(frame, ["seed"], scipy_one))
    assert find(found, name, "within_arm").value == pytest.approx(by_group(frame, ["arm"], scipy_one))
    gap = frame.test_error - frame.train_error
    assert find(found, name, "pooled", target="gap_given").value == pytest.approx(scipy_one(frame.sharpness, gap)[0])
    # With label noise the gap on clean labels is another number, and has a name of its own.
    same = associations(frame.assign(train_error_clean=frame.train_error), ["sharpness"], resamples=99)
    assert {a.target for a in same} == {"test_error", "gap_given"}
    clean = frame.train_error * np.random.default_rng(0).random(len(frame))
    both = associations(frame.assign(train_error_clean=clean), ["sharpness"], resamples=99)
    assert {a.target for a in both} == {"test_error", "gap_given", "gap_clean"}
    want = scipy_one(frame.sharpness, frame.test_error - clean)[0]
    assert find(both, name, "pooled", target="gap_clean").value == pytest.approx(want)


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
def test_granulated_varies_one_axis_at_a_time(frame, found):
    axes = [["rho", "seed"], ["arm", "seed"], ["arm", "rho"]]
    expected = np.mean([by_group(frame, keys, scipy_stats.kendalltau) for keys in axes])
    assert find(found, "kendall", "granulated").value == pytest.approx(expected)


def test_partial_is_the_correlation_of_residual_ranks(frame, found):
    got = find(found, "partial", "given train_loss, weight_norm, rho")
    ranks = frame[["sharpness", "test_error", "train_loss", "weight_norm", "rho"]].rank()
    z = np.column_stack([np.ones(len(ranks)), ranks.iloc[:, 2:]])
    x, y = (ranks.iloc[:, i] - z @ np.linalg.lstsq(z, ranks.iloc[:, i], rcond=None)[0] for i in (0, 1))
    assert got.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    alone = associations(frame, ["sharpness"], controls=("rho",), resamples=99)
    assert find(alone, "partial", "given rho").scope == "given rho"
    assert not [a for a in associations(frame, ["sharpness"], controls=(), resamples=99) if a.coefficient == "partial"]


def test_bootstrap_draws_are_those_of_resampled_runs(frame):
    x, y = frame.sharpness.to_numpy(), frame.test_error.to_numpy()
    seeds, arms = frame.seed.to_numpy(), np.unique(frame.arm, return_inverse=True)[1]
    weights = np.array([[1, 1, 1, 1, 1], [2, 0, 3, 0, 0], [0, 1, 1, 2, 1.0]])
    whole = np.zeros(len(x), dtype=int)
    for groups in (whole, arms):
        kendall = association._kendall(x, y, groups, seeds, weights)
        spearman = association._spearman([x, y], groups, seeds, weights)
        for row, w in enumerate(weights.astype(int)):
            pick = np.repeat(np.arange(len(x)), w[seeds])
            taus, rhos = [], []
            for g in np.unique(groups):
                inside = pick[groups[pick] == g]
                taus.append(scipy_stats.kendalltau(x[inside], y[inside])[0])
                rhos.append(scipy_stats.spearmanr(x[inside], y[inside])[0])
            assert kendall[row] == pytest.approx(np.mean(taus))
            assert spearman[row] == pytest.approx(np.mean(rhos))
    # A group within one seed counts as often as the seed was drawn.
    within = association._kendall(x, y, seeds, seeds, weights)
    own = [scipy_stats.kendalltau(x[seeds == s], y[seeds == s])[0] for s in range(5)]
    assert within == pytest.approx(weights @ own / weights.sum(axis=1))


def test_simpsons_paradox_is_seen():
    """Sharper seeds are better seeds, but within each seed sharper runs are worse."""
    rows = [{"arm": "a", "seed": s, "rho": r, "test_error": 0.5 - 0.1 * s + 0.01 * r, "m": 1 + s + 0.1 * r}
            for s in range(4) for r in range(4)]  # fmt: skip
    found = associations(pd.DataFrame(rows), ["m"], resamples=99)
    assert find(found, "kendall", "pooled", "m").value < -0.5
    assert find(found, "kendall", "within_seed", "m").value == pytest.approx(1)
    assert find(found, "kendall", "granulated", "m").value == pytest.approx(0)  # 1 along rho, -1 along seeds


def test_permutation_p_by_enumeration():
    rng = np.random.default_rng(0)
    whole, strata = np.zeros(8, dtype=int), np.repeat([0, 1], 4)
    x, y = rng.normal(size=8) + 1.5 * strata, rng.normal(size=8) + 1.5 * strata  # strata that differ in both
    observed, hits = abs(scipy_stats.kendalltau(x, y)[0]), 0
    for first in itertools.permutations(range(4)):
        for second in itertools.permutations(range(4, 8)):
            hits += abs(scipy_stats.kendalltau(x[[*first, *second]], y)[0]) >= observed - 1e-9
    got = association._permutation_p(x, y, whole, strata, 4999, np.random.default_rng(1))
    assert got == pytest.approx(hits / 576, abs=0.03)


def test_p_values_hold_their_level_and_intervals_cover():
    design = StudyDesign(seeds=8, radii=3, mechanism="none")
    rejected, covered = defaultdict(list), defaultdict(list)
    for s in range(120):
        for a in associations(design.draw(s).drop(columns="train_error"), ["decoy"], resamples=99):
            covered[a.coefficient, a.scope].append(a.low <= 0 <= a.high)
            if not math.isnan(a.p):
                rejected[a.scope].append(a.p <= 0.05)
    assert set(rejected) == {"within_seed", "within_arm"}
    assert max(np.mean(r) for r in rejected.values()) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 120)
    assert min(np.mean(c) for c in covered.values()) >= 0.88


def test_what_does_not_vary_has_no_correlation(frame):
    found = associations(frame.assign(sharpness=1.0), ["sharpness"], resamples=99)
    assert all(math.isnan(a.value) and math.isnan(a.low) for a in found if a.metric == "sharpness")


def test_interval_on_fishers_scale_by_hand():
    # z of the study 0.5; draws 0.3, 0.5, 0.7 with s = 0.2; n = 4: 0.2 sqrt(4 / 3) t_{3, 0.975}, t from the table.
    low, high = association._z_interval(np.tanh([0.5, 0.3, 0.5, 0.7]), 4, 0.95)
    half = 0.2 * math.sqrt(4 / 3) * 3.182446305284263
    assert (low, high) == (pytest.approx(math.tanh(0.5 - half)), pytest.approx(math.tanh(0.5 + half)))


def test_a_perfect_correlation_gets_no_interval():
    rows = [{"arm": "a", "seed": s, "rho": r, "test_error": 0.1 * s + 0.01 * r, "m": 1.0 + s + 0.1 * r}
            for s in range(4) for r in range(4)]  # fmt: skip
    (one,) = [a for a in associations(pd.DataFrame(rows), ["m"], resamples=99)
              if (a.coefficient, a.scope) == ("kendall", "within_seed")]  # fmt: skip
    assert one.value == pytest.approx(1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_bad_settings_are_refused(frame):
    for setting in ({"resamples": 10}, {"confidence": 1.0}):
        with pytest.raises(InputError, match="resamples"):
            associations(frame, ["sharpness"], **setting)
    with pytest.raises(InputError, match="unknown column"):
        associations(frame, ["lambda_max"])
    with pytest.raises(InputError, match="at least 2 seeds"):
        associations(frame[frame.seed == 0], ["sharpness"])


def test_secondary_metrics_are_adjusted_and_problems_named():
    design = StudyDesign(seeds=8)
    frame = design.draw(0).assign(signed=0.0, copy=lambda f: 2 * f.sharpness, copy_repeat=lambda f: f.sharpness_repeat)
    names = ["copy", "decoy", "signed"]
    got = secondary_metrics(frame, names, arm="arm1", reference="arm0", chosen=design.chosen)
    assert [g.metric for g in got] == names
    assert "signed: 96 of 96 values are not positive" in got[2].problem
    assert (got[2].flattening, got[2].p_indirect) == (None, 1.0)
    alone = [secondary_metrics(frame, [n], arm="arm1", reference="arm0", chosen=design.chosen)[0] for n in names]
    for key in ("p_flattening", "p_indirect", "p_direct"):
        assert [getattr(g, key) for g in got] == pytest.approx(holm([getattr(a, key) for a in alone]))
    assert got[0].p_flattening == pytest.approx(3 * alone[0].p_flattening)
    assert "not decided" in got[1].problem
    assert got[1].p_indirect == 1.0
    assert secondary_metrics(frame, [], arm="arm1", reference="arm0", chosen=design.chosen) == ()
    several = secondary_metrics(frame, names, arm="arm1", reference="arm0", chosen=design.chosen, num_contrasts=4)
    for one, four in zip(got, several, strict=True):
        assert four.p_flattening == pytest.approx(min(1.0, 4 * one.p_flattening))
    joint = adjusted([*got, *got])  # Holm over both contrasts, from the raw values
    assert [row.p_direct for row in joint] == pytest.approx(holm([row.raw[2] for row in [*got, *got]]))


def test_p_values_of_rank_correlations_are_adjusted_over_all_of_them(found):
    tested = [a for a in found if not math.isnan(a.p)]
    assert len(tested) == 2 * 2 * 2  # metrics, targets, strata
    assert [a.p_holm for a in tested] == pytest.approx(holm([a.p for a in tested]))
    assert all(math.isnan(a.p_holm) for a in found if math.isnan(a.p))
