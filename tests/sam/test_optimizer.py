"""SAM as an optimizer: base optimizers, schedulers, groups, non-finite gradients, refusals."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from masks import InputError, Mask, ParamTable
from sam import SAM, NonFiniteError, Rule
from tests.sam.nets import (
    BASES,
    ENTRIES,
    Recorder,
    batches,
    buffers,
    build,
    closure,
    gradients,
    losses,
    make,
    mixed_mask,
    same_bits,
    snapshot,
    state_of,
    take,
)


def everything(model, optimizer):
    base = optimizer.base_optimizer if isinstance(optimizer, SAM) else optimizer
    return snapshot(model), buffers(model), state_of(base), torch.get_rng_state()


def plain_run(net, base, data, dropout=0.3):
    """The base optimizer alone."""
    model = make(net, dropout=dropout)
    optimizer = BASES[base](model.parameters())
    torch.manual_seed(9)
    for batch in data:
        closure(optimizer, losses(model), batch)()
        optimizer.step()
    return everything(model, optimizer)


# -- against the base optimizer and an independent SAM -------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_an_empty_mask_or_radius_is_the_base_optimizer(net, base, entry):
    """Bit for bit over five steps, with dropout, BatchNorm and LayerNorm: weights, buffers, state, random stream."""
    data = batches(5)
    expected = plain_run(net, base, data)
    for name, rho in (("none", 0.5), ("all", 0.0), ("mixed", 0.0)):
        model = make(net, dropout=0.3)
        mask = mixed_mask(model) if name == "mixed" else build(model, name)
        optimizer = SAM(BASES[base](model.parameters()), model, mask=mask, rho=rho)
        torch.manual_seed(9)
        for batch in data:
            take(optimizer, losses(model), batch, entry)
        assert same_bits(everything(model, optimizer), expected), name
        assert optimizer.skipped_steps == 0


class PlainSAM:
    """Dense SAM after davda54/sam, written out: perturb everything, second gradient, copy back, step."""

    def __init__(self, params, base, rho, adaptive=False):
        self.params, self.base, self.rho, self.adaptive = list(params), base, rho, adaptive

    def step(self, loss):
        self.base.zero_grad()
        loss().backward()
        with torch.no_grad():
            scaled = [p.grad * p.abs() if self.adaptive else p.grad for p in self.params]
            norm = torch.stack([s.double().square().sum() for s in scaled]).sum().sqrt()
            old = [p.clone() for p in self.params]
            for p, s in zip(self.params, scaled, strict=True):
                p.add_(s * (p.abs() if self.adaptive else 1.0) * (self.rho / norm).to(p.dtype))
        self.base.zero_grad()
        loss().backward()
        with torch.no_grad():
            for p, o in zip(self.params, old, strict=True):
                p.copy_(o)
        self.base.step()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_full_mask_is_plain_sam(dtype, adaptive, base, entry):
    """Against the independent implementation; only the rounding of the norm may differ."""
    data = batches(4, dtype=dtype)
    mine, other = make("resnet").to(dtype), make("resnet").to(dtype)
    rule = Rule.named("elementwise_l2", eta=0.0, bias="adaptive") if adaptive else Rule()
    optimizer = SAM(BASES[base](mine.parameters()), mine, mask=build(make("resnet"), "all"), rho=0.2, rule=rule)
    plain = PlainSAM(other.parameters(), BASES[base](other.parameters()), 0.2, adaptive)
    for batch in data:
        take(optimizer, losses(mine), batch, entry)
        plain.step(lambda batch=batch: losses(other)(batch).mean())
    rel = 1e-12 if dtype == torch.float64 else 1e-6
    for a, b in zip(snapshot(mine).values(), snapshot(other).values(), strict=True):
        assert float((a - b).norm() / b.norm()) < rel


@pytest.mark.parametrize("base", BASES)
def test_every_base_optimizer_learns_under_a_mask(base):
    """...and gives other weights than without: the perturbation is not lost on the way."""
    data = batches(1) * 30
    found = {}
    for name in ("none", "norm", "random", "mixed"):
        model = make("resnet")
        mask = mixed_mask(model) if name == "mixed" else build(model, name)
        optimizer = SAM(BASES[base](model.parameters()), model, mask=mask, rho=0.3)
        values = [float(optimizer.step_on(losses(model), batch)) for batch in data]
        assert values[-1] < values[0] * 0.8
        assert float(optimizer.stats.radius) == pytest.approx(0.3 * (name != "none"), rel=1e-6)
        found[name] = snapshot(model)
    names = list(found)
    assert not any(same_bits(found[a], found[b]) for a in names for b in names if a < b)


# -- schedulers, clipping, groups ----------------------------------------------------------------------------

SCHEDULERS = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 6),
    "onecycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=6),  # moves the momentum too
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("on", ["sam", "base"])
@pytest.mark.parametrize("base", ["sgd", "adamw", "sgd_fused"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, base, on, entry):
    """One truth: a scheduler on either object moves both, without a warning about the order of calls."""
    data = batches(5)
    plain = make("resnet")
    reference = BASES[base](plain.parameters())
    schedule = SCHEDULERS[name](reference)
    expected = []
    for batch in data:
        closure(reference, losses(plain), batch)()
        reference.step()
        schedule.step()
        expected.append(reference.param_groups[0]["lr"])

    model = make("resnet")
    inner = BASES[base](model.parameters())
    optimizer = SAM(inner, model, mask=build(model, "none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = SCHEDULERS[name](optimizer if on == "sam" else inner)
        got = []
        for batch in data:
            take(optimizer, losses(model), batch, entry)
            schedule.step()
            assert optimizer.param_groups[0]["lr"] == inner.param_groups[0]["lr"]
            got.append(inner.param_groups[0]["lr"])
    assert got == expected
    assert len(set(got)) == 5
    assert same_bits(snapshot(model), snapshot(plain))


@pytest.mark.parametrize("entry", ENTRIES)
def test_clipping_in_a_hook_of_the_base_sees_the_second_gradient_at_restored_weights(entry):
    model = make("resnet")
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = SAM(inner, model, mask=mixed_mask(model), rho=0.5)
    recorder = Recorder(model)
    seen = []

    def clip(*_):
        seen.append((snapshot(model), gradients(model)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    inner.register_step_pre_hook(clip)
    before = snapshot(model)
    take(optimizer, recorder, batches()[0], entry)
    ((weights, second),) = seen
    assert same_bits(weights, before)
    twin = make("resnet")
    twin.load_state_dict(recorder.weights[1], strict=False)
    losses(twin)(batches()[0]).mean().backward()
    assert same_bits(second, gradients(twin))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in second.values()))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * second[name] * (0.01 / norm), rtol=0, atol=1e-7)


@pytest.mark.parametrize("entry", ENTRIES)
def test_step_hooks_run_through_both_entries(entry):
    model = make("resnet")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    take(optimizer, losses(model), batches()[0], entry)
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_groups_with_other_learning_rates_and_decay(entry):
    def groups(model):
        params = dict(model.named_parameters())
        return [
            {"params": [p for p in params.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in params.values() if p.ndim == 1], "lr": 0.3, "momentum": 0.0},
        ]

    data = batches(4)
    plain, model = make("vit"), make("vit")
    reference = torch.optim.SGD(groups(plain), lr=0.05, momentum=0.9)
    optimizer = SAM(torch.optim.SGD(groups(model), lr=0.05, momentum=0.9), model, mask=mixed_mask(model), rho=0.0)
    for batch in data:
        closure(reference, losses(plain), batch)()
        reference.step()
        take(optimizer, losses(model), batch, entry)
    assert same_bits(snapshot(plain), snapshot(model))


def test_add_param_group():
    model = make("resnet")
    table = ParamTable.from_model(model)
    inner = torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("fc")], 0.1)
    late = [p for n, p in model.named_parameters() if n.startswith("fc")]
    with pytest.raises(InputError, match=r"touches 2 parameters that the base optimizer does not hold.*fc.weight"):
        SAM(inner, model, mask=build(model, "all"))
    assert "rho" not in inner.param_groups[0]  # a refusal leaves no trace
    assert "rho" not in inner.defaults
    optimizer = SAM(inner, model, mask=build(model, "norm"), rho=0.2)
    optimizer.step_on(losses(model), batches()[0])
    before = snapshot(model)
    with pytest.raises(InputError, match="rho must be a finite number"):
        optimizer.add_param_group({"params": late, "rho": -1.0})
    assert len(inner.param_groups) == 1
    optimizer.add_param_group({"params": late, "lr": 0.7})
    assert optimizer.param_groups is inner.param_groups
    assert [(g["lr"], g["rho"]) for g in inner.param_groups] == [(0.1, 0.2), (0.7, 0.2)]
    optimizer.step_on(losses(model), batches()[0])
    assert not same_bits(before["fc.weight"], snapshot(model)["fc.weight"])
    optimizer.set_mask(Mask(table, tuple(row.name.startswith("fc") for row in table)))
    recorder = Recorder(model)
    optimizer.step_on(recorder, batches()[0])
    assert {name for name, eps in recorder.eps().items() if eps.any()} == {"fc.weight", "fc.bias"}


def test_a_group_added_to_the_base_optimizer_gets_a_radius():
    model = make("resnet")
    params = list(model.parameters())
    inner = torch.optim.SGD(params[:-1], 0.1)
    optimizer = SAM(inner, model, mask=build(model, "norm"), rho=0.2)
    inner.add_param_group({"params": params[-1:]})
    optimizer.set_mask(build(model, "all"))
    optimizer.step_on(losses(model), batches()[0])
    assert float(optimizer.stats.radius) == pytest.approx(0.2, rel=1e-6)


def test_the_radius_can_be_changed_between_steps():
    model = make("resnet")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), rho=torch.tensor(0.1))
    for rho in (0.1, 0.4, torch.tensor(0.9)):
        optimizer.param_groups[0]["rho"] = rho
        optimizer.step_on(losses(model), batches()[0])
        assert float(optimizer.stats.radius) == pytest.approx(float(rho), rel=1e-5)


def test_set_mask_changes_what_moves():
    model = make("resnet")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "none"), norm_scope="full")
    for name in ("none", "norm", "random", "none", "no_norm"):
        mask = build(model, name)
        optimizer.set_mask(mask)
        assert optimizer.mask is mask
        recorder = Recorder(model)
        optimizer.step_on(recorder, batches()[0])
        if name == "none":
            assert len(recorder.weights) == 1
        else:
            keep = {row.name: part for row, part in zip(mask.table, mask.dense(), strict=True)}
            assert all(not eps[~keep[key]].any() for key, eps in recorder.eps().items())
            assert any(eps.any() for eps in recorder.eps().values())


@pytest.mark.parametrize("entry", ENTRIES)
def test_full_scope_counts_parameters_that_no_group_holds(entry):
    """Their gradients do not pile up from step to step."""
    model = make("resnet")
    held = [p for n, p in model.named_parameters() if not n.startswith("fc")]
    optimizer = SAM(torch.optim.SGD(held, 0.0), model, mask=build(model, "norm"), norm_scope="full", rho=0.3)
    radii = []
    for _ in range(3):
        take(optimizer, losses(model), batches()[0], entry)
        radii.append(float(optimizer.stats.radius))
    model.zero_grad()
    losses(model)(batches()[0]).mean().backward()
    squares = {n: float(g.double().square().sum()) for n, g in gradients(model).items()}
    norm = [n for n in squares if n in {row.name for row in ParamTable.from_model(model) if row.is_norm}]
    expected = 0.3 * math.sqrt(sum(squares[n] for n in norm) / sum(squares.values()))
    assert radii == pytest.approx([expected] * 3, rel=1e-5)


# -- gradients that are not finite ---------------------------------------------------------------------------


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
        logits = self.model(batch[0])
        if self.calls in self.passes:
            logits = _Poison.apply(logits, self.value)
        return F.cross_entropy(logits, batch[1], reduction="none")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("good_steps", [0, 2])
@pytest.mark.parametrize("base", ["sgd", "sgd_fused", "adamw", "adam_fused", "adamw_fused", "adagrad_fused", "rmsprop"])
def test_a_nonfinite_gradient_skips_the_step(base, good_steps, bad_pass, value):
    """Weights and state stay bit for bit, and a later step is what it would have been."""
    for entry in ENTRIES:
        model, twin = make("vit"), make("vit")
        mask = mixed_mask(model)
        optimizer = SAM(BASES[base](model.parameters()), model, mask=mask, rho=0.2)
        other = SAM(BASES[base](twin.parameters()), twin, mask=mask, rho=0.2)
        data = batches(good_steps + 1)
        for batch in data[:-1]:
            take(optimizer, losses(model), batch, entry)
            take(other, losses(twin), batch, entry)
        before = snapshot(model), state_of(optimizer)
        take(optimizer, Poisoned(model, {bad_pass}, value), data[0], entry)
        assert same_bits((snapshot(model), state_of(optimizer)), before)
        assert optimizer.skipped_steps == 1
        assert not bool(optimizer.stats.finite)
        if bad_pass == 1:
            assert optimizer.stats.radius == 0
        take(optimizer, losses(model), data[-1], entry)
        take(other, losses(twin), data[-1], entry)
        assert same_bits((snapshot(model), state_of(optimizer)), (snapshot(twin), state_of(other)))
        assert optimizer.skipped_steps == 1
        assert bool(optimizer.stats.finite)
        assert not hasattr(optimizer.base_optimizer, "found_inf")


@pytest.mark.parametrize("base", ["sgd", "sgd_fused", "adamw_fused"])
def test_a_nonfinite_gradient_under_an_empty_mask(base):
    model = make("vit")
    optimizer = SAM(BASES[base](model.parameters()), model, mask=build(model, "none"))
    for bad in (True, False, True):
        before = snapshot(model), state_of(optimizer)
        optimizer.step_on(Poisoned(model, {1} if bad else (), math.nan), batches()[0])
        assert same_bits((snapshot(model), state_of(optimizer)), before) == bad
    assert optimizer.skipped_steps == 2


@pytest.mark.parametrize("base", ["sgd_fused", "adamw_fused"])
def test_a_group_that_is_new_to_a_fused_optimizer_is_not_initialised_by_a_skipped_step(base):
    """Fused SGD allocates momentum without filling it when the step is skipped on the device."""
    model = make("vit")
    params = list(model.parameters())
    optimizer = SAM(BASES[base](params[:-2]), model, mask=build(model, "norm"))
    optimizer.step_on(losses(model), batches()[0])
    optimizer.add_param_group({"params": params[-2:]})
    optimizer.step_on(Poisoned(model, {2}, math.nan), batches()[0])
    assert state_of(optimizer)[-2:] == [{}, {}]
    assert optimizer.skipped_steps == 1


def test_groups_that_are_not_fused_are_not_asked_to_skip_on_the_device():
    model = make("vit")
    params = list(model.parameters())
    inner = torch.optim.SGD([{"params": params[:3], "fused": False}, {"params": params[3:]}], 0.1, 0.9, fused=True)
    optimizer = SAM(inner, model, mask=build(model, "norm"))
    for _ in range(3):
        optimizer.step_on(losses(model), batches()[0])
    before = snapshot(model)
    optimizer.step_on(Poisoned(model, {2}, math.nan), batches()[0])
    assert same_bits(before, snapshot(model))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("base", ["sgd", "adamw_fused"])
@pytest.mark.parametrize("bad_pass", [1, 2])
def test_nonfinite_can_be_an_error(bad_pass, base, entry):
    model = make("vit")
    optimizer = SAM(BASES[base](model.parameters()), model, mask=build(model, "all"), on_nonfinite="raise")
    take(optimizer, losses(model), batches()[0], entry)
    before = snapshot(model), state_of(optimizer)
    with pytest.raises(NonFiniteError, match="not finite"):
        take(optimizer, Poisoned(model, {bad_pass}, math.nan), batches()[0], entry)
    assert same_bits((snapshot(model), state_of(optimizer)), before)
    take(optimizer, losses(model), batches()[0], entry)


@pytest.mark.parametrize("scale", [1e-25, 1e22])
def test_extreme_but_finite_gradients_are_not_skipped(scale):
    """Their squares leave the range of float32; they themselves do not."""
    model = make("vit")
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.01 / scale), model, mask=build(model, "norm"), rho=0.1)
    before = snapshot(model)
    optimizer.step_on(lambda batch: losses(model)(batch) * scale, batches()[0])
    assert bool(optimizer.stats.finite)
    assert float(optimizer.stats.radius) == pytest.approx(0.1, rel=1e-5)
    assert not same_bits(before, snapshot(model))


@pytest.mark.parametrize("rule", ["l2", "linf", "elementwise_l2", "layerwise_linf"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_zero_gradients(rule, entry):
    """No move, no NaN, and the step (weight decay) is taken."""
    model = make("vit")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=mixed_mask(model), rule=Rule.named(rule))
    recorder = Recorder(model, lambda batch: losses(model)(batch) * 0.0)
    before = snapshot(model)
    take(optimizer, recorder, batches()[0], entry)
    assert same_bits(recorder.weights[0], recorder.weights[1])
    assert bool(optimizer.stats.finite)
    assert optimizer.stats.radius == 0
    assert optimizer.skipped_steps == 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.05 * 5e-3))


# -- refusals ------------------------------------------------------------------------------------------------


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho must be a finite number >= 0, got -0.1"),
        ({"rho": math.nan}, "rho must be a finite number >= 0, got nan"),
        ({"rho": math.inf}, "rho must be a finite number >= 0, got inf"),
        ({"rho": True}, "rho must be a finite number >= 0, got True"),
        ({"rho": "0.1"}, "rho must be a finite number >= 0, got 0.1"),
        ({"norm_scope": "mask"}, "unknown norm_scope 'mask'; did you mean masked"),
        ({"norm_statistics": "frist"}, "unknown norm_statistics 'frist'; did you mean first"),
        ({"on_nonfinite": "ignore"}, "unknown on_nonfinite 'ignore'; known: raise, skip"),
        ({"norm_scope": "full", "rule": Rule(p=math.inf)}, 'norm_scope="full" has no meaning for p = infinity'),
    ],
)
def test_refused_settings(options, message):
    model = make("resnet")
    with pytest.raises(InputError, match=message):
        SAM(sgd(model), model, mask=build(model, "norm"), **options)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS cannot be the base optimizer"),
        (lambda m: SAM(sgd(m), m, mask=build(m, "norm")), "SAM cannot be the base optimizer"),
        (lambda m: torch.optim.SGD, "must be an instance of torch.optim.Optimizer, got <class"),
        (lambda m: 0.1, "must be an instance of torch.optim.Optimizer, got 0.1"),
        (lambda m: torch.optim.Adadelta(m.parameters()), "this Adadelta already has a setting rho"),
        (lambda m: SAM(sgd(m), m, mask=build(m, "norm"), rho=0.3).base_optimizer, "the radius of another SAM"),
        (lambda m: torch.optim.SGD(m.parameters(), 0.1, maximize=True), "SAM minimizes"),
        (lambda m: torch.optim.SGD([{"params": m.parameters(), "rho": -1.0}], 0.1), "rho must be a finite number"),
    ],
)
def test_refused_base_optimizers(base, message):
    model = make("resnet")
    with pytest.raises(InputError, match=message):
        SAM(base(model), model, mask=build(model, "norm"))


def test_masks_of_other_models_are_refused():
    resnet, vit = make("resnet"), make("vit")
    with pytest.raises(InputError, match=r"the model has no parameter token"):
        SAM(sgd(resnet), resnet, mask=build(vit, "norm"))
    with pytest.raises(InputError, match=r"conv1.weight has shape \(5, .*, the mask's table \(6, "):
        SAM(sgd(resnet), make("resnet", width=5), mask=build(resnet, "norm"))
    optimizer = SAM(sgd(resnet), resnet, mask=build(resnet, "norm"))
    mask = optimizer.mask
    with pytest.raises(InputError, match="the model has no parameter token"):
        optimizer.set_mask(build(vit, "norm"))
    assert optimizer.mask is mask
    optimizer.step_on(losses(resnet), batches()[0])


def test_a_mask_built_while_a_part_was_frozen_is_refused():
    """Its densities, and the norm of scope full, would not count what has been thawed since."""
    model = make("resnet")
    model.fc.requires_grad_(False)
    mask = build(model, "all")
    model.fc.requires_grad_(True)
    with pytest.raises(InputError, match="the mask is of another model: 9 trainable tensors here, 11 there"):
        SAM(sgd(model), model, mask=mask)


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (lambda out, y: F.cross_entropy(out, y), r"a tensor of shape \(\)"),
        (lambda out, y: out, r"a tensor of shape \(8, 4\)"),
        (lambda out, y: 1.5, "float"),
        (lambda out, y: None, "NoneType"),
        (lambda out, y: out.argmax(1), r"a tensor of shape \(8,\)"),
        (lambda out, y: out[:0, 0], r"a tensor of shape \(0,\)"),
    ],
)
@pytest.mark.parametrize("name", ["norm", "none"])
def test_refused_losses(name, loss_fn, found):
    model = make("resnet")
    optimizer = SAM(sgd(model), model, mask=build(model, name))
    before = snapshot(model)
    with pytest.raises(InputError, match=f"per-example losses of shape .batch,., got {found}"):
        optimizer.step_on(lambda batch: loss_fn(model(batch[0]), batch[1]), batches()[0])
    assert same_bits(before, snapshot(model))


def test_no_closure():
    model = make("resnet")
    with pytest.raises(InputError, match="needs a closure"):
        SAM(sgd(model), model, mask=build(model, "norm")).step()


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4, sparse=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x)))


@pytest.mark.parametrize("entry", ENTRIES)
def test_sparse_gradients(entry):
    """Refused where the mask needs them; elsewhere they are the base optimizer's business."""
    batch = (torch.tensor([1, 2, 2, 7]), torch.arange(4))
    for name in ("all", "random"):
        model = Words()
        optimizer = SAM(sgd(model), model, mask=build_words(model, name))
        before = snapshot(model)
        with pytest.raises(InputError, match=r"embedding.weight has a sparse gradient"):
            take(optimizer, losses(model), batch, entry)
        assert same_bits(before, snapshot(model))
    model = Words()
    optimizer = SAM(sgd(model), model, mask=build_words(model, "norm"))
    before = snapshot(model)
    take(optimizer, losses(model), batch, entry)
    changed = (model.embedding.weight.detach() != before["embedding.weight"]).any(1)
    assert changed.nonzero().squeeze(1).tolist() == [1, 2, 7]


