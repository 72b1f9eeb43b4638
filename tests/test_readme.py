"""The README: its commands, its examples, its links and its map are true."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from analysis import PRIMARY, seeds_needed
from experiments.config import CompareConfig
from experiments.measure import MeasureConfig
from masks import Budget, MaskContext, build_mask, mask_info, registry
from tests import documents
from tests.documents import ROOT, understood

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return documents.blocks(TEXT, language)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The plugin of the README, imported."""
    mask_info("norm")
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    module = ModuleType("my_masks")
    monkeypatch.setitem(sys.modules, "my_masks", module)
    (source,) = [block for block in blocks("python") if "register_score" in block]
    exec(compile(source, "README.md", "exec"), vars(module))
    return module


def test_the_two_commands_are_one_line_each_and_make_their_own_environment() -> None:
    commands = blocks("bash")
    assert len(commands) == 2
    for command in commands:
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
    assert commands[0].rstrip().endswith("&& .venv/bin/sam-masks compare")
    assert commands[1].rstrip().endswith("&& .venv/bin/pytest")


def test_ci_runs_the_second_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m 1 -E '([^']+)' README.md", script)
    assert pattern
    found = [line for line in TEXT.splitlines() if re.search(pattern[1], line)]
    assert found == [blocks("bash")[1].rstrip()]


def test_the_first_example_runs_and_its_comment_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = [block for block in blocks("python") if "SAM(" in block]
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(compile(source, "README.md", "exec"), names)
    kept, total = re.search(r"# ([\d,]+) of ([\d,]+) coordinates", source).groups()  # type: ignore[union-attr]
    assert (names["mask"].num_kept, names["mask"].numel) == (int(kept.replace(",", "")), int(total.replace(",", "")))
    assert f"{kept} of {total} coordinates" in capsys.readouterr().out
    assert torch.isfinite(names["loss"])
    assert float(names["optimizer"].stats.radius) == pytest.approx(1.0, rel=1e-5)
    assert len(source.strip().splitlines()) <= 12


def test_the_plugin_of_the_readme_registers_a_mask_that_keeps_its_budget(plugin: ModuleType) -> None:
    (name,) = re.findall(r'@register_score\("(\w+)"', TEXT)
    info = mask_info(name)
    assert (info.kind, info.origin) == ("budgeted", "my_masks")
    (option,) = [o for o in info.options if o.name not in ("order", "scope", "exclude_norm")]
    command = re.search(r"`sam-masks compare --plugin my_masks --masks ([^`]+)`", TEXT)
    assert command
    assert f"{name}:{option.name}=" in command[1]
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    context = MaskContext(model)
    mask = build_mask(name, context, Budget(7, context.table.numel), {option.name: 2.0})
    assert mask.num_kept == 7


def test_the_plugin_of_the_readme_keeps_the_contract(plugin: ModuleType) -> None:
    testing = pytest.importorskip("masks.testing")
    (name,) = re.findall(r'check_mask_builder\("(\w+)"\)', TEXT)
    testing.check_mask_builder(name)


def test_the_commands_about_flatness_are_ones_that_the_command_line_understands() -> None:
    commands = documents.commands(blocks("sh"))
    assert [words[:2] for words in commands] == [
        [".venv/bin/sam-masks", name] for name in ("compare", "verdict", "train", "analyze")
    ]
    compare, verdict, train, analyze = map(understood, commands)
    # Each goes on from what the one before has made, and the verdict finds its primary metric.
    assert compare.out == verdict.folder
    assert analyze.checkpoint == f"{train.out}/checkpoint.pt"
    assert (compare.sweep, verdict.primary, PRIMARY) == (True, None, MeasureConfig(metrics=compare.metrics).metrics)
    assert CompareConfig(masks=compare.masks).seeds >= seeds_needed(2)


def test_links_into_the_repository_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    own = [target.partition("#")[0] for target in targets if not target.startswith("https://")]
    assert own
    for target in own:
        assert (ROOT / target).exists(), target


def test_the_map_names_what_is_there_and_all_of_it() -> None:
    named = re.findall(r"^\| `(\w+)/` \|", TEXT, flags=re.MULTILINE)
    for name in named:
        assert (ROOT / name).is_dir(), name
    there = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"experiments", "tests"}
    assert there <= set(named)


def test_commands_options_and_models_that_are_named_exist() -> None:
    from experiments.cli import build_parser
    from experiments.data import NPZ_KEYS, TORCHVISION
    from experiments.models import list_models

    commands = next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    for command, rest in re.findall(r"`sam-masks ([\w-]+)([^`\n]*)`", TEXT):
        known = {option for action in commands[command]._actions for option in action.option_strings}
        for option in re.findall(r"--[\w-]+", rest):
            assert option.replace("-", "_").replace("__", "--", 1) in known, (command, option)
    compare = {option for action in commands["compare"]._actions for option in action.option_strings}
    (line,) = [line for line in TEXT.splitlines() if line.startswith("| `sam-masks compare` |")]
    assert {option.split()[0] for option in re.findall(r"`(--\w+)", line)} <= compare
    for name in ("cifar10", "fashion_mnist"):
        assert name in TEXT
        assert name in TORCHVISION
    assert ", ".join(NPZ_KEYS) in TEXT
    for name in list_models():
        assert f"`{name}`" in TEXT
