"""An interrupted and resumed run equals an uninterrupted one, bit for bit; what does not fit is refused."""

from __future__ import annotations

import io

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from masks import InputError, Mask, ParamTable, list_masks
from sam import SAM, Rule
from tests.sam.nets import BASES, ENTRIES, batches, build, losses, make, mixed_mask, same_bits, state_of, take


def through_a_file(state):
    """Saved and read back as a checkpoint from an untrusted source would be."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def new_run(net, mask, base, seed=0, **options):
    model = make(net, dropout=0.3, seed=seed)
    optimizer = SAM(BASES[base](model.parameters()), model, mask=mask, rho=0.2, **options)
    return model, optimizer


def mask_of(net, name):
    model = make(net)
    return mixed_mask(model) if name == "mixed" else build(model, name)


def resumed_and_uninterrupted(net, name, base, entry, **options):
    data = batches(5)
    mask = mask_of(net, name)
    model, optimizer = new_run(net, mask, base, **options)
    schedule = CosineAnnealingLR(optimizer, 5)
    torch.manual_seed(3)
    for i, batch in enumerate(data):
        if i == 3:
            saved = through_a_file(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "rng": torch.get_rng_state(),
                }
            )
        take(optimizer, losses(model), batch, entry)
        schedule.step()
    end = model.state_dict(), state_of(optimizer), optimizer.skipped_steps, torch.get_rng_state()

    other, again = new_run(net, mask_of(net, name), base, seed=1, **options)
    schedule = CosineAnnealingLR(again, 5)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    torch.set_rng_state(saved["rng"])
    for batch in data[3:]:
        take(again, losses(other), batch, entry)
        schedule.step()
    return (other.state_dict(), state_of(again), again.skipped_steps, torch.get_rng_state()), end


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", [*(info.name for info in list_masks()), "mixed"])
def test_resume_is_bitwise(name, base, entry):
    """Every registered mask, with dropout, BatchNorm, momentum and a schedule."""
    resumed, uninterrupted = resumed_and_uninterrupted("resnet", name, base, entry)
    assert same_bits(list(resumed), list(uninterrupted))


@pytest.mark.parametrize("base", sorted(BASES))
@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_resume_is_bitwise_for_every_base(net, base):
    resumed, uninterrupted = resumed_and_uninterrupted(
        net, "mixed", base, "step_on", rule=Rule.named("elementwise_l2"), norm_scope="full", norm_statistics="both"
    )
    assert same_bits(list(resumed), list(uninterrupted))


def test_the_count_of_skipped_steps_survives():
    model, optimizer = new_run("resnet", mask_of("resnet", "norm"), "sgd_fused")
    for scale in (1.0, torch.nan, torch.nan):
        optimizer.step_on(lambda batch, scale=scale: losses(model)(batch) * scale, batches()[0])
    _, again = new_run("resnet", mask_of("resnet", "norm"), "sgd_fused")
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.skipped_steps == again.skipped_steps == 2


def test_the_state_is_a_copy_of_nothing_that_trains_on():
    """Through a file: the run that saved does not change what was saved."""
    model, optimizer = new_run("resnet", mask_of("resnet", "norm"), "sgd")
    optimizer.step_on(losses(model), batches()[0])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    size = len(buffer.getvalue())
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size < 2 * parameters + 100_000  # momentum and a mask, not the model


# -- one truth after loading ---------------------------------------------------------------------------------


def loaded():
    model, optimizer = new_run("resnet", mask_of("resnet", "norm"), "sgd")
    optimizer.step_on(losses(model), batches()[0])
    optimizer.param_groups[0]["lr"] = 0.123
    other, again = new_run("resnet", mask_of("resnet", "norm"), "sgd")
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    return other, again


def test_groups_and_state_are_still_the_base_optimizers_own():
    _, optimizer = loaded()
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.123
    assert optimizer.param_groups[0]["rho"] == 0.2
    assert len(optimizer.state) == 11


@pytest.mark.parametrize("on", ["sam", "base"])
def test_a_scheduler_made_after_loading_moves_both(on):
    model, optimizer = loaded()
    schedule = CosineAnnealingLR(optimizer if on == "sam" else optimizer.base_optimizer, 4)
    before = model.fc.weight.detach().clone()
    for _ in range(4):
        optimizer.step_on(losses(model), batches()[0])
        schedule.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert not same_bits(before, model.fc.weight.detach())
    before = model.fc.weight.detach().clone()
    optimizer.step_on(losses(model), batches()[0])
    torch.testing.assert_close(before, model.fc.weight.detach(), rtol=0, atol=1e-9)


def test_a_state_loaded_into_the_base_optimizer_is_seen():
    """Also one of a plain run, which knows no radius."""
    model, optimizer = new_run("resnet", mask_of("resnet", "norm"), "sgd")
    plain = BASES["sgd"](make("resnet").parameters())
    plain.param_groups[0]["lr"] = 0.321
    optimizer.base_optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["rho"]) == (0.321, 0.2)
    optimizer.step_on(losses(model), batches()[0])
    assert float(optimizer.stats.radius) == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize(("first", "second"), [("adamw", "adamw_fused"), ("adamw_fused", "adamw")])
def test_fused_and_unfused_checkpoints_are_exchangeable(first, second):
    mask = mask_of("resnet", "norm")
    model, optimizer = new_run("resnet", mask, first)
    optimizer.step_on(losses(model), batches()[0])
    _, again = new_run("resnet", mask, second)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    for scale in (1.0, torch.nan, 1.0):
        again.step_on(lambda batch, scale=scale: losses(again.model)(batch) * scale, batches()[0])
    assert again.skipped_steps == 1


# -- refusals ------------------------------------------------------------------------------------------------


def everything(model, optimizer):
    base = optimizer.base_optimizer
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        state_of(optimizer),
        [{k: v for k, v in group.items() if k != "params"} for group in base.param_groups],
        optimizer.mask.digest(),
        optimizer.skipped_steps.clone(),
        optimizer.param_groups is base.param_groups,
        optimizer.state is base.state,
    )


def trained(name="norm", base="sgd", net="resnet", **options):
    model, optimizer = new_run(net, mask_of(net, name), base, **options)
    optimizer.step_on(losses(model), batches()[0])
    return model, optimizer


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("make_state", "message"),
    [
        (
            lambda: trained("random")[1].state_dict(),
            "made with another mask: digest [0-9a-f]{16} there, [0-9a-f]{16} here",
        ),
        (
            lambda: trained(rule=Rule.named("linf"))[1].state_dict(),
            r"made with method=Method\(rule=Rule\(.*p=inf\).*, not Method\(rule=Rule\(.*p=2\)",
        ),
        (lambda: trained(norm_scope="full")[1].state_dict(), "made with norm_scope=full, not masked"),
        (lambda: trained(norm_statistics="both")[1].state_dict(), "made with norm_statistics=both, not first"),
        (lambda: trained(replay_rng=False)[1].state_dict(), "made with replay_rng=False, not True"),
        (lambda: trained(base="adamw")[1].state_dict(), "made with base_optimizer=AdamW, not SGD"),
        (lambda: trained(net="vit")[1].state_dict(), "the checkpoint is of another model: parameter conv1.weight"),
        (lambda: {}, "not a checkpoint of SAM: it needs the keys base, mask"),
        (lambda: [1], "not a checkpoint of SAM"),
        (lambda: torch.optim.SGD(make("resnet").parameters(), 0.1).state_dict(), "not a checkpoint of SAM"),
        (lambda: without(trained()[1].state_dict(), "settings"), "not a checkpoint of SAM"),
        (lambda: {**trained()[1].state_dict(), "version": 99}, "checkpoint version 99; this version reads 3"),
        (lambda: {**trained()[1].state_dict(), "base": {"state": {}, "param_groups": []}}, "state does not fit"),
        (lambda: {**trained()[1].state_dict(), "base": {}}, "state does not fit"),
        (lambda: {**trained()[1].state_dict(), "base": None}, "not a checkpoint of SAM"),
        (lambda: {**trained()[1].state_dict(), "mask": {}}, "not the state of a mask"),
        (lambda: {**trained()[1].state_dict(), "mask": 3}, "not a checkpoint of SAM"),
        (lambda: {**trained()[1].state_dict(), "settings": None}, "not a checkpoint of SAM"),
        (lambda: {**trained()[1].state_dict(), "skipped_steps": "many"}, "not a checkpoint of SAM"),
    ],
)
def test_refused_checkpoints_change_nothing(make_state, message):
    model, optimizer = trained()
    before = everything(model, optimizer)
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(make_state())
    assert same_bits(everything(model, optimizer), before)
    optimizer.step_on(losses(model), batches()[0])


def test_both_digests_are_named():
    _, optimizer = trained("norm")
    _, other = trained("random")
    with pytest.raises(InputError) as error:
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.mask.digest()[:16] in str(error.value)
    assert other.mask.digest()[:16] in str(error.value)
    assert "adopt_mask=True" in str(error.value)


def test_adopting_the_checkpoints_mask():
    """...continues as the run that saved it would have."""
    data = batches(3)
    model, optimizer = trained("mixed")
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    torch.manual_seed(4)
    for batch in data:
        optimizer.step_on(losses(model), batch)
    other, again = new_run("resnet", mask_of("resnet", "norm"), "sgd", seed=1)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"], adopt_mask=True)
    assert again.mask == optimizer.mask
    torch.manual_seed(4)
    for batch in data:
        again.step_on(losses(other), batch)
    assert same_bits(model.state_dict(), other.state_dict())


def test_adopting_still_refuses_other_models_and_rules():
    model, optimizer = trained()
    before = everything(model, optimizer)
    for other in (trained(net="vit"), trained("random", rule=Rule.named("linf"))):
        with pytest.raises(InputError):
            optimizer.load_state_dict(other[1].state_dict(), adopt_mask=True)
    assert same_bits(everything(model, optimizer), before)


def test_adopting_a_mask_of_parameters_that_are_not_held_changes_nothing():
    model = make("resnet")
    table = ParamTable.from_model(model)
    held = [p for n, p in model.named_parameters() if not n.startswith("fc")]
    fc = Mask(table, tuple(row.name.startswith("fc") for row in table))
    twin = make("resnet")
    twin_held = list(twin.parameters())[:9]
    other = SAM(torch.optim.SGD([*twin_held[:7], *list(twin.parameters())[9:]], 0.3), twin, mask=fc)
    optimizer = SAM(torch.optim.SGD(held, 0.1), model, mask=build(model, "norm"))
    before = everything(model, optimizer)
    with pytest.raises(InputError, match="touches 2 parameters that the base optimizer does not hold"):
        optimizer.load_state_dict(other.state_dict(), adopt_mask=True)
    assert same_bits(everything(model, optimizer), before)
