"""How sharpness developed along training, where it was measured on the way."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.measure import LAMBDA_MAX
from experiments.plot import outcome
from experiments.plot.style import Style
from experiments.record import RunRecord
from experiments.report.content import Absent, Block, picture
from experiments.report.findings import Findings


def along(findings: Findings, style: dict[str, Style]) -> Iterator[Block]:
    """The table's two flatness metrics after the epochs that ``--measure-every`` names, and after the last one."""
    comparison = findings.comparison
    every, n = comparison.config.measure_every, findings.table.rows[0].n
    if not every:
        yield Absent(
            "Sharpness along training",
            "it was measured at the end only",
            "measure it after every so many epochs, too (--measure-every 5)",
        )
        return
    for i, metric in enumerate((LAMBDA_MAX, comparison.measure.m_sharpness), start=1):
        curves, after = {}, {}
        for arm, records in comparison.records.items():
            runs = [observations(record, metric) for record in records]
            after[arm], curves[arm] = list(runs[0]), [list(run.values()) for run in runs]
        yield picture(
            outcome.along_training(curves, style, metric, after),
            f"along-{i}",
            f"{metric} along training",
            f"On training images with their labels as given, after every {every} epochs and the last one. Line: mean "
            f"over n = {n} seeds; band: its 95 % t interval over seeds; a gap where a run has no value.",
        )


def observations(record: RunRecord, metric: str) -> dict[int, float | None]:
    """What a run measured of a metric, by the number of epochs after which it did; the final weights last."""
    history = record.result["history"]
    taken = {i: epoch["observed"] for i, epoch in enumerate(history, start=1) if "observed" in epoch}
    return {i: found["metrics"][metric]["value"] for i, found in (taken | {len(history): record.result}).items()}
