"""mu-P-squared: its formula, and that perturbations do not depend on the width where SAM's do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from masks import InputError, Mask, ParamTable
from sam import SAM, MethodSpec, build_method, mup_param_groups
from tests.sam.nets import BASES, ENTRIES, Recorder, build, make, mixed_mask, same_bits, snapshot, take
from tests.sam.runs import CASES, MASKS, check_moves, outcome, passes, resumed_and_uninterrupted
from tests.sam.test_mup import WIDTHS, batch, exponents, mlp, mup_mlp, sizes_and_effects

WIDER = {"resnet": {"width": 2}, "vit": {"dim": 4}}
MOVE = {"input": lambda n: n, "hidden": lambda n: 1.0, "output": lambda n: 1 / n, "fixed": lambda n: 1.0}
NORM = {
    "paper": {
        "input": lambda n: n**0.5,
        "hidden": lambda n: n**-0.5,
        "output": lambda n: n**-1.5,
        "fixed": lambda n: 1.0,
    },
    "balanced": {
        "input": lambda n: n**0.5,
        "hidden": lambda n: 1.0,
        "output": lambda n: n**-0.5,
        "fixed": lambda n: 1.0,
    },
}
ROLES = {
    "0.weight": "input",
    "0.bias": "input",
    "2.weight": "hidden",
    "2.bias": "input",
    "4.weight": "output",
    "4.bias": "fixed",
}


def loss_of(model):
    return lambda data: F.cross_entropy(model(data[0]), data[1], reduction="none")


def prepared(net, **options):
    """For the nets of `start`, from bases three times (resnet) or twice (vit) as narrow."""
    return build_method("mup_sam", **options).prepared(make(net), make(net, **WIDER[net]))


@pytest.mark.parametrize("weights", ["paper", "balanced"])
@pytest.mark.parametrize(("net", "mask", "base"), CASES)
def test_at_the_base_width_it_is_sam(net, mask, base, weights):
    method = build_method("mup_sam", norm_weights=weights).prepared(make(net), make(net))
    sam = outcome(net, mask, base, build_method("sam"), rho=0.2)
    assert same_bits(outcome(net, mask, base, method, rho=0.2), sam)
    assert not same_bits(outcome(net, mask, base, prepared(net, norm_weights=weights), rho=0.2)[0], sam[0])


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("scope", ["masked", "full"])
@pytest.mark.parametrize("mask", ["all", "mixed"])
@pytest.mark.parametrize("weights", ["paper", "balanced"])
def test_closed_form(weights, mask, scope, entry):
    """eps_l = rho_l g_l / ||(s_l g_l)_l||, from the table of exponents, at n = 3."""
    model, n = mlp(12), 3.0
    chosen = build(model, "all") if mask == "all" else mixed_mask(model)
    method = build_method("mup_sam", norm_weights=weights).prepared(model, mlp(4))
    base = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = SAM(base, model, mask=chosen, rho=0.3, method=method, norm_scope=scope)
    keep = dict(zip((row.name for row in ParamTable.from_model(model)), chosen.dense(), strict=True))
    recorder = Recorder(model, loss_of(model))
    for _ in range(3):
        grads = torch.autograd.grad(loss_of(model)(batch()).mean(), list(model.parameters()))
        gradient = dict(zip(keep, grads, strict=True))
        counted = {k: g * keep[k] if scope == "masked" else g for k, g in gradient.items()}
        norm = math.sqrt(sum(float((NORM[weights][ROLES[k]](n) * g).square().sum()) for k, g in counted.items()))
        before = snapshot(model)
        take(optimizer, recorder, batch(), entry)
        for name, g in gradient.items():
            eps = 0.3 * MOVE[ROLES[name]](n) * g * keep[name] / norm
            torch.testing.assert_close(recorder.weights[-1][name] - before[name], eps, rtol=1e-9, atol=1e-14)


def perturbations(width, seed, name, weights="balanced"):
    """Size and effect per tensor after three steps with the learning rates of muP."""
    model, base = mup_mlp(width, seed)
    method = (
        build_method("sam") if name == "sam" else build_method("mup_sam", norm_weights=weights).prepared(model, base)
    )
    groups = mup_param_groups(model, base, 0.1, optimizer="sgd")
    mask = Mask(ParamTable.from_model(model), (True,) * 6)
    optimizer = SAM(torch.optim.SGD(groups, momentum=0.9), model, mask=mask, rho=0.1, method=method)
    for _ in range(3):
        optimizer.step_on(loss_of(model), batch())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    recorder = Recorder(model, loss_of(model))
    optimizer.step_on(recorder, batch())
    return sizes_and_effects(model, recorder.eps())


def test_perturbations_do_not_depend_on_the_width():
    """Widths 32 to 512: exponents near 0 for every tensor, in size relative to the weights (spectral norms) and in
    effect on the outputs. Not for the last bias, whose three entries have a gradient of little but noise."""
    found = exponents(lambda w, s: perturbations(w, s, "mup_sam"))
    del found["4.bias"]
    assert max(abs(slope).max() for slope in found.values()) < 0.25, found


def test_sam_in_wide_nets_perturbs_only_the_last_layer():
    """Exponents -3/2, -1/2 and 1/2 of the effects of input, hidden and output weights, in the limit."""
    found = exponents(lambda w, s: perturbations(w, s, "sam"))
    for name, limit in (("0.weight", -1.5), ("2.weight", -0.5), ("4.weight", 0.5)):
        assert found[name] == pytest.approx([limit] * 2, abs=0.4), found


def test_the_norm_of_the_paper_agrees_once_its_hidden_terms_have_faded():
    """Its terms of hidden and output layers fall as n^(-1/2) and faster."""
    wide, wider = (perturbations(width, 0, "mup_sam", "paper") for width in WIDTHS[-2:])
    for name in ("0.weight", "2.weight", "4.weight"):
        assert wider[name] == pytest.approx(wide[name], rel=0.35), name


@pytest.mark.parametrize("mask", MASKS)
def test_the_rest_of_the_contract(mask):
    method = prepared("resnet")
    resumed, uninterrupted = resumed_and_uninterrupted("resnet", mask, "sgd", method, rho=0.2)
    assert same_bits(resumed, uninterrupted)
    check_moves("resnet", mask, "sgd", method, rho=0.2)


@pytest.mark.parametrize("entry", ENTRIES)
def test_two_passes(entry):
    assert passes(prepared("resnet"), entry) == (2, 2)


def test_other_ratios_are_other_methods():
    """A checkpoint of one is refused by the other."""
    model = make("resnet")
    one, two = (
        SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "norm"), method=method)
        for method in (prepared("resnet"), build_method("mup_sam").prepared(make("resnet"), make("resnet", width=3)))
    )
    with pytest.raises(InputError, match="the checkpoint was made with method="):
        two.load_state_dict(one.state_dict())


def test_what_is_refused():
    model = make("resnet")
    base = BASES["sgd"](model.parameters())
    with pytest.raises(InputError, match=r"use the method that build_method\('mup_sam'\)\.prepared"):
        SAM(base, model, mask=build(model, "all"), method=build_method("mup_sam"))
    linear = build_method("mup_sam").prepared(*(torch.nn.Linear(3, width) for width in (4, 2)))
    with pytest.raises(InputError, match=r"mup_sam was prepared for another model, without conv1\.weight"):
        SAM(base, model, mask=build(model, "norm"), method=linear)
    with pytest.raises(InputError, match="base_width of mup_sam must be at least 1, got 0"):
        build_method("mup_sam", base_width=0)


def test_roles_can_be_given_and_other_methods_need_no_preparation():
    model = make("resnet")
    roles = {"fc.weight": "hidden"}
    method = build_method("mup_sam").prepared(model, make("resnet", width=2), roles=roles)
    assert method.rule.metric.shapes.roles["fc.weight"] == "hidden"
    for name in ("sam", "asam", "friendly_sam"):
        assert build_method(name).prepared(model, make("resnet", width=2)) == build_method(name)
    info = MethodSpec.parse("mup_sam:base_width=16:norm_weights=balanced").info
    assert info.needs_model
