"""What a method remembers: across memory layouts, masks, skipped steps, damaged files, and on an accelerator."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sam.memory
from masks import InputError, Mask, ParamTable
from sam import SAM, build_method
from tests.sam.nets import BASES, ENTRIES, batches, build, losses, make, same_bits, snapshot, take

METHODS = ("friendly_sam", "vasso", "looksam")


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x))).mean((2, 3))


def sparse(model):
    """Six coordinates in a hundred: the index form."""
    generator = torch.Generator().manual_seed(1)
    table = ParamTable.from_model(model)
    return Mask(table, tuple(len(r.shape) == 4 and torch.rand(r.shape, generator=generator) < 0.06 for r in table))


def start(name, layout=torch.contiguous_format, **options):
    torch.manual_seed(0)
    model = Convolutions().double().to(memory_format=layout)
    base = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return model, SAM(base, model, mask=sparse(model), rho=0.5, method=build_method(name), **options)


def run(model, optimizer, steps):
    for batch in batches(8, dtype=torch.float64)[steps]:
        optimizer.step_on(losses(model), batch)


def expect(model, name):
    other, optimizer = start(name)
    run(other, optimizer, slice(8))
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_a_new_memory_layout_changes_nothing(name):
    """The closed comparison: a run that stays in one layout. Permuted averages would be off by about 1e-3."""
    model, optimizer = start(name)
    run(model, optimizer, slice(4))
    model.to(memory_format=torch.channels_last)
    run(model, optimizer, slice(4, 8))
    assert optimizer.memory.resets == 0
    expect(model, name)


@pytest.mark.parametrize("there", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("here", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", METHODS)
def test_a_resume_in_another_memory_layout(name, there, here):
    model, optimizer = start(name, there)
    run(model, optimizer, slice(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer = start(name, here)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(model, optimizer, slice(4, 8))
    expect(model, name)


@pytest.mark.parametrize(
    ("name", "scope", "kept"),
    [
        ("friendly_sam", "masked", False),
        ("vasso", "masked", False),
        ("vasso", "full", True),
        ("looksam", "masked", True),
    ],
)
def test_a_new_mask_drops_what_belongs_to_the_old_one_only(name, scope, kept):
    model, optimizer = start(name, norm_scope=scope)
    run(model, optimizer, slice(2))
    before = optimizer.memory.state_dict()["tensors"]
    optimizer.set_mask(Mask(optimizer.mask.table, (False,) * len(optimizer.mask.table)))
    optimizer.set_mask(build(model, "all"))
    assert same_bits(optimizer.memory.state_dict()["tensors"], before if kept else {})
    assert optimizer.memory.resets == (0 if kept else 1)
    run(model, optimizer, slice(2, 4))


# -- skipped and broken steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_first_step_that_is_skipped_starts_nothing(name, asynchronous, monkeypatch):
    """On an accelerator nothing is read: emulated here."""
    monkeypatch.setattr(sam.memory, "readable", lambda value: not asynchronous)
    found = []
    for bad in (True, False):
        model, optimizer = start(name)
        if bad:
            optimizer.step_on(
                lambda batch, model=model: losses(model)(batch) * math.inf, batches(dtype=torch.float64)[0]
            )
            assert optimizer.skipped_steps == 1
            assert optimizer.memory.state_dict()["tensors"] == {}
            optimizer.memory.steps = 0
        run(model, optimizer, slice(3))
        found.append((snapshot(model), optimizer.memory.state_dict()["tensors"]))
    assert same_bits(found[0], found[1])


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("name", ["friendly_sam", "vasso"])
def test_a_step_that_was_not_taken_is_not_remembered(name, bad, asynchronous, monkeypatch):
    """Not finite in either pass; or an exception in the second, after which the pass of a next step counts alone."""
    monkeypatch.setattr(sam.memory, "readable", lambda value: not asynchronous)
    model, optimizer = start(name)
    run(model, optimizer, slice(2))
    kept = copy.deepcopy(optimizer.memory.state_dict()["tensors"])
    calls = []

    def poisoned(batch):
        calls.append(batch)
        return losses(model)(batch) * (math.nan if len(calls) == bad else 1.0)

    optimizer.step_on(poisoned, batches(dtype=torch.float64)[0])
    assert optimizer.skipped_steps == 1
    assert same_bits(optimizer.memory.state_dict()["tensors"], kept)

    def raising(batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyError("broken")
        return losses(model)(batch)

    with pytest.raises(KeyError):
        optimizer.step_on(raising, batches(dtype=torch.float64)[0])
    optimizer.enabled = False
    run(model, optimizer, slice(2, 3))
    assert same_bits(optimizer.memory.state_dict()["tensors"], kept)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("statistics", ["first", "second", "both"])
@pytest.mark.parametrize("name", ["norm", "none"])
def test_running_statistics_of_a_skipped_step(name, statistics, on_nonfinite, entry):
    model = make("resnet")
    options = {"norm_statistics": statistics, "on_nonfinite": on_nonfinite}
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, name), **options)
    (x, y), other = batches(2)
    take(optimizer, losses(model), (x, y), entry)
    before = {key: b.clone() for key, b in model.named_buffers()}
    bad = x.clone()
    bad[0, 0] = math.nan
    if on_nonfinite == "raise":
        with pytest.raises(ArithmeticError):
            take(optimizer, losses(model), (bad, y), entry)
    else:
        take(optimizer, losses(model), (bad, y), entry)
        assert optimizer.skipped_steps == 1
    assert same_bits(dict(model.named_buffers()), before)
    take(optimizer, losses(model), other, entry)
    assert not same_bits(dict(model.named_buffers()), before)
    assert torch.isfinite(model.bn1.running_mean).all()


# -- damaged states --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m["tensors"]["mean_gradient"].pop(), "mean_gradient does not fit: 1 tensors, 2 needed"),
        (lambda m: m["tensors"]["mean_gradient"].reverse(), "another shape is number 0"),
        (lambda m: m["tensors"].update(mean_gradient=3), "must be a list of tensors"),
        (lambda m: m["coordinates"].update(mean_gradient="some"), "unknown coordinates of the method state 'some'"),
        (lambda m: m["coordinates"].clear(), "names other tensors than it holds"),
        (lambda m: m.pop("replica"), "needs the keys coordinates, generator, replica"),
        (lambda m: m.update(replica=[1, 2]), "is of rank 1 of 2, and this is no replica"),
    ],
)
def test_damaged_states_are_refused_and_change_nothing(damage, message):
    model, optimizer = start("friendly_sam")
    run(model, optimizer, slice(2))
    state = copy.deepcopy(optimizer.state_dict())
    damage(state["memory"])
    model, optimizer = start("friendly_sam")
    run(model, optimizer, slice(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(state)
    assert same_bits(optimizer.state_dict(), before)


def test_a_setting_that_decides_along_what_is_ascended():
    _, optimizer = start("sam")
    _, other = start("sam", ascent_gradient="synchronised")
    with pytest.raises(InputError, match="made with ascent_gradient=synchronised, not replica"):
        optimizer.load_state_dict(other.state_dict())


def test_examples_are_chosen_only_from_batches_with_one_entry_per_loss():
    model = make("resnet")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "all"), method=build_method("esam"))
    x, y = batches()[0]

    def loss_fn(batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(InputError, match=r"found lengths \[8, 10\]"):
        optimizer.step_on(loss_fn, (x, y, torch.arange(10)))
    with pytest.raises(InputError, match="the batch has 8 entries and loss_fn gave 7 losses"):
        optimizer.step_on(lambda batch: loss_fn(batch)[1:], (x, y))
