"""What is drawn is what was measured: the data of the artists, read back from the figures."""

from __future__ import annotations

import math
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import paired_runs
from analysis.iso_sharpness import iso_sharpness
from experiments.compare import Comparison, Trial
from experiments.config import Arm
from experiments.plot import flatness, masks, outcome
from experiments.plot.style import Style, styles, svg
from experiments.record import RunRecord
from experiments.study import load_study
from experiments.table import Table, build_table
from tests.experiments.studies import weights, write_study


@pytest.fixture(scope="module")
def table(comparison: Comparison) -> Table:
    return build_table(comparison)


@pytest.fixture(scope="module")
def style(comparison: Comparison) -> dict[str, Style]:
    return styles(comparison.config.arms)


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines}


def colours(axes: Any) -> dict[str, str]:
    return {name: line.get_color() for name, line in lines(axes).items() if not name.startswith("_")}


def test_accuracy_per_arm(comparison: Comparison, table: Table, style: dict[str, Style]) -> None:
    (axes,) = outcome.accuracy(comparison, table.rows, style).axes
    dots = [line for line in axes.lines if line.get_marker() == "."]
    for row, line in zip(table.rows, dots, strict=True):
        records = comparison.records[row.arm.name]
        assert list(line.get_xdata()) == [100 * r.result["test_accuracy"] for r in records]
        assert line.get_color() == style[row.arm.name].colour
    bars = [line.get_xdata() for line in axes.lines if line.get_marker() == "None"]
    assert np.array(bars) == pytest.approx(100 * np.array([(r.accuracy.low, r.accuracy.high) for r in table.rows]))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [row.arm.name for row in table.rows]


def test_accuracy_against_rho_with_a_sweep(comparison: Comparison, style: dict[str, Style]) -> None:
    rows = [("norm", rho, seed, 0.1 * rho + 0.01 * seed) for rho in (0.5, 2.0) for seed in (0, 1)]
    swept = pd.DataFrame(rows, columns=["arm", "rho", "seed", "test_error"])
    left, right = outcome.against_rho(comparison, style, swept).axes
    for name, line in lines(left).items():
        if not name.startswith("_"):
            want = sorted((t.rho, 100 * t.val_accuracy) for t in comparison.trials if t.arm == name)
            assert list(zip(*line.get_data(), strict=True)) == want
    assert set(colours(left)) == set(comparison.chosen)
    assert lines(right)["norm"].get_ydata() == pytest.approx([100 * (1 - 0.055), 100 * (1 - 0.205)])
    rings = [line for line in right.lines if line.get_markersize() == 13]
    assert [list(ring.get_xdata()) for ring in rings] == [[comparison.chosen["norm"]]]


def test_methods_have_rows_and_collapsed_radii_leave_the_axis(comparison: Comparison) -> None:
    arms = (Arm("a", "all", (0.1, 0.2), method="sam"), Arm("b", "all", (0.1, 0.2), method="asam"))
    values = {"a": (0.9, 0.2), "b": (0.8, 0.85)}
    trials = tuple(Trial(name, 0.1 * (i + 1), v, 0, 2) for name, both in values.items() for i, v in enumerate(both))
    made = replace(
        comparison, config=replace(comparison.config, arms=(Arm("none", "none"), *arms)), trials=trials,
        chosen={"a": 0.1, "b": 0.2},
    )  # fmt: skip
    upper, lower = outcome.against_rho(made, styles(arms), None).axes
    assert (set(colours(upper)), set(colours(lower))) == ({"a"}, {"b"})
    assert lines(upper)["a"].get_ydata().tolist() == pytest.approx([90, 20])
    assert upper.get_ylim()[0] == lower.get_ylim()[0] == 85 - outcome.BELOW
    made = replace(made, trials=tuple(t for t in trials if t.val_accuracy > 0.5))
    assert outcome.against_rho(made, styles(arms), None).axes[0].get_ylim()[0] > 79


