"""The ablations: each file is understood, can be had and says what it costs; two are run, shrunk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from benchmarks.gpu_hours import Grid, grids
from experiments import cli
from experiments.ablate import (
    Ablation,
    describe_ablations,
    joint_notes,
    list_ablations,
    load_ablation,
    point_name,
)
from experiments.cli import main
from experiments.commands import _pick
from experiments.compare import check_arms
from experiments.config import CompareConfig
from experiments.table import Table
from masks.errors import InputError
from tests.documents import ROOT

NAMES = list_ablations()
PAGE = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
MOST_SECONDS = 2 * 180
"""Processor seconds of three minutes on two cores."""


def configs(ablation: Ablation, **given: Any) -> list[tuple[CompareConfig, bool]]:
    """The comparisons as the command line reads them, and whether all radii are swept."""
    parser = cli.build_parser()
    values = [cli._compare_values(parser, settings) for _, settings in ablation.comparisons(given)]
    return [(_pick(CompareConfig, each), each["sweep"]) for each in values]


def work(ablation: Ablation) -> tuple[int, float]:
    """Runs, and passes over the training images per epoch summed over them, counted by hand."""
    runs = passes = 0.0
    for config, sweep in configs(ablation):
        for arm in config.arms:
            tuning = len(arm.rho) * config.tuning_seeds if len(arm.rho) > 1 else 0
            number = tuning + config.seeds * (len(arm.rho) if sweep and arm.rho else 1)
            start, _, end = arm.settings.get("sam_epochs", "0..").partition("..")
            share = (int(end or config.epochs) - int(start)) / config.epochs if arm.rho else 0
            runs += number
            passes += number * arm.epochs_factor * (1 + share)
    return int(runs), passes


@pytest.fixture(scope="module")
def wide_resnet() -> Grid:
    return grids()[0]


def test_the_ablations_are_those_of_the_list_and_the_page_has_all_of_them() -> None:
    assert set(NAMES) == {
        *("norm_parts", "depth", "density", "rho", "norm_scope", "norm_statistics", "sam_epochs", "frozen_norm"),
        *("only_norm", "norm_type", "random_depth", "scores", "label_noise", "norm_weight_decay", "compute_matched"),
    }
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert dict(rows) == {name: question(name) for name in NAMES}
    assert [name for name, _ in rows] == NAMES


def question(name: str) -> str:
    return load_ablation(name).paragraphs[0].removeprefix("Question: ")


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_of_every_point_can_be_had(name: str) -> None:
    for config, _ in configs(load_ablation(name)):
        check_arms(config)
        main_arms = [arm for arm in config.arms if arm.role == "main" and arm.name != "none"]
        assert len(config.arms) > 1
        assert 2 / 2**config.seeds * len(main_arms) <= 0.05  # Holm can find something


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_asks_what_it_costs_and_how_to_read_it(name: str, wide_resnet: Grid) -> None:
    ablation = load_ablation(name)
    asked, cost, reading = ablation.paragraphs
    assert (asked[:10], cost[:6], reading[:9]) == ("Question: ", "Cost: ", "Reading: ")
    runs, passes = work(ablation)
    found = re.fullmatch(
        r"Cost: ([\d,]+) runs; on digits (\d+) processor seconds \((measured|estimated)\); as WRN-28-10 on CIFAR-100 "
        r"([\d,]+) GPU-hours \(estimated\)\.",
        cost,
    )
    assert found, cost
    assert int(found[1]) == runs
    assert int(found[2]) <= MOST_SECONDS
    assert int(found[4].replace(",", "")) == round(wide_resnet.hours(1, 35) * passes)


def test_what_is_given_replaces_the_file_and_the_file_the_defaults() -> None:
    ablation = load_ablation("norm_type")
    parts = [config for config, _ in configs(ablation, epochs=3, data="digits")]
    assert [config.model for config in parts] == [
        "resnet_small",
        *(f"resnet_small:norm={norm}" for norm in ("layer", "group", "rms", "none")),
    ]
    assert {config.epochs for config in parts} == {3}
    assert {config.tuning_seeds for config in parts} == {1}
    assert [arm.name for arm in parts[-1].arms] == ["none", "all"]
    assert {config.lr for config in parts} == {CompareConfig.lr}
    with pytest.raises(InputError, match="model is what ablation norm_type varies; leave it out"):
        ablation.comparisons({"model": "mlp"})


def test_folders_of_points_have_plain_names() -> None:
    assert point_name({"model": "resnet_small:norm=rms", "density": 0.1}) == "model=resnet_small-norm=rms,density=0.1"
    assert point_name({}) == ""


def test_notes_of_all_points_are_said_once() -> None:
    tables = [
        ({"lr": 1}, Table((), ("a", "b"))),
        ({"lr": 2}, Table((), ("a", "c"))),
        ({"lr": 3}, Table((), ("a", "c"))),
    ]
    each, *others = joint_notes(tables)
    assert each.startswith("Each point has a baseline")
    assert others == ["a", "lr=1: b", "lr=2; lr=3: c"]
    assert joint_notes(tables[:1]) == ["a", "b"]


BAD: dict[str, tuple[str, str]] = {
    "no mapping": ("- 1\n", "must hold settings of a comparison, and under points, if at all, a list of settings"),
    "nothing": ("", "must hold settings of a comparison"),
    "points as a mapping": ("points: {lr: 1}\n", "a list of settings"),
    "no point": ("points: []\n", "a list of settings"),
    "one point twice": ("points: [{lr: 1, masks: all}, {lr: 1}]\n", "two points vary the same: lr=1, lr=1"),
    "not YAML": ("arms: [\n", "cannot read mine.yaml: "),
    "unknown setting": ("labelnoise: 1\n", "unknown option 'labelnoise'; did you mean label_noise"),
    "unknown setting of a point": ("points: [{epoch: 1}]\n", "unknown option 'epoch'"),
    "a value of another type": ("epochs: many\n", "option epochs must be a whole number, got many"),
    "an arm that cannot be had": (
        "model: mlp\narms: [{name: a, mask: norm, rho: [1]}]\n",
        "arm a: mask norm: none of the model's 6 trainable tensors belongs to a normalization layer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_had_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = BAD[case]
    Path("mine.yaml").write_text(text)
    assert main(["ablate", "mine.yaml"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["norm_prats"], "unknown ablation 'norm_prats'; did you mean norm_parts"),
        ([], "missing: ABLATION"),
        (["nowhere.yaml"], "cannot read nowhere.yaml: No such file or directory"),
        (["label_noise", "--label-noise=0.1"], "label_noise is what ablation label_noise varies"),
        (["norm_parts", "--epoch=3"], "unknown option 'epoch'; did you mean epochs"),
    ],
)
def test_what_cannot_be_had_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_the_list_and_a_file_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed == f"{describe_ablations()}\n"
    assert re.findall(r"^\w+$", listed, flags=re.MULTILINE) == NAMES
    assert main(["ablate", "depth", "--show"]) == 0
    source = capsys.readouterr().out
    assert source == (ROOT / "experiments" / "ablations" / "depth.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(source)["seeds"] == 9


SMALL = ["--smoke", "--epochs=2", "--width=4", "--batch-size=32", "--quiet"]


def test_several_comparisons_have_one_table(
    serial: None, no_figures: None, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", "label_noise", *SMALL, "--out=o", "--masks=norm"]) == 0
    out = capsys.readouterr().out
    joint = pd.read_csv("o/ablation.csv")
    assert list(joint.columns[:2]) == ["label_noise", "arm"]
    assert list(zip(joint["label_noise"], joint["arm"], strict=True)) == [
        (noise, arm) for noise in (0.0, 0.2, 0.4) for arm in ("none", "norm")
    ]
    assert set(joint["n"]) == {2}
    for noise, rows in joint.groupby("label_noise"):
        own = pd.read_csv(f"o/label_noise={noise}/table.csv")
        pd.testing.assert_frame_equal(rows[own.columns].reset_index(drop=True), own)
        study = json.loads(Path(f"o/label_noise={noise}/study.json").read_text())
        assert study["config"]["label_noise"] == noise
    page = Path("o/ablation.md").read_text()
    assert "SMOKE: it runs." in page
    for text in (
        question("label_noise"),
        r"| label\_noise | arm | kept | density | rho | accuracy % | gain | p Holm | n |",
    ):
        assert text in page
    assert page.count("\n| 0.2 |") == 2
    assert "Each point has a baseline" in out
    assert all(f"page: o/label_noise={noise}/report.html" in out for noise in (0.0, 0.2, 0.4))


def test_a_point_takes_over_what_another_has_made(
    serial: None, no_figures: None, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base optimizer at another density is the same."""
    Path("own.yaml").write_text("points:\n  - {density: 0.1}\n  - {density: 0.5}\n")
    assert main(["ablate", "own.yaml", *SMALL, "--out=o", "--masks=random"]) == 0
    assert "comparing: 2 of 4 runs taken over from o/density=0.1" in capsys.readouterr().err


