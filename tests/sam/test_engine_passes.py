"""The two passes of a step: what is asked of autograd, what moves, what is put back, what both passes share."""

from __future__ import annotations

import copy
import gc
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from masks import InputError, Mask, ParamTable
from masks.region import Region
from sam import SAM, Rule
from tests.sam.nets import (
    BASES,
    ENTRIES,
    MASK_NAMES,
    RULES,
    RULES_AND_SCOPES,
    Quadratic,
    Recorder,
    TinyResNet,
    batches,
    buffers,
    build,
    closure,
    describe,
    flat,
    gradients,
    losses,
    make,
    mixed_mask,
    quadratic_masks,
    reference_eps,
    same_bits,
    snapshot,
    state_of,
    take,
)


def sam_of(model, mask, base="sgd", **options) -> SAM:
    return SAM(BASES[base](model.parameters()), model, mask=mask, **options)


# -- the whole step on a quadratic, in numpy -----------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("form", ["whole", "index", "dense", "mixed", "all"])
@pytest.mark.parametrize(("rule", "scope"), RULES_AND_SCOPES)
def test_closed_form_steps(rule, scope, form, entry):
    """Three steps of SAM with momentum and weight decay: eps, the gradient at w + eps, and the weights."""
    model = Quadratic()
    mask = quadratic_masks(model)[form]
    lr, momentum, decay, rho = 0.02, 0.9, 0.1, 0.4
    base = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=decay)
    optimizer = SAM(base, model, mask=mask, rho=rho, rule=RULES[rule], norm_scope=scope)
    recorder = Recorder(model, model)
    A, b = model.A.numpy(), model.b.numpy().mean(0)
    w, velocity = flat(list(model.parameters())), 0.0
    for _ in range(3):
        loss = take(optimizer, recorder, model.b, entry)
        g = A @ w - b
        eps, _ = reference_eps(w, g, mask, **describe(RULES[rule]), scope=scope, rho=np.full_like(w, rho))
        g_adv = A @ (w + eps) - b
        np.testing.assert_allclose(flat(list(recorder.eps().values())), eps, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(flat([p.grad for p in model.parameters()]), g_adv, rtol=1e-11, atol=1e-13)
        assert loss.item() == pytest.approx(0.5 * w @ A @ w - b @ w, rel=1e-12)
        v = w + eps
        assert float(optimizer.stats.perturbed_loss) == pytest.approx(0.5 * v @ A @ v - b @ v, rel=1e-12)
        assert float(optimizer.stats.loss) == loss.item()
        assert float(optimizer.stats.radius) == pytest.approx(np.linalg.norm(eps), rel=1e-12)
        velocity = momentum * velocity + g_adv + decay * w
        w = w - lr * velocity
        np.testing.assert_allclose(flat(list(model.parameters())), w, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("entry", ENTRIES)
def test_radii_per_group_share_one_norm(entry):
    """Tensor i moves by rho_i g_i / ||g||, with one norm over the mask, whatever group it is in."""
    model = Quadratic()
    tensors = list(model.parameters())
    base = torch.optim.SGD([{"params": tensors[:1], "rho": 0.3}, {"params": tensors[1:], "lr": 0.5}], lr=0.1)
    mask = quadratic_masks(model)["mixed"]
    optimizer = SAM(base, model, mask=mask, rho=0.07)
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.07]
    recorder = Recorder(model, model)
    w = flat(tensors)
    take(optimizer, recorder, model.b, entry)
    g = model.A.numpy() @ w - model.b.numpy().mean(0)
    rho = np.concatenate([np.full(40, 0.3), np.full(19, 0.07)])
    eps, _ = reference_eps(w, g, mask, metric="identity", p=2, eta=0, bias="identity", scope="masked", rho=rho)
    np.testing.assert_allclose(flat(list(recorder.eps().values())), eps, rtol=1e-12, atol=1e-15)


# -- the two entries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["resnet", "vit"])
@pytest.mark.parametrize("name", [*MASK_NAMES, "mixed"])
def test_step_on_equals_step(net, name):
    """Bit for bit, for every mask, rule and scope, over two steps, with dropout and BatchNorm."""
    template = make(net, dropout=0.2)
    mask = mixed_mask(template) if name == "mixed" else build(template, name)
    data = batches(2)
    for rule, scope in RULES_AND_SCOPES:
        if "eta" in rule and "eta0-identity" not in rule:
            continue
        found = []
        for entry in ENTRIES:
            model = copy.deepcopy(template)
            optimizer = sam_of(model, mask, rho=0.1, rule=RULES[rule], norm_scope=scope)
            torch.manual_seed(5)
            seen = [take(optimizer, losses(model), batch, entry).detach() for batch in data]
            stats = [optimizer.stats.loss, optimizer.stats.perturbed_loss.detach(), optimizer.stats.radius]
            found.append((snapshot(model), buffers(model), seen, stats[1:], state_of(optimizer), torch.get_rng_state()))
        assert same_bits(found[0], found[1]), (rule, scope)


@pytest.mark.parametrize("net", ["resnet", "vit"])
@pytest.mark.parametrize("name", ["norm", "parameters", "random", "mixed", "classifier"])
def test_the_first_pass_asks_only_for_touched_tensors(net, name, monkeypatch):
    """...and gets what a full backward would give, bit for bit."""
    model = make(net)
    if name == "classifier":
        table = ParamTable.from_model(model)
        mask = Mask(table, tuple(row.name.startswith(("fc", "head")) for row in table))
    else:
        mask = mixed_mask(model) if name == "mixed" else build(model, name)
    asked = []
    real = torch.autograd.grad

    def spy(outputs, inputs, *args, **kwargs):
        out = real(outputs, inputs, *args, **kwargs)
        asked.append((list(inputs), out))
        return out

    twin = copy.deepcopy(model)
    losses(twin)(batches()[0]).mean().backward()
    names = {id(p): n for n, p in model.named_parameters()}
    monkeypatch.setattr(torch.autograd, "grad", spy)
    for scope in ("masked", "full"):
        asked.clear()
        sam_of(model, mask, norm_scope=scope).step_on(losses(model), batches()[0])
        ((inputs, got),) = asked
        touched = [row.name for row, part in zip(mask.table, mask.parts, strict=True) if part is not False]
        assert [names[id(p)] for p in inputs] == (touched if scope == "masked" else [r.name for r in mask.table])
        if scope == "masked":  # the second scope steps from other weights
            expected = gradients(twin)
            assert all(same_bits(g, expected[names[id(p)]]) for p, g in zip(inputs, got, strict=True))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_parameter_that_the_loss_does_not_use(entry):
    """No gradient in either pass: it does not move, is not updated, and is put back."""
    model = make("resnet")
    model.unused = nn.Linear(3, 3)
    before = snapshot(model)
    optimizer = sam_of(model, build(model, "all"), rho=0.1)
    take(optimizer, losses(model), batches()[0], entry)
    after = snapshot(model)
    assert same_bits(before["unused.weight"], after["unused.weight"])
    assert float(optimizer.stats.radius) == pytest.approx(0.1, rel=1e-5)
    assert not same_bits(before["fc.weight"], after["fc.weight"])


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_parameter_without_gradient_in_the_second_pass_is_put_back(entry, layout):
    """Stochastic depth: the second pass drops a branch that the first one perturbed."""
    model = make("resnet").to(memory_format=layout)
    calls = []

    def loss_fn(batch):
        calls.append(1)
        x = F.relu(model.bn1(model.conv1(batch[0])))
        short = model.shortcut(x)
        if len(calls) == 1:
            short = short + model.bn2(model.conv2(x))
        return F.cross_entropy(model.fc(short.mean((2, 3))), batch[1], reduction="none")

    before = snapshot(model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1), model, mask=mixed_mask(model) | build(model, "norm"))
    take(optimizer, loss_fn, batches()[0], entry)
    assert model.conv2.weight.grad is None
    for name in ("conv2.weight", "bn2.weight", "bn2.bias"):
        assert same_bits(before[name], snapshot(model)[name])


