"""The benchmarks of masks and analysis run and write what they say; their numbers are judged where they are run."""

from __future__ import annotations

import json

import pytest

from benchmarks import hessian_cost, mask_cost, profiles, sharpness_cost
from benchmarks.rows import Row, table


def result_of(main, path, *arguments):
    main([*arguments, "--rounds", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    assert {"torch", "cpu", "threads", "load_average"} <= result["environment"].keys()
    assert result["environment"]["threads"] == 1
    return result


@pytest.fixture(autouse=True)
def short_profiles(monkeypatch):
    monkeypatch.setattr(profiles, "ROUNDS", 1)


def test_selection(tmp_path, capsys):
    result = result_of(mask_cost.main, tmp_path / "out" / "cost.json", "selection", "--sizes", "3000")
    assert result["schema"] == "sam-masks/benchmarks/mask_cost/1"
    rows = {row["what"]: row for row in result["rows"]}
    assert len(rows) == 3 * len(mask_cost.DENSITIES)
    parts = rows[f"3e+03 scores, normal, density 0.5, {mask_cost.PARTS}"]
    seconds = result["rounds"]["3000"]["3e+03 scores, normal, density 0.5"][0]["seconds"]
    assert parts["found"]["median"] == pytest.approx(seconds[mask_cost.PARTS] / seconds["torch.topk"])
    seconds = result["rounds"]["3000"]["3e+03 scores, zeros, density 0.5"][0]["seconds"]
    row = rows["3e+03 scores, zeros, density 0.5"]
    assert row["found"]["median"] == pytest.approx(seconds["top_k"] / seconds["torch.topk"])
    assert row["limit"] == pytest.approx(seconds["reading"] / seconds["torch.topk"])
    assert (row["at_most"], row["unit"]) == (1.5, "torch.topk")
    assert "zeros, density 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "arguments", "names"),
    [
        pytest.param(
            mask_cost.main,
            ["fisher", "--nets", "vit", "--num-examples", "4"],
            ["vit, Fisher, all", "vit, Fisher, norm", "vit, Fisher, norm, trace"],
            marks=pytest.mark.slow,
        ),
        (
            hessian_cost.main,
            ["--nets", "vit"],
            [f"vit, Hessian product, {what}" for what in ("all", "norm", "rebuilt")],
        ),
        (sharpness_cost.main, ["--nets", "vit", "--steps", "2"], ["vit, 2 steps of Auto-PGD"]),
    ],
)
def test_costs_of_passes(main, arguments, names, tmp_path):
    result = result_of(main, tmp_path / "cost.json", *arguments)
    assert [row["what"] for row in result["rows"]] == names
    assert all(row["found"]["median"] > 0 for row in result["rows"])
    assert len(result["rounds"]["vit"]) == 1


def test_a_row_is_met_missed_or_without_target():
    found = {"median": 1.2, "q1": 1.0, "q3": 1.4}
    rows = [
        Row("a", found, "gradients", 1.0, 1.2),
        Row("b", found, "gradients", at_most=1.1),
        Row("c", found, "gradients"),
    ]
    assert [row.met for row in rows] == [True, False, None]
    lines = table(rows).splitlines()
    assert ["MISSED" in line for line in lines] == [False, False, True, False]
    assert " met " in lines[1]
