"""The interval of an accuracy, for test images that all seeds share and for images that are redrawn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis import accuracy_interval
from experiments.accuracy import overlapping_interval
from experiments.compare import Comparison
from experiments.table import build_table
from tests.experiments.made_up import Made, row_of


def test_shared_test_images_get_the_crossed_interval(made: Made) -> None:
    rng = np.random.default_rng(0)
    texts = {s: "".join(map(str, rng.integers(0, 2, 40))) for s in range(8)}

    def change(arm: str, seed: int) -> dict[str, Any]:
        text = texts[seed]
        return {"test_correct": text, "test_accuracy": text.count("1") / 40, "test_is_shared": True, "test_index": None}

    comparison = made(change)
    wanted = accuracy_interval(np.array([[int(c) for c in texts[s]] for s in range(8)]))
    assert row_of(comparison, "norm").accuracy == wanted
    notes = " ".join(build_table(comparison).notes)
    assert "the same for all seeds" in notes
    assert "given these test images" in notes


def test_redrawn_test_images_get_the_interval_that_counts_their_overlap(comparison: Comparison) -> None:
    for name, row in {row.arm.name: row for row in build_table(comparison).rows}.items():
        records = comparison.records[name]
        right = [
            {i: int(c) for i, c in zip(r.result["test_index"], r.result["test_correct"], strict=True)} for r in records
        ]
        means = [sum(r.values()) / 50 for r in right]
        products, overlaps = [], []
        for a, b in itertools.combinations(range(3), 2):
            both = right[a].keys() & right[b].keys()
            products += [(right[a][i] - means[a]) * (right[b][i] - means[b]) for i in both]
            overlaps.append(len(both) / 50**2)
        covariance = max(0.0, sum(products) / len(products) * 50 / 49)
        variance = np.var(means, ddof=1) / 3 + covariance * np.mean(overlaps)
        assert row.accuracy.value == pytest.approx(np.mean(means))
        assert row.accuracy.standard_error == pytest.approx(math.sqrt(variance))
        assert 0 <= row.accuracy.low < row.accuracy.value < row.accuracy.high <= 1
        assert len({len(r) for r in right}) == 1


def test_with_one_test_set_it_is_the_crossed_design() -> None:
    rng = np.random.default_rng(3)
    difficulty, skill = rng.normal(size=60), rng.normal(size=6, scale=0.5)
    correct = rng.random((6, 60)) < 1 / (1 + np.exp(-1 - difficulty - skill[:, None]))
    index = [np.arange(60) + 7] * 6
    ours, crossed = overlapping_interval(list(correct), index), accuracy_interval(correct)
    assert ours.value == pytest.approx(crossed.value)
    assert ours.standard_error == pytest.approx(crossed.standard_error, rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx((crossed.low, crossed.high), abs=5e-3)


def test_its_coverage_is_what_it_says_where_that_of_the_seeds_alone_is_not() -> None:
    rng = np.random.default_rng(0)
    hits = {"ours": 0, "t": 0}
    trials, n, size, pool = 400, 8, 120, 216
    grid = rng.normal(size=200_000)
    truth = float(np.mean(1 / (1 + np.exp(-1.5 - 1.5 * grid))))  # over all images there could be
    for _ in range(trials):
        difficulty = rng.normal(size=pool)
        index = [rng.choice(pool, size, replace=False) for _ in range(n)]
        p = 1 / (1 + np.exp(-1.5 - 1.5 * difficulty))
        correct = [rng.random(size) < p[i] for i in index]
        ours = overlapping_interval(correct, index)
        hits["ours"] += ours.low <= truth <= ours.high
        means = [c.mean() for c in correct]
        low, high = stats.t.interval(0.95, n - 1, np.mean(means), stats.sem(means))
        hits["t"] += low <= truth <= high
    assert 0.92 <= hits["ours"] / trials <= 0.98
    assert hits["t"] / trials < 0.85


def test_extremes_of_accuracy() -> None:
    index = [np.arange(s, s + 20) for s in range(4)]
    perfect = overlapping_interval([np.ones(20, bool)] * 4, index)
    assert (perfect.value, perfect.high) == (1, 1)
    assert perfect.low == pytest.approx(stats.beta.ppf(0.025, 23, 1))  # Clopper and Pearson, 23 of 23 images
    hopeless = overlapping_interval([np.zeros(20, bool)] * 4, index)
    assert (hopeless.low, hopeless.value) == (0, 0)
    same = overlapping_interval([np.arange(20) < 10] * 4, [np.arange(20) + 20 * s for s in range(4)])
    assert (same.low, same.value, same.high) == (0.5, 0.5, 0.5)  # disjoint images, no spread at all
    assert math.isnan(overlapping_interval([np.arange(20) < 10], index[:1]).low)
