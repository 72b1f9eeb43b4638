"""Methods by masks: the arms of a comparison that name a method, with a line per method and a column per mask."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from experiments.compare import Comparison
from experiments.config import BASELINE, Arm
from experiments.table import Row, Table, frame, gain_text, interval_text, rho_text
from sam import MethodSpec

OWN_MASK = "own mask"
"""Column of the methods that bring their mask."""
LINES = ("accuracy %", "gain", "rho")


def placed(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """The rows of arms that name a method, by method and column, in the order of the arms.

    The column is the name of the arm without the method, or the mask where the arm is not called METHOD/ARM; an arm
    whose place is taken has a column of its own.
    """
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.arm.method and row.arm.rho:
            place = row.arm.method, _column(row.arm)
            found[place if place not in found else (row.arm.method, row.arm.name)] = row
    return found


def _column(arm: Arm) -> str:
    if "mask" in MethodSpec.parse(arm.method).preset:
        return OWN_MASK
    return arm.name.removeprefix(f"{arm.method}/") if arm.name.startswith(f"{arm.method}/") else arm.mask


def methods_frame(table: Table) -> pd.DataFrame:
    """One line per method and mask, with the numbers of :func:`experiments.table.frame`."""
    places = placed(table.rows)
    numbers = frame(Table(tuple(places.values()), ()))
    return pd.DataFrame(list(places), columns=["method", "column"]).join(numbers.drop(columns="method"))


def methods_shown(table: Table) -> pd.DataFrame | None:
    """Accuracy, gain and radius of every method (three lines each) under every mask (a column each), as text; None
    where no arm names a method. A combination that was not compared is empty."""
    places = placed(table.rows)
    if not places:
        return None
    methods, columns = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    lines = pd.MultiIndex.from_product([methods, LINES], names=["method", ""])
    text = pd.DataFrame("", index=lines, columns=columns)
    for (method, column), row in places.items():
        cell = (
            interval_text(row.accuracy, 100.0, 1) + (" (!)" if row.diverged else ""),
            gain_text(row),
            rho_text(row) + (f" ({row.arm.mask})" if column == OWN_MASK else ""),
        )
        text.loc[[(method, line) for line in LINES], column] = list(cell)
    return text


def methods_notes(comparison: Comparison, table: Table) -> list[str]:
    """What a reader of the methods by masks must know; nothing where no arm names a method."""
    rows = list(placed(table.rows).values())
    if not rows:
        return []
    config = comparison.config
    (base,) = (row for row in table.rows if row.arm.name == BASELINE)
    notes = [
        f"Baseline: {BASELINE}, the base optimizer alone: {interval_text(base.accuracy, 100.0, 1)} %; gains are to it, "
        "in percentage points. (!), *, intervals and what they are over: as in the table of arms."
    ]
    tried = {len(row.arm.rho) for row in rows}
    if tried == {1}:
        notes.append("Nothing was tuned for any method and mask: rho was given.")
    else:
        grids = "; ".join(f"{row.arm.name} {', '.join(f'{rho:g}' for rho in row.arm.rho)}" for row in rows)
        notes.append(
            f"Tuned for each method under each mask by itself: rho, on validation images of {config.tuning_seeds} "
            f"other seed{'s' if config.tuning_seeds > 1 else ''}, from {grids}. Not tuned: options of methods, learning"
            " rate, weight decay, epochs; they are the same in every cell and in the baseline"
            + (", settings that differ (below) excepted." if any(row.arm.settings for row in rows) else ".")
        )
    fixed = {
        row.arm.method: MethodSpec.parse(row.arm.method).preset
        for row in rows
        if MethodSpec.parse(row.arm.method).preset
    }
    if fixed:
        said = "; ".join(
            f"{method} has {', '.join(f'{name} {value}' for name, value in own.items())}"
            for method, own in fixed.items()
        )
        notes.append(f"Settings that methods bring: {said}.")
    return notes
