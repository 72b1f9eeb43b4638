"""Records: plain JSON values, and named after all that they depend on."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from experiments.config import RunConfig
from experiments.models import build_model
from experiments.record import RunRecord, config_of, content_digests, environment, file_digest, write_text
from masks import MaskContext, build_mask, load_plugin, mask_info, registry
from masks.errors import InputError


@pytest.fixture
def record(tiny: Callable[..., RunConfig]) -> RunRecord:
    config = tiny(seed=3)
    result = {"val_accuracy": 1 / 3, "history": [{"loss": math.nan, "ascent": -math.inf}], "pair": (1, 2), "none": None}
    return RunRecord("abc", "norm", asdict(config), result, {"seconds": 0.1}, environment(torch.device("cpu")))


def test_numbers_that_are_not_finite_are_none_as_json_has_none(record: RunRecord) -> None:
    assert record.result["history"] == [{"loss": None, "ascent": None}]
    assert record.result["pair"] == [1, 2]
    json.dumps(record.result, allow_nan=False)
    assert config_of(record) == RunConfig(**record.config)
    assert config_of(record).seed == 3


def test_a_file_is_complete_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def test_the_environment_names_versions_and_device() -> None:
    found = environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["python"].split(".")[:2] == [str(v) for v in sys.version_info[:2]]
    assert found["device"].startswith("cpu")
    assert found["threads"] == 1


# -- what a configuration refers to -------------------------------------------------------------------------

PLUGIN = """from masks import register_score

@register_score("of_a_file", summary="s", source="test")
def score(context):
    return [{} * p.abs() for p in context.parameters()]
"""


def test_a_changed_plugin_is_another_run(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask_info("norm")
    digests = []
    for factor in ("1", "-1", "1"):
        monkeypatch.setattr(registry, "_registry", dict(registry._registry))
        registry._registry.pop("of_a_file", None)
        sys.modules.pop("file_of_masks", None)
        (in_folder / "file_of_masks.py").write_text(PLUGIN.format(factor))
        load_plugin("file_of_masks")
        digests.append(content_digests(["norm", "of_a_file"], RunConfig(), "data"))
    assert digests[0] == digests[2] != digests[1]
    assert set(digests[0]) == {"data", "mask norm", "mask of_a_file"}
    assert digests[0]["mask of_a_file"] == f"file_of_masks {file_digest(in_folder / 'file_of_masks.py')}"


def test_a_changed_model_of_the_users_own_is_another_run(in_folder: Path) -> None:
    digests = []
    for width in ("3", "4", "3"):
        (in_folder / "file_of_nets.py").write_text(
            f"from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear({width}, 2))\n"
        )
        sys.modules.pop("file_of_nets", None)
        build_model("file_of_nets:net", in_channels=1, image_size=(8, 8), num_classes=2)
        digests.append(content_digests(["norm"], RunConfig(model="file_of_nets:net"), "data"))
    assert digests[0] == digests[2] != digests[1]


def test_a_changed_mask_file_is_another_run(in_folder: Path) -> None:
    model = build_model("resnet_small", in_channels=1, image_size=(8, 8), num_classes=10, width=4)
    found = []
    for name in ("norm", "all", "norm"):
        build_mask(name, MaskContext(model)).save("m.npz")
        found.append(content_digests(["file:path=m.npz"], RunConfig(), "data"))
        matched = content_digests(["random"], RunConfig(match=r"file:path=m.npz"), "data")
        assert matched["file:path=m.npz"] == found[-1]["file:path=m.npz"]
    assert found[0] == found[2] != found[1]
    assert "file:path=lost.npz" not in content_digests(["file:path=lost.npz"], RunConfig(), "data")
    with pytest.raises(InputError, match=r"cannot read lost\.npz: No such file"):
        file_digest(Path("lost.npz"))


def test_built_in_masks_and_models_have_no_files() -> None:
    config = replace(RunConfig(), model="torchvision:resnet18")
    assert content_digests(["all", "fisher"], config, "d") == {
        "data": "d",
        **dict.fromkeys(("mask all", "mask fisher", "mask norm"), "sam-masks"),
    }
