"""What builders are given."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

from masks import MaskContext, MaskError, ParamTable, cross_entropy


def test_cross_entropy_is_per_example() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64)
    targets = torch.tensor([0, 2, 1, 1, 0])
    losses = cross_entropy(logits, targets)
    assert losses.shape == (5,)
    for row, target, loss in zip(logits, targets, losses, strict=True):
        torch.testing.assert_close(loss, row.exp().sum().log() - row[target])


def test_table_is_read_off_the_model_or_checked() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    assert MaskContext(model).table == ParamTable.from_model(model)
    table = ParamTable.from_model(model)
    assert MaskContext(model, table).table is table
    with pytest.raises(MaskError, match="the table is of another model"):
        MaskContext(model, ParamTable.from_model(nn.Linear(3, 2)))
    model[1].requires_grad_(False)
    with pytest.raises(MaskError, match="2 trainable tensors here, 4 there"):
        MaskContext(model, table)


def test_parameters_and_device() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[0].bias.requires_grad_(False)
    found = MaskContext(model).parameters()
    wanted = [p for p in model.parameters() if p.requires_grad]
    assert [p.data_ptr() for p in found] == [p.data_ptr() for p in wanted]
    assert not any(p.requires_grad for p in found)
    assert MaskContext(model).device == torch.device("cpu")


def draw(context: MaskContext, *names: str) -> list[int]:
    return torch.randint(2**62, (4,), generator=context.generator(*names)).tolist()


def test_random_streams() -> None:
    model = nn.Linear(2, 2)
    context = MaskContext(model, seed=3)
    first = draw(context, "a")
    torch.rand(3)
    torch.manual_seed(9)
    draw(context, "b")
    # The same, however often and whatever was drawn elsewhere, also on another model.
    assert draw(context, "a") == draw(MaskContext(nn.Linear(3, 3), seed=3), "a") == first
    others = [(3, ("b",)), (3, ("a", "b")), (3, ()), (4, ("a",)), (30, ("a",)), (-3, ("a",))]
    streams = [draw(MaskContext(model, seed=seed), *names) for seed, names in others]
    assert len({tuple(s) for s in [first, *streams]}) == len(others) + 1
    before = torch.get_rng_state()
    draw(context, "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_random_stream_by_hand() -> None:
    """Which stream a seed stands for may not change: masks of published seeds would."""
    number = int.from_bytes(hashlib.sha256(b"mask/3/random").digest()[:8], "big") // 2
    expected = torch.randint(2**62, (4,), generator=torch.Generator().manual_seed(number)).tolist()
    assert draw(MaskContext(nn.Linear(2, 2), seed=3), "random") == expected


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 3, generator=generator) * 5 + 2, torch.tensor([0, 1, 0, 1, 0, 1])) for _ in range(2)]


def test_scoring_model(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    context = MaskContext(model, batches=batches)
    twin = context.scoring_model()
    torch.testing.assert_close(twin[0].running_mean, (batches[0][0].mean(0) + batches[1][0].mean(0)) / 2)
    assert not twin.training
    assert model.training
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert context.scoring_model() is twin


def test_scoring_model_follows_the_model(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    context = MaskContext(model, batches=batches)
    twin = context.scoring_model()
    model[1].weight.data.mul_(2)
    again = context.scoring_model()
    assert again is not twin
    assert torch.equal(again[1].weight, model[1].weight)
    assert len(context._twin) == 1


def test_scoring_model_needs_batches() -> None:
    with pytest.raises(MaskError, match="scored on data, and none was given"):
        MaskContext(nn.Linear(2, 2)).scoring_model()
