"""WSAM: coupled at gamma = 0.5 is SAM; both ways in numpy; the base optimizer's state; skipped steps."""

from __future__ import annotations

import math

import pytest
import torch

from masks import InputError
from sam import SAM, Method, build_method
from sam.methods.wsam import WeightedSharpness
from tests.sam.methods.oracles import FORMS, Expected, assert_closed_form
from tests.sam.nets import BASES, ENTRIES, Quadratic, batches, build, losses, make, quadratic_masks, same_bits, snapshot
from tests.sam.runs import CASES, assert_passes_as_stated, assert_same_training, outcome


@pytest.mark.parametrize(("net", "mask", "base"), CASES)
def test_coupled_at_one_half_is_sam(net, mask, base):
    assert_same_training(build_method("wsam", gamma=0.5, decoupled=False), build_method("sam"), net, mask, base)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("decoupled", [False, True])
def test_closed_form(decoupled, gamma, form, entry):
    a = gamma / (1 - gamma)

    def step(world, w, t):
        g = world.gradient(w)
        eps = world.eps(g)
        g_adv = world.gradient(w + eps)
        return Expected(g, eps, -a * (g_adv - g)) if decoupled else Expected(a * g_adv + (1 - a) * g, eps)

    assert_closed_form(build_method("wsam", gamma=gamma, decoupled=decoupled), form, step, entry=entry)


@pytest.mark.parametrize("base", ["sgd", "adamw", "adamw_fused"])
def test_the_base_optimizer_never_sees_the_sharpness(base):
    """Decoupled: after one step its state is that of the base optimizer alone (rho = 0), bit for bit."""
    states = []
    for rho in (0.3, 0.0):
        model = make("resnet")
        optimizer = SAM(
            BASES[base](model.parameters()), model, mask=build(model, "all"), rho=rho, method=build_method("wsam")
        )
        optimizer.step_on(losses(model), batches()[0])
        states.append([dict(optimizer.state[p]) for p in model.parameters()])
    assert same_bits(*states)
    assert not same_bits(outcome("resnet", "all", base, build_method("wsam"))[0], trained_sgd(base))


def trained_sgd(base):
    return outcome("resnet", "all", base, build_method("wsam", gamma=0.0))[0]


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_the_move_takes_the_learning_rate_of_each_group(tensor_lr):
    model = Quadratic()
    rates = [0.1, 0.02]
    if tensor_lr:
        rates = [torch.tensor(rate, dtype=torch.float64) for rate in rates]
    tensors = list(model.parameters())
    base = torch.optim.SGD(
        [{"params": tensors[:1], "lr": rates[0]}, {"params": tensors[1:], "lr": rates[1]}], foreach=False
    )
    mask = quadratic_masks(model)["all"]
    optimizer = SAM(base, model, mask=mask, rho=0.4, method=build_method("wsam", gamma=0.75))
    w = torch.cat([p.detach().reshape(-1) for p in tensors])
    g = model.A @ w - model.b.mean(0)
    g_adv = g + model.A @ (0.4 * g / g.norm())
    lr = torch.tensor([0.1] * 40 + [0.02] * 19, dtype=torch.float64)
    optimizer.step_on(model, model.b)
    expected = w - lr * (g + 3 * (g_adv - g))
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in tensors]), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("base", ["sgd", "sgd_fused", "adamw_fused"])
@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_gradient_that_is_not_finite_in_either_pass_skips_the_whole_step(bad_pass, base, decoupled):
    model = make("resnet")
    method = build_method("wsam", decoupled=decoupled)
    optimizer = SAM(BASES[base](model.parameters()), model, mask=build(model, "norm"), rho=0.3, method=method)
    optimizer.step_on(losses(model), batches()[0])  # fused kernels skip only parameters with a state
    before = snapshot(model)
    calls = []

    def poisoned(batch):
        calls.append(1)
        return losses(model)(batch) * (math.inf if len(calls) == bad_pass else 1.0)

    optimizer.step_on(poisoned, batches()[0])
    assert int(optimizer.skipped_steps) == 1
    assert same_bits(snapshot(model), before)


def test_passes():
    assert_passes_as_stated("wsam", steps=2)


def test_refusals():
    for gamma in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match=r"gamma of wsam must lie in \[0, 1\)"):
            build_method("wsam", gamma=gamma)

    class NoRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    model = make("vit")
    with pytest.raises(InputError, match="decoupled wsam moves by the learning rate lr of each group, and NoRate"):
        SAM(NoRate(model.parameters()), model, mask=build(model, "all"), method=build_method("wsam"))
    SAM(NoRate(model.parameters()), model, mask=build(model, "all"), method=build_method("wsam", decoupled=False))


@pytest.mark.parametrize(("net", "mask", "base"), CASES)
def test_the_general_slot_is_sam_there_too(net, mask, base):
    """The factory takes the plain slot where the weight is 1; this one adds (g_adv - g) times 0."""
    method = Method(combine=WeightedSharpness(0.5, decoupled=False))
    assert_same_training(method, build_method("sam"), net, mask, base)


def test_clipping_is_refused_where_it_would_not_reach():
    model = make("resnet")
    options = {"mask": build(model, "norm"), "clip_grad_norm": 1.0}
    with pytest.raises(InputError, match=r"decoupled wsam moves the weights .* clip_grad_norm would not reach"):
        SAM(BASES["sgd"](model.parameters()), model, method=build_method("wsam"), **options)
    SAM(BASES["sgd"](model.parameters()), model, method=build_method("wsam", decoupled=False), **options)
