"""The step-cost benchmark runs and writes what it says; its numbers are judged where it is run, not here."""

from __future__ import annotations

import json

import pytest

from benchmarks import step_cost


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
