"""Methods by masks: the numbers and the notes of a comparison whose arms name their method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.by_method import methods_frame, methods_notes, methods_shown, placed
from experiments.compare import Comparison
from experiments.config import Arm, CompareConfig
from experiments.table import build_table, frame
from tests.experiments.made_up import Made

FAMILY = ("sam", "friendly_sam")


@pytest.fixture
def family(made: Made) -> Comparison:
    """Two methods under two masks, one with its own, and one cell that was not compared; all with other numbers."""
    arms = CompareConfig(masks="all,norm", methods=f"{','.join(FAMILY)},ssam_f", rho_grid="0.1,0.2,0.4").arms
    kept = tuple(arm for arm in arms if arm.name != "friendly_sam/norm")

    def change(arm: str, seed: int) -> dict[str, Any]:
        more = {"diverged": "it ended above its start"} if (arm, seed) == ("sam/norm", 2) else {}
        return {"accuracy": 0.5 + 0.05 * [a.name for a in kept].index(arm) + 0.025 * (seed % 2), **more}

    comparison = made(change, arms=kept)
    comparison.chosen["ssam_f"] = 0.4
    return comparison


def test_methods_by_masks_are_the_numbers_of_the_arms(family: Comparison) -> None:
    table = build_table(family)
    rows = {row.arm.name: row for row in table.rows}
    places = {place: row.arm.name for place, row in placed(table.rows).items()}
    assert places == {
        ("sam", "all"): "sam/all",
        ("sam", "norm"): "sam/norm",
        ("friendly_sam", "all"): "friendly_sam/all",
        ("ssam_f", "own mask"): "ssam_f",
    }
    text = methods_shown(table)
    assert text is not None
    assert list(text.columns) == ["all", "norm", "own mask"]
    assert list(dict.fromkeys(text.index.get_level_values(0))) == ["sam", "friendly_sam", "ssam_f"]
    numbers = methods_frame(table).set_index(["method", "column"])
    arms = frame(table).set_index("arm")
    for (method, column), name in places.items():
        row, i = rows[name], list(rows).index(name)
        accuracy, gain = row.accuracy, row.gain
        assert gain is not None
        assert accuracy.value == pytest.approx(
            np.mean([round(40 * (0.5 + 0.05 * i + 0.025 * (s % 2))) / 40 for s in range(8)])
        )
        got = text.loc[method, column]
        assert got["accuracy %"] == (
            f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"
            + (" (!)" if name == "sam/norm" else "")
        )
        assert got["gain"] == f"{5.0 * i:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
        assert got["rho"] == {"ssam_f": "0.4* (fisher)"}.get(name, "0.2")
        pd.testing.assert_series_equal(
            numbers.loc[(method, column)].drop("arm"), arms.loc[name].drop("method"), check_names=False
        )
    assert set(text.loc["friendly_sam", "norm"]) == {""}
    assert set(text.loc["ssam_f", "all"]) == {""}


def test_notes_of_methods_by_masks_say_what_was_tuned(family: Comparison) -> None:
    base, tuned, fixed = methods_notes(family, build_table(family))
    assert base.startswith("Baseline: none, the base optimizer alone: 51.2 [")
    assert (
        "Tuned for each method under each mask by itself: rho, on validation images of 2 other seeds, from "
        "sam/all 0.1, 0.2, 0.4; sam/norm 0.1, 0.2, 0.4; friendly_sam/all 0.1, 0.2, 0.4; ssam_f 0.1, 0.2, 0.4. "
        "Not tuned: options of methods" in tuned
    )
    assert fixed == "Settings that methods bring: ssam_f has mask fisher@every=1, norm_scope full."
    table = build_table(family)
    assert "Masks: ssam_f is fisher, built every epoch; all others" in " ".join(table.notes)  # not "sam/all is all"


def test_methods_by_masks_without_tuning(made: Made) -> None:
    comparison = made(arms=CompareConfig(masks="norm", methods="sam", rho_grid="0.1").arms)
    _, tuned = methods_notes(comparison, build_table(comparison))
    assert tuned == "Nothing was tuned for any method and mask: rho was given."


def test_without_methods_there_is_no_such_table(made: Made) -> None:
    comparison = made()
    table = build_table(comparison)
    assert methods_shown(table) is None
    assert methods_notes(comparison, table) == []


def test_arms_of_a_file_are_placed_by_their_mask(made: Made) -> None:
    arms = (
        *(Arm("none", "none"), Arm("mine", "random", (0.1,), method="sam")),
        *(Arm("longer", "random", (0.1,), 2, method="sam"), Arm("without", "norm", (0.1,))),
    )
    found = placed(build_table(made(arms=arms)).rows)
    assert {place: row.arm.name for place, row in found.items()} == {
        ("sam", "random"): "mine",
        ("sam", "longer"): "longer",  # the place is taken
    }
