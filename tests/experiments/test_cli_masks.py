"""sam-masks masks: the list, and what each keeps on a model."""

from __future__ import annotations

import re
from pathlib import Path

from masks import Mask, list_masks
from tests.experiments.command_line import TINY, Output, printed


def test_masks_lists_every_mask(capsys: Output) -> None:
    text = printed(["masks"], capsys)
    listed = printed(["masks", "--json"], capsys)
    names = [info.name for info in list_masks()]
    assert [one["name"] for one in listed] == names
    for info in list_masks():
        assert re.search(rf"^{info.name}  \(", text, flags=re.MULTILINE)
        assert info.summary in text


def test_masks_of_a_model_as_json(capsys: Output) -> None:
    masks = printed(["masks", "--model=vit_small", "--width=16", "--num-classes=3", "--json"], capsys)
    norm = next(mask for mask in masks if mask["name"] == "norm")
    assert (norm["kept"], norm["matched"], norm["jaccard_norm"]) == (7 * 32, False, 1.0)
    for mask in masks:
        assert {"name", "kept", "numel", "density", "matched", "jaccard_norm"} <= set(mask)
        if mask["matched"]:
            assert (mask["kept"], mask["numel"]) == (norm["kept"], norm["numel"])
    assert {mask["name"] for mask in masks if mask["matched"]} == {"random", "random_depth", "magnitude"}


def test_masks_of_a_model_with_data(capsys: Output) -> None:
    command = ["masks", "--model=resnet_small", "--width=4", "--data=digits", "--score-images=40"]
    text = printed(command, capsys)
    masks = {mask["name"]: mask for mask in printed([*command, "--json"], capsys)}
    for name in ("fisher", "snip", "gradient", "magnitude", "random"):
        assert masks[name]["kept"] == 72
        assert re.search(rf"^ *{name} +72 +5\.21 % +yes ", text, flags=re.MULTILINE)
    assert masks["fisher"]["build_seconds"] > 0
    assert "skipped file" in text


def test_both_spellings_of_an_option(capsys: Output) -> None:
    one, other = (
        printed(["masks", "--model=mlp", "--width=4", "--density=0.5", flag, "3", "--masks=all", "--json"], capsys)
        for flag in ("--num-classes", "--num_classes")
    )
    assert one[0]["numel"] == other[0]["numel"] == 64 * 4 + 4 + 16 + 4 + 12 + 3


def test_a_saved_mask_can_be_trained_with(in_folder: Path, capsys: Output) -> None:
    printed(["masks", "--model=resnet_small", "--width=4", "--masks=random", "--save=m", "--seed=5", "--json"], capsys)
    mask = Mask.load("m/random.npz")
    record = printed(["train", *TINY, "--mask=file:path=m/random.npz", "--out=o", "--json"], capsys)
    (build,) = record["result"]["mask_builds"]
    assert build["digest"] == mask.digest()
    assert build["num_kept"] == 72
