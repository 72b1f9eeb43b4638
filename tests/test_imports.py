"""The direction of imports: experiments -> analysis, sam, masks; analysis -> masks, sam.perturbation; sam -> masks."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = {"masks", "sam", "analysis", "experiments", "tests", "benchmarks"}
ALLOWED = {
    "masks": {"masks", "torch", "numpy"},
    "sam": {"sam", "masks", "torch"},
    "analysis": {"analysis", "masks", "sam.perturbation", "torch", "numpy", "scipy", "pandas", "matplotlib"},
}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, at any depth; relative imports begin with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, "." * node.level + f"{node.module or ''}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def is_allowed(name: str, allowed: set[str]) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names or any(f"{name}.".startswith(f"{a}.") for a in allowed)


def breaches(source: str, allowed: set[str]) -> list[str]:
    return [f"line {line}: {name}" for line, name in imported(source) if not is_allowed(name, allowed)]


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_downwards_only(package: str) -> None:
    assert files(package)
    found = {str(path.relative_to(ROOT)): breaches(path.read_text(), ALLOWED[package]) for path in files(package)}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_nothing_imports_experiments() -> None:
    for package in ALLOWED:
        for path in files(package):
            assert not [n for _, n in imported(path.read_text()) if n.split(".")[0] in OWN - set(ALLOWED)], path


@pytest.mark.parametrize("folder", ["masks", "sam", "analysis", "experiments", "tests", "benchmarks"])
def test_no_relative_imports(folder: str) -> None:
    for path in files(folder):
        assert not [name for _, name in imported(path.read_text()) if name.startswith(".")], path


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import scipy.stats", ["line 1: scipy.stats"]),
        ("from sam import SAM", ["line 1: sam.SAM"]),
        ("def f():\n    from experiments.data import x", ["line 2: experiments.data.x"]),
        ("from . import mask", ["line 1: ..mask"]),
        ("from .mask import Mask", ["line 1: .mask.Mask"]),
        ("import importlib\nimportlib.import_module('sam.optimizer')", ["line 2: sam.optimizer"]),
        ("import masksy, torchvision", ["line 1: masksy", "line 1: torchvision"]),
        ("import torch.nn, numpy as np, os.path\nfrom masks import Mask\nfrom torch import nn", []),
    ],
)
def test_the_test_sees_what_it_should(source: str, found: list[str]) -> None:
    assert breaches(source, ALLOWED["masks"]) == found


def test_analysis_may_use_the_perturbation_but_not_the_optimizer() -> None:
    source = "from sam.perturbation import Rule\nfrom sam.optimizer import SAM\nfrom sam import SAM\nimport sam"
    assert breaches(source, ALLOWED["analysis"]) == [
        "line 2: sam.optimizer.SAM",
        "line 3: sam.SAM",
        "line 4: sam",
    ]
