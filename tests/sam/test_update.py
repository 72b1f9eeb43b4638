"""Between the passes and the base optimizer: clipping of the final gradient, and learning-rate schedules."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from masks import InputError
from sam import SAM, Accumulated, MethodSpec
from tests.sam.nets import (
    BASES,
    ENTRIES,
    Quadratic,
    Recorder,
    batches,
    build,
    gradients,
    losses,
    make,
    mixed_mask,
    quadratic_masks,
    same_bits,
    snapshot,
    state_of,
    take,
)

# -- clipping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_the_final_gradient_is_clipped(limit, entry):
    """Closed form over three steps: eps from the whole gradient, then g_adv of length at most the limit."""
    model = Quadratic()
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.2),
        model,
        mask=quadratic_masks(model)["all"],
        rho=0.3,
        clip_grad_norm=limit,
    )
    w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    clipped = []
    for _ in range(3):
        take(optimizer, model, model.b, entry)
        g = model.A @ w - model.b.mean(0)
        final = model.A @ (w + 0.3 * g / g.norm()) - model.b.mean(0)
        clipped.append(bool(final.norm() > limit))
        final = final * min(1.0, limit / (float(final.norm()) + 1e-6))  # the small number is torch's
        got = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(got, final, rtol=1e-11, atol=1e-13)
        w = w - 0.1 * (final + 0.2 * w)  # weight decay is not clipped
        torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in model.parameters()]), w)
        assert float(optimizer.stats.radius) == pytest.approx(0.3, rel=1e-12)
    assert all(clipped) == any(clipped) == (limit == 0.5)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("base", ["sgd", "adamw_fused"])
def test_a_limit_that_is_not_reached_changes_nothing(base, entry):
    found = []
    for limit in (None, 1e6):
        model = make("vit")
        optimizer = SAM(BASES[base](model.parameters()), model, mask=mixed_mask(model), clip_grad_norm=limit)
        for batch in batches(3):
            take(optimizer, losses(model), batch, entry)
        found.append((snapshot(model), state_of(optimizer)))
    assert same_bits(found[0], found[1])


@pytest.mark.parametrize("name", ["none", "norm", "all"])
@pytest.mark.parametrize("method", ["sam", "gsam", "wsam:decoupled=false", "micro_batch_sam"])
def test_what_is_clipped_is_what_the_base_optimizer_sees(method, name):
    """After the gradients were combined, and as `clip_grad_norm_` in a hook of the base optimizer clips it."""
    found = []
    for limit in (0.1, None):
        model = make("vit")
        inner = BASES["sgd"](model.parameters())
        options = {"method": MethodSpec.parse(method).build(), "clip_grad_norm": limit, "rho": 0.2}
        optimizer = SAM(inner, model, mask=build(model, name), **options)
        if limit is None:
            clip = functools.partial(torch.nn.utils.clip_grad_norm_, list(model.parameters()), 0.1)
            inner.register_step_pre_hook(lambda *_, clip=clip: clip() and None)
        recorder = Recorder(model)
        optimizer.step_on(recorder, batches()[0])
        found.append((recorder.weights, snapshot(model), gradients(model)))
    assert same_bits(found[0][0], found[1][0])
    for a, b in zip(found[0][1].values(), found[1][1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    length = math.sqrt(sum(float(g.double().square().sum()) for g in found[0][2].values()))
    assert length == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("base", ["sgd", "adamw_fused"])
def test_a_clipped_step_with_an_infinity_is_skipped(base):
    """An infinite norm would make the clipped gradient 0 or NaN, not infinite."""
    model = make("vit")
    optimizer = SAM(BASES[base](model.parameters()), model, mask=mixed_mask(model), clip_grad_norm=0.1)
    optimizer.step_on(losses(model), batches()[0])
    before = snapshot(model), state_of(optimizer)
    for value in (math.inf, math.nan):
        optimizer.step_on(lambda batch, value=value: losses(model)(batch) * value, batches()[0])
    assert same_bits((snapshot(model), state_of(optimizer)), before)
    assert optimizer.skipped_steps == 2


def test_accumulated_batches_are_clipped_as_one():
    found = []
    for batch in (batches(1, 12)[0], Accumulated([tuple(t[i : i + 4] for t in batches(1, 12)[0]) for i in (0, 4, 8)])):
        model = make("vit")
        optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), clip_grad_norm=0.1)
        optimizer.step_on(losses(model), batch)
        found.append(gradients(model))
    for a, b in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, math.nan, True, "1"])
def test_refused_limits(limit):
    model = make("vit")
    with pytest.raises(InputError, match="clip_grad_norm must be a finite number > 0, or None"):
        SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), clip_grad_norm=limit)


def test_a_checkpoint_with_another_limit_is_refused():
    model = make("vit")
    clipping = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), clip_grad_norm=0.1)
    other = make("vit")
    plain = SAM(BASES["sgd"](other.parameters()), other, mask=build(other, "norm"))
    with pytest.raises(InputError, match=r"made with clip_grad_norm=0.1, not None"):
        plain.load_state_dict(clipping.state_dict())


# -- schedules -----------------------------------------------------------------------------------------------

SCHEDULES = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 6),
    "one cycle, with the momentum": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=6),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.3, patience=0),
}


def advance(schedule):
    schedule.step(1.0) if isinstance(schedule, ReduceLROnPlateau) else schedule.step()  # a loss that does not fall


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("on", ["sam", "base"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_move_the_base_optimizer_and_not_the_radius(name, base, on, entry):
    """Learning rate and momentum (or beta) are those of the schedule without SAM, and the steps use them."""

    def settings(optimizer):
        (group,) = optimizer.param_groups
        return group["lr"], group.get("momentum"), group.get("betas")

    def run(schedule_of):
        model = make("vit")
        inner = BASES[base](model.parameters())
        optimizer = SAM(inner, model, mask=build(model, "norm"), rho=0.3)
        advance_schedule = schedule_of(inner, optimizer)
        seen = []
        for batch in batches(5):
            take(optimizer, losses(model), batch, entry)
            seen.append(settings(inner))
            advance_schedule()
            assert optimizer.param_groups[0]["rho"] == 0.3
            assert float(optimizer.stats.radius) == pytest.approx(0.3, rel=1e-6)
        return seen, snapshot(model)

    plain = make("vit")
    reference = BASES[base](plain.parameters())
    schedule = SCHEDULES[name](reference)
    expected = []
    for batch in batches(5):
        losses(plain)(batch).mean().backward()
        reference.step()
        expected.append(settings(reference))
        advance(schedule)

    def scheduled(inner, optimizer):
        schedule = SCHEDULES[name](optimizer if on == "sam" else inner)
        return lambda: advance(schedule)

    def by_hand(inner, optimizer):
        rest = iter(expected)

        def put():
            for key, value in zip(("lr", "momentum", "betas"), next(rest, expected[-1]), strict=True):
                if value is not None:
                    inner.param_groups[0][key] = value

        put()
        return put

    seen, weights = run(scheduled)
    assert seen == expected
    assert len({lr for lr, _, _ in seen}) >= 4
    assert (len({(momentum, betas) for _, momentum, betas in seen}) > 1) == name.startswith("one cycle")
    assert same_bits(weights, run(by_hand)[1])
