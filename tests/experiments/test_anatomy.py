"""The list of masks, and what each keeps on a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.anatomy import Anatomy, AnatomyReport, Target, build_all, describe_all
from experiments.checkpoint import save_checkpoint
from experiments.models import build_model
from masks import Mask, MaskContext, list_masks, register_mask, register_score
from masks.errors import InputError

BUDGETED = {"dynamic", "random", "random_depth", "magnitude", "fisher", "snip", "gradient"}


@pytest.fixture(scope="module")
def resnet18() -> AnatomyReport:
    return build_all(Target("torchvision:resnet18", num_classes=10), only=None)


@pytest.fixture(scope="module")
def small() -> dict[str, Anatomy]:
    report = build_all(Target("resnet_small", width=4, data="digits", score_images=40))
    return {mask.name: mask for mask in report.masks}


def test_resnet18_has_the_counts_of_the_paper(resnet18: AnatomyReport) -> None:
    masks = {mask["name"]: mask for mask in json.loads(resnet18.as_json())}
    assert set(masks) == {info.name for info in list_masks()}
    norm = masks["norm"]
    assert (norm["kept"], norm["numel"], norm["matched"], norm["jaccard_norm"]) == (9_600, 11_181_642, False, 1.0)
    assert norm["density"] == 9_600 / 11_181_642
    assert norm["tensors"] == 40
    assert masks["all"]["kept"] == 11_181_642
    assert masks["no_norm"]["kept"] == 11_181_642 - 9_600
    assert (masks["no_norm"]["jaccard_norm"], masks["none"]["kept"]) == (0, 0)
    for name in ("random", "random_depth", "magnitude"):
        assert (masks[name]["kept"], masks[name]["matched"], masks[name]["skipped"]) == (9_600, True, None)
    # At initialization gammas are 1 and larger than any other weight: all 4,800 are kept, and no beta (0).
    assert masks["magnitude"]["norm_share"] == 0.5
    assert masks["magnitude"]["jaccard_norm"] == pytest.approx(4800 / 14400)
    assert masks["random_depth"]["norm_share"] == 0
    for name in ("fisher", "snip", "gradient"):
        assert masks[name]["skipped"] == f"mask {name} is scored on data, and none was given"
        assert masks[name]["kept"] is None
    assert "path" in masks["file"]["skipped"]


def test_predicted_costs_of_resnet18(resnet18: AnatomyReport) -> None:
    costs = {mask.name: mask.predicted_cost for mask in resnet18.masks}
    assert (costs["none"], costs["all"], costs["fisher"]) == (1, 2, None)
    assert costs["norm"] is not None
    # The first pass of the norm mask: a forward pass and all gradients of inputs, but of no convolution's weights.
    assert costs["norm"] == pytest.approx(1 + 2 / 3, abs=0.03)


def test_the_text_says_what_is_counted(resnet18: AnatomyReport) -> None:
    text = resnet18.as_text()
    assert text.startswith("torchvision:resnet18: 11,181,642 trainable coordinates in 62 tensors\n")
    assert "budgeted masks keep 9,600 (as norm does)" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["norm"][1:6] == ["9,600", "0.08586", "%", "natural", "size"]
    assert lines["random"][1:5] == ["9,600", "0.08586", "%", "yes"]
    assert "skipped fisher: mask fisher is scored on data, and none was given" in text


def test_with_data_every_mask_is_built(small: dict[str, Anatomy]) -> None:
    assert {name for name, mask in small.items() if mask.skipped} == {"file"}
    for name, mask in small.items():
        assert mask.matched == (name in BUDGETED)
        if name in BUDGETED:
            assert mask.kept == small["norm"].kept
        if mask.skipped is None:
            assert mask.density == mask.kept / mask.numel  # type: ignore[operator]
            assert mask.build_seconds is not None
    assert small["norm"].kept == sum(2 * c for c in (4, 4, 4, 8, 8, 8))
    assert small["norm"].norm_share == 1
    assert small["none"].norm_share is None


def test_a_density_instead_of_a_mask() -> None:
    report = build_all(Target("mlp", width=4), density=0.25, only=["random", "magnitude", "all"])
    numel = 64 * 4 + 4 + 4 * 4 + 4 + 4 * 10 + 10
    assert [(m.kept, m.numel, m.jaccard_norm) for m in report.masks] == [
        (int(numel / 4 + 0.5), numel, None),
        (int(numel / 4 + 0.5), numel, None),
        (numel, numel, None),
    ]
    assert "density 0.25" in report.as_text()
    assert all(mask.norm_share == 0 for mask in report.masks)


def test_frozen_coordinates_are_named(in_folder: Path) -> None:
    (in_folder / "frozen_net.py").write_text(
        "from torch import nn\ndef make(num_classes):\n    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), "
        "nn.LayerNorm(8), nn.Linear(8, num_classes))\n    net[1].requires_grad_(False)\n    return net\n"
    )
    report = build_all(Target("frozen_net:make"), only=["random"])
    assert "106 trainable coordinates in 4 tensors, 520 frozen ones not counted" in report.as_text()
    assert report.masks[0].kept == 16


def test_masks_are_of_the_weights_given(tmp_path: Path) -> None:
    model = build_model("resnet_small", in_channels=1, image_size=(8, 8), num_classes=10, width=4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(0)
                module.bias.fill_(9)
    save_checkpoint(tmp_path / "c.pt", {"model": model.state_dict()})
    target = Target("resnet_small", width=4, init=tmp_path / "c.pt")
    build_all(target, only=["magnitude"], save=tmp_path / "saved")
    mask = Mask.load(tmp_path / "saved" / "magnitude.npz")
    betas = {c.row.name for c in mask.per_layer() if c.kept and c.row.role == "norm_bias"}
    assert len(betas) == 6
    assert not [c for c in mask.per_layer() if c.kept and c.row.role == "norm_weight"]


def test_masks_are_saved_under_safe_names_and_never_over_others(tmp_path: Path) -> None:
    target = Target("resnet_small", width=4)
    wanted = ["norm:part=weights", "parameters:pattern=stages.0/*.weight", "random"]
    with pytest.raises(InputError, match="none of the 20 tensors meets"):
        build_all(target, only=wanted, save=tmp_path / "m")
    wanted[1] = "parameters:pattern=stages.0*weight"
    for _ in range(2):  # the same masks may be written again
        build_all(target, only=wanted, save=tmp_path / "m")
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == ["norm_part-weights.npz", "parameters_pattern-stages.0_weight.npz", "random.npz"]
    before = (tmp_path / "m" / "random.npz").read_bytes()
    with pytest.raises(InputError, match=r"random\.npz holds another mask"):
        build_all(Target("resnet_small", width=4, seed=1), only=["random"], save=tmp_path / "m")
    assert (tmp_path / "m" / "random.npz").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file.random\.npz: "):
        build_all(target, only=["random"], save=tmp_path / "file")


def test_scores_are_taken_on_images_of_all_classes(tmp_path: Path, own_masks: None) -> None:
    seen = []

    @register_score("watching", summary="s", source="test", needs_data=True)
    def score(context: MaskContext) -> list[torch.Tensor]:
        seen.append(torch.cat([y for _, y in context.batches]))
        return [p.abs() for p in context.parameters()]

    y = np.repeat(np.arange(4), 50)
    np.savez(
        tmp_path / "a.npz",
        x_train=np.zeros((200, 8, 8), np.uint8) + y[:, None, None].astype(np.uint8),
        y_train=y,
        x_test=np.ones((4, 8, 8), np.uint8),
        y_test=np.arange(4),
    )
    build_all(Target("resnet_small", width=4, data=f"npz:{tmp_path}/a.npz", score_images=40), only=["watching"])
    assert len(seen[0]) == 40
    assert torch.bincount(seen[0], minlength=4).min() >= 3


def test_a_builder_that_breaks_does_not_hide_the_others(own_masks: None) -> None:
    @register_mask("broken_builder", kind="natural", summary="s", source="test")
    def build(context: MaskContext, budget: None) -> Mask:
        raise KeyError("oops")

    report = build_all(Target("resnet_small", width=4))
    found = {mask.name: mask for mask in report.masks}
    assert found["broken_builder"].skipped == "its builder raised KeyError: 'oops'"
    assert found["norm"].kept == 72
    with pytest.raises(InputError, match="mask broken_builder: its builder raised KeyError: 'oops'"):
        build_all(Target("resnet_small", width=4), only=["broken_builder"])


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ({"model": "mlp"}, {}, "none of the model's 6 trainable tensors belongs to a normalization layer"),
        ({"model": "mlp"}, {"density": 2.0}, "density must lie between 0 and 1, got 2.0"),
        ({"model": "mlp"}, {"density": 1e-9}, "out of reach"),
        ({"model": "resnet_small"}, {"match": "random"}, "random is budgeted"),
        ({"model": "resnet_small"}, {"only": ["nrom"]}, "did you mean norm"),
        ({"model": "resnet_small"}, {"only": ["fisher"]}, "mask fisher is scored on data, and none was given"),
        ({"model": "resnet_small", "num_classes": 0}, {}, "num_classes must be at least 1, got 0"),
        ({"model": "resnet_small", "score_images": 0}, {}, "score_images must be at least 1, got 0"),
        ({"model": "resnet_small", "data": "digits", "num_classes": 5}, {}, "num_classes is 5, but digits has 10"),
        ({"model": "torchvision:resnet18", "data": "digits"}, {}, "does not take images of 1x8x8"),
    ],
)
def test_what_cannot_be_had(target: dict[str, object], options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        build_all(Target(**target), **options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_every_mask_is_described() -> None:
    text = describe_all(as_json=False)
    listed = json.loads(describe_all(as_json=True))
    assert [one["name"] for one in listed] == [info.name for info in list_masks()]
    for info, one in zip(list_masks(), listed, strict=True):
        assert (one["kind"], one["summary"], one["source"], one["origin"]) == (
            info.kind,
            info.summary,
            info.source,
            info.origin,
        )
        assert [o["name"] for o in one["options"]] == [o.name for o in info.options]
        for words in (info.name, info.summary, info.source, info.origin, *(f"option {o.name}:" for o in info.options)):
            assert words in text
    fisher = next(one for one in listed if one["name"] == "fisher")
    assert (fisher["needs_data"], fisher["schedule"]) == (True, "every=1")
    assert {"name": "exclude_norm", "type": "bool", "default": False} in fisher["options"]
