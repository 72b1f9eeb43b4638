"""What every registered method must keep, under every mask and base optimizer."""

from __future__ import annotations

import io
import itertools

import pytest
import torch

from masks import InputError, Mask, ParamTable
from sam import SAM, MethodSpec, build_method, list_methods
from tests.sam.nets import Recorder, batches, buffers, build, losses, make, own_settings, same_bits, snapshot, state_of

# Those of FIXED have a mask of their own, "own" below.
METHODS = [info.name for info in list_methods() if not MethodSpec(info.name).preset]
FIXED = [info.name for info in list_methods() if MethodSpec(info.name).preset]
MASKS = {"all": None, "norm": None, "random": 0.01, "fisher": 0.01}
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, 0.005),
}
QUICK = {("own", "sgd"), ("all", "sgd"), ("norm", "adamw"), ("random", "sgd"), ("fisher", "adamw")}


CASES = [
    pytest.param(*case, marks=[] if case[1:] in QUICK else [pytest.mark.slow], id="-".join(case))
    for case in (*itertools.product(METHODS, MASKS, BASES), *itertools.product(FIXED, ["own"], BASES))
]


def optimizer_of(method, mask, base, *, net="resnet", rho=None, dropout=0.1):
    model = make(net, dropout=dropout)
    spec = MethodSpec.parse(method)
    made = spec.build().prepared(model, make(net, width=3)) if spec.info.needs_model else spec.build()
    if spec.preset:
        options = own_settings(spec, model)
    else:  # beside a method with a mask of its own stands sam under all
        options = {"method": made, "mask": build(model, "all" if mask == "own" else mask, density=MASKS.get(mask))}
    rho = spec.info.rho if rho is None else rho
    optimizer = SAM(BASES[base](model.parameters()), model, rho=rho, **options)
    return model, optimizer, options["mask"]


def run(model, optimizer, data, seed=11):
    torch.manual_seed(seed)
    for batch in data:
        optimizer.step_on(losses(model), batch)


def everything(model, optimizer):
    return snapshot(model), buffers(model), state_of(optimizer.base_optimizer), optimizer.memory.state_dict()


def loss_of(model, data):
    model.eval()
    with torch.no_grad():
        total = torch.cat([losses(model)(batch) for batch in data]).mean().item()
    model.train()
    return total


@pytest.mark.parametrize(("method", "mask", "base"), CASES)
def test_training_lowers_the_loss(method, mask, base):
    # Default radii are for large nets: momentum SAM's 3 is as long as all the weights here.
    rho = min(MethodSpec.parse(method).info.rho, 0.5)
    model, optimizer, _ = optimizer_of(method, mask, base, rho=rho)
    data = batches(2, size=16)
    run(model, optimizer, data)  # running statistics
    before = loss_of(model, data)
    run(model, optimizer, data * 15)
    assert optimizer.skipped_steps == 0
    assert loss_of(model, data) < 0.9 * before


@pytest.mark.parametrize(("method", "mask", "base"), CASES)
def test_only_masked_coordinates_move_and_all_come_back(method, mask, base):
    """At every pass of the step, the weights differ from w on masked coordinates only; a base optimizer that does
    nothing leaves them as they were, bit for bit."""
    model, optimizer, chosen = optimizer_of(method, mask, base)
    data = batches(8, size=8)
    run(model, optimizer, data[:2])  # what the method remembers
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    before = snapshot(model)
    recorder = Recorder(model)
    for batch in data[2:]:  # a method may perturb in every fifth step only
        optimizer.step_on(recorder, batch)
    assert same_bits(snapshot(model), before)
    keep = dict(zip((row.name for row in ParamTable.from_model(model)), chosen.dense(), strict=True))
    moved = 0
    for weights in recorder.weights:
        for name, weight in weights.items():
            outside = torch.where(keep[name], 0, weight - before[name])
            assert not outside.any(), name
            moved += int((weight != before[name]).sum())
    assert moved > 0


@pytest.mark.parametrize(("method", "mask", "base"), CASES)
def test_resume_is_bitwise(method, mask, base):
    data = batches(7, size=8)
    model, optimizer, _ = optimizer_of(method, mask, base)
    run(model, optimizer, data)
    expected = everything(model, optimizer)

    model, optimizer, _ = optimizer_of(method, mask, base)
    run(model, optimizer, data[:4])
    rng = torch.get_rng_state()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model, optimizer, _ = optimizer_of(method, mask, base)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(rng)
    for batch in data[4:]:
        optimizer.step_on(losses(model), batch)
    assert same_bits(everything(model, optimizer), expected)


