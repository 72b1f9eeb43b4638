"""Parts of a run: what is trained, which weights decay, and models whose width counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from experiments.build import base_optimizer, budget_of, initial_model, load_cached, prepared_method
from experiments.config import RunConfig
from experiments.data import ImageSet
from masks import MaskSpec, ParamTable
from masks.errors import InputError
from sam import build_method

CPU = torch.device("cpu")
Tiny = Callable[..., RunConfig]
NORMS = (nn.BatchNorm2d, nn.LayerNorm)
MODELS: list[dict[str, Any]] = [{"model": "resnet_small"}, {"model": "vit_small", "width": 16}]


def norm_parameters(model: nn.Module) -> set[str]:
    """Found by the type of the module that owns them."""
    return {
        f"{name}.{own}" for name, m in model.named_modules() if isinstance(m, NORMS) for own, _ in m.named_parameters()
    }


def test_one_class_is_refused(tmp_path: Path) -> None:
    """As from a folder of class folders that is named one level too high."""
    (tmp_path / "all").mkdir()
    for value in (0, 9):
        Image.new("L", (4, 4), value).save(tmp_path / "all" / f"{value}.png")
    with pytest.raises(InputError, match=r"has one class only \(all\), and there is nothing to tell it from$"):
        load_cached(f"folder:{tmp_path}")


# -- weight decay -------------------------------------------------------------------------------------------


def decays(config: RunConfig, model: nn.Module) -> dict[str, float]:
    """Weight decay of each parameter that the optimizer holds, once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        (names[id(p)], group["weight_decay"])
        for group in base_optimizer(config, model, CPU).param_groups
        for p in group["params"]
    ]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("net", MODELS)
def test_exactly_the_normalization_parameters_do_not_decay(
    tiny: Tiny, digits: ImageSet, net: dict[str, Any], optimizer: str
) -> None:
    config = tiny(weight_decay=0.1, norm_weight_decay=False, optimizer=optimizer, **net)
    model = initial_model(config, digits)
    norm = norm_parameters(model)
    everything = {name for name, _ in model.named_parameters()}
    assert 0 < len(norm) < len(everything)
    assert decays(config, model) == {name: 0.0 if name in norm else 0.1 for name in everything}
    assert decays(tiny(weight_decay=0.1, optimizer=optimizer, **net), model) == dict.fromkeys(everything, 0.1)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("trainable", ["all", "norm", "no_norm"])
def test_every_trainable_parameter_is_held_whatever_decays(
    tiny: Tiny, digits: ImageSet, trainable: str, decay: float
) -> None:
    config = tiny(weight_decay=decay, norm_weight_decay=False, trainable=trainable)
    model = initial_model(config, digits)
    assert set(decays(config, model)) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_an_optimizer_without_weight_decay_needs_no_group_of_its_own(tiny: Tiny, digits: ImageSet) -> None:
    config = tiny(optimizer="rprop", weight_decay=0.0, norm_weight_decay=False)
    (group,) = base_optimizer(config, initial_model(config, digits), CPU).param_groups
    assert "weight_decay" not in group


# -- what is trained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", MODELS)
def test_what_is_trainable(tiny: Tiny, digits: ImageSet, net: dict[str, Any]) -> None:
    model = initial_model(tiny(**net), digits)
    norm, everything = norm_parameters(model), {name for name, _ in model.named_parameters()}
    for trainable, wanted in (("all", everything), ("norm", norm), ("no_norm", everything - norm)):
        config = tiny(trainable=trainable, **net)
        frozen = initial_model(config, digits)
        assert {name for name, p in frozen.named_parameters() if p.requires_grad} == wanted
        assert {row.name for row in ParamTable.from_model(frozen)} == wanted  # what masks are made of
        budget = budget_of(tiny(trainable=trainable, density=0.5, **net), MaskSpec.parse("random"), frozen)
        assert budget is not None
        assert budget.numel == sum(p.numel() for name, p in frozen.named_parameters() if name in wanted)
        for name, p in frozen.named_parameters():
            assert torch.equal(p, model.get_parameter(name))


def test_nothing_to_train_is_refused(tiny: Tiny, digits: ImageSet) -> None:
    with pytest.raises(InputError, match="trainable norm leaves nothing to train: the model has no normalization"):
        initial_model(tiny(model="mlp", trainable="norm"), digits)
    initial_model(tiny(model="mlp", trainable="no_norm"), digits)


# -- width --------------------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {"model": "mlp", "width": 32, "mask": "all"}


def test_a_method_that_scales_with_the_width_gets_its_base_model(tiny: Tiny, digits: ImageSet) -> None:
    config = tiny(method="mup_sam:base_width=8", **WIDE)
    model, plain = initial_model(config, digits), initial_model(config, digits)
    method, base = prepared_method(config, model, digits)
    assert base is not None
    narrow = initial_model(tiny(model="mlp", width=8, mask="all"), digits)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), narrow.parameters(), strict=True))
    assert method == build_method("mup_sam", base_width=8).prepared(model, narrow)
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    with torch.no_grad():
        ratio = {name: float(model.get_parameter(name).norm() / plain.get_parameter(name).norm()) for name in names}
    # Default initialization falls as 1/sqrt(fan in) in every layer; muP's falls as 1/n in the last one.
    assert ratio[names[0]] == pytest.approx(1, rel=0.15)
    assert ratio[names[-1]] == pytest.approx(4**-0.5, rel=0.15)
    groups = base_optimizer(config, model, CPU, base).param_groups
    assert {group["role"]: group["lr"] / config.lr for group in groups} == {
        **{"input": 4.0, "hidden": 1.0, "output": 0.25, "fixed": 1.0}
    }


def test_other_methods_leave_the_weights_alone(tiny: Tiny, digits: ImageSet) -> None:
    config = tiny(method="asam", **WIDE)
    model, plain = initial_model(config, digits), initial_model(config, digits)
    method, base = prepared_method(config, model, digits)
    assert (method, base) == (build_method("asam"), None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "mup_sam"}, "method mup_sam needs a base width: mup_sam:base_width=N"),
        ({"optimizer": "rmsprop"}, "scales learning rates for sgd and adamw only, got rmsprop"),
        ({"norm_weight_decay": False}, "decays all parameters alike; leave norm_weight_decay on"),
        ({"rho_min": 0.01}, "has a learning rate per layer; leave rho_min out"),
    ],
)
def test_what_does_not_go_with_the_width(tiny: Tiny, digits: ImageSet, changes: dict[str, Any], message: str) -> None:
    config = tiny(**{"method": "mup_sam:base_width=8", **WIDE, **changes})
    model = initial_model(config, digits)
    with pytest.raises(InputError, match=message):
        base_optimizer(config, model, CPU, prepared_method(config, model, digits)[1])