# -- what moves, and what is put back ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", [*MASK_NAMES, "mixed"])
def test_only_masked_coordinates_ever_move(name, entry, layout):
    model = make("resnet").to(memory_format=layout)
    mask = mixed_mask(model) if name == "mixed" else build(model, name)
    keep = {row.name: part for row, part in zip(mask.table, mask.dense(), strict=True)}
    for rule in ("l2", "linf", "elementwise_l2", "layerwise_linf"):
        optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rule=Rule.named(rule), rho=0.3)
        recorder = Recorder(model)
        take(optimizer, recorder, batches()[0], entry)
        if name == "none":
            assert len(recorder.weights) == 1
            continue
        moved = {key: eps != 0 for key, eps in recorder.eps().items()}
        assert not any((moved[key] & ~keep[key]).any() for key in keep)
        share = sum(int(moved[key].sum()) for key in keep) / mask.num_kept
        assert share > 0.5  # a ReLU may be dead, but the mask does move
        total = sum(float(eps.double().square().sum()) for eps in recorder.eps().values())
        assert float(optimizer.stats.radius) == pytest.approx(math.sqrt(total), rel=1e-3)
        if rule == "l2":
            assert float(optimizer.stats.radius) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["all", "norm", "random", "mixed"])
def test_weights_come_back_bit_for_bit_in_the_same_storage(name, entry, layout):
    """With lr = 0, a hundred steps at a large radius change nothing."""
    model = make("resnet", width=3).to(memory_format=layout)
    with torch.no_grad():
        model.bn1.weight[0] = -0.0
    mask = mixed_mask(model) if name == "mixed" else build(model, name)
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=0.7)
    before = snapshot(model)
    where = [(p.data_ptr(), p.stride()) for p in model.parameters()]
    batch = batches(size=2)[0]
    for _ in range(100):
        take(optimizer, losses(model), batch, entry)
    assert float(optimizer.stats.radius) == pytest.approx(0.7, rel=1e-6)
    assert same_bits(before, snapshot(model))
    assert where == [(p.data_ptr(), p.stride()) for p in model.parameters()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["all", "norm", "mixed"])
