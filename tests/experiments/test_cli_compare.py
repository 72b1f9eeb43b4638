"""sam-masks compare: the table that it prints, the files that it takes, progress, failed and interrupted runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from experiments import worker
from experiments.cli import main
from experiments.compare import Comparison
from experiments.config import CompareConfig
from experiments.presets import get_preset, list_presets
from experiments.store import RESULT
from tests.experiments.command_line import COMMAND, COMPARE, PLUGIN, Output, printed, refused

pytestmark = pytest.mark.usefixtures("own_masks")


def test_compare_prints_the_table_that_it_keeps(in_folder: Path, capsys: Output, serial: None) -> None:
    command = [*COMPARE, "--masks=norm,random", "--rho-grid=0.5,1", "--quiet", "--out=o"]
    found = printed([*command, "--json"], capsys)
    assert [line["arm"] for line in found["arms"]] == ["none", "norm", "random"]
    assert found["folder"] == "o"
    assert {path.name for path in Path("o").iterdir()} == {
        *("figures", "mask_layers.csv", "mask_overlap.csv", "report.html", "report.md", "runs", "runs.csv"),
        *("study.json", "table.csv", "table.tex", "training.csv", "trials.csv", "verdict.csv"),
    }
    assert len(list(Path("o/runs").iterdir())) == 2 * 2 + 3 * 2
    text = printed(command, capsys)  # reads the records
    for line in found["arms"]:
        shown = next(row for row in text.splitlines() if row.startswith(line["arm"]))
        assert f"{100 * line['test_accuracy']:.1f} [" in shown
    for note in found["notes"]:
        assert f"- {note}" in text
    assert "page: o/report.html" in text
    assert any(note.startswith("TOO FEW SEEDS") for note in found["notes"])


def test_methods_are_compared_by_masks(in_folder: Path, capsys: Output, serial: None, no_figures: None) -> None:
    methods = "--methods=sam,momentum_sam,ssam_f,esam:gamma=1.0"
    command = [*COMPARE, "--masks=all,norm", methods, "--rho-grid=0.5", "--quiet", "--out=o"]
    found = printed([*command, "--json"], capsys)
    arms = {line["arm"]: line for line in found["arms"]}
    names = ["sam/all", "sam/norm", "momentum_sam/all", "momentum_sam/norm", "ssam_f", "esam:gamma=1.0/all"]
    assert list(arms) == ["none", *names, "esam:gamma=1.0/norm"]
    cells = {(cell["method"], cell["column"]): cell for cell in found["methods_by_masks"]["cells"]}
    assert set(cells) == {
        *((method, mask) for method in ("sam", "momentum_sam", "esam:gamma=1.0") for mask in ("all", "norm")),
        ("ssam_f", "own mask"),
    }
    for cell in cells.values():
        assert {key: cell[key] for key in arms["none"] if key != "method"} == {
            key: value for key, value in arms[cell["arm"]].items() if key != "method"
        }
    text = printed(command, capsys)
    assert "\nmethods by masks\n" in text
    below = text.partition("\nmethods by masks\n")[2]
    for cell in cells.values():
        assert f"{100 * cell['gain']:+.1f} [" in below
    for note in found["methods_by_masks"]["notes"]:
        assert f"- {note}\n" in below
    written = pd.read_csv("o/methods_by_masks.csv")
    assert list(zip(written["method"], written["column"], strict=True)) == list(cells)
    page = Path("o/report.html").read_text()
    assert "<h2>Methods by masks</h2>" in page
    assert page.count('scope="rowgroup"') == 4
    # A step of momentum SAM is one pass, of ssam_f, whose norm is over all parameters, two.
    assert (arms["momentum_sam/norm"]["predicted_cost"], arms["ssam_f"]["predicted_cost"]) == (1, 2)
    assert arms["sam/all"]["predicted_cost"] == 2 > arms["sam/norm"]["predicted_cost"] > 1
    assert (arms["esam:gamma=1.0/all"]["predicted_cost"], arms["none"]["predicted_cost"]) == (None, 1)
    assert {arm["ascent"] is None for name, arm in arms.items() if "momentum" in name} == {True}
    runs = pd.read_csv("o/runs.csv")
    assert set(runs["method"].dropna()) == {"sam", "momentum_sam", "ssam_f", "esam:gamma=1.0"}


def test_a_comparison_without_methods_has_no_table_of_them(
    in_folder: Path, capsys: Output, serial: None, no_figures: None
) -> None:
    command = [*COMPARE, "--masks=norm", "--rho-grid=0.5", "--quiet", "--out=o"]
    assert "methods_by_masks" not in printed([*command, "--json"], capsys)
    assert "methods by masks" not in printed(command, capsys)
    assert not Path("o/methods_by_masks.csv").exists()
    assert "Methods by masks" not in Path("o/report.html").read_text()


def test_a_swept_comparison_and_its_verdict(in_folder: Path, capsys: Output, serial: None, no_figures: None) -> None:
    command = [
        *COMPARE,
        "--masks=all,norm",
        "--rho-grid=0.5,1",
        "--epochs=2",
        "--measure-every=1",
        "--quiet",
        "--out=o",
    ]
    plain = printed([*command, "--json"], capsys)
    records = {path: path.read_bytes() for path in Path("o/runs").glob(f"*/{RESULT}")}
    assert len(records) == 2 * 2 + 3 * 2
    swept = printed([*command, "--sweep", "--json"], capsys)
    assert [{**line, "rho": None} for line in swept["arms"]] == [{**line, "rho": None} for line in plain["arms"]]
    assert {path: path.read_bytes() for path in Path("o/runs").glob(f"*/{RESULT}")}.items() > records.items()
    assert len(list(Path("o/runs").iterdir())) == len(records) + 2 * 2
    assert "Sweep: 4 more runs" in next(note for note in swept["notes"] if note.startswith("Sweep"))
    assert not any(note.startswith("Sweep") for note in plain["notes"])
    fast = "--primary=one_step_linf_adaptive_normalised@0.002"
    assert "the runs lack the primary metric" in refused(["verdict", "o"], capsys)
    text = printed(["verdict", "o", fast], capsys)
    assert "norm against all, 2 seeds, by one_step_linf_adaptive_normalised@0.002: TOO FEW SEEDS." in text
    assert "norm against none, 2 seeds" in text
    found = printed(["verdict", "o", fast, "--contrasts=norm-all", "--at=equal_train_loss", "--json"], capsys)
    assert set(found["levels"]) | set(found["not_decided"]) == {"norm-all"}


def test_compare_shows_progress_unless_told_not_to(
    in_folder: Path, capsys: Output, serial: None, no_figures: None
) -> None:
    assert main([*COMPARE, "--masks=norm", "--rho-grid=1"]) == 0
    err = capsys.readouterr().err
    assert "comparing: 100%" in err
    assert "\x1b" not in err  # no colours
    assert "choosing rho" not in err  # there is nothing to choose


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[CompareConfig, dict[str, Any]]]:
    """What comparisons are asked for; none is made."""
    calls: list[tuple[CompareConfig, dict[str, Any]]] = []

    def spy(config: CompareConfig, folder: Any, **options: Any) -> Comparison:
        calls.append((config, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.compare.compare", spy)
    return calls


def test_a_configuration_file_asks_for_what_it_says(
    in_folder: Path, asked: list[tuple[CompareConfig, dict[str, Any]]], tiny_comparison: Any
) -> None:
    config = replace(tiny_comparison(), norm_scope="full", density=0.1)
    Path("c.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config.settings()))))
    assert main(["compare", "--config=c.yaml"]) == 130
    assert asked[-1][0] == config
    assert main(["compare", "--config", "c.yaml", "--seeds=5", "--masks=all", "--images", "9", "--processes=3"]) == 130
    changed, options = asked[-1]
    assert changed == replace(config, seeds=5, arms=tuple(a for a in config.arms if a.name in ("none", "all")))
    assert (options["measure"].images, len(options["executor"]._slots)) == (9, 3)


@pytest.mark.parametrize("words", [["--config", "c.yaml"], ["--config=c.yaml"]])
def test_an_option_overrides_the_configuration_file_wherever_it_stands(
    words: list[str], in_folder: Path, asked: list[tuple[CompareConfig, dict[str, Any]]]
) -> None:
    Path("c.yaml").write_text("momentum: 0.5\nlr: 0.3\n")
    option = ["--momentum", "0.7"]
    for order in (words + option, option + words):
        assert main(["compare", *order]) == 130
        assert (asked[-1][0].momentum, asked[-1][0].lr) == (0.7, 0.3)


def test_presets_are_listed_and_are_configuration_files(
    in_folder: Path, capsys: Output, asked: list[tuple[CompareConfig, dict[str, Any]]]
) -> None:
    listed = printed(["presets"], capsys)
    assert [line for line in listed.splitlines() if not line.startswith(" ")] == list(list_presets())
    for name in list_presets():
        text = printed(["presets", "--name", name, "--scale=0.1"], capsys)
        assert "Scaled by 0.1" in text
        preset = get_preset(name, 0.1)
        assert yaml.safe_load(text) == preset.config()
        Path("study.yaml").write_text(text)
        assert main(["compare", "--config=study.yaml"]) == 130
        capsys.readouterr()
        config = asked[-1][0]
        assert {key: getattr(config, key) for key in preset.settings} == preset.settings
        assert [(arm.name, arm.rho) for arm in config.arms] == [
            (arm["name"], tuple(arm.get("rho", ()))) for arm in preset.arms
        ]


def test_masks_of_a_plugin_with_options_are_compared(
    in_folder: Path, capsys: Output, serial: None, no_figures: None
) -> None:
    Path("power_masks.py").write_text(PLUGIN.format(name="power_of_w"))
    masks = "--masks=norm,power_of_w:power=2,power_of_w:power=2:exclude_norm=true"
    found = printed([*COMPARE, "--plugin=power_masks", masks, "--rho-grid=0.5", "--quiet", "--json"], capsys)
    arms = {line["arm"]: line for line in found["arms"]}
    for name in ("power_of_w:power=2", "power_of_w:power=2:exclude_norm=true"):
        assert (arms[name]["kept"], arms[name]["matched"]) == (72, "yes")
    assert arms["power_of_w:power=2:exclude_norm=true"]["norm_share"] == 0
    Path("c.yaml").write_text("plugin: power_masks\narms:\n- {name: squares, mask: 'power_of_w:power=2', rho: [1.0]}\n")
    found = printed([*COMPARE, "--config=c.yaml", "--quiet", "--json"], capsys)
    assert [line["arm"] for line in found["arms"]] == ["none", "squares"]


def test_a_failing_run_is_exit_code_1_and_one_line(
    in_folder: Path, capsys: Output, serial: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = worker.execute

    def fail(job: worker.Job, *arguments: Any, **options: Any) -> Any:
        if job.arm == "norm":
            raise ArithmeticError("a\nb")
        return original(job, *arguments, **options)

    monkeypatch.setattr(worker, "execute", fail)
    assert main([*COMPARE, "--masks=norm", "--rho-grid=1", "--quiet", "--out=o"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "sam-masks: error: 2 of 4 runs failed, the others are kept; first: norm, rho 1, seed 0: ArithmeticError: a b\n"
    )
    assert len(list(Path("o/runs").glob(f"*/{RESULT}"))) == 2


@pytest.mark.slow
def test_an_interrupted_comparison_ends_at_once_without_a_trace_and_goes_on_later(in_folder: Path) -> None:
    command = [COMMAND, *COMPARE, "--masks=norm", "--rho-grid=1", "--epochs=40", "--out=o", "--quiet"]
    for wait_for in (Path("o/runs"), "a record"):
        running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if wait_for.exists() if isinstance(wait_for, Path) else any(Path("o/runs").glob(f"*/{RESULT}")):
                break
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, err = running.communicate(timeout=30)
        assert running.returncode == 130
        assert err == "sam-masks: interrupted; finished runs are kept, and the same command goes on from there\n"
    kept = {path: path.stat().st_mtime_ns for path in Path("o/runs").glob(f"*/{RESULT}")}
    assert kept
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(Path("o/runs").glob(f"*/{RESULT}"))) == 4