def test_one_comparison_is_that_of_its_file(
    serial: None, no_figures: None, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--masks=norm,norm_weights,norm_biases,classifier", "--json"]
    assert main(["ablate", "norm_parts", *SMALL, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert re.fullmatch(r"results/ablate-norm_parts-[0-9a-f]{8}", found["folder"])
    (point,) = found["points"]
    assert (point["point"], point["folder"]) == ({}, found["folder"])
    joint = pd.read_csv(f"{found['folder']}/ablation.csv")
    assert list(joint["arm"]) == ["none", "norm", "norm_weights", "norm_biases", "classifier"]
    kept = dict(zip(joint["arm"], joint["kept"], strict=True))
    # A net of width 4 has norm layers of 4, 4, 4, 8, 8 and 8 channels, and a classifier from 8 features to 10 classes.
    assert kept == {"none": 0, "norm": 72, "norm_weights": 36, "norm_biases": 36, "classifier": 90}


@pytest.mark.slow
def test_a_shrunk_comparison_is_one_of_the_file_by_hand(
    serial: None, no_figures: None, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", "norm_statistics", *SMALL, "--json"]) == 0
    (point,) = json.loads(capsys.readouterr().out)["points"]
    file = ROOT / "experiments" / "ablations" / "norm_statistics.yaml"
    values = yaml.safe_load(file.read_text())
    for arm in values["arms"]:
        arm["rho"] = arm.get("rho", [])[:1]
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    shrink = ["--n-train=32", "--n-val=50", "--n-test=100", "--seeds=2", *SMALL[1:]]
    measure = ["--images=32", "--metrics=", "--repeats=1"]
    assert main(["compare", "--config=mine.yaml", *shrink, *measure, "--json", "--out=c"]) == 0
    by_hand = json.loads(capsys.readouterr().out)
    assert [{**arm, "cost": 0} for arm in by_hand["arms"]] == [{**arm, "cost": 0} for arm in point["arms"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_ablation_runs(name: str, serial: None, no_figures: None, in_folder: Path) -> None:
    assert main(["ablate", name, "--smoke", "--width=4", "--batch-size=32", "--quiet", "--out=o"]) == 0
    joint = pd.read_csv("o/ablation.csv")
    arms = [len(config.arms) for config, _ in configs(load_ablation(name))]
    assert len(joint) == sum(arms)
    assert joint["test_accuracy"].between(0, 1).all()
