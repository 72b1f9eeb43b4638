"""Tiny runs and one tiny comparison that the tests of the main job share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import worker
from experiments.compare import Comparison, compare
from experiments.config import Arm, CompareConfig, RunConfig
from experiments.data import ImageSet, load_data
from experiments.executors.base import Executor
from experiments.measure import MeasureConfig
from experiments.runner import Policy
from experiments.worker import Outcome, Task
from masks import mask_info, registry
from tests.experiments.by_hand import Watch, watching
from tests.experiments.made_up import Made, making

TINY = {"n_train": 100, "n_val": 30, "n_test": 50, "width": 4, "epochs": 2, "batch_size": 32, "lr": 0.1}
QUIET = Policy(device="cpu", quiet=True)
ARMS = (
    Arm("none", "none"),
    Arm("none_2x", "none", epochs_factor=2, role="control"),
    Arm("all", "all", (0.05, 0.2)),
    Arm("no_norm", "no_norm", (0.05, 0.2), role="control"),
    Arm("norm", "norm", (0.5, 2.0)),
    Arm("random", "random", (0.5, 2.0)),
    Arm("fisher", "fisher:exclude_norm=true", (0.05, 0.2)),
)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., RunConfig]:
    """Makes the configuration of a run of a twentieth of a second."""
    return lambda **changes: RunConfig(**{**TINY, "score_images": 40, **changes})


@pytest.fixture(scope="session")
def tiny_comparison() -> Callable[..., CompareConfig]:
    """Makes a comparison of such runs."""
    small = {**TINY, "arms": ARMS, "seeds": 3, "tuning_seeds": 2}
    return lambda **changes: CompareConfig(**{**small, **changes})


@pytest.fixture(scope="session")
def measured() -> MeasureConfig:
    return MeasureConfig(images=64, sharpness_m=16)


@pytest.fixture(scope="session")
def comparison(
    tiny_comparison: Callable[..., CompareConfig], measured: MeasureConfig, tmp_path_factory: pytest.TempPathFactory
) -> Comparison:
    """A finished comparison, made by a real worker process; leave its folder as it is."""
    folder = tmp_path_factory.mktemp("study") / "comparison"
    return compare(tiny_comparison(), folder, measure=measured, policy=QUIET)


class SerialExecutor(Executor):
    """Does each run in this process."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome] | None]:
        for task in tasks:
            yield task, worker.work(task)

    def stop(self) -> None: ...


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are made in this process: starting others takes seconds, and here they can be watched."""
    monkeypatch.setattr("experiments.executors.local.LocalExecutor", SerialExecutor)
    monkeypatch.setattr("experiments.compare.LocalExecutor", SerialExecutor)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn as empty ones: they take seconds a page."""
    monkeypatch.setattr("experiments.report.content.svg", lambda *_: "<svg></svg>")


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, from which modules are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks registered inside, by hand or by a plugin, are forgotten."""
    mask_info("norm")
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    return load_data("digits")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Trains and notes what every step was given."""
    return watching(monkeypatch)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Makes comparisons that were never run."""
    return making(monkeypatch)
