"""Running statistics: frozen bit for bit, and re-estimated as averages by hand."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from masks import MaskError, register_norm_type
from masks.norm_stats import frozen_statistics, reestimated_copy, statistics


def every_kind() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, momentum=None),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.GroupNorm(2, 4),
        nn.Dropout(0.5),
    )


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 3, 4, 5, generator=generator) * (i + 1) + i for i in range(3)]


def test_statistics_lists_the_buffers_of_normalization_layers() -> None:
    model = every_kind()
    model.register_buffer("mine", torch.zeros(1))
    found = statistics(model)
    assert len(found) == 9  # mean, variance and count of three layers
    assert {id(b) for b in found} == {id(b) for name, b in model.named_buffers() if name != "mine"}


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("poison", [1.0, float("nan"), float("inf")])
def test_frozen_statistics_come_back_bit_for_bit(batches: list[Tensor], poison: float, failing: bool) -> None:
    torch.manual_seed(0)
    model = every_kind().train()
    model(batches[0])  # so that they are no longer those of a new layer
    buffers = statistics(model)
    before = [b.clone() for b in buffers]
    pointers = [b.data_ptr() for b in buffers]
    error = None
    try:
        with frozen_statistics(buffers):
            model(batches[1] * poison)
            # All but the count of batches of InstanceNorm, which torch never touches.
            assert sum(not torch.equal(a, b) for a, b in zip(buffers, before, strict=True)) == 8
            if failing:
                raise KeyError("inside")
    except KeyError as raised:
        error = raised
    assert (error is not None) == failing
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))
    assert [b.data_ptr() for b in statistics(model)] == pointers
    # A cumulative average goes on as if nothing had been in between.
    assert [int(m.num_batches_tracked) for m in (model[1], model[2])] == [1, 1]


def test_frozen_statistics_of_a_model_without_any() -> None:
    with frozen_statistics([]):
        pass
    with pytest.raises(KeyError), frozen_statistics([]):
        raise KeyError


def by_hand(values: list[Tensor], dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Averages over batches of the mean and the unbiased variance over ``dims``."""
    means = torch.stack([v.mean(dims) for v in values])
    variances = torch.stack([v.var(dims, unbiased=True) for v in values])
    return means.mean(0), variances.mean(0)


def test_reestimated_batch_norm(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.BatchNorm2d(5, momentum=None)
    ).double()
    inputs = [b.double() for b in batches]
    model.train()(inputs[2] * 7)  # stale statistics must not count
    twin = reestimated_copy(model, inputs)

    first = [model[0](x) for x in inputs]
    mean, variance = by_hand(first, (0, 2, 3))
    torch.testing.assert_close(twin[1].running_mean, mean)
    torch.testing.assert_close(twin[1].running_var, variance)
    # The second layer sees what the first makes of each batch with that batch's own statistics.
    second = [
        functional.relu(model[2](functional.batch_norm(h, None, None, model[1].weight, model[1].bias, training=True)))
        for h in first
    ]
    mean, variance = by_hand(second, (0, 2, 3))
    torch.testing.assert_close(twin[4].running_mean, mean)
    torch.testing.assert_close(twin[4].running_var, variance)
    assert int(twin[1].num_batches_tracked) == 3
    assert (twin[1].momentum, twin[4].momentum) == (0.1, None)
    assert not any(module.training for module in twin.modules())


def test_reestimated_instance_norm(batches: list[Tensor]) -> None:
    model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True, momentum=0.3)).double()
    inputs = [b.double() for b in batches]
    twin = reestimated_copy(model, inputs)
    means = torch.stack([x.mean((2, 3)).mean(0) for x in inputs]).mean(0)
    variances = torch.stack([x.var((2, 3), unbiased=True).mean(0) for x in inputs]).mean(0)
    torch.testing.assert_close(twin[0].running_mean, means)
    torch.testing.assert_close(twin[0].running_var, variances)
    assert twin[0].momentum == 0.3


def test_reestimation_weighs_batches_equally() -> None:
    x, y = torch.randn(10, 3), torch.randn(2, 3)
    twin = reestimated_copy(nn.Sequential(nn.BatchNorm1d(3)), [x, y])
    torch.testing.assert_close(twin[0].running_mean, (x.mean(0) + y.mean(0)) / 2)
    torch.testing.assert_close(twin[0].running_var, (x.var(0) + y.var(0)) / 2)


@pytest.mark.parametrize("training", [True, False])
def test_reestimation_leaves_the_model_alone(batches: list[Tensor], training: bool) -> None:
    torch.manual_seed(0)
    model = every_kind().train(training)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[5].weight.grad = torch.ones(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    twin = reestimated_copy(model, batches)
    assert torch.equal(torch.get_rng_state(), rng)  # dropout drew nothing
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[5].weight.grad, torch.ones(4))
    assert [m.momentum for m in (model[1], model[2], model[3])] == [0.1, None, 0.1]

    shared = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    assert not shared & {t.data_ptr() for t in [*twin.parameters(), *twin.buffers()]}
    assert all(p.grad is None for p in twin.parameters())
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_model_without_running_statistics_needs_no_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).train()
    twin = reestimated_copy(model, [])
    assert not twin.training
    assert model.training


def test_no_batch_and_a_single_example_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(MaskError, match="at least one batch"):
        reestimated_copy(model, [])
    with pytest.raises(MaskError, match=r"on a batch of shape \(1, 3\).*more than 1 value"):
        reestimated_copy(model, [torch.randn(4, 3), torch.randn(1, 3)])


@pytest.mark.usefixtures("clean_norm_types")
def test_running_statistics_that_cannot_be_reset_are_refused() -> None:
    @register_norm_type
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.running_mean

    with pytest.raises(MaskError, match=r"statistics of 1 \(Mine\) cannot be re-estimated"):
        reestimated_copy(nn.Sequential(nn.Linear(3, 3), Mine()), [torch.randn(4, 3)])


def test_model_that_cannot_be_copied_is_refused() -> None:
    locked = nn.Linear(3, 3)
    locked.lock = threading.Lock()
    with pytest.raises(MaskError, match=r"cannot be copied for scoring.*lock"):
        reestimated_copy(locked, [torch.randn(4, 3)])
    graph = nn.Linear(3, 3)
    graph.cache = graph.weight * 2
    with pytest.raises(MaskError, match="cannot be copied for scoring"):
        reestimated_copy(graph, [torch.randn(4, 3)])
