"""What only an accelerator shows: no waiting for the device, and the same numbers as on the CPU."""

from __future__ import annotations

import io

import pytest
import torch

from sam import SAM
from tests.sam.nets import BASES, ENTRIES, RULES_AND_SCOPES, batches, build, losses, make, mixed_mask, take
from tests.sam.nets import RULES as RULES_BY_NAME

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(device, batch):
    return tuple(t.to(device) for t in batch)


def run(device, base="sgd", name="mixed", steps=2, entry="step_on", dropout=0.0, dtype=torch.float64, **options):
    mask = mixed_mask(make("resnet")) if name == "mixed" else build(make("resnet"), name)
    model = make("resnet", dropout=dropout).to(device, dtype)
    optimizer = SAM(BASES[base](model.parameters()), model, mask=mask, rho=0.2, **options)
    for batch in batches(steps, dtype=dtype):
        take(optimizer, losses(model), on(device, batch), entry)
    return model, optimizer


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["norm", "random", "mixed", "all", "none"])
@pytest.mark.parametrize("base", ["sgd_fused", "adamw_fused"])
def test_a_step_never_waits_for_the_device(base, name, entry):
    """With a fused base optimizer, from its second step on; a read of a device value would raise."""
    model, optimizer = run("cuda", base, name, steps=1, dropout=0.3, dtype=torch.float32)
    data = on("cuda", batches()[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            take(optimizer, losses(model), data, entry)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(optimizer.stats.finite)


@pytest.mark.parametrize(("rule", "scope"), RULES_AND_SCOPES)
@pytest.mark.parametrize("name", ["norm", "mixed", "all"])
def test_cpu_and_cuda_agree(name, rule, scope):
    a, on_cpu = run("cpu", name=name, rule=RULES_BY_NAME[rule], norm_scope=scope)
    b, on_cuda = run("cuda", name=name, rule=RULES_BY_NAME[rule], norm_scope=scope)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y.cpu(), rtol=1e-8, atol=1e-10)
    for field in ("loss", "perturbed_loss", "radius"):
        x, y = getattr(on_cpu.stats, field), getattr(on_cuda.stats, field).cpu()
        torch.testing.assert_close(x.detach().double(), y.detach().double(), rtol=1e-8, atol=1e-10)


def test_dropout_is_replayed_on_the_device():
    """At radius 0 both passes give the same loss, dropout or not."""
    _, optimizer = run("cuda", dropout=0.5, dtype=torch.float32)
    optimizer.param_groups[0]["rho"] = 0.0
    model = optimizer.model
    optimizer.step_on(losses(model), on("cuda", batches()[0]))
    assert optimizer.stats.loss == optimizer.stats.perturbed_loss
    optimizer.replay_rng = False
    optimizer.step_on(losses(model), on("cuda", batches()[0]))
    assert optimizer.stats.loss != optimizer.stats.perturbed_loss


@pytest.mark.parametrize("base", ["sgd", "sgd_fused", "adamw_fused"])
def test_a_nonfinite_gradient_skips_the_step(base):
    model, optimizer = run("cuda", base, dtype=torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step_on(lambda batch: losses(model)(batch) * torch.nan, on("cuda", batches()[0]))
    assert all(torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))
    assert optimizer.skipped_steps.item() == 1


def test_a_checkpoint_read_onto_the_device_loads():
    """`torch.load(map_location="cuda")` moves the mask's bits, too."""
    _, optimizer = run("cuda")
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    _, again = run("cuda", steps=1)
    again.load_state_dict(torch.load(buffer, map_location="cuda", weights_only=True))
    again.step_on(losses(again.model), on("cuda", batches(dtype=torch.float64)[0]))


def test_selection_on_the_device_is_the_cpus():
    """Builders give the same mask wherever the model lies."""
    for name in ("norm", "random", "magnitude"):
        assert build(make("resnet"), name) == build(make("resnet").cuda(), name)