def test_weights_come_back_after_an_exception(name, entry, failing, error):
    model = make("resnet")
    mask = mixed_mask(model) if name == "mixed" else build(model, name)
    optimizer = sam_of(model, mask, rho=0.5)
    recorder = Recorder(model)

    def loss_fn(batch):
        out = recorder(batch)
        if len(recorder.weights) == failing:
            raise error("no luck")
        return out

    before, where = snapshot(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(error, match="no luck"):
        take(optimizer, loss_fn, batches()[0], entry)
    assert same_bits(before, snapshot(model))
    assert where == [p.data_ptr() for p in model.parameters()]
    if failing == 2:
        assert not same_bits(before, recorder.weights[1])
    assert not any(state_of(optimizer))
    take(optimizer, losses(model), batches()[0], entry)  # and the optimizer still works
    assert not same_bits(before, snapshot(model))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["norm", "random", "mixed"])
def test_the_second_gradient_is_dense(name, entry):
    """Every parameter is updated with the gradient at w + eps, whatever the mask keeps."""
    model = make("vit")
    mask = mixed_mask(model) if name == "mixed" else build(model, name)
    recorder = Recorder(model)
    take(sam_of(model, mask, rho=0.5), recorder, batches()[0], entry)
    twin = copy.deepcopy(model)
    twin.load_state_dict(recorder.weights[1])
    twin.zero_grad()
    losses(twin)(batches()[0]).mean().backward()
    assert same_bits(gradients(model), gradients(twin))


class Odd(nn.Module):
    """A linear layer, a LayerNorm, and one parameter that is unlike the others."""

    def __init__(self, odd: nn.Parameter | None):
        super().__init__()
        self.linear, self.norm, self.odd = nn.Linear(8, 8), nn.LayerNorm(8), odd

    def forward(self, x):
        x = self.norm(self.linear(x))
        return (x * self.odd.sum()).float() if self.odd.numel() else x


ODD = {
    "scalar": lambda: torch.tensor(1.5),
    "empty": lambda: torch.empty(0),
    "float64": lambda: torch.randn(30, dtype=torch.float64),
    "strided": lambda: torch.randn(40, 16)[::5, ::2],
    "transposed": lambda: torch.randn(12, 10).T,
    "offset": lambda: torch.randn(100)[17:77].view(6, 10),
}


@pytest.mark.parametrize("rule", ["l2", "linf", "elementwise_l2", "layerwise_l2"])
@pytest.mark.parametrize("kind", ODD)
def test_odd_parameters(kind, rule):
    for density in (1.0, 0.5, 0.05):
        model = Odd(nn.Parameter(ODD[kind]()))
        table = ParamTable.from_model(model)
        mask = Mask(table, tuple(torch.rand(row.shape) < density for row in table))
        recorder = Recorder(model)
        optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=0.5, rule=Rule.named(rule))
        before, where = snapshot(model), model.odd.data_ptr()
        optimizer.step_on(recorder, (torch.randn(6, 8), torch.arange(6)))
        assert same_bits(before, snapshot(model))
        assert where == model.odd.data_ptr()
        keep = {row.name: part for row, part in zip(table, mask.dense(), strict=True)}
        assert not any(eps[~keep[name]].any() for name, eps in recorder.eps().items())
        measured = math.sqrt(sum(float(eps.double().square().sum()) for eps in recorder.eps().values()))
        assert float(optimizer.stats.radius) == pytest.approx(measured, rel=1e-5)
        if rule == "l2":
            assert measured == pytest.approx(0.5, rel=1e-5)


