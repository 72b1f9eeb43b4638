"""Sharpness along training is drawn where it was measured, at the epochs after which it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from experiments.plot.style import styles
from experiments.record import RunRecord
from experiments.report import along as module
from experiments.report.along import along, observations
from experiments.report.content import Absent, Picture
from experiments.report.findings import Findings


def watched(record: RunRecord, metrics: tuple[str, ...]) -> RunRecord:
    """The same run, measured after its first epoch, too: 100 there, at the end 7."""

    def found(value: float) -> dict[str, Any]:
        return {"metrics": {metric: {"value": value} for metric in metrics}}

    history = [dict(epoch) for epoch in record.result["history"]]
    history[0]["observed"] = found(100.0)
    return replace(record, result=record.result | found(7.0) | {"history": history})


def test_observations_end_with_the_final_weights(findings: Findings) -> None:
    record = findings.comparison.records["norm"][0]
    epochs = len(record.result["history"])
    assert epochs > 1
    assert observations(watched(record, ("a",)), "a") == {1: 100.0, epochs: 7.0}
    value = record.result["metrics"]["lambda_max"]["value"]
    assert observations(record, "lambda_max") == {epochs: value}


def test_both_metrics_of_the_table_are_drawn_for_every_arm(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = findings.comparison
    names = ("lambda_max", comparison.measure.m_sharpness)
    records = {arm: tuple(watched(r, names) for r in rs) for arm, rs in comparison.records.items()}
    config = replace(comparison.config, measure_every=1)
    given, draw = [], module.outcome.along_training

    def drawn(*arguments: Any) -> Any:
        given.append(arguments)
        return draw(*arguments)

    monkeypatch.setattr(module.outcome, "along_training", drawn)
    blocks = list(along(replace(findings, comparison=replace(comparison, config=config, records=records)),
                        styles(config.arms)))  # fmt: skip
    assert [block.name for block in blocks if isinstance(block, Picture)] == ["along-1", "along-2"]
    for (curves, _, what, after), name in zip(given, names, strict=True):
        assert what == name
        assert set(curves) == set(after) == {arm.name for arm in config.arms}
        for arm, rs in records.items():
            assert curves[arm] == [[100.0, 7.0]] * len(rs)
            assert after[arm] == [1, len(rs[0].result["history"])]


def test_measured_at_the_end_only(findings: Findings) -> None:
    (block,) = along(findings, styles(findings.comparison.config.arms))
    assert isinstance(block, Absent)
