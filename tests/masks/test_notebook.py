"""Masks in a notebook: every number, nothing as markup."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import torch
from torch import nn

from masks import Mask, MaskContext, ParamTable, build_mask
from masks.notebook import MOST_LAYERS


def text(html: str) -> tuple[str, list[list[str]]]:
    root = ET.fromstring(f"<div>{html}</div>")
    rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    return "".join(root.itertext()), rows


def test_a_mask_in_a_notebook() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    mask = build_mask("norm", MaskContext(model))
    words, rows = text(mask._repr_html_())
    assert words.startswith(
        "Mask norm, built at init: 8 of 58 coordinates (13.7931%) in 2 of 6 tensors, 100.0% of them"
    )
    assert rows[1:] == [["1.weight", "norm_weight", "4", "4", "100.00%"], ["1.bias", "norm_bias", "4", "4", "100.00%"]]


def test_an_empty_mask_and_a_long_one() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(MOST_LAYERS + 3)))
    table = ParamTable.from_model(model)
    words, rows = text(Mask(table, (False,) * len(table))._repr_html_())
    assert "0 of 23 coordinates" in words
    assert len(rows) == 1
    words, rows = text(Mask(table, (True,) * len(table))._repr_html_())
    assert len(rows) == 1 + MOST_LAYERS
    assert words.endswith("and 3 more tensors")


def test_names_are_text() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("<w>&", nn.Parameter(torch.ones(2)))

    table = ParamTable.from_model(Odd())
    assert text(Mask(table, (True,))._repr_html_())[1][1][0] == "<w>&"