@pytest.mark.parametrize(("method", "mask", "base"), CASES)
def test_differs_from_the_base_optimizer_and_from_sam(method, mask, base):
    """Every method at its defaults is something of its own (a setting that silently does nothing would not be)."""
    data = batches(6, size=8)
    results = {}
    rho = MethodSpec.parse(method).info.rho
    for name, radius in ((method, rho), ("sam", rho), ("sam", 0.0)):
        model, optimizer, _ = optimizer_of(name, mask, base, rho=radius)
        run(model, optimizer, data)
        results[name, radius] = snapshot(model)
    assert not same_bits(results[method, rho], results["sam", 0.0])
    if method != "sam":
        assert not same_bits(results[method, rho], results["sam", rho])


@pytest.mark.parametrize(("method", "mask", "base"), CASES)
def test_memory_is_as_stated(method, mask, base):
    """What is kept from step to step, in entries; the registry states it per masked coordinate or per parameter."""
    model, optimizer, chosen = optimizer_of(method, mask, base)
    run(model, optimizer, batches(3, size=8))
    info = MethodSpec.parse(method).info
    entries = optimizer.memory.nbytes / 4
    # A tensor in the dense form holds all its entries; see masks.region.
    region = sum(w.numel() for w in optimizer._region.weights())
    stated = info.state_per_masked * region + info.state_per_parameter * chosen.numel
    assert entries == stated


def test_a_tensor_in_the_dense_form_is_remembered_whole():
    model = make("resnet")
    mask = build(model, "random", density=0.5)
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=mask, method=build_method("friendly_sam"))
    run(model, optimizer, batches(1))
    touched = sum(count.row.numel for count in mask.per_layer() if count.kept)
    assert optimizer.memory.nbytes == 4 * touched > 4 * mask.num_kept


@pytest.mark.parametrize("name", FIXED)
def test_a_method_with_a_mask_of_its_own_takes_no_other(name):
    model, spec = make("resnet"), MethodSpec(name)
    own = own_settings(spec, model)
    hand_made = Mask(own["mask"].table, own["mask"].parts)
    empty = Mask(own["mask"].table, (False,) * len(own["mask"].table))

    def start(**changes):
        return SAM(BASES["sgd"](model.parameters()), model, **(own | changes))

    for mask in (build(model, "all"), hand_made):
        with pytest.raises(InputError, match=r"has a mask of its own, .*; build it by MaskSpec.parse"):
            start(mask=mask)
    other = {"full": "masked", "masked": "full"}[own["norm_scope"]]
    with pytest.raises(InputError, match=f'this method has norm_scope="{own["norm_scope"]}", got "{other}"'):
        start(norm_scope=other)
    optimizer = start(mask=empty)
    with pytest.raises(InputError, match="has a mask of its own"):
        optimizer.set_mask(hand_made)
    assert optimizer.mask is empty
    optimizer.set_mask(own["mask"])
    run(model, optimizer, batches(1))


def test_options_of_the_mask_of_a_method_count():
    model = make("resnet")
    own = own_settings(MethodSpec.parse("ssam_d"), model)
    with pytest.raises(InputError, match=r"mask of its own, dynamic:.*drop_rate=0.3.*this one is dynamic with"):
        SAM(BASES["sgd"](model.parameters()), model, **own | {"method": build_method("ssam_d", drop_rate=0.3)})


def test_names_options_and_texts():
    for info in list_methods():
        assert info.summary
        assert info.source
        assert info.passes
        assert info.tuned_on
        assert info.rho > 0
        spec = MethodSpec(info.name)
        assert str(spec) == info.name
        assert MethodSpec.parse(str(spec)) == spec


def test_unknown_names_and_options_are_refused():
    with pytest.raises(InputError, match="unknown method 'smam'; did you mean"):
        MethodSpec.parse("smam")
    with pytest.raises(InputError, match="unknown option of method asam 'eat'; did you mean eta"):
        MethodSpec.parse("asam:eat=1")
    with pytest.raises(InputError, match=r"option eta of method asam must be .*, got 'much'"):
        MethodSpec.parse("asam:eta=much")
    with pytest.raises(InputError, match="option 'eta' of method asam must be written option=value"):
        MethodSpec.parse("asam:eta")
    model, method = make("resnet"), build_method("sam")
    with pytest.raises(InputError, match="rule is a part of the method"):
        SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "all"), rule=method.rule, method=method)


def test_options_reach_the_method():
    assert build_method("asam", p="inf", eta=0.5) != build_method("asam")
    assert (
        MethodSpec.parse("asam:scale=layerwise:p=inf").build().rule
        == build_method("asam", scale="layerwise", p="inf").rule
    )