def test_asam_is_invariant_to_rescaling():
    """w1 * a, w2 / a in a ReLU net is the same function; elementwise ASAM without a floor finds the same ascent."""
    found = []
    for a in (1.0, 7.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 9, bias=False), nn.ReLU(), nn.Linear(9, 4, bias=False)).double()
        with torch.no_grad():
            model[0].weight.mul_(a)
            model[2].weight.div_(a)
        mask = Mask(ParamTable.from_model(model), (True, True))
        batch = (torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 4)
        for rule in (Rule.named("elementwise_l2", eta=0.0), Rule()):
            optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=0.5, rule=rule)
            optimizer.step_on(losses(model), batch)
            found.append(float(optimizer.stats.ascent))
    assert found[0] == pytest.approx(found[2], rel=1e-10)
    assert found[1] != pytest.approx(found[3], rel=1e-2)


def test_a_model_that_moves_after_construction_is_followed():
    """`model.to(memory_format=...)` gives the weights other storage in another order."""
    for name in ("all", "mixed"):
        results = []
        for when in ("before", "after"):
            model = make("resnet")
            mask = mixed_mask(model) if name == "mixed" else build(model, name)
            if when == "before":
                model.to(memory_format=torch.channels_last)
            optimizer = sam_of(model, mask, rho=0.5)
            if when == "after":
                model.to(memory_format=torch.channels_last)
            recorder = Recorder(model)
            optimizer.step_on(recorder, batches()[0])
            results.append((recorder.weights, snapshot(model)))
        assert same_bits(results[0], results[1])
        assert not same_bits(*results[1][0])


def test_a_masked_parameter_frozen_after_construction_is_refused():
    model = make("resnet")
    optimizer = sam_of(model, build(model, "norm"))
    model.bn1.weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"bn1.weight is frozen"):
        optimizer.step_on(losses(model), batches()[0])


@pytest.mark.parametrize("entry", ENTRIES)
def test_tied_weights_move_once(entry):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    optimizer = sam_of(model, Mask(ParamTable.from_model(model), (True,) * 3), rho=0.4)
    recorder = Recorder(model)
    batch = (torch.randn(6, 4), torch.arange(6) % 4)
    take(optimizer, recorder, batch, entry)
    eps = recorder.eps()  # named_parameters lists the tied weight once
    assert math.sqrt(sum(float(e.double().square().sum()) for e in eps.values())) == pytest.approx(0.4, rel=1e-5)


@pytest.mark.parametrize("entry", ENTRIES)
def test_autocast_around_the_step_sees_the_moved_weights(entry):
    """Autocast caches low-precision copies of the weights, which a change in place does not invalidate."""
    results = []
    for outside in (False, True):
        model = make("vit")
        optimizer = sam_of(model, build(model, "all"), rho=2.0)

        def inside(batch, model=model):
            with torch.autocast("cpu", torch.bfloat16):
                return losses(model)(batch)

        with torch.autocast("cpu", torch.bfloat16, enabled=outside):  # around several steps: one cache for all
            for _ in range(2):
                take(optimizer, losses(model) if outside else inside, batches()[0], entry)
        results.append((snapshot(model), optimizer.stats.loss, optimizer.stats.perturbed_loss.detach()))
    assert same_bits(results[0], results[1])
    assert float(results[0][2]) > float(results[0][1]) + 0.1


# -- dropout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_both_passes_draw_the_same_dropout_masks(net, entry):
    model = make(net, dropout=0.5)
    recorder = Recorder(model)
    # rho = 0 makes the two outputs comparable entry by entry
    optimizer = sam_of(model, build(model, "norm"), rho=0.0)
    torch.manual_seed(1)
    take(optimizer, recorder, batches()[0], entry)
    after = torch.get_rng_state()
    assert len(recorder.drawn[0]) >= 1
    assert same_bits(recorder.drawn[0], recorder.drawn[1])
    torch.manual_seed(1)
    losses(make(net, dropout=0.5))(batches()[0])
    assert torch.equal(after, torch.get_rng_state())  # the stream stands where one pass leaves it


