"""Mixed precision: bfloat16 autocast, and float16 with a GradScaler and infinities in any pass."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler

from masks import InputError, Mask, ParamTable
from sam import SAM, Accumulated, Ascent, Method, Metric, Rule, build_method
from tests.sam.nets import (
    BASES,
    ENTRIES,
    Recorder,
    batches,
    build,
    gradients,
    losses,
    make,
    mixed_mask,
    same_bits,
    snapshot,
    state_of,
)


class CountedScaler(GradScaler):
    updates = 0

    def update(self, new_scale=None):
        self.updates += 1
        super().update(new_scale)


def scaler_of(scale=2.0**10, **options):
    return CountedScaler("cpu", init_scale=scale, **{"growth_interval": 1000, **options})


def take(optimizer, loss_fn, batch, entry, scaler=None):
    """One step through either entry; the closure scales its loss, as it would without SAM."""
    if entry == "step_on":
        return optimizer.step_on(loss_fn, batch)

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(batch).mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return optimizer.step(closure)


def sam_of(model, base="sgd", mask=None, **options):
    return SAM(BASES[base](model.parameters()), model, mask=mask or mixed_mask(model), **{"rho": 0.2, **options})


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        g.view(-1)[0] = ctx.value
        return g, None


class Poisoned:
    """A loss whose gradient has one bad entry in the given passes, counted from 1."""

    def __init__(self, model, passes, value):
        self.model, self.passes, self.value, self.calls = model, passes, value, 0

    def __call__(self, batch):
        self.calls += 1
        out = self.model(batch[0])
        out = _Poison.apply(out, self.value) if self.calls in self.passes else out
        return F.cross_entropy(out, batch[1], reduction="none")


# -- bfloat16 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["all", "norm", "random"])
def test_bfloat16_autocast(name, entry):
    """Both passes run in bfloat16 on float32 weights, which come back bit for bit; the second one sees w + eps."""
    model = make("vit")

    def half(batch, net=model):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(net(batch[0]), batch[1], reduction="none")

    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=build(model, name), rho=0.5)
    recorder = Recorder(model, half)
    before, batch = snapshot(model), batches()[0]
    with torch.autocast("cpu", torch.bfloat16):  # one cache around all that follows
        for _ in range(2):
            take(optimizer, recorder, batch, entry)
            assert same_bits(before, snapshot(model))
            assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
            assert float(optimizer.stats.radius) == pytest.approx(0.5, rel=1e-6)
        found = gradients(model)
        after = half(batch).detach()  # no low-precision copy of w + eps is left
    twin = make("vit")
    assert same_bits(after, half(batch, twin).detach())
    twin.load_state_dict(recorder.weights[-1])
    half(batch, twin).mean().backward()
    assert same_bits(found, gradients(twin))
    losses(twin)(batch).mean().backward()
    assert not same_bits(found, gradients(twin))  # bfloat16 is not float32


# -- a scaler without infinities -----------------------------------------------------------------------------

METHODS = [
    ("sam", {}, ENTRIES),
    ("asam", {}, ENTRIES),
    ("sam", {"p": "inf"}, ENTRIES),
    ("fisher_sam", {}, ENTRIES),
    ("friendly_sam", {}, ENTRIES),
    ("gsam", {}, ENTRIES),
    ("looksam", {"k": 2}, ENTRIES),
    ("wsam", {}, ENTRIES),
    ("momentum_sam", {}, ENTRIES),
    ("micro_batch_sam", {"parts": 3}, ("step_on",)),
    ("esam", {}, ("step_on",)),
    ("exact_sam", {"steps": 2, "backpropagate": False}, ENTRIES),
    ("universal_sam", {}, ENTRIES),
]


@pytest.mark.parametrize("scale", [2.0**12, 1000.0])
@pytest.mark.parametrize(("name", "options", "entries"), METHODS)
def test_methods_see_unscaled_gradients(name, options, entries, scale):
    """Steps are those without a scaler: bit for bit for powers of two, else to rounding."""
    for entry, net in itertools.product(entries, ("resnet", "vit")):
        found = []
        for scaler in (None, scaler_of(scale)):
            model = make(net, dropout=0.2)
            optimizer = sam_of(model, method=build_method(name, **options), scaler=scaler)
            torch.manual_seed(5)
            for batch in batches(4):
                take(optimizer, losses(model), batch, entry, scaler)
            found.append((snapshot(model), state_of(optimizer), optimizer.memory.state_dict(), optimizer.stats.radius))
            if scaler is not None:
                assert scaler.updates == 4
                assert scaler.get_scale() == scale
        if scale == 2.0**12:
            assert same_bits(found[0], found[1]), entry
        else:
            assert not same_bits(found[0][0], found[1][0])
            for a, b in zip(found[0][0].values(), found[1][0].values(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@dataclass(frozen=True)
class Seen(Metric):
    """T = 1, and a note of the gradient that the rule was given."""

    gradients: tuple[list, ...] = ([],)

    def scale(self, row, param, weights, gradient=None):
        self.gradients[0].append((row.name, gradient.clone()))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_metric_of_the_gradient_is_given_the_unscaled_one(entry):
    model, scaler = make("vit"), scaler_of(2.0**14)
    metric = Seen(([],))
    mask = build(model, "norm")
    take(sam_of(model, mask=mask, rule=Rule(metric), scaler=scaler), losses(model), batches()[0], entry, scaler)
    twin = make("vit")
    losses(twin)(batches()[0]).mean().backward()
    expected = gradients(twin)
    assert len(metric.gradients[0]) == mask.num_tensors
    assert all(same_bits(g, expected[name]) for name, g in metric.gradients[0])


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_disabled_scaler_is_none(entry):
    found = []
    for scaler in (None, GradScaler("cpu", enabled=False)):
        model = make("vit")
        optimizer = sam_of(model, scaler=scaler)
        take(optimizer, losses(model), batches()[0], entry, scaler)
        found.append(snapshot(model))
    assert same_bits(found[0], found[1])


def test_an_empty_mask_and_clipping_see_unscaled_gradients():
    found = []
    for scaler in (None, scaler_of(2.0**12)):
        model = make("vit")
        optimizer = sam_of(model, mask=build(model, "none"), scaler=scaler, clip_grad_norm=0.1)
        for batch in batches(3):
            optimizer.step_on(losses(model), batch)
        found.append((snapshot(model), gradients(model)))
    assert same_bits(found[0], found[1])


def test_accumulated_batches_see_unscaled_gradients():
    found = []
    for scaler in (None, scaler_of(2.0**12)):
        model = make("vit")
        optimizer = sam_of(model, scaler=scaler)
        for _ in range(2):
            optimizer.step_on(losses(model), Accumulated([*batches(2), *batches(1, 3)]))
        found.append((snapshot(model), gradients(model), optimizer.stats.loss))
        assert scaler is None or scaler.updates == 2
    assert same_bits(found[0], found[1])


# -- infinities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("bad", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("base", ["sgd", "sgd_fused", "adamw", "adamw_fused"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_an_infinity_in_any_pass_skips_the_step_and_halves_the_scale_once(entry, base, bad, value):
    model, twin = make("vit"), make("vit")
    scaler, other = scaler_of(1024.0), scaler_of(512.0)
    optimizer, reference = sam_of(model, base, scaler=scaler), sam_of(twin, base, scaler=other)
    data = batches(3)
    take(optimizer, losses(model), data[0], entry, scaler)
    take(reference, losses(twin), data[0], entry, other)
    before = snapshot(model), state_of(optimizer)
    poisoned = Poisoned(model, bad, value)
    take(optimizer, poisoned, data[1], entry, scaler)
    assert poisoned.calls == 2
    assert same_bits((snapshot(model), state_of(optimizer)), before)
    assert (scaler.updates, scaler.get_scale(), int(optimizer.skipped_steps)) == (2, 512.0, 1)
    assert not bool(optimizer.stats.finite)
    take(optimizer, losses(model), data[2], entry, scaler)
    take(reference, losses(twin), data[2], entry, other)
    assert same_bits((snapshot(model), state_of(optimizer)), (snapshot(twin), state_of(reference)))
    assert (scaler.updates, scaler.get_scale(), int(optimizer.skipped_steps)) == (3, 512.0, 1)


@pytest.mark.parametrize("bad", [1, 2, 5, 6])
def test_an_infinity_in_one_of_several_parts(bad):
    """Three micro-batches, two passes each, and one update."""
    model, scaler = make("vit"), scaler_of()
    optimizer = sam_of(model, method=build_method("micro_batch_sam", parts=3), scaler=scaler)
    before = snapshot(model)
    optimizer.step_on(Poisoned(model, {bad}, math.inf), batches(1, 9)[0])
    assert same_bits(before, snapshot(model))
    assert (scaler.updates, scaler.get_scale(), int(optimizer.skipped_steps)) == (1, 2.0**9, 1)


def test_the_scale_grows_after_enough_steps_without_infinities():
    model, scaler = make("vit"), scaler_of(8.0, growth_interval=2)
    optimizer = sam_of(model, scaler=scaler)
    scales = []
    for bad in ((), (), (2,), (), (), ()):
        optimizer.step_on(Poisoned(model, bad, math.inf), batches()[0])
        scales.append(scaler.get_scale())
    assert scales == [8.0, 16.0, 8.0, 8.0, 16.0, 16.0]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(108, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.two(torch.relu(self.norm(self.one(x.flatten(1)))))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["all", "norm"])
def test_float16_training_from_a_scale_that_overflows(name, entry):
    """Real float16 autocast: the first steps overflow and are skipped, then it learns."""
    torch.manual_seed(0)
    model, scaler = Mlp(), scaler_of(2.0**26)
    table = ParamTable.from_model(model)
    mask = Mask(table, tuple(name == "all" or row.is_norm for row in table))
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1, 0.9), model, mask=mask, rho=0.1, scaler=scaler)

    def half(batch):
        with torch.autocast("cpu", torch.float16):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    batch, first = batches(1, 16)[0], None
    for _ in range(30):
        before = snapshot(model)
        loss = take(optimizer, half, batch, entry, scaler).item()
        first = first or loss
        assert same_bits(before, snapshot(model)) != bool(optimizer.stats.finite)
        if bool(optimizer.stats.finite):
            assert float(optimizer.stats.radius) == pytest.approx(0.1, rel=1e-3)
    skipped = int(optimizer.skipped_steps)
    assert 1 <= skipped <= 20
    assert scaler.get_scale() == 2.0 ** (26 - skipped)
    assert scaler.updates == 30
    assert loss < 0.3 * first
    assert all(p.dtype == torch.float32 for p in model.parameters())


# -- the rest ------------------------------------------------------------------------------------------------


def test_resume_with_the_scalers_own_state():
    """Which the user saves, as without SAM."""

    def start():
        model, scaler = make("vit"), scaler_of(64.0, growth_interval=3)
        return model, scaler, sam_of(model, scaler=scaler)

    data = batches(5)
    model, scaler, optimizer = start()
    for batch in data[:2]:
        optimizer.step_on(losses(model), batch)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), scaler.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    other, its_scaler, resumed = start()
    for part, state in zip((other, its_scaler, resumed), torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    for batch in data[2:]:
        optimizer.step_on(losses(model), batch)
        resumed.step_on(losses(other), batch)
    assert same_bits((snapshot(model), state_of(optimizer)), (snapshot(other), state_of(resumed)))
    assert scaler.get_scale() == its_scaler.get_scale() == 128.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaler": 1024.0}, "scaler must be a torch.amp.GradScaler, got float"),
        ({"scaler": scaler_of(), "on_nonfinite": "raise"}, 'on_nonfinite="raise" with a scaler'),
    ],
)
def test_refused_settings(options, message):
    model = make("vit")
    with pytest.raises(InputError, match=message):
        sam_of(model, **options)


def test_refused_models_and_methods():
    model = make("vit").half()
    with pytest.raises(InputError, match="some parameters are float16"):
        sam_of(model, scaler=scaler_of())
    model = make("vit")

    @dataclass(frozen=True)
    class Second(Ascent):
        batch = True

        def __call__(self, step, passes):
            with passes.graph(step.first_region):
                raise AssertionError("not reached")

    with pytest.raises(InputError, match="second derivative, which goes with neither a GradScaler"):
        sam_of(model, method=build_method("exact_sam"), scaler=scaler_of())
    optimizer = sam_of(model, method=Method(ascent=Second()), scaler=scaler_of())
    before = snapshot(model)
    with pytest.raises(InputError, match="second derivative, which goes with neither a GradScaler"):
        optimizer.step_on(losses(model), batches()[0])
    assert same_bits(before, snapshot(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_scaled_step_never_waits_for_the_device(entry):
    """With a fused base optimizer, from its second step on."""
    model, scaler = make("vit").cuda(), GradScaler("cuda")
    optimizer = sam_of(model, "adamw_fused", mixed_mask(make("vit")), scaler=scaler, clip_grad_norm=1.0)
    data = tuple(t.cuda() for t in batches()[0])
    take(optimizer, losses(model), data, entry, scaler)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            take(optimizer, losses(model), data, entry, scaler)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped_steps == 0
