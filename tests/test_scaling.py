"""docs/scaling.md: its numbers are those of the command that it names, and that command counts right."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu_hours import Grid, grids, main
from experiments.config import Arm

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_table_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    table = capsys.readouterr().out.strip()
    assert table.count("\n") == 4
    assert table in PAGE
    main(["--tflops", "70"])
    assert capsys.readouterr().out.strip() not in PAGE


def test_operations_are_the_published_ones() -> None:
    """Multiply-adds: WRN-28-10 5.25 G (1605.07146, section 3), ResNet-50 4.1 G, ViT-S/16 4.6 G (2012.12877)."""
    wrn, resnet, vit = (grid.flops / 2e9 for grid in grids())
    assert wrn == pytest.approx(5.25, rel=0.01)
    assert resnet == pytest.approx(4.1, rel=0.01)
    assert vit == pytest.approx(4.6, rel=0.01)


def test_runs_passes_and_hours_by_hand() -> None:
    arms = (Arm("none", "none"), Arm("twice", "none", epochs_factor=2), Arm("all", "all", (0.1, 0.2)),
            Arm("one", "all", (0.1,)))  # fmt: skip
    grid = Grid("g", flops=10**9, images=3600, epochs=10, arms=arms)
    runs, passes = grid.passes(seeds=3, tuning_seeds=2)
    assert runs == 3 + 3 + (3 + 2 * 2) + 3
    assert passes == 3 * 1 + 3 * 2 + 7 * 2 + 3 * 2
    # 36,000 images x 3e9 operations at 1e12 per second are 108 s.
    assert grid.hours(1, tflops=1.0) == pytest.approx(108 / 3600)


def test_hours_of_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--configs", "studies/cifar10_gpu/resnet18_long.yaml"])
    said = capsys.readouterr().out
    # SGD 8 runs of one pass; 2 arms of 8 + 5 runs, then 8 + 7, of two: 1.11 GFLOP x 3 x 45,000 x 200 / 35e12.
    hours = [(8 + 2 * 2 * runs) * 3 * 1.11084544e9 * 45_000 * 200 / 35e12 / 3600 for runs in (13, 15)]
    assert f"34 runs, {hours[0]:.1f} h; extended to the end: 38 runs, {hours[1]:.1f} h" in said
