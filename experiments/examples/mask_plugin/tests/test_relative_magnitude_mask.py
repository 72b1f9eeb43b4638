"""The mask relative_magnitude keeps the contract of mask builders, and scores as it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from masks import Budget, MaskContext, build_mask, mask_info
from masks.testing import check_mask_builder


def test_it_is_found_by_its_entry_point() -> None:
    assert mask_info("relative_magnitude").origin.endswith("(relative_magnitude_mask)")


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_it_keeps_the_contract(power: float) -> None:
    check_mask_builder("relative_magnitude", options={"power": power})


@pytest.mark.parametrize(("power", "kept"), [(0.0, [False, False, True, True]), (1.0, [False, True, False, True])])
def test_scores_by_hand(power: float, kept: list[bool]) -> None:
    """|w| is 1, 3 in a tensor of mean 2 and 10, 30 in one of mean 20: relative to it 0.5, 1.5 and 0.5, 1.5."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    nn.utils.vector_to_parameters(torch.tensor([1.0, -3.0, 10.0, -30.0]), model.parameters())
    mask = build_mask("relative_magnitude", MaskContext(model), Budget(2, 4), {"power": power})
    assert torch.cat([part.reshape(-1) for part in mask.dense()]).tolist() == kept
