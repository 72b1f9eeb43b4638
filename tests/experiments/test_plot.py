"""Figures: SVG that is the same for the same results, with every arm and run in it."""

from __future__ import annotations

import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from experiments import plot
from experiments.compare import Comparison, Trial
from experiments.config import Arm
from experiments.plot import figures, styles
from experiments.record import RunRecord
from experiments.table import Table, build_table

ACCURACY, RHO, LAMBDA, SHARPNESS, LOSS = range(5)


@pytest.fixture(scope="module")
def table(comparison: Comparison) -> Table:
    return build_table(comparison)


@pytest.fixture(scope="module")
def drawn(comparison: Comparison, table: Table) -> dict[str, str]:
    return figures(comparison, table)


def texts(svg: str) -> list[str]:
    return [t for node in ET.fromstring(svg).iter() if node.tag.endswith("text") and (t := "".join(node.itertext()))]


def renamed(comparison: Comparison, table: Table, names: dict[str, str]) -> tuple[Comparison, Table]:
    arms = tuple(replace(arm, name=names.get(arm.name, arm.name)) for arm in comparison.config.arms)
    return (
        replace(
            comparison,
            config=replace(comparison.config, arms=arms),
            records={names.get(name, name): records for name, records in comparison.records.items()},
            chosen={names.get(name, name): rho for name, rho in comparison.chosen.items()},
            trials=tuple(replace(t, arm=names.get(t.arm, t.arm)) for t in comparison.trials),
        ),
        replace(table, rows=tuple(replace(row, arm=arm) for row, arm in zip(table.rows, arms, strict=True))),
    )


def test_the_same_results_give_the_same_figures_bit_for_bit(
    comparison: Comparison, table: Table, drawn: dict[str, str]
) -> None:
    assert figures(comparison, table) == drawn


def test_every_figure_is_xml_that_names_every_arm_that_it_shows(comparison: Comparison, drawn: dict[str, str]) -> None:
    found = list(drawn.values())
    assert len(found) == 5
    everything = {arm.name for arm in comparison.config.arms}
    tuned = {arm.name for arm in comparison.config.arms if arm.rho}
    for number, svg in enumerate(found):
        assert svg.startswith("<svg")
        wanted = tuned if number == RHO else everything
        assert {text for text in texts(svg) if text in everything} == wanted
    assert "test accuracy, %" in texts(found[ACCURACY])
    assert "lambda_max" in texts(found[LAMBDA])
    assert "m-sharpness" in texts(found[SHARPNESS])


def test_every_run_has_its_mark(comparison: Comparison, drawn: dict[str, str]) -> None:
    fewer = replace(comparison, records={name: records[:2] for name, records in comparison.records.items()})
    all_marks, less = (svg.count("<use ") for svg in (list(drawn.values())[LAMBDA], plot._scatter(fewer, "lambda_max")))
    # Besides one mark per run, the legend has one per arm, and the axes have ticks.
    assert all_marks >= 7 * 3 + 7
    assert less < all_marks


def test_names_are_shown_as_they_are(comparison: Comparison, table: Table) -> None:
    names = {"norm": "a<b>&c", "random": r"$\alpha$ and $", "fisher": "_hidden"}
    for svg in figures(*renamed(comparison, table, names)).values():
        shown = [text.lstrip("\u200b") for text in texts(svg)]
        for name in names.values():
            assert name in shown, shown


def test_runs_without_numbers_are_left_out_without_a_word_on_stderr(comparison: Comparison, table: Table) -> None:
    def broken(record: RunRecord) -> RunRecord:
        history = [{"loss": None, "ascent": None, "radius": None}] * len(record.result["history"])
        metrics = {name: {"value": None} for name in record.result["metrics"]}
        gone = {"metrics": metrics, "history": history}
        return replace(record, result=record.result | gone)

    for affected in (("norm",), tuple(comparison.records)):
        records = {
            name: tuple(map(broken, found)) if name in affected else found for name, found in comparison.records.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(figures(replace(comparison, records=records), table)) == 5


def test_without_tuning_there_is_no_figure_of_it(comparison: Comparison, table: Table) -> None:
    assert len(figures(replace(comparison, trials=()), table)) == 4


def test_a_radius_of_zero_has_no_place_on_a_logarithmic_axis(comparison: Comparison) -> None:
    trials = (*comparison.trials, Trial("norm", 0.0, 0.9, 0, 2))
    zero = replace(comparison, trials=trials, chosen=comparison.chosen | {"norm": 0.0})
    assert plot._rho(zero).startswith("<svg")


def test_arms_can_be_told_apart() -> None:
    names = [Arm(f"arm{i}", "norm", (0.1,)).name for i in range(100)]
    assert len(set(styles(names).values())) == 100
    assert len({colour for colour, _ in styles(names[:10]).values()}) == 10
