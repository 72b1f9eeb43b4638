"""The curvature benchmark runs and writes what it says; its numbers are judged where it is run, not here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import curvature, peers


def test_curvature_without_other_libraries(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curvature, "versions", lambda: dict.fromkeys(peers.PACKAGES))
    path = tmp_path / "results" / "curvature.json"
    curvature.main(["--rounds", "1", "--nets", "mlp", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["environment"]["libraries"] == dict.fromkeys(peers.PACKAGES)
    assert {"torch", "scipy", "cpu", "threads"} <= result["environment"].keys()
    net = result["nets"]["mlp"]
    assert net["num_parameters"] == 609
    five = net["top five"]
    assert five["exact"] == net["largest_eigenvalues"][:5]
    ours, checked = five["methods"]["ours"], five["methods"]["ours, with the deflation check"]
    assert ours["error"][0] < 1e-5
    assert len(ours["products"]) == len(five["krylov_limit"]) == 1
    # More with the check, and never fewer than the bound.
    assert np.all(np.array(five["krylov_limit"]) <= ours["products"])
    assert np.all(np.array(ours["products"]) < checked["products"])
    assert five["methods"]["curvlinops, scipy eigsh"] == {"failed": "not installed"}
    for name, row in net["trace"]["methods"].items():
        assert name.startswith("ours") == ("products" in row)
        if "products" in row:
            assert row["products"] == [60]
            assert row["error"][0] < 0.15
    assert len(net["moments"]["methods"]["ours"]["error"]) == 4
    assert [item["target"] for item in result["targets"]] == [
        f"mlp, {task}, {what}" for task in ("lambda_max", "top five") for what in ("error", "products")
    ]
    printed = capsys.readouterr().out
    assert "ours, Hutchinson deflated" in printed
    assert "(Krylov limit)" in printed


@pytest.mark.parametrize(("values", "k", "limit"), [([5, 3], 2, 3), ([5, 3, -1], 1, 4), ([2], 1, 2)])
def test_the_krylov_limit_of_few_distinct_eigenvalues_is_their_number(values, k, limit):
    matrix = torch.diag(torch.tensor([*values, *[0.0] * 40], dtype=torch.float64))
    exact = np.array(values[:k], dtype=float)
    assert curvature.krylov_limit(matrix, exact, seed=0, accuracy=1e-12) == limit
    assert curvature.krylov_limit(matrix, exact, seed=0, accuracy=0.9) <= limit


def test_other_libraries_fail_with_their_reason_and_ours_fail_the_benchmark(monkeypatch):
    def broken(seed):
        raise RuntimeError("no such operation. Use another")

    monkeypatch.setattr(curvature, "versions", lambda: dict.fromkeys(peers.PACKAGES, "1.0"))
    good = ("", lambda seed: ([2.0 + seed], 3))
    found = curvature.compare("trace", np.array([2.0]), {"ours": good, "x": ("pyhessian", broken)}, 3, 0)
    assert found["x"] == {"failed": "RuntimeError: no such operation"}
    assert found["ours"]["values"] == [[2.0], [3.0], [4.0]]
    assert found["ours"]["products"] == [3, 3, 3]
    assert found["ours"]["error"] == pytest.approx([np.sqrt((0.25 + 1) / 3)])
    worst = curvature.compare("lambda_max", np.array([2.0]), {"ours": good}, 3, 0)
    assert worst["ours"]["error"] == [1.0]
    with pytest.raises(RuntimeError, match="no such operation"):
        curvature.compare("trace", np.array([2.0]), {"ours": ("", broken)}, 1, 0)
