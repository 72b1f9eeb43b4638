"""Everything that a report is written from: the comparison, its table, and what else its folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import PRIMARY
from experiments.compare import Comparison
from experiments.measure import LAMBDA_MAX
from experiments.record import RunRecord
from experiments.report.anatomy import MaskAnatomy, mask_anatomy
from experiments.report.folder import load_comparison
from experiments.runs import RunsOptions, show
from experiments.store import read_all
from experiments.study import Study, load_study
from experiments.table import Table, build_table
from experiments.verdict import Judgement, judge
from masks.errors import InputError


@dataclass(frozen=True, eq=False)
class Findings:
    """What a report says.

    Attributes:
        comparison: the finished arms.
        table: their table.
        left_out: why other arms are not in it.
        runs: every finished run in the folder, those that chose the radius and those of a sweep included.
        failed: runs that did not end well, each with ``run``, ``state`` and ``reason``.
        study: the runs on the report's seeds, also at other radii than the chosen one.
        judgement: the verdicts on the default contrasts.
        masks: the masks' anatomy.
        absent: why one of the three above is None, by its name.
    """

    comparison: Comparison
    table: Table
    left_out: dict[str, str] = field(default_factory=dict)
    runs: tuple[RunRecord, ...] = ()
    failed: tuple[dict[str, Any], ...] = ()
    study: Study | None = None
    judgement: Judgement | None = None
    masks: MaskAnatomy | None = None
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def swept(self) -> pd.DataFrame | None:
        """The study's runs where some arm was trained at several radii, else None."""
        if self.study is None or self.study.frame.groupby("arm")["rho"].nunique().max() < 2:
            return None
        return self.study.frame


def find(folder: Path, *, primary: str | None = None, contrasts: Sequence[str] = ()) -> Findings:
    """Read all that a report of the comparison in a folder says.

    Raises:
        InputError: see :func:`experiments.report.folder.load_comparison`; a primary metric or contrast that is not
            there.
    """
    loaded = load_comparison(folder)
    table = build_table(loaded.comparison, predicted=loaded.predicted)
    if primary is not None or contrasts:
        _judge(load_study(folder), loaded.comparison, primary, contrasts)  # what was named must be there
    return gather(loaded.comparison, table, loaded.left_out, primary=primary, contrasts=contrasts)


def gather(
    comparison: Comparison,
    table: Table,
    left_out: dict[str, str] | None = None,
    *,
    primary: str | None = None,
    contrasts: Sequence[str] = (),
) -> Findings:
    """The same for a comparison that is at hand. What the folder does not hold is told, not raised."""
    folder, absent = comparison.folder, {}
    found: dict[str, Any] = {"study": None, "judgement": None, "masks": None}
    for name, take in (
        ("study", lambda: load_study(folder)),
        ("judgement", lambda: _judge(found["study"], comparison, primary, contrasts)),
        ("masks", lambda: mask_anatomy(comparison)),
    ):
        try:
            found[name] = take()
        except InputError as error:
            absent[name] = str(error)
    return Findings(
        comparison=comparison,
        table=table,
        left_out=left_out or {},
        runs=tuple(read_all(folder / "runs")),
        failed=tuple(show(RunsOptions(str(folder), failed=True))[1]) if folder.is_dir() else (),
        **found,
        absent=absent,
    )


def _judge(study: Study | None, comparison: Comparison, primary: str | None, contrasts: Sequence[str]) -> Judgement:
    """By the metric named, else by the one named beforehand for all studies, else by the first that is not one of the
    table's: the notes of the judgement say so."""
    if study is None:
        raise InputError("the runs cannot be judged")
    if primary is None and PRIMARY not in study.metrics:
        others = [name for name in study.metrics if name not in (LAMBDA_MAX, comparison.measure.m_sharpness)]
        primary = (others or list(study.metrics))[0]
    return judge(comparison.folder, primary=primary, contrasts=contrasts, secondary=(), resamples=0)
