"""Curves that runs kept are drawn, for the arms that have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.plot.style import styles
from experiments.record import RunRecord
from experiments.report.content import Absent, Picture
from experiments.report.curvature import curvature
from experiments.report.findings import Findings

KEPT: dict[str, dict[str, Any]] = {
    "spectrum": {"nodes": [[-1.0, 5.0]], "weights": [[0.9, 0.1]], "dimension": 9, "seed": 0},
    "slice_1d": {"axes": [[-1, 0, 1]], "values": [2.0, 1.0, 3.0], "num_examples": 8},
    "slice_2d": {"axes": [[-1, 1], [-1, 1]], "values": [[2.0, 1.0], [3.0, 4.0]], "num_examples": 8},
}


def measured(findings: Findings, arms: tuple[str, ...], broken: str = "") -> Findings:
    """The same runs, but these arms kept curves; the first seed of the arm ``broken`` has none."""

    def kept(record: RunRecord, value: float | None) -> RunRecord:
        found = {name: {"value": value, "settings": {"name": name, **settings}} for name, settings in KEPT.items()}
        return replace(record, result=record.result | {"metrics": record.result["metrics"] | found})

    records = {
        arm: tuple(kept(r, None if arm == broken and i == 0 else 1.0) for i, r in enumerate(rs)) if arm in arms else rs
        for arm, rs in findings.comparison.records.items()
    }
    return replace(findings, comparison=replace(findings.comparison, records=records))


def test_curves_are_drawn_in_the_colours_of_their_arms(findings: Findings) -> None:
    style = styles(findings.comparison.config.arms)
    blocks = list(curvature(measured(findings, ("none", "norm"), broken="norm"), style))
    assert [block.name for block in blocks if isinstance(block, Picture)] == ["spectrum", "slice-1d", "slice-2d"]
    lines, curves, surfaces = blocks
    assert isinstance(lines, Picture)
    assert isinstance(curves, Picture)
    assert isinstance(surfaces, Picture)
    for picture in (lines, curves):
        assert "seeds: none n = 3, norm n = 2" in picture.caption
        assert style["norm"].colour.lower() in picture.svg.lower()
        assert style["fisher"].colour.lower() not in picture.svg.lower()
    assert "1 random vectors of 2 steps" in lines.caption
    assert "n = 1 seed per arm" in surfaces.caption


def test_without_them_each_is_absent(findings: Findings) -> None:
    blocks = list(curvature(findings, styles(findings.comparison.config.arms)))
    assert [type(block) for block in blocks] == [Absent] * 3