def test_arms_of_one_density_stand_side_by_side_around_it(table: Table, style: dict[str, Style]) -> None:
    rows = [row for row in table.rows if row.arm.rho]
    (axes,) = outcome.against_density(rows, style, table.rows[0]).axes
    found = {name: line for name, line in lines(axes).items() if not name.startswith("_")}
    x = {row.arm.name: found[row.arm.name].get_xdata()[0] for row in rows}
    budgeted = [row for row in rows if row.arm.name in ("norm", "random", "fisher")]
    assert math.exp(np.mean([math.log(x[r.arm.name]) for r in budgeted])) == pytest.approx(100 * budgeted[0].density)
    assert len({round(v, 9) for v in x.values()}) == len(rows)
    for row in rows:
        assert found[row.arm.name].get_ydata()[0] == 100 * row.accuracy.value
        assert abs(math.log(x[row.arm.name] / (100 * row.density))) < 0.2


def test_a_curve_is_the_mean_with_its_t_interval(style: dict[str, Style]) -> None:
    runs = [[1.0, 5.0, None], [2.0, 7.0, 1.0], [6.0, 9.0, 1.0]]
    (axes,) = outcome.along_training({"norm": runs}, style, "x").axes
    assert axes.lines[0].get_ydata()[:2] == pytest.approx([3.0, 7.0])
    assert math.isnan(axes.lines[0].get_ydata()[2])
    vertices = axes.collections[0].get_paths()[0].vertices
    half = stats.t.ppf(0.975, 2) * np.std([5.0, 7.0, 9.0], ddof=1) / math.sqrt(3)
    at_two = vertices[vertices[:, 0] == 2][:, 1]
    assert (at_two.min(), at_two.max()) == pytest.approx((7 - half, 7 + half))
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]
    (axes,) = outcome.along_training({"norm": runs}, style, "x", {"norm": [5, 10, 12]}).axes
    assert list(axes.lines[0].get_xdata()) == [5, 10, 12]


def test_cost(style: dict[str, Style]) -> None:
    (axes,) = outcome.cost({"none": [1.0], "norm": [1.5, 2.0, 4.0]}, {"none": 1.0, "norm": None}, style).axes
    medians = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"]
    rings = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert (medians, rings) == ([1.0, 2.0], [1.0])


def test_every_run_has_its_mark(comparison: Comparison, style: dict[str, Style]) -> None:
    (axes,) = flatness.scatter(comparison, "lambda_max", "lambda_max", style).axes
    for name, records in comparison.records.items():
        points = [(r.result["metrics"]["lambda_max"]["value"], 100 * (1 - r.result["test_accuracy"])) for r in records]
        runs = [line for line in axes.lines if line.get_marker() == "." and line.get_color() == style[name].colour]
        assert points in [list(zip(*line.get_data(), strict=True)) for line in runs]
        (middle,) = zip(*lines(axes)[name].get_data(), strict=True)
        assert middle[0] == pytest.approx(math.prod(x for x, _ in points) ** (1 / len(points)))
        assert middle[1] == pytest.approx(sum(y for _, y in points) / len(points))
    assert axes.get_xlabel() == "lambda_max"
    assert axes.get_xscale() == "log"


def test_the_curves_at_equal_sharpness_end_where_their_common_range_does(tmp_path: Path) -> None:
    sharp, radii = {"none": 2.0, "all": 1.0, "norm": 1.1}, (0.2, 0.5, 1.0, 2.0)

    def result(arm: str, rho: float, seed: int) -> dict[str, Any]:
        value = sharp[arm] / (1 + rho) * (1 + 0.02 * seed)
        error = 0.1 + 0.02 * value + 0.001 * (seed % 3)
        return {"test_accuracy": 1 - error, **weights(0.1, {"m": value}, {"m": value * 1.1})}

    arms = {"none": (), "all": radii, "norm": radii}
    study = load_study(write_study(tmp_path / "study", result, arms=arms, chosen={"all": 0.5, "norm": 0.5}))
    runs = paired_runs(study.frame, metric="m", arm="norm", reference="all", chosen=study.chosen)
    iso = iso_sharpness(runs)
    look = {"all": Style("#111111", "o"), "norm": Style("#222222", "s")}
    (axes,) = flatness.equal_sharpness(runs, iso, look).axes
    drawn = lines(axes)
    for arm in ("all", "norm"):
        rows = study.frame.loc[study.frame["arm"] == arm].assign(both=lambda f: np.sqrt(f["m"] * f["m_repeat"]))
        x = rows.groupby("rho")["both"].agg(lambda v: math.exp(np.log(v).mean()))
        assert drawn[arm].get_xdata() == pytest.approx(x.to_numpy())
        assert drawn[arm].get_ydata() == pytest.approx(100 * rows.groupby("rho")["test_error"].mean().to_numpy())
    assert iso.decided
    ends = [drawn[arm].get_xdata() for arm in ("all", "norm")]
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert band.x0 == pytest.approx(max(min(x) for x in ends))
    assert band.x1 == pytest.approx(min(max(x) for x in ends))


