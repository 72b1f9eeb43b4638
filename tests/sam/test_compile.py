"""Models under torch.compile: the same steps as without, through both entries."""

from __future__ import annotations

import copy

import pytest
import torch

from masks import MaskContext, build_mask
from sam import SAM, Accumulated
from tests.sam.nets import (
    BASES,
    ENTRIES,
    Recorder,
    batches,
    buffers,
    build,
    losses,
    make,
    mixed_mask,
    same_bits,
    snapshot,
    take,
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(net, mask, entry, *, backend=None, given="wrapper", dropout=0.2, dtype=torch.float32, count=3):
    """Weights, running statistics and losses after some steps; SAM is given the compiled model or the bare one."""
    model = make(net, dropout=dropout).to(dtype)
    called = model if backend is None else torch.compile(model, backend=backend)
    chosen = mixed_mask(model) if mask == "mixed" else build(copy.deepcopy(model).float(), mask)
    if given == "wrapper" and mask != "mixed":  # built on the compiled model, whose names have a prefix
        chosen = build_mask(mask, MaskContext(called))
    optimizer = SAM(BASES["sgd"](model.parameters()), called if given == "wrapper" else model, mask=chosen, rho=0.2)
    torch.manual_seed(4)
    seen = []
    for batch in batches(count, dtype=dtype):
        loss = take(optimizer, losses(called), batch, entry)
        seen += [loss.detach(), optimizer.stats.perturbed_loss.detach()]
    return seen, snapshot(model), buffers(model), optimizer.mask


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("net", ["resnet", "vit"])
@pytest.mark.parametrize(("mask", "given"), [("norm", "wrapper"), ("mixed", "module")])
def test_the_eager_backend_changes_no_bit(net, mask, given, entry):
    """With dropout and BatchNorm, and a first pass that is restricted to the mask's tensors."""
    plain = run(net, mask, entry)
    compiled = run(net, mask, entry, backend="eager", given=given)
    assert same_bits(plain[:3], compiled[:3])
    assert plain[3] == compiled[3]  # in the names of the model itself


@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_ahead_of_time_autograd(net):
    """To rounding in float64, without dropout, whose draws it orders differently."""
    plain, compiled = (
        run(net, "norm", "step_on", backend=b, dropout=0.0, dtype=torch.float64) for b in (None, "aot_eager")
    )
    for a, b in zip(plain[1].values(), compiled[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(plain[2].values(), compiled[2].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_it_is_not_compiled_again_for_the_second_pass():
    """Weights that moved in place, accumulated micro-batches and a new mask are no reason to."""
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return module.forward

    model = make("vit")
    compiled = torch.compile(model, backend=counting)
    optimizer = SAM(BASES["sgd"](model.parameters()), compiled, mask=build(model, "norm"), rho=0.2)
    data = batches(3)
    optimizer.step_on(losses(compiled), data[0])
    first = len(graphs)
    assert first >= 1
    optimizer.step_on(losses(compiled), Accumulated(data))
    optimizer.set_mask(build(model, "all"))
    recorder = Recorder(model, losses(compiled))
    optimizer.step_on(recorder, data[1])
    assert len(graphs) == first
    assert any(eps.any() for eps in recorder.eps().values())


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_inductor(net, entry):
    plain, compiled = (run(net, "norm", entry, backend=b, dropout=0.0) for b in (None, "inductor"))
    for a, b in zip(plain[1].values(), compiled[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
