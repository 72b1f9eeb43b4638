"""Gradient accumulation: one step over micro-batches is the step on the whole batch."""

from __future__ import annotations

import copy
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F

from masks import InputError
from sam import SAM, Accumulated, build_method
from tests.sam.nets import (
    BASES,
    ENTRIES,
    Quadratic,
    Recorder,
    batches,
    buffers,
    build,
    gradients,
    losses,
    make,
    mixed_mask,
    quadratic_masks,
    same_bits,
    snapshot,
    state_of,
)

SPLITS = {"even": (4, 4, 4), "uneven": (5, 1, 6), "one": (12,), "single examples": (1,) * 12}


def parts_of(batch, sizes):
    return [tuple(part) for part in zip(*(t.split(list(sizes)) for t in batch), strict=True)]


def accumulating_closure(optimizer, loss_fn, parts):
    """What users of `step` write: each mean loss times its share."""
    examples = sum(len(part[1]) for part in parts)

    def run():
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            loss = loss_fn(part).mean() * (len(part[1]) / examples)
            loss.backward()
            total += loss.detach()
        return total

    return run


def take(optimizer, loss_fn, parts, entry):
    if entry == "step_on":
        return optimizer.step_on(loss_fn, Accumulated(parts))
    return optimizer.step(accumulating_closure(optimizer, loss_fn, parts))


METHODS = [
    ("sam", {}),
    ("asam", {}),
    ("sam", {"p": "inf"}),
    ("fisher_sam", {}),
    ("friendly_sam", {}),
    ("gsam", {}),
    ("looksam", {"k": 2}),
    ("momentum_sam", {}),
    ("exact_sam", {"steps": 2, "backpropagate": False}),
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("name", "options", "split"),
    [("sam", {}, split) for split in SPLITS] + [(*method, "uneven") for method in METHODS[1:]],
)
def test_it_is_the_step_on_the_whole_batch(name, options, split, entry):
    """To rounding, in float64, on a net whose examples do not see each other; three steps under two masks."""
    for mask in ("norm", "mixed"):
        found = []
        for accumulated in (False, True):
            model = make("vit").double()
            chosen = mixed_mask(model) if mask == "mixed" else build(make("vit"), mask)
            method = build_method(name, **options)
            optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=chosen, rho=0.2, method=method)
            seen = []
            for batch in batches(3, size=12, dtype=torch.float64):
                if accumulated:
                    loss = take(optimizer, losses(model), parts_of(batch, SPLITS[split]), entry)
                else:
                    loss = optimizer.step_on(losses(model), batch)
                seen += [loss.detach(), optimizer.stats.perturbed_loss, optimizer.stats.radius]
            found.append((seen, list(snapshot(model).values()), list(gradients(model).values())))
        for a, b in zip(*found, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_weights_are_by_number_of_examples():
    """On a quadratic, where one micro-batch has four times the examples of the other; closed form."""
    model = Quadratic()
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1), model, mask=quadratic_masks(model)["all"], rho=0.3)
    w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    parts = [model.b[:1], model.b[1:]]
    optimizer.step_on(model, Accumulated(parts))
    g = model.A @ w - model.b.mean(0)
    final = model.A @ (w + 0.3 * g / g.norm()) - model.b.mean(0)
    got = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(got, final, rtol=1e-12, atol=1e-13)
    # It is not the mean of the micro-batches' own steps, which is another method.
    own = [model.A @ w - part.mean(0) for part in parts]
    ends = [model.A @ (w + 0.3 * h / h.norm()) - part.mean(0) for h, part in zip(own, parts, strict=True)]
    assert float((got - (ends[0] + 4 * ends[1]) / 5).norm()) > 1e-3


@pytest.mark.parametrize("net", ["resnet", "vit"])
@pytest.mark.parametrize("mask", ["norm", "mixed", "none"])
def test_one_micro_batch_is_the_batch(net, mask):
    """Bit for bit, with dropout and BatchNorm."""
    found = []
    for wrap in (lambda batch: batch, lambda batch: Accumulated([batch])):
        model = make(net, dropout=0.3)
        chosen = mixed_mask(model) if mask == "mixed" else build(model, mask)
        optimizer = SAM(BASES["adamw"](model.parameters()), model, mask=chosen, rho=0.2)
        torch.manual_seed(3)
        seen = [optimizer.step_on(losses(model), wrap(batch)) for batch in batches(3)]
        found.append((seen, snapshot(model), buffers(model), state_of(optimizer), torch.get_rng_state()))
    assert same_bits(found[0], found[1])


@pytest.mark.parametrize("net", ["resnet", "vit"])
@pytest.mark.parametrize("mask", ["norm", "mixed", "none"])
def test_both_entries_agree(net, mask):
    """With dropout and BatchNorm: weights to rounding, running statistics and random stream bit for bit."""
    found = []
    for entry in ENTRIES:
        model = make(net, dropout=0.3).double()
        chosen = mixed_mask(model) if mask == "mixed" else build(make(net), mask)
        optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=chosen, rho=0.2)
        torch.manual_seed(3)
        take(optimizer, losses(model), batches(2, dtype=torch.float64), entry)
        found.append((snapshot(model), buffers(model), torch.get_rng_state()))
    for a, b in zip(found[0][0].values(), found[1][0].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert same_bits(found[0][1:], found[1][1:])


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_micro_batch_replays_its_own_dropout(entry):
    model = make("vit", dropout=0.4)
    recorder = Recorder(model)
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), rho=0.0)
    torch.manual_seed(1)
    take(optimizer, recorder, batches(3), entry)
    assert same_bits(recorder.drawn[:3], recorder.drawn[3:])
    assert not any(same_bits(a, b) for a, b in itertools.combinations(recorder.drawn[:3], 2))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for batch in batches(3):
        losses(make("vit", dropout=0.4))(batch)
    assert torch.equal(after, torch.get_rng_state())  # the stream stands where one pass leaves it