def test_masks_by_layer_by_each_other_and_over_time(style: dict[str, Style]) -> None:
    shares = pd.DataFrame({"a": [1.0, 0.0], "b": [0.5, 0.001]}, index=["t1", "t2"])
    axes = masks.layers(shares).axes[0]
    image = axes.images[0].get_array()
    assert image.filled(-1).tolist() == [[100.0, 50.0], [-1.0, 0.1]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["t1", "t2"]
    matrix = pd.DataFrame([[1.0, 0.25], [0.25, 1.0]], index=["a", "b"], columns=["a", "b"])
    axes = masks.overlap(matrix).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.25", "0.25", "1.00"]
    over = masks.rebuilt({"fisher": pd.DataFrame({0: [0.1], 3: [0.2]}, index=["t1"])}).axes[0]
    assert over.images[0].get_array().tolist() == [[10.0, 20.0]]
    assert [tick.get_text() for tick in over.get_xticklabels()] == ["0", "3"]
    (axes,) = masks.norm_share({"fisher": {0: 0.5, 2: 0.25}}, style).axes
    assert list(zip(*axes.lines[0].get_data(), strict=True)) == [(0, 50.0), (2, 25.0)]


def test_an_arm_has_one_colour_in_all_figures(comparison: Comparison, table: Table, style: dict[str, Style]) -> None:
    rows = [row for row in table.rows if row.arm.rho]
    loss = {arm: [[e["loss"] for e in r.result["history"]] for r in rs] for arm, rs in comparison.records.items()}
    figures = (
        outcome.against_rho(comparison, style, None),
        outcome.against_density(rows, style, table.rows[0]),
        outcome.along_training(loss, style, "loss"),
        flatness.scatter(comparison, "lambda_max", "", style),
    )
    for figure in figures:
        for name, colour in colours(figure.axes[0]).items():
            assert colour == style[name].colour, name


def test_names_are_shown_as_they_are(comparison: Comparison) -> None:
    names = {"norm": "a<b>&c", "random": r"$\alpha$ and $", "fisher": "_hidden"}
    records = {names.get(name, name): found for name, found in comparison.records.items()}
    arms = [replace(arm, name=names.get(arm.name, arm.name)) for arm in comparison.config.arms]
    figure = flatness.scatter(replace(comparison, records=records), "lambda_max", "x", styles(arms))
    text = svg(figure, "n", "t", "d")
    shown = ["".join(n.itertext()).lstrip("\u200b") for n in ET.fromstring(text).iter() if n.tag.endswith("}text")]
    for name in names.values():
        assert name in shown, shown


def test_runs_without_numbers_are_left_out_without_a_word(comparison: Comparison, style: dict[str, Style]) -> None:
    def broken(record: RunRecord) -> RunRecord:
        metrics = {name: {"value": None} for name in record.result["metrics"]}
        return replace(record, result=record.result | {"metrics": metrics})

    for affected in (("norm",), tuple(comparison.records)):
        records = {n: tuple(map(broken, rs)) if n in affected else rs for n, rs in comparison.records.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = flatness.scatter(replace(comparison, records=records), "lambda_max", "x", style)
            assert svg(figure, "n", "t", "d").startswith("<svg")
        assert len(lines(figure.axes[0])["norm"].get_xdata()) == 0
