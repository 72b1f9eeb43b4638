"""The evolving mask, update by update, against its definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from masks import Budget, Mask, MaskContext, MaskError, ParamTable, build_mask
from masks.builders.dynamic import exchanged

CRITERIA = ("gradient", "magnitude", "random")


def flat_of(mask: Mask) -> Tensor:
    return torch.cat([part.reshape(-1) for part in mask.dense("cpu")])


@pytest.fixture
def context(small_resnet: nn.Module, images: Any) -> MaskContext:
    return MaskContext(small_resnet, batches=images, seed=3)


def update(context: MaskContext, previous: Mask | None, kept: int, progress: float = 0.0, **options: Any) -> Mask:
    now = replace(context, previous=previous, progress=progress)
    return build_mask("dynamic", now, Budget(kept, context.table.numel), options)


@pytest.mark.parametrize(
    ("kept", "numel", "rate", "progress", "expected"),
    [
        (100, 1000, 0.5, 0.0, 50),
        (100, 1000, 0.5, 0.5, 25),
        (100, 1000, 0.5, 1.0, 0),
        (100, 1000, 0.5, 1 / 3, 38),  # 0.5 * (1 + 0.5) / 2 = 0.375, halves to even
        (80, 100, 0.5, 0.0, 20),  # no more than are dead; the published code would drop 40
        (100, 100, 0.5, 0.0, 0),
        (100, 1000, 1.0, 0.0, 100),
        (0, 1000, 0.5, 0.0, 0),
    ],
)
def test_numbers_exchanged(kept: int, numel: int, rate: float, progress: float, expected: int) -> None:
    assert exchanged(kept, numel, rate, progress) == expected


@pytest.mark.parametrize("grow", CRITERIA)
@pytest.mark.parametrize("drop", CRITERIA)
@pytest.mark.parametrize("density", [0.01, 0.8])
def test_live_count_is_constant_and_nothing_is_dropped_and_regrown(
    context: MaskContext, density: float, drop: str, grow: str
) -> None:
    n = context.table.numel
    kept = round(density * n)
    mask = update(context, None, kept, drop=drop, grow=grow)
    for progress in (0.0, 0.3, 0.7, 1.0):
        after = update(context, mask, kept, progress, drop=drop, grow=grow)
        before, now = flat_of(mask), flat_of(after)
        count = min(round(0.5 * (1 + math.cos(math.pi * progress)) / 2 * kept), n - kept)
        assert int(now.sum()) == kept
        # As many leave as were to be dropped: none of them came back.
        assert int((before & ~now).sum()) == int((~before & now).sum()) == count
        assert (count == 0) == (progress == 1.0)
        mask = after


def test_drops_the_smallest_and_grows_the_largest(context: MaskContext) -> None:
    """By sorting, in plain Python; the gradient by autograd on the mean loss."""
    kept = 400
    first = update(context, None, kept)
    live = flat_of(first)
    twin = context.scoring_model()
    total = sum(nn.functional.cross_entropy(twin(x), y, reduction="sum") for x, y in context.batches)
    size = sum(len(y) for _, y in context.batches)
    params = context.table.tensors(twin)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total / size, params)]).abs()
    weight = torch.cat([w.reshape(-1) for w in context.parameters()]).abs()
    for drop, drops in (("gradient", gradient), ("magnitude", weight)):
        for grow, grows in (("gradient", gradient), ("magnitude", weight)):
            now = flat_of(update(context, first, kept, drop=drop, grow=grow))
            # Far from a tie, or the two summation orders could disagree.
            dropped = sorted(live.nonzero().squeeze(1).tolist(), key=lambda i: (float(drops[i]), i))[:200]
            grown = sorted((~live).nonzero().squeeze(1).tolist(), key=lambda i: (-float(grows[i]), i))[:200]
            assert set((live & ~now).nonzero().squeeze(1).tolist()) == set(dropped), (drop, grow)
            assert set((~live & now).nonzero().squeeze(1).tolist()) == set(grown), (drop, grow)


def test_equal_scores_by_position() -> None:
    model = nn.Linear(10, 2, bias=False)
    nn.init.constant_(model.weight, 0.5)
    context = MaskContext(model, batches=[(torch.randn(4, 10), torch.tensor([0, 1, 0, 1]))])
    part = torch.zeros(2, 10, dtype=torch.bool)
    part[0, 4:8] = True
    previous = Mask(ParamTable.from_model(model), (part,))
    now = flat_of(update(context, previous, 4, drop="magnitude", grow="magnitude"))
    assert now.nonzero().squeeze(1).tolist() == [0, 1, 6, 7]


def test_random_growth_is_uniform_over_the_dead(context: MaskContext) -> None:
    """Every dead coordinate is grown equally often, over 300 seeds: none is a favourite."""
    model = nn.Linear(10, 4, bias=False)
    part = torch.zeros(4, 10, dtype=torch.bool)
    part[0] = True
    previous = Mask(ParamTable.from_model(model), (part,))
    data = [(torch.randn(4, 10), torch.tensor([0, 1, 2, 3]))]
    grown = torch.zeros(40)
    for seed in range(300):
        now = flat_of(update(MaskContext(model, batches=data, seed=seed), previous, 10, drop="magnitude"))
        grown += now & ~flat_of(previous)
    assert not grown[:10].any()
    expected = 300 * 5 / 30
    chi_square = float(((grown[10:] - expected) ** 2 / expected).sum())
    assert chi_square < 58.3  # 29 degrees of freedom, p = 0.001; draws without replacement make it smaller


def test_deterministic_from_the_seed_and_another_stream_every_update(context: MaskContext) -> None:
    kept = 300
    options = {"drop": "random", "grow": "random"}
    first = update(context, None, kept, **options)
    second = update(context, first, kept, **options)
    torch.manual_seed(99)
    assert update(context, first, kept, **options) == second
    other = replace(context, seed=4)
    assert update(other, first, kept, **options) != second
    # The second update's draw is not the first's: of 150 of 4456 dead ones, hardly any are the same.
    third = update(context, second, kept, **options)
    positions = flat_of(second) & ~flat_of(first), flat_of(third) & ~flat_of(second)
    ranks = [
        set((mask.cumsum(0) - 1)[new].tolist())
        for mask, new in zip((~flat_of(first), ~flat_of(second)), positions, strict=True)
    ]
    assert len(ranks[0] & ranks[1]) < 30


def test_refusals(context: MaskContext) -> None:
    first = update(context, None, 300)
    with pytest.raises(MaskError, match="the previous one keeps 300, the budget 301"):
        update(context, first, 301)
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(MaskError, match="drop_rate must lie between 0 and 1"):
            update(context, first, 300, drop_rate=rate)
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(MaskError, match="progress must lie between 0 and 1"):
            replace(context, progress=progress)
    with pytest.raises(MaskError, match="the previous mask is of another model"):
        replace(context, previous=build_mask("all", MaskContext(nn.Linear(2, 2))))


def test_full_and_empty_budgets_stay(context: MaskContext) -> None:
    for kept in (0, context.table.numel):
        mask = update(context, None, kept)
        assert update(context, mask, kept) == mask


def test_ssam_f_scores_are_those_of_the_paper(context: MaskContext) -> None:
    """Sum over examples of the squared gradient with the true label, whatever gradients lie about in ``.grad``."""
    context = replace(context, batches=[(x[:12], y[:12]) for x, y in context.batches[:1]])
    model = context.model
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)  # the published code adds it to the first example's
    twin = context.scoring_model()
    params = context.table.tensors(twin)
    total = [torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for p in params]
    for x, y in context.batches:
        for xi, yi in zip(x, y, strict=True):
            loss = nn.functional.cross_entropy(twin(xi[None]), yi[None])
            for t, g in zip(total, torch.autograd.grad(loss, params), strict=True):
                t += g.double() ** 2
    flat = torch.cat([t.reshape(-1) for t in total])
    expected = set(flat.argsort(descending=True)[:50].tolist())
    mask = build_mask("fisher", context, Budget(50, context.table.numel))
    assert set(flat_of(mask).nonzero().squeeze(1).tolist()) == expected
    assert flat.sort(descending=True).values[49:51].diff().abs() > 1e-6 * flat.max()  # no near tie decides it
