"""docs/performance.md holds the committed results, and the benchmark for GPUs runs as far as a CPU can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu, growth, page, profiles
from benchmarks.rows import Row
from experiments.models import build_model

CPU = torch.device("cpu")


def test_the_page_holds_what_the_results_say() -> None:
    assert page.main(["--check"]) == 0


def test_every_result_with_rows_is_on_the_page() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    for path in page.RESULTS.glob("*.json"):
        if "rows" in json.loads(path.read_text(encoding="utf-8")):
            assert f"<!-- results: {path.name} -->" in text


def test_a_changed_result_changes_the_page(tmp_path: Path) -> None:
    row = {"what": "a", "unit": "b", "limit": 1.5, "at_most": 2.0, "at_least": None, "met": False, "note": "why"}
    env = {"cpu": "C", "device": "cpu (x)", "threads": 1, "torch": "2", "load_average": [0.0, 1.0, 2.0]}
    result = {"environment": env, "clock": "process CPU", "created": "2026-01-02T00:00:00"}
    for median, met in ((2.5, False), (1.75, True)):
        rows = [{**row, "met": met, "found": {"median": median, "q1": 1.0, "q3": 3.0}}]
        (tmp_path / "r.json").write_text(json.dumps({**result, "rows": rows}))
        text = page.filled("x\n<!-- results: r.json -->\nold\n<!-- end -->\ny\n", tmp_path)
        assert f"| a; why | {median:.3f} x b | 1.000 to 3.000 | 1.50 | at most 2.00 |" in text
        assert ("**missed**" in text) == (not met)
        assert "old" not in text
        assert text.endswith("<!-- end -->\ny\n")
        assert page.filled(text, tmp_path) == text


def test_a_row_that_misses_is_profiled_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"twice": {"a": 0.6, "b": 0.4, "c": 0.001}, "once": {"a": 0.75, "d": 0.25}}
    calls: list[str] = []
    monkeypatch.setattr(profiles, "shares", lambda step: taken[step()])
    steps = {name: lambda name=name: calls.append(name) or name for name in taken}
    found = {"median": 2.0, "q1": 2.0, "q3": 2.0}
    met, untold = Row("a", found, "b", at_most=2.0), Row("a", found, "b")
    assert profiles.explained(met, steps, "twice", "once") is met
    assert profiles.explained(untold, steps, "twice", "once") is untold
    assert not calls
    row = profiles.explained(Row("a", found, "b", at_most=1.0), steps, "twice", "once", lambda: calls.append("before"))
    assert calls[::2] == ["before"] * 2 * profiles.ROUNDS
    assert sorted(calls[1::2]) == ["once"] * profiles.ROUNDS + ["twice"] * profiles.ROUNDS
    parts = row.profile
    assert parts is not None
    assert list(parts) == ["a", "b", "d", "all else", "together"]
    assert parts["a"] == pytest.approx((1.2 / 1.001, 0.75))
    assert parts["d"] == (0.0, 0.25)
    assert parts["all else"] == pytest.approx((0.002 / 1.001, 0.0))
    assert parts["together"] == (2.0, 1.0)


def test_shares_by_kind() -> None:
    x = torch.randn(300, 300)
    found = profiles.shares(lambda: (x @ x, x.sin()))
    assert sum(found.values()) == pytest.approx(1)
    assert found["products and convolutions"] > 0
    assert found["other operators, mostly elementwise"] > 0
    assert min(found.values()) >= 0
    assert "attention" not in found


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "products and convolutions"),
        ("aten::mkldnn_convolution", "products and convolutions"),
        ("aten::convolution_backward", "products and convolutions, backward"),
        ("aten::native_batch_norm_backward", "normalization"),
        ("aten::topk", "selection and sorting"),
        ("aten::_foreach_norm", "norms and sums"),
        ("aten::clone", "copies and fresh memory"),
        ("aten::_foreach_add_", "other operators, mostly elementwise"),
        ("autograd::engine::evaluate_function: AddBackward0", None),
    ],
)
def test_kinds_of_operators(operator: str, kind: str | None) -> None:
    assert profiles.kind(operator) == kind


def test_growth_on_a_small_model(tmp_path: Path) -> None:
    file, folder = tmp_path / "growth.json", tmp_path / "figures"
    growth.main(["--axes", "parameters", "--most", "10000", "--rounds", "1", "--json", str(file)])
    rows = {row["what"]: row["found"]["median"] for row in json.loads(file.read_text())["rows"]}
    place = "parameters of the model: 10000"
    assert set(rows) == {
        *(f"{place}, SAM, {name}" for name in ("all", "norm", "random")),
        *(f"{place}, building {name}" for name in ("all", "norm", "random", "magnitude")),
    }
    growth.main(["--figures", str(file), str(folder)])
    text = (folder / "growth-parameters.svg").read_text(encoding="utf-8")
    assert f"norm: 10000 {rows[f'{place}, SAM, norm']:.2f}" in text
    assert [path.name for path in folder.iterdir()] == ["growth-parameters.svg"]


@pytest.mark.parametrize("size", growth.SIZES[:-1])
def test_the_perceptron_is_the_widest_with_so_many_parameters(size: int) -> None:
    model = growth.perceptron(size)
    count = sum(p.numel() for p in model.parameters())
    width = model[0].out_features
    assert count <= size < count + 2 * width + 80


@pytest.mark.slow
def test_the_gpu_benchmark_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [gpu.Workload("resnet20", 2, False, 1)]
    monkeypatch.setattr(
        gpu, "WORKLOADS", (*small, gpu.Workload("resnet20", 3, False, 1), gpu.Workload("resnet20", 4, True, 1))
    )
    path = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--rounds", "1", "--seconds", "0.01", "--json", str(path)])
    result = json.loads(path.read_text())
    rows = {row["what"]: row for row in result["rows"]}
    work = gpu.WORKLOADS[2]
    flops = result["workloads"][work.name]["flops_per_step"]
    assert flops["all"] == 2 * flops["SGD"]
    assert 1.6 < flops["norm"] / flops["SGD"] < 1.7
    seconds = result["rounds"][work.name][0]["seconds"]
    assert rows[f"{work.name}, all eager"]["found"]["median"] == pytest.approx(4 / seconds["all eager"])
    assert rows[f"{work.name}, all, eager"]["found"]["median"] == seconds["all eager"] / seconds["SGD eager"]
    moved = rows["resnet20, all, w + eps and back"]
    seconds = result["rounds"]["resnet20, moves"][0]["seconds"]["all"]
    assert moved["found"]["median"] == pytest.approx(1e6 * seconds / 20)
    model = build_model("resnet20", in_channels=3, image_size=(32, 32), num_classes=10)
    count = sum(p.numel() for p in model.parameters())
    assert moved["limit"] == pytest.approx(28e6 * count / result["limits"]["copied bytes/s"])
    assert rows["resnet20, norm, w + eps and back"]["limit"] < 0.01 * moved["limit"]
    assert work.name in capsys.readouterr().out


class Again:
    """A recorder without a graph; a replay does the work again, and writes to the same place."""

    def __init__(self) -> None:
        self.records = 0

    def eager(self, body: Any) -> Any:
        return body()

    def record(self, body: Any) -> Any:
        self.records += 1
        place = torch.zeros(())

        def replay() -> Any:
            loss, stats = body()
            return place.copy_(loss), stats

        return replay


@pytest.mark.parametrize("bf16", [False, True])
def test_the_unit_of_the_gpu_benchmark_is_plain_sgd(bf16: bool) -> None:
    """The same losses as a loop written here, recorded or not."""
    work, recorder = gpu.Workload("resnet20", 2, bf16, 1), Again()
    runs = [gpu.Run.of(work, gpu.SGD, CPU), gpu.Run.of(work, gpu.SGD, CPU, recorder)]
    found = [[run.step() for _ in range(6)] for run in runs]  # the losses are kept, not overwritten
    torch.manual_seed(0)
    model = build_model("resnet20", in_channels=3, image_size=(32, 32), num_classes=10).to(
        memory_format=torch.channels_last
    )
    x, y = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (2,))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, fused=True)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.tensor(found).tolist() == [pytest.approx(losses, rel=1e-6)] * 2
    assert recorder.records == 1
    assert gpu.trajectory_difference(work, gpu.SGD, CPU, Again(), steps=5) == 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "finds no CUDA device" in capsys.readouterr().err
