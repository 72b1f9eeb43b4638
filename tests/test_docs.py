"""The pages in docs: their Python runs, their commands are understood, and those in blocks called sh are run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from experiments.cli import main
from experiments.config import OTHER_RHO
from masks import list_masks, mask_info, params, registry
from masks.testing import check_mask_builder
from tests.documents import ROOT, blocks, commands, file_of, understood
from tests.environments import fresh_environment, run

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PLUGINS = PAGES["mask-plugins"]


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is forgotten."""
    mask_info("norm")
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(params, "_norm_types", params._norm_types)


def run_python(text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Run a page's Python in order: blocks of a file in a module of that name, the others together in one; returns
    the names in each.
    """
    modules: dict[str, ModuleType] = {}
    for block in blocks(text, "python"):
        name = (file_of(block) or "page.py").removesuffix(".py")
        if name not in modules:
            modules[name] = ModuleType(name)
            monkeypatch.setitem(sys.modules, name, modules[name])
        with torch.random.fork_rng(devices=[]):
            exec(compile(block, f"{name}.py", "exec"), vars(modules[name]))
    return {name: vars(module) for name, module in modules.items()}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
def test_python_runs(page: str, own_registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(PAGES[page], monkeypatch)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "sh", "bash")])
def test_commands_are_understood(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(blocks(PAGES[page], "sh", "bash")):
        if words[0] != "sam-masks":
            continue
        if ">" in words:  # a file that a later command reads
            at = words.index(">")
            assert main(words[1:at]) == 0
            Path(words[at + 1]).write_text(capsys.readouterr().out)
            words = words[:at]
        understood(words)


def test_the_masks_of_the_page_keep_the_contract(own_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_python(PLUGINS, monkeypatch)
    made = {info.name: info for info in list_masks() if info.origin == "my_masks"}
    test = names["test_my_masks"]["test_my_masks_keep_the_contract"]
    (tested,) = (mark.args[1] for mark in test.pytestmark)
    assert sorted(tested) == sorted(made)
    for name, info in made.items():
        if not info.needs_data:  # these take seconds; the slow test runs them all
            check_mask_builder(name)
    assert str(made["relative_gradient"].schedule) == "every=2"
    assert f"with the radii {', '.join(f'{rho:g}' for rho in OTHER_RHO)};" in PLUGINS


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "sh")])
def test_a_reader_who_does_what_the_page_says(page: str, tmp_path: Path) -> None:
    """In a fresh environment, with nothing but the page: files are written and commands run in its order."""
    variables = fresh_environment(tmp_path)
    folder = tmp_path / "reader"
    folder.mkdir()
    for block in blocks(PAGES[page], "python", "sh"):
        name = file_of(block)
        if name is not None:
            with (folder / name).open("a") as file:
                file.write(block)
        elif block in blocks(PAGES[page], "sh"):
            for line in block.splitlines():
                run(line, folder, variables)