@pytest.mark.parametrize("policy", ["first", "second", "both"])
def test_running_statistics_follow_the_policy_per_micro_batch(policy):
    model = make("resnet")
    recorder = Recorder(model)
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "all"), rho=0.5, norm_statistics=policy)
    data, twin = batches(2), copy.deepcopy(model)
    optimizer.step_on(recorder, Accumulated(data))
    assert len(recorder.weights) == 4
    passes = {"first": (0, 1), "second": (2, 3), "both": (0, 1, 2, 3)}[policy]
    for i in passes:
        twin.load_state_dict(recorder.weights[i], strict=False)
        twin(data[i % 2][0])
    assert same_bits(buffers(twin), buffers(model))


class _Saves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alive):
        kept = x.detach().clone()
        ctx.save_for_backward(kept)
        alive.append(weakref.ref(kept))
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        (_,) = ctx.saved_tensors
        return g, None


@pytest.mark.parametrize("mask", ["norm", "all"])
def test_one_graph_at_a_time(mask):
    """What the graph of a micro-batch saved is gone when the next one's is built; and restricted passes are."""
    model, graphs, alive = make("vit"), [], []
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, mask), rho=0.2)

    def loss_fn(batch):
        alive.append(sum(graph() is not None for graph in graphs))
        return F.cross_entropy(_Saves.apply(model(batch[0]), graphs), batch[1], reduction="none")

    optimizer.step_on(loss_fn, Accumulated(batches(4)))
    assert alive == [0] * 8


def test_the_first_pass_is_restricted(monkeypatch):
    model = make("vit")
    mask = build(model, "norm")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=mask)
    asked, real = [], torch.autograd.grad

    def spy(outputs, inputs, *args, **kwargs):
        asked.append(len(list(inputs)))
        return real(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    optimizer.step_on(losses(model), Accumulated(batches(3)))
    assert asked == [mask.num_tensors] * 3


def test_weights_come_back():
    """With lr = 0 bit for bit, also after an exception in the middle of the second pass."""
    model = make("vit")
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mixed_mask(model), rho=0.5)
    recorder, before = Recorder(model), snapshot(model)
    optimizer.step_on(recorder, Accumulated(batches(3)))
    assert same_bits(before, snapshot(model))
    assert all(same_bits(before, w) for w in recorder.weights[:3])
    assert not same_bits(before, recorder.weights[3])
    assert same_bits(recorder.weights[3], recorder.weights[5])

    def failing(batch):
        if len(recorder.weights) == 11:
            raise RuntimeError("no luck")
        return recorder(batch)

    with pytest.raises(RuntimeError, match="no luck"):
        optimizer.step_on(failing, Accumulated(batches(3)))
    assert same_bits(before, snapshot(model))


class Shared(torch.nn.Module):
    """Two parameters that get one and the same gradient tensor from autograd."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(3))

    def forward(self, x):
        return ((self.a + self.b) * x).sum(1)


def test_gradients_that_share_memory():
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(6, 3)
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=build(model, "all"), rho=0.3)
    recorder = Recorder(model, model)
    optimizer.step_on(recorder, Accumulated([x[:2], x[2:]]))
    direction = torch.cat([x.mean(0)] * 2)
    eps = torch.cat(list(recorder.eps(0, -1).values()))
    torch.testing.assert_close(eps, 0.3 * direction / direction.norm(), rtol=1e-4, atol=1e-6)


class Loader:
    """Read anew in every pass; it augments with the default generator."""

    def __init__(self, data, drop_later=False):
        self.data, self.reads, self.drop_later = data, 0, drop_later
        self.given = []

    def __iter__(self):
        self.reads += 1
        for x, y in self.data[: -1 if self.drop_later and self.reads > 1 else None]:
            self.given.append(x + torch.randn_like(x))
            yield self.given[-1], y


def test_an_iterable_is_read_once_per_pass_with_its_random_draws_replayed():
    model = make("vit", dropout=0.2)
    loader = Loader(batches(3))
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), rho=0.2)
    optimizer.step_on(losses(model), Accumulated(loader))
    assert loader.reads == 2
    assert same_bits(loader.given[:3], loader.given[3:])


def test_refusals():
    model = make("vit")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), rho=0.2)
    before = snapshot(model)
    with pytest.raises(InputError, match="an iterator only once; give a list"):
        Accumulated(iter(batches(2)))
    with pytest.raises(InputError, match="sequence of micro-batches, got Tensor"):
        Accumulated(torch.zeros(3))
    for empty in ([], Loader([])):
        with pytest.raises(InputError, match="at least one micro-batch, got none"):
            optimizer.step_on(losses(model), Accumulated(empty))
    with pytest.raises(InputError, match="it gave 24 examples in the first and 16 in a later one"):
        optimizer.step_on(losses(model), Accumulated(Loader(batches(3), drop_later=True)))
    with pytest.raises(InputError, match=r"per-example losses of shape .batch,., got a tensor of shape \(\)"):
        optimizer.step_on(lambda batch: losses(model)(batch).mean(), Accumulated(batches(2)))
    assert same_bits(before, snapshot(model))


@pytest.mark.parametrize("name", ["micro_batch_sam", "esam"])
def test_methods_that_look_into_the_batch_are_refused(name):
    model = make("vit")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), method=build_method(name))
    with pytest.raises(InputError, match="looks into the batch, which Accumulated hides"):
        optimizer.step_on(losses(model), Accumulated(batches(2)))