@pytest.mark.parametrize("entry", ENTRIES)
def test_without_replay_the_passes_draw_anew(entry):
    model = make("resnet", dropout=0.5)
    recorder = Recorder(model)
    torch.manual_seed(1)
    take(sam_of(model, build(model, "norm"), rho=0.0, replay_rng=False), recorder, batches()[0], entry)
    assert not same_bits(recorder.drawn[0], recorder.drawn[1])
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for _ in range(2):
        losses(make("resnet", dropout=0.5))(batches()[0])
    assert torch.equal(after, torch.get_rng_state())


# -- running statistics --------------------------------------------------------------------------------------


def statistics_after(momentum, norm_statistics, entry, mode="train"):
    """Buffers after one step, and after forwards of a twin at w, at w + eps, and at both."""
    model = make("resnet", momentum=momentum)
    losses(model)(batches(seed=3)[0])  # not the first batch that the layers see
    start = copy.deepcopy(model)
    getattr(model, mode)()
    recorder = Recorder(model)
    optimizer = sam_of(model, mixed_mask(model), rho=1.0, norm_statistics=norm_statistics)
    take(optimizer, recorder, batches()[0], entry)
    expected = {}
    for name, passes in {"first": (0,), "second": (1,), "both": (0, 1)}.items():
        twin = copy.deepcopy(start)
        getattr(twin, mode)()
        for i in passes:
            twin.load_state_dict(recorder.weights[i], strict=False)
            losses(twin)(batches()[0])
        expected[name] = buffers(twin)
    return buffers(model), expected


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("norm_statistics", ["first", "second", "both"])
def test_running_statistics(norm_statistics, momentum, entry):
    got, expected = statistics_after(momentum, norm_statistics, entry)
    assert same_bits(got, expected[norm_statistics])
    counts = {k: int(v) for k, v in got.items() if k.endswith("num_batches_tracked")}
    assert set(counts.values()) == {3 if norm_statistics == "both" else 2}
    if momentum != 0.0:
        assert not same_bits(expected["first"], expected["second"])


@pytest.mark.parametrize("norm_statistics", ["first", "second", "both"])
def test_running_statistics_in_evaluation_mode_stay(norm_statistics):
    got, expected = statistics_after(0.1, norm_statistics, "step_on", mode="eval")
    assert same_bits(got, expected["first"])
    assert {int(v) for k, v in got.items() if k.endswith("num_batches_tracked")} == {1}


@pytest.mark.parametrize(("norm_statistics", "failing"), [("first", 2), ("second", 1)])
def test_frozen_statistics_thaw_after_an_exception(norm_statistics, failing):
    model, twin = make("resnet"), make("resnet")
    calls = []

    def loss_fn(batch):
        calls.append(1)
        out = losses(model)(batch)
        if len(calls) == failing:
            raise RuntimeError("no luck")
        return out

    optimizer = sam_of(model, build(model, "norm"), norm_statistics=norm_statistics)
    with pytest.raises(RuntimeError):
        optimizer.step_on(loss_fn, batches()[0])
    for _ in range(failing - 1):
        losses(twin)(batches()[0])
    assert same_bits(buffers(model), buffers(twin))  # the failing pass left no trace
    model(batches()[0][0])
    assert not same_bits(buffers(model), buffers(twin))


def test_an_empty_mask_updates_statistics_once():
    for norm_statistics in ("first", "second", "both"):
        model, twin = make("resnet"), make("resnet")
        sam_of(model, build(model, "none"), norm_statistics=norm_statistics).step_on(losses(model), batches()[0])
        losses(twin)(batches()[0])
        assert same_bits(buffers(model), buffers(twin))


# -- what a step reports and holds ---------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["norm", "all", "mixed"])
def test_stats_are_what_can_be_measured(name, entry):
    model = make("vit").double()
    batch = batches(dtype=torch.float64)[0]
    mask = mixed_mask(model) if name == "mixed" else build(model.float(), name)
    model.double()
    optimizer = sam_of(model, mask, rho=0.3, rule=Rule.named("elementwise_l2"))
    assert optimizer.stats is None
    recorder = Recorder(model)
    returned = take(optimizer, recorder, batch, entry)
    twin = copy.deepcopy(model)
    measured = []
    for weights in recorder.weights:
        twin.load_state_dict(weights)
        measured.append(losses(twin)(batch).mean().detach())
    stats = optimizer.stats
    assert same_bits(stats.loss, measured[0])
    assert same_bits(returned.detach(), measured[0])
    assert same_bits(stats.perturbed_loss.detach(), measured[1])
    assert float(stats.ascent) == float(measured[1] - measured[0])
    total = sum(float(eps.square().sum()) for eps in recorder.eps().values())
    assert float(stats.radius) == pytest.approx(math.sqrt(total), rel=1e-9)
    assert stats.finite.item() is True
    assert not any(t.requires_grad for t in (stats.loss, stats.perturbed_loss, stats.radius))
    assert all(t.ndim == 0 for t in (stats.loss, stats.perturbed_loss, stats.radius, stats.finite))


