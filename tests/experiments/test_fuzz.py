"""Configuration files that are wrong in any way: one line that names the key, code 2, and no run started."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from experiments import runner, train
from experiments.cli import build_parser, main
from experiments.commands import CompareOptions, TrainOptions
from experiments.config import DECIDED, CompareConfig, RunConfig
from experiments.measure import MeasureConfig

TINY = {"n_train": 100, "n_val": 30, "n_test": 50, "width": 4, "epochs": 2, "batch_size": 32}
CLASSES: dict[str, tuple[type, ...]] = {
    "compare": (CompareConfig, MeasureConfig, CompareOptions),
    "train": (RunConfig, TrainOptions),
}
HIDDEN = {"compare": {*DECIDED}, "train": {"tuning"}}
FREE = {"out"}
"""Settings that take any text."""
NAMES = {"data", "model", "optimizer", "mask", "match", "method", "augment", "schedule", "rule", "bias", "trainable",
         "norm_scope", "norm_statistics", "device", "executor", "sam_epochs", "metrics"}  # fmt: skip
"""Text of which only some is understood."""
AT_LEAST_1 = {"epochs", "batch_size", "score_images", "seeds", "tuning_seeds", "images", "sharpness_m", "processes"}
AT_LEAST_0 = {"lr", "momentum", "weight_decay", "rho", "warmup", "measure_every"}


def settings_of(command: str) -> dict[str, str]:
    """Types of a command's settings, as text."""
    found = {f.name: str(f.type) for cls in CLASSES[command] for f in fields(cls)}
    return {name: kind for name, kind in found.items() if name not in HIDDEN[command] | FREE}


words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=5, max_size=12).map(lambda text: f"zq{text}")
nested = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | words,
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(words, inner, min_size=1, max_size=3),
    max_leaves=5,
)
containers = st.lists(nested, min_size=1, max_size=3) | st.dictionaries(words, nested, min_size=1, max_size=3)


def wrong_value(name: str, kind: str) -> st.SearchStrategy[Any]:
    """Values that a setting cannot have."""
    options = [containers]
    if name == "arms":
        arm = st.fixed_dictionaries({"name": words, "mask": st.just("norm"), "rho": st.just([0.1])})
        return st.one_of(
            words,
            st.integers(),
            st.lists(nested.filter(lambda value: not isinstance(value, dict)), min_size=1, max_size=2),
            st.lists(st.dictionaries(words, nested, min_size=1), min_size=1, max_size=2),
            arm.flatmap(lambda arm: st.sampled_from([
                [{**arm, "mask": "zqnowhere"}], [{**arm, "rho": [-1.0]}], [{**arm, "rho": "zq"}], [arm, arm],
                [{**arm, "epochs_factor": 0}], [{**arm, "role": "zq"}], [{**arm, "zq": 1}], [{"mask": "norm"}],
                [{**arm, "rho": []}], [{**arm, "rho": [float("nan")]}],
            ])),
        )  # fmt: skip
    if kind.startswith(("int", "float", "bool")):
        options.append(words)
    if kind.startswith("int"):
        options.append(st.floats(0.1, 0.9).map(lambda share: 3 + share))
    if kind.startswith(("int", "float")) and name in AT_LEAST_1:
        options.append(st.integers(-100, 0))
    if kind.startswith("float") and name in AT_LEAST_0:
        options += [st.floats(-100, -0.001), st.sampled_from([float("nan"), float("inf"), float("-inf")])]
    if name in NAMES:
        options.append(words)
    return st.one_of(options)


@st.composite
def wrong_settings(draw: st.DrawFn) -> tuple[str, str, Any]:
    """A command, a setting, and a value that it cannot have; or a setting that does not exist."""
    command = draw(st.sampled_from(sorted(CLASSES)))
    known = settings_of(command)
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(sorted(known)))
        at = draw(st.integers(0, len(name) - 1))
        name = name[:at] + draw(st.sampled_from("qxz")) + name[at:]
        return command, name, draw(nested)
    name = draw(st.sampled_from(sorted(known)))
    return command, name, draw(wrong_value(name, known[name]))


@contextmanager
def no_run() -> Iterator[list[str]]:
    """Whatever would be started is noted instead."""
    started: list[str] = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.chdir(folder)
        patch.setattr(runner.Runner, "__init__", lambda *_, **__: started.append("a study"))
        patch.setattr(train.Training, "run", lambda *_: started.append("a run"))
        yield started
        assert os.listdir() in ([], ["c.yaml"])


def refused(command: str, text: str | bytes) -> str:
    """The one line that a configuration file is refused with."""
    with no_run() as started:
        Path("c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([command, "--config=c.yaml"])
    said = err.getvalue()
    assert (code, out.getvalue(), started) == (2, "", []), said
    assert said.startswith("sam-masks: error: ")
    assert said.count("\n") == 1
    assert said.endswith("\n")
    assert "Traceback" not in said
    assert len(said) < 1000
    return said


def check(case: tuple[str, str, Any]) -> None:
    command, name, value = case
    said = refused(command, yaml.safe_dump({**TINY, name: value}))
    known = settings_of(command)
    words = {name, name.replace("_", " ").rstrip("s"), "arm" if name == "arms" else name}
    assert any(word in said for word in words), (name, said)
    if name not in known:
        assert "unknown option" in said


RAW = st.one_of(
    st.binary(min_size=1, max_size=30),
    st.text(min_size=1, max_size=30),
    st.text("{}[]:-,'\"&*!|>%@`#? \n\tab1", min_size=1, max_size=30),
)


def check_raw(command: str, text: str | bytes) -> None:
    """Text that is no mapping of settings; what happens to be an empty file, or a comment, is none of it."""
    content = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    try:
        parsed = yaml.safe_load(content.decode())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError):
        parsed = "not YAML"
    if parsed is None or parsed == {}:
        return
    refused(command, content)


QUICK = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
SLOW = settings(deadline=None, max_examples=1500, suppress_health_check=list(HealthCheck))


@QUICK
@given(wrong_settings())
@example(("train", "epochs", None))
@example(("compare", "epochs", True))
@example(("train", "lr", "1e"))
@example(("compare", "arms", []))
@example(("train", "n_train", -1))
@example(("train", "seed", "zq"))
def test_a_wrong_setting_is_one_line_that_names_it(case: tuple[str, str, Any]) -> None:
    check(case)


@QUICK
@given(st.sampled_from(sorted(CLASSES)), RAW)
def test_what_is_no_configuration_is_one_line(command: str, text: str | bytes) -> None:
    check_raw(command, text)


@pytest.mark.slow
@SLOW
@given(wrong_settings())
def test_thousands_of_wrong_settings(case: tuple[str, str, Any]) -> None:
    check(case)


@pytest.mark.slow
@SLOW
@given(st.sampled_from(sorted(CLASSES)), RAW)
def test_thousands_of_files_that_are_no_configuration(command: str, text: str | bytes) -> None:
    check_raw(command, text)


def test_every_setting_is_tried() -> None:
    for command in CLASSES:
        known = build_parser()._actions[-1].choices[command]._actions  # type: ignore[index]
        options = {action.dest for action in known if "." not in action.dest}
        options -= {"help", "config", "print_config", *FREE}
        assert options == set(settings_of(command))
