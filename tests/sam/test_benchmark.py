"""The benchmarks of cost run and write what they say; their numbers are judged where they are run, not here."""

from __future__ import annotations

import json

import pytest

from benchmarks import method_cost, step_cost
from sam import MethodSpec


@pytest.mark.parametrize("model", ["resnet20", pytest.param("resnet18_w16", marks=pytest.mark.slow), "vit_d128"])
def test_step_cost(model, tmp_path, capsys):
    path = tmp_path / "cost.json"
    arguments = ["--model", model, "--rounds", "1", "--batch-size", "2", "--device", "cpu", "--json", str(path)]
    step_cost.main(arguments)
    result = json.loads(path.read_text())
    assert result["settings"] == {"model": model, "rounds": 1, "batch_size": 2, "seed": 0}
    assert {"torch", "cpu", "threads", "load_average"} <= result["environment"].keys()
    assert result["environment"]["threads"] == 1
    assert len(result["rounds"]) == 1
    assert sorted(result["rounds"][0]["order"]) == sorted(step_cost.LABELS)
    assert result["num_kept"]["random"] == result["num_kept"]["norm"]
    assert result["held"]["norm"]["share_of_parameters"] < 0.01
    assert result["held"]["all"]["share_of_parameters"] == pytest.approx(1.0)
    assert result["flop_limit"]["all"] == pytest.approx(2.0)
    assert 1.6 < result["flop_limit"]["norm"] < 1.7
    assert [item["target"] for item in result["targets"]] == [
        "step cost, all",
        "step cost, norm",
        "norm relative to all",
        "held by norm / parameters",
    ]
    printed = capsys.readouterr().out
    assert "SAM, norm (step_on)" in printed
    assert "at most 1.85" in printed


def test_method_cost(tmp_path, capsys):
    path = tmp_path / "cost.json"
    method_cost.main(["--model", "vit_d128", "--rounds", "1", "--batch-size", "2", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["settings"] == {"model": "vit_d128", "mask": "all", "rounds": 1, "batch_size": 2, "seed": 0}
    rows = {row["method"]: row for row in result["methods"]}
    assert {"sam", "looksam", "exact_sam"} <= rows.keys()
    assert not {"ssam_f", "sam_on", "mup_sam"} & rows.keys()
    assert sorted(result["rounds"][0]["order"]) == sorted(["sgd", *rows])
    seconds = result["rounds"][0]["seconds"]
    for name, row in rows.items():
        steps = MethodSpec(name).options.get("k", 1)
        assert row["cost_relative_to_sgd"]["median"] == pytest.approx(seconds[name] / seconds["sgd"] / steps)
    assert [name for name, row in rows.items() if row["explained"]] == ["exact_sam"]
    assert rows["looksam"]["stated_passes"] == pytest.approx(1.2)
    assert rows["exact_sam"]["stated_passes"] == 5
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(rows)


def test_a_missed_number_is_marked_or_explained():
    cost = {"median": 6.05, "q1": 6.0, "q3": 6.1}
    row = {"method": "sam", "cost_relative_to_sgd": cost, "stated_passes": 5, "off": 0.21, "met": False}
    result = {
        "settings": {"model": "m", "mask": "all", "batch_size": 1, "rounds": 1},
        "environment": {"device": "cpu"},
        "sgd_seconds": {"median": 0.1},
        "methods": [row | {"explained": None}, row | {"explained": "because"}, row | {"met": True, "explained": "b"}],
    }
    ends = [line.split("%", 1)[1] for line in method_cost.table(result).splitlines()[3:]]
    assert ends == ["  MISSED", "  (because)", ""]
