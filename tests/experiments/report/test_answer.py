"""The answer follows its rules, on tables made up here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from analysis import PairedComparison, Verdict
from experiments.report.answer import answer, of_flatness
from experiments.table import Row, Table


def told(table: Table, gains: dict[str, tuple[float, float]], n: int = 8, **changes: dict[str, object]) -> list[str]:
    """The answer where arms have these gains (mean, Holm p), and no other one."""

    def made(row: Row) -> Row:
        gain = None
        if row.arm.name in gains:
            mean, p = gains[row.arm.name]
            gain = PairedComparison("", mean, mean - 0.01, mean + 0.01, 0.95, p, p, n, 1.0)
        plain = {"rho_at_edge": False, "diverged": 0, "matched": "yes"}
        return replace(row, gain=gain, n=n, **plain | changes.get(row.arm.name, {}))

    return answer(Table(tuple(map(made, table.rows)), ()))


def test_better_worse_and_not_shown(table: Table) -> None:
    lines = told(table, {"all": (0.02, 0.05), "norm": (-0.02, 0.01), "random": (0.05, 0.0501), "fisher": (0.0, 1.0)})
    assert lines == [
        "Of 4 main contrasts, at 0.05 after Holm with n = 8 seeds: better than none in test accuracy: all (by +2.0 "
        "[+1.0, +3.0] points); worse than none in test accuracy: norm (by -2.0 [-3.0, -1.0] points); no difference to "
        "none was shown for random, fisher."
    ]


def test_controls_are_a_family_of_their_own(table: Table) -> None:
    lines = told(table, {"all": (0.02, 0.01), "none_2x": (-0.02, 0.5)})
    assert lines[0].startswith("Of 1 main contrast, at 0.05")
    assert lines[1] == "Of 1 control, at 0.05 after Holm with n = 8 seeds: no difference to none was shown for none_2x."


@pytest.mark.parametrize(("n", "decided"), [(5, False), (6, True)])
def test_too_few_seeds_say_nothing(table: Table, n: int, decided: bool) -> None:
    """One contrast: 2 / 2^n <= 0.05 from n = 6 on."""
    (line,) = told(table, {"all": (0.02, 0.01)}, n=n)
    assert line.startswith("Of 1 main contrast") is decided
    assert decided or "no result can pass at 0.05 after Holm; at least 6 are needed" in line


def test_doubts_are_named(table: Table) -> None:
    doubts = {"all": {"rho_at_edge": True, "diverged": 2}, "fisher": {"matched": "NO"}}
    *_, last = told(table, {"all": (0.02, 0.01)}, **doubts)
    assert last == (
        "Not to be quoted as it stands: all: 2 of 8 runs diverged, its radius lies at the edge of the grid; fisher: "
        "its count is not matched."
    )


def test_arms_of_which_the_same_is_said_are_said_once() -> None:
    def made(arm: str, reference: str = "none", why: str = "{} has one radius.") -> Verdict:
        lines = [f"{arm} against {reference}: NOT IDENTIFIED.", f"Because {why.format(arm)}", "Total gain +1."]
        return cast(Verdict, SimpleNamespace(arm=arm, lines=tuple(lines)))

    verdicts = [
        made("sam/norm"),
        made("norm"),
        made("random", why="too few"),
        made("random", "all"),
        made("all", "sam/all"),
    ]
    assert list(of_flatness(verdicts)) == [
        "sam/norm, norm, each: the arm against none: NOT IDENTIFIED. Because the arm has one radius.",
        "random against none: NOT IDENTIFIED. Because too few",
        "random against all: NOT IDENTIFIED. Because random has one radius.",
        "all against sam/all: NOT IDENTIFIED. Because all has one radius.",
    ]
