"""What is published: wheel and sdist build, hold what they must, and work in a fresh environment; the site builds."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.documents import ROOT
from tests.environments import bare_environment, copied_source, install, run

PACKAGES = ("masks", "sam", "analysis", "experiments")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_package_is_named_and_typed() -> None:
    """Those with an __init__, as setuptools is given a list."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in PACKAGES
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert found == set(listed)
    assert all((ROOT / name / "py.typed").exists() for name in PACKAGES)


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["cff-version"], cited["version"], cited["license"]) == (
        "1.2.0",
        PROJECT["version"],
        PROJECT["license"],
    )
    assert all(cited[key] for key in ("message", "title", "authors"))
    assert f"\n## {PROJECT['version']} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_sites_navigation() -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for part in (entry.values() if isinstance(entry, dict) else entry) for name in files(part)]  # type: ignore[attr-defined]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(files(nav)) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason="needs the extra [docs]")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for package, name in {"masks": "ParamTable", "sam": "SAM", "analysis": "HessianOperator"}.items():
        assert f'id="{package}.{name}"' in (site / f"reference-{package}.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_wheel_and_sdist_from_a_clean_tree(tmp_path: Path) -> None:
    variables, source = bare_environment(tmp_path), copied_source(tmp_path)
    built, outside = tmp_path / "built", tmp_path / "outside"
    outside.mkdir()
    build = "import setuptools.build_meta as backend; backend.build_sdist('../built')"
    built.mkdir()
    run(f'python -c "{build}"', source, variables)
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["tests", "docs", "benchmarks", "masks", "sam", "analysis", "experiments"]
    tracked = {str(path.relative_to(ROOT)) for folder in wanted for path in (ROOT / folder).rglob("*.py")}
    assert tracked <= names
    assert {"CITATION.cff", "mkdocs.yml", "docs/index.md", "LICENSE", "constraints.txt"} <= names
    assert not [name for name in names if "__pycache__" in name]

    run(f"pip wheel --quiet --no-deps --wheel-dir {built} {sdist}", outside, variables)  # from the sdist alone
    (wheel,) = built.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{name}/py.typed" for name in PACKAGES} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/", "docs/"))]
    # Data files, too: all that a package has in the tree.
    for folder in ("experiments/templates", "experiments/ablations", "experiments/examples/mask_plugin"):
        files = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"}
        assert files
        assert files <= inside, sorted(files - inside)

    install(wheel, outside, variables)
    where = run("python -c 'import masks, sam, analysis, experiments; print(sam.__file__)'", outside, variables)
    assert Path(where.strip()).is_relative_to(tmp_path / "environment")
    tiny = "--n-train 100 --n-val 30 --n-test 50 --width 4 --epochs 1 --batch-size 32 --images 64 --sharpness-m 16"
    command = f"sam-masks compare --masks norm --rho-grid 1 --seeds 2 {tiny} --quiet --json --out results"
    text = run(command, outside, variables)
    assert [line["arm"] for line in json.loads(text)["arms"]] == ["none", "norm"]
    assert (outside / "results" / "report.html").exists()
