import json
from dataclasses import fields

import pytest

from experiments.augment import Augmentation
from experiments.config import Arm, RunConfig
from experiments.data import TORCHVISION
from experiments.models import list_models
from experiments.presets import Preset, get_preset, grid, list_presets
from masks.errors import InputError
from masks.spec import MaskSpec

KNOWN = {field.name for field in fields(RunConfig)}
COMING = {"augment", "label_smoothing"} - KNOWN
"""Fields of a run that presets use and that RunConfig is about to get; empty once it has them."""


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_is_a_configuration(name: str) -> None:
    preset = get_preset(name)
    config = preset.config()
    arms = [Arm(**{**arm, "rho": tuple(arm.get("rho", ()))}) for arm in config.pop("arms")]
    assert set(config) - KNOWN <= COMING
    run = RunConfig(**{key: value for key, value in config.items() if key not in COMING})
    assert {key: getattr(run, key) for key in config if key not in COMING} == {
        key: value for key, value in config.items() if key not in COMING
    }
    assert str(Augmentation.parse(config["augment"])) == config["augment"]
    assert config["model"] in list_models()
    assert config["data"] in TORCHVISION
    assert len({arm.name for arm in arms}) == len(arms)
    assert arms[0].name == "none"
    assert len({len(arm.rho) for arm in arms if arm.rho}) == 1  # a comparison wants grids of one size
    for arm in arms:
        MaskSpec.parse(arm.mask)
    assert json.loads(json.dumps(preset.config())) == preset.config()


@pytest.mark.parametrize("name", list_presets())
def test_a_published_radius_lies_inside_its_grid(name: str) -> None:
    preset = get_preset(name)
    arms = {arm["name"]: arm for arm in preset.arms}
    assert preset.best
    for arm, rho in preset.best.items():
        assert rho in sorted(arms[arm]["rho"])[1:-1]


def test_the_best_published_radii_of_sam_on() -> None:
    expected = {
        "sam_on_cifar100_wrn28_10": ("l2", 0.2, 1.0),
        "asam_on_cifar100_wrn28_10_elementwise_l2": ("elementwise_l2", 5, 10),
        "asam_on_cifar100_wrn28_10_layerwise_l2": ("layerwise_l2", 0.05, 0.5),
        "asam_on_cifar100_wrn28_10_elementwise_linf": ("elementwise_linf", 0.01, 0.1),
    }
    for name, (rule, all_, norm) in expected.items():
        preset = get_preset(name)
        assert (preset.settings["rule"], preset.best) == (rule, {"all": all_, "norm": norm})
        for key, value in {
            "model": "wrn28_10",
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "batch_size": 128,
            "epochs": 200,
            "label_smoothing": 0.1,
            "norm_statistics": "both",
        }.items():
            assert preset.settings[key] == value, key
        assert any("figure" in note and f"norm {norm:g}" in note for note in preset.notes())
    assert grid(1.0) == [0.25, 0.5, 1.0, 2.0]


def test_a_scaled_preset_says_so() -> None:
    full, small = get_preset("sam_on_cifar100_wrn28_10"), get_preset("sam_on_cifar100_wrn28_10", 0.1)
    sizes = {"epochs": 20, "n_train": 4_500, "n_val": 500}
    assert small.settings == full.settings | sizes
    assert small.arms == full.arms
    assert [note for note in small.notes() if note not in full.notes()] == [
        "Scaled by 0.1: 20 of 200 epochs, 4,500 of 45,000 training images, 500 of 5,000 validation images; "
        "not the published setting."
    ]
    assert not any("Scaled" in note for note in full.notes())
    least = get_preset("sam_on_cifar100_wrn28_10", 1e-6).settings
    assert (least["epochs"], least["n_train"], least["n_val"]) == (1, 128, 100)
    assert get_preset("sam_on_cifar100_wrn28_10", 1.0) is full


@pytest.mark.parametrize("scale", [0, -0.5, 1.5, float("nan")])
def test_scales_that_cannot_be(scale: float) -> None:
    with pytest.raises(InputError, match="scale must be above 0 and at most 1, got"):
        get_preset("sam_on_cifar100_wrn28_10", scale)


def test_errors() -> None:
    with pytest.raises(
        InputError, match="unknown preset 'sam_on_cifar10_wrn28_10'; did you mean sam_on_cifar100_wrn28_10"
    ):
        get_preset("sam_on_cifar10_wrn28_10")
    with pytest.raises(InputError, match=r"already scaled by 0\.5"):
        get_preset("sam_on_cifar100_wrn28_10", 0.5).scaled(0.5)


def test_a_configuration_is_a_copy() -> None:
    preset: Preset = get_preset("ssam_f_cifar10_resnet18")
    preset.config()["arms"][1]["rho"].clear()
    preset.config()["epochs"] = 3
    assert preset.config()["arms"][1]["rho"] == [0.025, 0.05, 0.1, 0.2]
    assert preset.config()["epochs"] == 200
