"""The answer of a comparison in sentences, by fixed rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from analysis import Verdict, seeds_needed
from experiments.config import BASELINE
from experiments.significance import ALPHA
from experiments.table import Row, Table, gain_text


def answer(table: Table) -> list[str]:
    """What the table shows of each family of contrasts, main arms and controls.

    An arm is better than the baseline where the Holm-adjusted p value of its gain is at most 0.05 and the mean gain is
    above 0, worse where that mean is below 0; of every other arm no difference was shown, which does not say that there
    is none. With too few seeds for any p value to pass nothing is said of any arm. Arms with a warning are named with
    it.
    """
    lines = []
    for role, name in (("main", "main contrasts"), ("control", "controls")):
        rows = [row for row in table.rows if row.arm.role == role and row.gain is not None]
        if rows:
            lines.append(_family(rows, name))
    doubts = {row.arm.name: _doubts(row) for row in table.rows}
    named = "; ".join(f"{name}: {', '.join(found)}" for name, found in doubts.items() if found)
    return lines + ([f"Not to be quoted as it stands: {named}."] if named else [])


def of_flatness(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """The word of every verdict and its reasons; of arms of which the same is said, once for all of them."""
    said: dict[str, dict[str, str]] = {}
    for one in verdicts:
        text = " ".join([one.lines[0], *(line for line in one.lines if line.startswith("Because"))])
        of_any = re.sub(rf"(?<![\w/]){re.escape(one.arm)}(?![\w/])", "the arm", text)
        said.setdefault(of_any, {})[one.arm] = text
    for of_any, arms in said.items():
        yield f"{', '.join(arms)}, each: {of_any}" if len(arms) > 1 else next(iter(arms.values()))


def _family(rows: Sequence[Row], name: str) -> str:
    n, needed = rows[0].n, seeds_needed(len(rows), ALPHA)
    size = f"{len(rows)} {name if len(rows) > 1 else name.removesuffix('s')}"
    if n < needed:
        return (
            f"Not decided for the {size}: with n = {n} seed{'s' * (n != 1)} no result can pass at {ALPHA} after Holm; "
            f"at least {needed} are needed."
        )
    passed = [row for row in rows if row.gain is not None and row.gain.p_holm <= ALPHA]
    better = [row for row in passed if row.gain is not None and row.gain.mean_difference > 0]
    worse = [row for row in passed if row not in better]
    open_ = [row.arm.name for row in rows if row not in passed]
    parts = [
        f"{word} than {BASELINE} in test accuracy: "
        + ", ".join(f"{row.arm.name} (by {gain_text(row)} points)" for row in found)
        for word, found in (("better", better), ("worse", worse))
        if found
    ]
    if open_:
        parts.append(f"no difference to {BASELINE} was shown for {', '.join(open_)}")
    return f"Of {size}, at {ALPHA} after Holm with n = {n} seeds: {'; '.join(parts)}."


def _doubts(row: Row) -> list[str]:
    return [
        text
        for holds, text in (
            (row.diverged > 0, f"{row.diverged} of {row.n} runs diverged"),
            (row.rho_at_edge, "its radius lies at the edge of the grid"),
            (row.matched == "NO", "its count is not matched"),
        )
        if holds
    ]