def build_words(model, name):
    table = ParamTable.from_model(model)
    few = torch.zeros(20, 4, dtype=torch.bool)
    few[2, 1] = True
    parts = {"all": (True,) * 5, "norm": (False, True, True, False, False), "random": (few, False, False, False, False)}
    return Mask(table, parts[name])


def test_parameters_on_several_devices_are_refused():
    model = make("resnet")
    stray = nn.Parameter(torch.empty(3, device="meta"))
    inner = torch.optim.SGD([*model.parameters(), stray], 0.1)
    with pytest.raises(InputError, match=r"several devices \(cpu, meta\)"):
        SAM(inner, model, mask=build(model, "norm"))


def test_copies_are_refused():
    """A copy would move the storage of the original."""
    model = make("resnet")
    optimizer = SAM(sgd(model), model, mask=build(model, "norm"))
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)


# -- what else torch expects of an optimizer -----------------------------------------------------------------


def test_it_is_an_optimizer_with_one_truth():
    model = make("resnet")
    inner = BASES["adamw"](model.parameters())
    optimizer = SAM(inner, model, mask=build(model, "norm"))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    optimizer.step_on(losses(model), batches()[0])
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert len(optimizer.state) == len(list(model.parameters()))
    assert "SAM" in repr(optimizer)


def test_gradients_are_enabled_and_the_mode_is_left_alone():
    model = make("resnet")
    optimizer = SAM(sgd(model), model, mask=build(model, "norm"))
    with torch.no_grad():
        optimizer.step_on(losses(model), batches()[0])
        assert not torch.is_grad_enabled()
    assert all(p.grad is not None for p in model.parameters())
    assert model.training
