"""sam-masks train: what it prints is the record that it keeps."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from experiments.config import RunConfig
from experiments.store import read_run
from tests.experiments.command_line import TINY, Output, printed


def test_train_prints_the_record_that_it_keeps(in_folder: Path, capsys: Output) -> None:
    command = ["train", *TINY, "--mask=random", "--rho=0.5", "--out=o", "--seed=3"]
    record = printed([*command, "--json"], capsys)
    assert record["config"] == asdict(
        RunConfig(
            **{
                **{"n_train": 100, "n_val": 30, "n_test": 50, "width": 4, "epochs": 1, "batch_size": 32},
                **{"mask": "random", "rho": 0.5, "seed": 3},
            }
        ).resolved()
    )
    kept = read_run(Path("o"))
    assert {**asdict(kept), "telemetry": None} == {**record, "telemetry": None}
    text = printed(command, capsys)
    result = record["result"]
    assert "mask random: 72 of 1,382 coordinates" in text
    assert f"test accuracy {result['test_accuracy']:.4f} of 50 images" in text
    for name, metric in result["metrics"].items():
        assert f"{name}: {metric['value']:.5g}" in text
    assert f"loss {result['history'][-1]['loss']:.4f}, ascent" in text
    assert "||eps|| 0.5000" in text
    assert "record and checkpoint: o" in text


def test_a_diverged_run_is_printed_as_one(in_folder: Path, capsys: Output) -> None:
    command = ["train", *TINY, "--lr=1e18", "--mask=gradient", "--epochs=3", "--model=vit_small", "--width=16"]
    record = printed([*command, "--json"], capsys)  # strict JSON: what is not finite is null
    assert record["result"]["history"][-1]["loss"] is None
    text = printed(command, capsys)
    assert "DIVERGED: " in text
    assert "loss -" in text
    assert "lambda_max: " in text


def test_train_needs_no_validation_images(in_folder: Path, capsys: Output) -> None:
    text = printed(["train", *TINY, "--n-val=0"], capsys)
    assert "validation accuracy - of 0 images" in text


def test_a_run_of_a_method_from_the_command_line(in_folder: Path, capsys: Output) -> None:
    options = ["--optimizer=adamw:betas=0.9+0.95", "--lr=0.003", "--schedule=step", "--warmup=1", "--epochs=4"]
    more = ["--augment=flip+crop=1", "--label-smoothing=0.1", "--clip-grad-norm=1", "--norm-weight-decay=false"]
    method = ["--method=ssam_d:drop_rate=0.3", "--density=0.5", "--sam-epochs=1..", "--rho=0.2", "--rho-min=0.1"]
    record = printed(["train", *TINY, *options, *more, *method, "--out=o", "--json"], capsys)
    config = record["config"]
    assert {key: config[key] for key in ("optimizer", "augment", "method", "mask", "norm_scope", "sam_epochs")} == {
        **{"optimizer": "adamw:betas=0.9+0.95", "augment": "crop=1+flip", "method": "ssam_d:drop_rate=0.3"},
        **{"mask": "dynamic:drop_rate=0.3", "norm_scope": "full", "sam_epochs": "1.."},
    }
    assert (config["norm_weight_decay"], config["clip_grad_norm"], config["rho_min"]) == (False, 1.0, 0.1)
    assert [epoch["radius"] > 0 for epoch in record["result"]["history"]] == [False, True, True, True]
    text = printed(["train", *TINY, "--method=momentum_sam", "--rho=0.3", "--mask=all"], capsys)
    assert re.search(r"loss \d\.\d{4}, ascent -, \|\|eps\|\| 0\.\d{4}", text)
