"""The table: every number against one computed here from the records, and every warning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.compare import Comparison
from experiments.config import Arm
from experiments.matching import matched_count
from experiments.table import Row, Table, build_table, frame, shown
from tests.experiments.made_up import Made, measured, row_of


@pytest.fixture(scope="module")
def table(comparison: Comparison) -> Table:
    return build_table(comparison)


@pytest.fixture(scope="module")
def rows(table: Table) -> dict[str, Row]:
    return {row.arm.name: row for row in table.rows}


def accuracies(comparison: Comparison, arm: str) -> np.ndarray:
    return np.array([np.mean([int(c) for c in r.result["test_correct"]]) for r in comparison.records[arm]])


def by_hand_interval(values: Sequence[float]) -> tuple[float, float, float]:
    n = len(values)
    mean = sum(values) / n
    half = stats.t.ppf(0.975, n - 1) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half


# -- against the records ------------------------------------------------------------------------------------


def test_means_over_seeds_and_steps(comparison: Comparison, rows: dict[str, Row]) -> None:
    assert list(rows) == [arm.name for arm in comparison.config.arms]
    for name, row in rows.items():
        records = comparison.records[name]
        for key in ("radius", "ascent"):
            per_run = [np.mean([epoch[key] for epoch in r.result["history"]]) for r in records]
            assert getattr(row, key) == pytest.approx(np.mean(per_run))
        builds = [r.result["mask_builds"][-1] for r in records]
        assert row.kept == builds[0]["num_kept"]
        assert row.density == builds[0]["num_kept"] / builds[0]["numel"]
        assert row.jaccard_norm == pytest.approx(np.mean([b["jaccard_norm"] for b in builds]))
        assert row.rho == comparison.chosen.get(name)
        assert row.diverged == sum(r.result["diverged"] is not None for r in records)
        assert row.n == 3
        for key, name_in_full in (("lambda_max", "lambda_max"), ("m_sharpness", "one_step_l2@0.1")):
            metric = getattr(row, key)
            values = [r.result["metrics"][name_in_full]["value"] for r in records]
            wanted = by_hand_interval(values)
            assert (metric.interval.value, metric.interval.low, metric.interval.high) == pytest.approx(wanted)
            assert (metric.missing, metric.name) == (0, records[0].result["metrics"][name_in_full]["settings"]["name"])
    assert rows["norm"].radius == pytest.approx(comparison.chosen["norm"], rel=1e-5)
    assert (rows["none"].radius, rows["none"].ascent, rows["none"].norm_share) == (0, 0, None)
    assert (rows["norm"].jaccard_norm, rows["norm"].norm_share, rows["fisher"].norm_share) == (1, 1, 0)


def test_gains_are_paired_and_p_values_adjusted_per_family(comparison: Comparison, rows: dict[str, Row]) -> None:
    base = accuracies(comparison, "none")
    assert rows["none"].gain is None
    for family in (["all", "norm", "random", "fisher"], ["none_2x", "no_norm"]):
        p_values = {}
        for name in family:
            difference = accuracies(comparison, name) - base
            gain = rows[name].gain
            assert gain is not None
            wanted = by_hand_interval(list(difference))
            assert (gain.mean_difference, gain.low, gain.high) == pytest.approx(wanted, abs=1e-12)
            flipped = [abs(np.mean(difference * s)) for s in itertools.product((1, -1), repeat=3)]
            p_values[name] = np.mean(np.array(flipped) >= abs(difference.mean()) - 1e-12)
            assert gain.p == pytest.approx(p_values[name])
        order = sorted(p_values, key=lambda name: p_values[name])
        running = 0.0
        for i, name in enumerate(order):
            running = max(running, min(1.0, (len(order) - i) * p_values[name]))
            gain = rows[name].gain
            assert gain is not None
            assert gain.p_holm == pytest.approx(running)


def test_cost_is_the_median_ratio_of_processor_seconds(comparison: Comparison, rows: dict[str, Row]) -> None:
    seconds = {name: [r.telemetry["train_seconds"] for r in rs] for name, rs in comparison.records.items()}
    for name, row in rows.items():
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["none"], strict=True))
        assert row.cost == ratios[1]
    assert rows["none"].cost == 1
    predicted = {name: row.predicted_cost for name, row in rows.items()}
    assert [predicted[name] for name in ("none", "none_2x", "all", "no_norm")] == [1, 2, 2, 2]


def test_matched_is_said_of_budgeted_masks_only(comparison: Comparison, rows: dict[str, Row]) -> None:
    assert {name: row.matched for name, row in rows.items()} == {
        "none": "baseline",
        "none_2x": "no mask",
        "all": "unmatched",
        "no_norm": "unmatched",
        "norm": "reference",
        "random": "yes",
        "fisher": "yes",
    }
    assert rows["random"].kept == rows["fisher"].kept == rows["norm"].kept == matched_count(comparison)


def test_the_frame_has_every_number_and_survives_a_file(table: Table, tmp_path: Path) -> None:
    numbers = frame(table)
    assert list(numbers["arm"]) == [row.arm.name for row in table.rows]
    numbers.to_csv(tmp_path / "t.csv", index=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv", keep_default_na=False, na_values=[""]), numbers)
    for line, row in zip(numbers.to_dict("records"), table.rows, strict=True):
        assert line["test_accuracy"] == row.accuracy.value
        assert (line["lambda_max"], line["lambda_max_seeds"]) == (row.lambda_max.interval.value, 3)  # type: ignore[union-attr]
        if row.gain is not None:
            assert (line["gain"], line["gain_p_holm"]) == (row.gain.mean_difference, row.gain.p_holm)
            assert line["gain_low"] < line["gain"] < line["gain_high"] or line["gain_low"] == line["gain_high"]


def test_the_text_is_the_rounded_numbers(table: Table) -> None:
    text = shown(table)
    row = next(row for row in table.rows if row.arm.name == "norm")
    cells = text.loc["norm"] if "norm" in text.index else text.loc["norm (!)"]
    assert cells["kept"] == f"{row.kept:,}"
    assert cells["density"] == f"{100 * row.kept / 1382:.3g} %"
    assert cells["accuracy %"].split(" ")[0] == f"{100 * row.accuracy.value:.1f}"
    assert row.gain is not None
    assert cells["gain"].split(" ")[0] == f"{100 * row.gain.mean_difference:+.1f}"
    assert cells["rho"] == f"{row.rho:g}*"  # of two radii, both are at the edge
    assert cells["cost (predicted)"] == f"{row.cost:.2f}x ({row.predicted_cost:.2f})"


def test_rows_do_not_change_by_the_order_of_seeds(comparison: Comparison) -> None:
    reversed_ = replace(comparison, records={k: tuple(reversed(v)) for k, v in comparison.records.items()})
    one, other = frame(build_table(comparison)), frame(build_table(reversed_))
    pd.testing.assert_frame_equal(one, other, rtol=1e-9)


# -- against records made up here ---------------------------------------------------------------------------


def warnings(comparison: Comparison) -> list[str]:
    return [note for note in build_table(comparison).notes if note.partition(":")[0].isupper()]


def test_a_clean_comparison_has_no_warning(made: Made) -> None:
    assert warnings(made()) == []


@pytest.mark.parametrize(("seeds", "arms", "needed"), [(6, 2, 7), (7, 2, None), (5, 1, 6), (6, 1, None)])
def test_too_few_seeds_for_the_contrasts(made: Made, seeds: int, arms: int, needed: int | None) -> None:
    # The least two-sided sign-flip p of n seeds is 2^(1-n); Holm multiplies the least of m by m.
    chosen = (Arm("none", "none"), Arm("norm", "norm", (0.1,)), Arm("random", "random", (0.1,)))[: arms + 1]
    found = warnings(made(arms=chosen, seeds=seeds))
    assert (2.0 ** (1 - seeds) * arms > 0.05) == (needed is not None) == bool(found)
    if needed:
        plural = f"with {arms} main contrasts no result can reach p = 0.05 after Holm from {seeds} seeds"
        assert found == [f"TOO FEW SEEDS: {plural}; at least {needed} are needed."]
        assert 2.0 ** (1 - needed) * arms <= 0.05 < 2.0 ** (2 - needed) * arms


def test_each_family_is_counted_by_itself(made: Made) -> None:
    controls = tuple(Arm(f"c{i}", "random", (0.1 + i,), role="control") for i in range(7))
    arms = (Arm("none", "none"), Arm("norm", "norm", (0.1,)), *controls)
    assert warnings(made(arms=arms, seeds=7)) == [
        "TOO FEW SEEDS: with 7 control contrasts no result can reach p = 0.05 after Holm from 7 seeds; at least 9 "
        "are needed."
    ]


def test_holm_is_over_each_family_by_itself(made: Made) -> None:
    gains = {"none": 0.0, "norm": 0.3, "random": 0.2, "other": 0.1}

    def change(arm: str, seed: int) -> dict[str, Any]:
        return {"accuracy": 0.5 + gains[arm] * (1 if arm != "random" or seed else -0.25)}

    arms = (
        *(Arm("none", "none"), Arm("norm", "norm", (0.1,)), Arm("random", "random", (0.1,))),
        Arm("other", "random:exclude_norm=true", (0.1,), role="control"),
    )
    found = {row.arm.name: row.gain for row in build_table(made(change, arms=arms)).rows}
    least = 2 / 2**8
    # One difference of the other sign, and the smallest: 4 of the 256 sign patterns are as extreme.
    p_values = {name: (gain.p, gain.p_holm) for name, gain in found.items() if gain is not None}
    assert p_values == {"norm": (least, 2 * least), "random": (2 * least, 2 * least), "other": (least, least)}


@pytest.mark.parametrize(("rho", "edge"), [(0.1, True), (0.2, False), (0.4, True)])
def test_a_radius_at_the_edge_of_its_grid(made: Made, rho: float, edge: bool) -> None:
    comparison = made()
    comparison.chosen["norm"] = rho
    row = row_of(comparison, "norm")
    assert row.rho_at_edge == edge
    assert shown(build_table(comparison)).loc["norm", "rho"] == f"{rho:g}" + "*" * edge
    assert warnings(comparison) == edge * [
        f"RHO AT THE EDGE: for norm the best of 0.1, 0.2, 0.4 is {rho:g}; widen its grid (--extend 4) before quoting "
        "its line."
    ]


def test_a_grid_of_one_has_no_edge(made: Made) -> None:
    comparison = made(arms=(Arm("none", "none"), Arm("norm", "norm", (0.1,))))
    assert warnings(comparison) == []
    assert "Nothing was tuned here; rho was given: norm 0.1." in build_table(comparison).notes


def test_diverged_runs_are_counted_marked_and_kept_in_every_mean(made: Made) -> None:
    nothing = {"loss": None, "ascent": None, "radius": None}

    def change(arm: str, seed: int) -> dict[str, Any]:
        if arm != "norm" or seed != 2:
            return {"accuracy": 0.8 if arm == "norm" else 0.5}
        return {"accuracy": 0.1, "diverged": "9 steps with a non-finite gradient", "history": [nothing]}

    comparison = made(change)
    row = row_of(comparison, "norm")
    assert row.diverged == 1
    assert row.accuracy.value == pytest.approx((7 * 0.8 + 0.1) / 8)
    assert row.gain is not None
    assert row.gain.mean_difference == pytest.approx((7 * 0.3 - 0.4) / 8)
    assert row.radius is None  # not the mean over the steps that were healthy
    text = shown(build_table(comparison))
    assert "norm (!)" in text.index
    assert (text.loc["norm (!)", "||eps||"], text.loc["norm (!)", "ascent"]) == ("-", "-")
    assert warnings(comparison) == ["DIVERGED: 1 of 8 runs of norm; they are in the table as they ended."]


def test_a_metric_that_could_not_be_measured_everywhere(made: Made) -> None:
    def change(arm: str, seed: int) -> dict[str, Any]:
        if arm == "norm":
            return {"metrics": {"lambda_max": measured(None, reason="not finite")}} if seed < 3 else {}
        slow = {"lambda_max": measured(7.0, converged=False), "one_step_l2@0.1": measured(None, reason="too few")}
        return {"metrics": slow} if arm == "random" else {}

    comparison = made(change)
    norm, random = row_of(comparison, "norm"), row_of(comparison, "random")
    assert norm.lambda_max.interval is not None
    assert norm.lambda_max.interval.value == pytest.approx(np.mean([2.3, 2.4, 2.5, 2.6, 2.7]))
    assert random.m_sharpness.interval is None
    text = shown(build_table(comparison))
    assert text.loc["norm", "lambda_max"].endswith("(5 of 8)")
    assert text.loc["random", "m-sharpness"] == "-"
    assert frame(build_table(comparison)).set_index("arm").loc["norm", "lambda_max_seeds"] == 5
    assert warnings(comparison) == [
        "METRIC INCOMPLETE: norm: 3 seeds without, 0 not converged: a metric.",
        "METRIC INCOMPLETE: random: 0 seeds without, 8 not converged: a metric.",
        "METRIC INCOMPLETE: random: 8 seeds without, 0 not converged: one_step_l2@0.1: too few; compare with "
        "--sharpness-m 10 or less.",
    ]


@pytest.mark.parametrize(
    "builds",
    [
        [{"num_kept": 49}, {"num_kept": 50}],  # once too few, and not at the end
        [{"num_kept": 51}],
    ],
)
def test_a_mask_that_kept_another_count_is_not_called_matched(made: Made, builds: list[dict[str, int]]) -> None:
    comparison = made(lambda arm, seed: {"builds": builds} if (arm, seed) == ("random", 3) else {})
    assert matched_count(comparison) is None
    assert row_of(comparison, "random").matched == "NO"
    assert not any(note.startswith("Matched:") for note in build_table(comparison).notes)
    assert warnings(comparison) == ["NOT MATCHED: random did not keep the same count in every run; see runs.csv."]


def test_all_budgeted_masks_alike_but_unlike_the_reference_are_not_matched(made: Made) -> None:
    comparison = made(lambda arm, seed: {"builds": [{"num_kept": 51}]} if arm == "random" else {})
    assert row_of(comparison, "random").matched == "NO"


def test_at_a_density_the_norm_mask_is_not_the_reference(made: Made) -> None:
    comparison = made(lambda arm, seed: {"builds": [{"num_kept": 100}]} if arm == "random" else {}, density=0.1)
    assert (row_of(comparison, "norm").matched, row_of(comparison, "random").matched) == ("unmatched", "yes")
    assert (
        "Matched: every budgeted mask kept exactly 100 coordinates, density 0.1, in every run."
        in build_table(comparison).notes
    )


def test_a_natural_mask_of_the_same_count_by_chance_is_not_called_matched(made: Made) -> None:
    arms = (
        *(Arm("none", "none"), Arm("norm", "norm", (0.1,)), Arm("late", "norm@after=1", (0.1,))),
        *(Arm("half", "norm:part=weights", (0.1,)), Arm("random", "random", (0.1,))),
    )
    comparison = made(arms=arms)
    found = {row.arm.name: row.matched for row in build_table(comparison).rows}
    assert found["half"] == "unmatched"
    assert found["norm"] == found["late"] == "reference"
    without = made(arms=arms[:2])
    assert row_of(without, "norm").matched == "unmatched"  # nothing is matched to it


def test_runs_of_several_environments_are_pointed_out(made: Made) -> None:
    mixed = made(lambda arm, seed: {"environment": {"torch": "3"}} if (arm, seed) == ("norm", 1) else {})
    (warning,) = warnings(mixed)
    assert warning.startswith("MIXED ENVIRONMENTS")


def test_runs_of_several_versions_of_the_code_are_pointed_out(made: Made) -> None:
    mixed = made(lambda arm, seed: {"environment": {"code": "new" if (arm, seed) == ("norm", 1) else "old"}})
    (warning,) = warnings(mixed)
    assert warning.startswith("MIXED CODE: the runs were made by 2 versions of the code (new: 1 runs, old: ")
    same = made(lambda arm, seed: {"environment": {"code": "old"}})
    assert warnings(same) == []


def test_notes_say_what_the_numbers_rest_on(made: Made) -> None:
    arms = (
        *(Arm("none", "none"), Arm("norm", "norm", (0.1, 0.2))),
        *(Arm("fisher", "fisher:exclude_norm=true", (1.0, 2.0)), Arm("snip", "snip@after=3", (1.0, 2.0))),
        Arm("late", "random@every=10steps", (1.0, 2.0), role="control"),
    )
    notes = "\n".join(build_table(made(arms=arms)).notes)
    assert "n = 8 seeds per arm (from 0 on), paired: same initial weights" in notes
    assert "10 training images of digits, label noise 0.2; 40 test images, redrawn per seed" in notes
    assert (
        "Masks: fisher is fisher:exclude_norm=true, built every epoch; snip is snip@after=3, built once, after 3 "
        "epochs, with nothing perturbed before; late is random@every=10steps, built every 10 steps; all others" in notes
    )
    assert "Tuned: rho only, per arm, 2 radii x 2 seeds on validation images" in notes
    assert "nothing was tuned for none." in notes
    assert "Holm-adjusted over 3 main contrasts and, as a family of its own, 1 controls (late)" in notes
    assert "exact sign-flip p" in notes
    assert "a metric." in notes
    assert "  " not in notes
    assert "exact" not in next(n for n in build_table(made(seeds=17)).notes if n.startswith("Gain"))


@pytest.mark.parametrize(("n", "wanted"), [(12, "<0.001"), (8, "0.008")])
def test_a_small_p_value_is_not_shown_as_zero(made: Made, n: int, wanted: str) -> None:
    text = shown(
        build_table(
            made(
                lambda arm, seed: {"accuracy": 0.5 + 0.3 * (arm == "norm")},
                seeds=n,
                arms=(Arm("none", "none"), Arm("norm", "norm", (0.1,))),
            )
        )
    )
    assert text.loc["norm", "p Holm"] == wanted
    assert text.loc["norm", "gain"] == "+30.0 [+30.0, +30.0]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((123456.0, "123456 [123456, 123456]"), (149.7, "150 [150, 150]"), (46.44, "46.4 [46.4, 46.4]")),
        *((0.5879, "0.588 [0.588, 0.588]"), (0.0004321, "0.000432 [0.000432, 0.000432]")),
        *((0.0, "0.000 [0.000, 0.000]"), (-3.0, "-3.00 [-3.00, -3.00]")),
    ],
)
def test_metrics_are_shown_with_three_digits_whatever_their_size(made: Made, value: float, text: str) -> None:
    comparison = made(lambda arm, seed: {"metrics": {"lambda_max": measured(value)}})
    assert shown(build_table(comparison)).loc["norm", "lambda_max"] == text


def test_one_seed_has_no_interval_and_no_p_value(made: Made) -> None:
    comparison = made(seeds=1)
    text = shown(build_table(comparison))
    assert text.loc["norm", "accuracy %"] == "50.0 [-]"
    assert text.loc["norm", "gain"] == "+0.0 [-]"
    assert text.loc["norm", "p Holm"] == "1.000"
    assert text.loc["norm", "lambda_max"] == "2.00 [-]"
    assert warnings(comparison)[0].startswith("TOO FEW SEEDS")


def test_the_method_of_a_comparison_is_said(made: Made) -> None:
    notes = build_table(made(method="asam")).notes
    assert "Method: asam, in every arm with a mask that does not name another one." in notes
    assert not any(note.startswith("Method:") for note in build_table(made()).notes)


def test_an_ascent_that_is_not_known_is_explained(made: Made) -> None:
    arms = (Arm("none", "none"), *(Arm(name, "norm", (0.1,), method=name) for name in ("momentum_sam", "sam")))

    def change(arm: str, seed: int) -> dict[str, Any]:
        return {"history": [{"loss": 1.0, "ascent": None, "radius": 0.5}]} if arm == "momentum_sam" else {}

    comparison = made(change, arms=arms)
    text = shown(build_table(comparison))
    assert (text.loc["momentum_sam", "ascent"], text.loc["momentum_sam", "||eps||"]) == ("-", "0.5")
    assert text.loc["sam", "ascent"] == "0.5"
    assert pd.isna(frame(build_table(comparison)).set_index("arm").loc["momentum_sam", "ascent"])
    assert (
        "Ascent strength is not known (-) where L(w) is never computed: momentum_sam." in build_table(comparison).notes
    )
    assert warnings(comparison) == []


def test_arms_with_other_initial_weights_are_pointed_out(made: Made) -> None:
    arms = (Arm("none", "none"), Arm("mup", "norm", (0.1,), method="mup_sam:base_width=4"), Arm("all", "all", (0.1,)))
    (warning,) = warnings(made(arms=arms))
    assert warning.startswith("OTHER INITIAL WEIGHTS: mup: their initial weights and learning rates are scaled")
