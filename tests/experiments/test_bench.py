"""``sam-masks bench``: its numbers follow from its rounds, and bad input is one line."""

import json
import statistics

import pytest
import torch

from experiments import bench as module
from experiments.anatomy import Target
from experiments.bench import BenchOptions, bench
from experiments.cli import main
from masks import Budget, MaskContext, build_mask
from masks.errors import InputError

SMALL = {"batch_size": 8, "rounds": 3, "masks": "norm,random,all"}


@pytest.fixture(scope="module")
def report():
    return bench(BenchOptions(**SMALL))


def test_costs_are_the_medians_of_ratios_within_rounds(report):
    assert [set(r["seconds"]) for r in report.rounds] == [{"(sgd)", "norm", "random", "all"}] * 3
    for cost in report.masks:
        by_hand = statistics.median(r["seconds"][cost.mask] / r["seconds"]["(sgd)"] for r in report.rounds)
        assert cost.step["median"] == by_hand
    assert report.sgd["median"] == statistics.median(r["seconds"]["(sgd)"] for r in report.rounds)


def test_counts_limits_and_bytes(report):
    costs = {cost.mask: cost for cost in report.masks}
    assert costs["norm"].kept == costs["random"].kept == 288
    assert costs["all"].kept == report.numel == 19_706
    assert costs["all"].flop_limit == 2
    assert 1 < costs["norm"].flop_limit < 1.7
    assert costs["norm"].held_bytes == 4 * 288  # whole tensors: a float32 backup
    # Of a tensor below a density of 10 %, 4 bytes of backup and 8 of index per coordinate; else 4 + 1 per entry.
    model, _, _ = Target("resnet_small").build()
    context = MaskContext(model)
    counts = build_mask("random", context, Budget.matching(build_mask("norm", context))).per_layer()
    assert costs["random"].tensors == sum(c.kept > 0 for c in counts)
    expected = (12 * c.kept if c.kept < 0.1 * c.row.numel else 5 * c.row.numel for c in counts if c.kept)
    assert costs["random"].held_bytes == sum(expected)
    assert costs["all"].held_bytes == 4 * 19_706


def test_the_text_names_what_was_measured(report):
    text = report.as_text()
    assert "19,706 trainable coordinates, batch 8 of 1x8x8, 10 classes, 3 rounds" in text
    assert "instead of" not in text
    assert json.loads(report.as_json())["masks"][0]["kept"] == 288


def test_quick_halves_batches_until_the_rounds_fit(monkeypatch):
    x, y = torch.zeros(128, 1), torch.zeros(128)
    seconds = iter([99.0, 1.0] * 4)  # the first step of a probe allocates and does not count
    monkeypatch.setattr(module, "clock", lambda step, device: next(seconds))
    monkeypatch.setattr(module, "_steps", lambda model, batch, masks: {"(sgd)": None})
    plan = lambda predicted: module._plan(None, (x, y), predicted, torch.device("cpu"))  # noqa: E731
    # 16 images take a second, so a round of 128 takes 8 times as long times the predicted steps.
    assert plan(0.5) == (128, 8)  # 4 s a round, 40 in all, 2 of them to warm up
    assert plan(1.0) == (128, 3)  # 8 s a round: 5 rounds with the warm-up
    assert plan(1.1) == (64, 7)
    assert plan(1e-3) == (128, 9)


def test_quick_says_that_batches_are_smaller(monkeypatch):
    monkeypatch.setattr(module, "QUICK_SECONDS", 1e-3)
    report = bench(BenchOptions(masks="norm", batch_size=16, quick=True))
    assert (report.batch_size, len(report.rounds)) == (2, 3)
    assert "batches of 2 instead of 16" in report.as_text()


def test_data_of_the_users_own_and_masks_that_need_scores():
    report = bench(BenchOptions(data="digits", masks="fisher,magnitude", batch_size=4, rounds=1, density=0.01))
    assert {cost.kept for cost in report.masks} == {Budget.from_density(0.01, report.numel).num_kept}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": "3x8"}, "CxHxW"),
        ({"shape": "3x8x8", "data": "digits"}, "shape has no effect with data"),
        ({"masks": ","}, "no masks"),
        ({"masks": "nrom"}, "did you mean"),
        ({"batch_size": 0}, "at least 1, got 0"),
        ({"rounds": -1}, "at least 1, got -1"),
        ({"match": "random"}, "budgeted"),
        ({"model": "nope:nope"}, "nope"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(InputError, match=words):
        bench(BenchOptions(**{**SMALL, **options}))


def test_from_the_command_line(capsys):
    arguments = ["bench", "--model", "mlp", "--masks", "all", "--batch-size", "4", "--rounds", "1", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["masks"][0]["mask"] == "all"
    assert found["environment"]["torch"] == torch.__version__