def test_stats_under_an_empty_mask():
    model = make("resnet")
    optimizer = sam_of(model, build(model, "none"))
    loss = optimizer.step_on(losses(model), batches()[0])
    stats = optimizer.stats
    assert stats.loss == stats.perturbed_loss == loss
    assert stats.radius == stats.ascent == 0
    assert bool(stats.finite)


def test_a_closure_may_return_a_number():
    model = make("resnet")
    optimizer = sam_of(model, build(model, "norm"))
    run = closure(optimizer, losses(model), batches()[0])
    value = optimizer.step(lambda: run().item())
    assert isinstance(value, float)
    assert float(optimizer.stats.loss) == pytest.approx(value)


def test_a_closure_that_forgets_to_zero_is_not_misled():
    """Old gradients would tilt the ascent direction."""
    found = []
    for forgetful in (False, True):
        model = make("resnet")
        optimizer = sam_of(model, build(model, "norm"), rho=0.5)
        for batch in batches(3):

            def run(batch=batch, model=model, optimizer=optimizer, forgetful=forgetful):
                if not forgetful:
                    optimizer.zero_grad()
                loss = losses(model)(batch).mean()
                loss.backward()
                return loss

            optimizer.step(run)
        found.append(snapshot(model))
    assert same_bits(found[0], found[1])


def nbytes(tensors) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_bytes_held_between_the_passes():
    """The norm mask of a ResNet-18 holds under one percent of the parameters; a random mask of its size, too."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=10)
    params = sum(p.numel() * p.element_size() for p in model.parameters())
    held = {}
    for name in ("norm", "random", "all"):
        region = Region(build(model, name), model)
        held[name] = (nbytes(region.save()) + region.index_nbytes) / params
    assert held["norm"] < 0.01
    assert held["random"] < 0.01
    assert held["all"] == pytest.approx(1.0)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["norm", "all"])
def test_nothing_else_is_alive_in_the_second_pass(name, entry):
    """Between the passes the engine holds the backup alone: no first gradient, no eps."""
    model = TinyResNet(width=40)
    mask = build(model, name)
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1), model, mask=mask)
    alive = []

    def loss_fn(batch):
        gc.collect()
        alive.append(
            sum(t.numel() for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.numel() >= 80)
        )
        return losses(model)(batch)

    take(optimizer, loss_fn, batches()[0], entry)
    kept = sum(row.numel for row, part in zip(mask.table, mask.parts, strict=True) if part and row.numel >= 80)
    statistics = sum(b.numel() for b in model.buffers() if b.numel() >= 80)
    assert alive[1] - alive[0] <= kept + statistics


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norm", "random", "all"])
def test_a_network_of_eleven_million_parameters(name):
    """Where float32 norms go wrong: the radius is rho, both entries agree, and the weights come back."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    template = torchvision.models.resnet18(num_classes=4).to(memory_format=torch.channels_last)
    batch = (torch.randn(4, 3, 32, 32), torch.arange(4))
    mask = build(template, "norm") if name == "norm" else None
    if mask is None:
        table = ParamTable.from_model(template)
        mask = Mask(table, tuple(name == "all" or torch.rand(row.shape) < 0.01 for row in table))
    found = []
    for entry in ENTRIES:
        model = copy.deepcopy(template)
        optimizer = SAM(torch.optim.SGD(model.parameters(), 0.0), model, mask=mask, rho=0.05)
        recorder = Recorder(model)
        for _ in range(3):
            take(optimizer, recorder, batch, entry)
        assert same_bits(snapshot(template), snapshot(model))
        assert float(optimizer.stats.radius) == pytest.approx(0.05, rel=1e-7)
        squares = sum(float(eps.double().square().sum()) for eps in recorder.eps().values())
        assert math.sqrt(squares) == pytest.approx(0.05, rel=1e-3)  # w + eps is rounded, 11 million times
        found.append((optimizer.stats.loss, optimizer.stats.perturbed_loss.detach(), gradients(model)))
    assert same_bits(found[0], found[1])
