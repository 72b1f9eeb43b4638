"""Short runs that the tests of single methods share: bitwise comparisons, resuming, what moves, counts of passes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from masks import Mask, ParamTable
from sam import SAM, Method, MethodSpec
from sam.step import StepStats
from tests.sam.nets import (
    BASES,
    Batch,
    Recorder,
    batches,
    buffers,
    build,
    losses,
    make,
    mixed_mask,
    same_bits,
    snapshot,
    state_of,
    take,
)

MASKS = ("all", "norm", "mixed")
CASES = list(itertools.product(("resnet", "vit"), MASKS, ("sgd", "adamw")))
"""Net, mask and base optimizer of :func:`start`."""


def mask_of(model: nn.Module, name: str) -> Mask:
    return mixed_mask(model) if name == "mixed" else build(model, name)


def start(net: str, mask: str, base: str, method: Method | None, **options) -> tuple[nn.Module, SAM]:
    """A model with dropout (and BatchNorm: "resnet"), and SAM around a base optimizer with momentum."""
    model = make(net, dropout=0.2)
    return model, SAM(BASES[base](model.parameters()), model, mask=mask_of(model, mask), method=method, **options)


def go(model: nn.Module, optimizer: SAM, data: Sequence[Batch], entry: str = "step_on") -> list[Tensor]:
    return [take(optimizer, losses(model), batch, entry).detach() for batch in data]


def everything(model: nn.Module, optimizer: SAM) -> tuple:
    return snapshot(model), buffers(model), state_of(optimizer), torch.get_rng_state()


def trained(
    net: str, mask: str, base: str, method: Method | None, entry: str = "step_on", **options
) -> tuple[tuple, list[StepStats]]:
    """Weights, running statistics, the base's state, the random generator and the losses of four steps; and their
    statistics."""
    model, optimizer = start(net, mask, base, method, **options)
    torch.manual_seed(5)
    seen, stats = [], []
    for batch in batches(4):
        seen += go(model, optimizer, [batch], entry)
        stats.append(optimizer.stats)
    return (*everything(model, optimizer), seen), stats


def outcome(net: str, mask: str, base: str, method: Method | None, entry: str = "step_on", **options) -> tuple:
    """What :func:`trained` leaves behind, without the statistics of its steps."""
    return trained(net, mask, base, method, entry, **options)[0]


def assert_same_training(a: Method, b: Method, net: str, mask: str, base: str) -> None:
    """No bit of what is left behind differs, and no loss at w or w + eps."""
    (one, stats), (other, others) = (trained(net, mask, base, method, rho=0.3) for method in (a, b))
    assert same_bits(one, other)
    assert same_bits(*([(s.loss, s.perturbed_loss) for s in found] for found in (stats, others)))
    # A rule's radius is that of eps before it was rounded.
    assert [float(s.radius) for s in stats] == pytest.approx([float(s.radius) for s in others], rel=3e-7)


def resumed_and_uninterrupted(net: str, mask: str, base: str, method: Method, **options) -> tuple[list, list]:
    data = batches(6)
    model, optimizer = start(net, mask, base, method, **options)
    torch.manual_seed(5)
    go(model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()), file)
    file.seek(0)
    go(model, optimizer, data[3:])
    end = [*everything(model, optimizer), optimizer.memory.state_dict()]

    weights, state, rng = torch.load(file, weights_only=True)
    model, optimizer = start(net, mask, base, method, **options)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    torch.set_rng_state(rng)
    go(model, optimizer, data[3:])
    return [*everything(model, optimizer), optimizer.memory.state_dict()], end


def check_moves(net: str, mask: str, base: str, method: Method, **options) -> None:
    """No coordinate outside the mask is moved in any pass, some inside are, and all come back bit for bit."""
    model, optimizer = start(net, mask, base, method, **options)
    go(model, optimizer, batches(2))  # what the method remembers
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = snapshot(model)
    recorder = Recorder(model)
    take(optimizer, recorder, batches(3)[2], "step_on")
    assert same_bits(snapshot(model), before)
    keep = dict(zip((row.name for row in ParamTable.from_model(model)), optimizer.mask.dense(), strict=True))
    moved = {name: recorder.weights[-1][name] != w for name, w in before.items()}
    assert not any((moved[name] & ~keep[name]).any() for name in moved)
    assert any(m.any() for m in moved.values())


def passes(method: Method, entry: str = "step_on", *, steps: int = 3, size: int = 12) -> tuple[float, float]:
    """Forward and backward passes over the whole batch per step; one over a part of it counts that part."""
    model, optimizer = start("resnet", "all", "sgd", method)
    forward, backward = [], []

    def loss_fn(batch: Batch) -> Tensor:
        values = losses(model)(batch)
        forward.append(len(values))
        if values.requires_grad:
            values.register_hook(lambda _: backward.append(len(values)))
        return values

    for batch in batches(steps, size=size):
        take(optimizer, loss_fn, batch, entry)
    return sum(forward) / size / steps, sum(backward) / size / steps


def assert_passes_as_stated(spec: str, *, steps: int) -> None:
    """A forward pass alone counts a third of one with its backward pass."""
    parsed = MethodSpec.parse(spec)
    forward, backward = passes(parsed.build(), steps=steps)
    assert (forward + 2 * backward) / 3 == pytest.approx(parsed.info.num_passes(**parsed.options))
