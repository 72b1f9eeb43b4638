"""The benchmarks of cost run and write what they say; their numbers are judged where they are run, not here."""

from __future__ import annotations

import json

import pytest

from benchmarks import default_comparison, method_cost, perturb_cost, step_cost
from sam import MethodSpec


@pytest.mark.parametrize("model", ["resnet20", pytest.param("resnet18_w16", marks=pytest.mark.slow), "vit_d128"])
def test_step_cost(model, tmp_path, capsys):
    path = tmp_path / "cost.json"
    step_cost.main(["--model", model, "--rounds", "1", "--batch-size", "2", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["settings"] == {"model": model, "rounds": 1, "batch_size": 2}
    assert {"torch", "cpu", "threads", "load_average"} <= result["environment"].keys()
    assert result["environment"]["threads"] == 1
    [only] = result["rounds"][model]
    assert sorted(only["order"]) == sorted(["sgd", *step_cost.LABELS])
    rows = {row["what"].removeprefix(f"{model}, "): row for row in result["rows"]}
    for name, label in step_cost.LABELS.items():
        assert rows[label]["found"]["median"] == only["seconds"][name] / only["seconds"]["sgd"]
    assert rows["norm"]["found"]["median"] == only["seconds"]["norm"] / only["seconds"]["all"]
    limits = {name: rows[label]["limit"] for name, label in step_cost.LABELS.items()}
    assert limits["all"] == limits["norm_closure"] == pytest.approx(2.0)
    assert 1.6 < limits["norm"] < 1.7
    assert 1 < limits["last_stage"] < (1.35 if model == "resnet20" else 1.25)
    assert 0.99 < limits["classifier"] < 1.01
    assert rows["SAM, norm"]["at_most"] == (1.78 if model.startswith("resnet18") else 1.85)
    assert rows["held by norm"]["found"]["median"] == 4
    assert rows["held by random"]["found"]["median"] <= 16
    printed = capsys.readouterr().out
    assert all(f"{row['what']}  " in printed for row in result["rows"])


def test_perturb_cost(tmp_path):
    path = tmp_path / "cost.json"
    perturb_cost.main(["--model", "resnet20", "--rounds", "2", "--batch-size", "2", "--json", str(path)])
    result = json.loads(path.read_text())
    rows = {(row["what"], row["unit"]): row for row in result["rows"]}
    assert rows["norm", "naive SAM-ON"]["at_most"] == 0.3
    assert rows["random 1.0%", "an SGD step"]["at_most"] == 0.01
    first = result["rounds"]["moves"]
    ratio = sorted(r["seconds"]["norm"] / r["seconds"]["norm, naive SAM-ON"] for r in first)
    assert rows["norm", "naive SAM-ON"]["found"]["median"] == pytest.approx(sum(ratio) / 2)


@pytest.mark.slow
def test_default_comparison(tmp_path):
    path = tmp_path / "cost.json"
    small = ["--masks", "none,norm", "--rho-grid", "1", "--seeds", "1", "--epochs", "1", "--tuning-seeds", "1"]
    default_comparison.main(["--json", str(path), "--", *small])
    result = json.loads(path.read_text())
    wall, processor = (row["found"]["median"] for row in result["rows"])
    assert result["rounds"]["compare"][0]["seconds"] == {"wall": wall, "processor": processor}
    assert wall > 0.5
    assert processor > 0.5
    assert result["rows"][0]["met"] is None  # the target is that of the defaults


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
