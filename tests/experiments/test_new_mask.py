"""sam-masks new-mask: what it writes is a plugin that works, and its example is what it would write."""

from __future__ import annotations

import importlib
import json
import runpy
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.cli import main
from experiments.new_mask import EXAMPLE, FILES, SOURCE, NewMaskOptions, new_mask
from masks import mask_info, registry
from masks.errors import InputError
from masks.testing import check_mask_builder
from tests.documents import ROOT
from tests.environments import fresh_environment, run

BUILT = {"__pycache__", "build"}
TRIAL = "--epochs=1 --n-train=100 --n-val=30 --n-test=50 --width=4 --seeds=2 --tuning-seeds=1 --rho-grid=0.5 --quiet"


def files(folder: Path) -> dict[str, str]:
    """The text of every file below a folder, without what building it leaves."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in paths if not BUILT & {*path.parts} and ".egg-info" not in str(path)]
    return {path.as_posix(): (folder / path).read_text() for path in kept}


def test_the_example_is_what_it_writes_for_its_name(in_folder: Path) -> None:
    assert files(SOURCE) == files(new_mask(NewMaskOptions(EXAMPLE)))
    assert ROOT / "experiments" / "examples" / "mask_plugin" == SOURCE


def test_another_name_is_put_everywhere(in_folder: Path) -> None:
    folder = new_mask(NewMaskOptions("my_own_2", out="deep/plugin"))
    assert folder == Path("deep/plugin")
    written = files(folder)
    assert list(written) == ["README.md", "my_own_2_mask.py", "pyproject.toml", "tests/test_my_own_2_mask.py"]
    for name, text in written.items():
        assert "my_own_2" in text, name
        assert "relative_magnitude" not in text, name
        assert "relative-magnitude" not in text, name
    project = tomllib.loads(written["pyproject.toml"])
    assert project["project"]["name"] == "my-own-2-mask"
    assert project["project"]["entry-points"] == {registry.ENTRY_POINT_GROUP: {"my_own_2": "my_own_2_mask"}}
    assert project["tool"]["setuptools"]["py-modules"] == ["my_own_2_mask"]


def test_its_tests_pass_and_its_mask_is_found(
    in_folder: Path, own_masks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, as if it were installed: its tests need the entry point."""
    folder = new_mask(NewMaskOptions("my_own"))
    monkeypatch.syspath_prepend(folder)
    point = SimpleNamespace(
        name="my_own",
        value="my_own_mask",
        load=lambda: importlib.import_module("my_own_mask"),
        dist=SimpleNamespace(name="my-own-mask", version="0.1.0"),
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.setattr(registry, "_discovered", False)
    tests = runpy.run_path(str(folder / "tests" / "test_my_own_mask.py"))
    tests["test_it_is_found_by_its_entry_point"]()
    (cases,) = (mark.args[1] for mark in tests["test_scores_by_hand"].pytestmark)
    assert len(cases) == 2
    for power, kept in cases:
        tests["test_scores_by_hand"](power, kept)
    check_mask_builder("my_own")
    assert mask_info("my_own").origin == "my-own-mask 0.1.0 (my_own_mask)"
    assert [option.name for option in mask_info("my_own").options][:1] == ["power"]


@pytest.mark.parametrize(
    "name", ["", "My", "my-idea", "2d", "_x", "x_", "a__b", "lambda", "café", "a b", "../x", "my_idea\n"]
)
def test_names_that_are_refused(name: str, in_folder: Path) -> None:
    with pytest.raises(InputError, match="in snake_case"):
        new_mask(NewMaskOptions(name))
    assert list(in_folder.iterdir()) == []


def test_what_is_there_already_is_refused_in_one_line(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-mask", "norm"]) == 2
    assert capsys.readouterr().err == (
        "sam-masks: error: there is a mask norm already, from sam-masks; choose another name\n"
    )
    Path("my-idea-mask").mkdir()
    Path("file").write_text("mine")
    for options, folder in (([], "my-idea-mask"), (["--out=file"], "file")):
        assert main(["new-mask", "my_idea", *options]) == 2
        assert capsys.readouterr().err.startswith(f"sam-masks: error: {folder} is there already; ")
    assert main(["new-mask", "my_idea", "--out=file/below"]) == 2
    assert "cannot write to file/below: Not a directory" in capsys.readouterr().err
    assert sorted(path.name for path in in_folder.rglob("*")) == ["file", "my-idea-mask"]


def test_the_command_says_what_it_wrote_and_what_comes_next(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-mask", "my_idea"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:4] == sorted(f"my-idea-mask/{file}".replace(EXAMPLE, "my_idea") for file in FILES)
    assert "pip install -e 'my-idea-mask[test]' && pytest my-idea-mask" in out[5]


@pytest.mark.slow
def test_the_example_installs_passes_and_is_compared(tmp_path: Path) -> None:
    """In a fresh environment, with this project as its wheel installs it."""
    variables = fresh_environment(tmp_path)
    # The installed project brings its example along, and writes another one.
    run("sam-masks new-mask another", tmp_path, variables)
    plugin = tmp_path / "source" / "experiments" / "examples" / "mask_plugin"
    run(f"pip install {plugin} ./another-mask", tmp_path, variables)
    assert " 5 passed" in run(f"pytest {plugin}", tmp_path, variables)
    assert " 5 passed" in run("pytest another-mask", tmp_path, variables)
    listed = {info["name"]: info for info in json.loads(run("sam-masks masks --json", tmp_path, variables))}
    assert listed[EXAMPLE]["origin"] == "relative-magnitude-mask 0.1.0 (relative_magnitude_mask)"
    assert listed["another"]["options"][0] == {"name": "power", "type": "float", "default": 1.0}
    doctor = run("sam-masks doctor", tmp_path, variables)
    assert "ok      plugin another-mask 0.1.0 (another_mask): masks another" in doctor
    masks = f"norm,{EXAMPLE},another:power=0"
    arms = json.loads(run(f"sam-masks compare --masks={masks} {TRIAL} --json", tmp_path, variables))["arms"]
    kept = {arm["arm"]: arm["kept"] for arm in arms}
    assert kept[EXAMPLE] == kept["another:power=0"] == kept["norm"] > 0
    assert {arm["matched"] for arm in arms if arm["arm"] in (EXAMPLE, "another:power=0")} == {"yes"}
