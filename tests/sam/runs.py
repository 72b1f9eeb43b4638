"""Short runs that the tests of single methods share: bitwise comparisons, resuming, closed forms on the quadratic."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from masks import Mask, ParamTable
from sam import SAM, Method
from tests.sam.nets import (
    BASES,
    Batch,
    Quadratic,
    Recorder,
    batches,
    buffers,
    build,
    flat,
    losses,
    make,
    mixed_mask,
    quadratic_masks,
    same_bits,
    snapshot,
    state_of,
    take,
)

NETS_AND_BASES = [("resnet", "sgd"), ("resnet", "adamw"), ("vit", "sgd"), ("vit", "adamw")]
MASKS = ("all", "norm", "mixed")
FORMS = ("whole", "index", "dense", "mixed", "all")


def mask_of(model: nn.Module, name: str) -> Mask:
    return mixed_mask(model) if name == "mixed" else build(model, name)


def start(net: str, mask: str, base: str, method: Method | None, **options) -> tuple[nn.Module, SAM]:
    """A model with dropout (and BatchNorm: "resnet"), and SAM around a base optimizer with momentum."""
    model = make(net, dropout=0.2)
    return model, SAM(BASES[base](model.parameters()), model, mask=mask_of(model, mask), method=method, **options)


def go(model: nn.Module, optimizer: SAM, data: Sequence[Batch], entry: str = "step_on") -> list[Tensor]:
    return [take(optimizer, losses(model), batch, entry).detach() for batch in data]


def everything(model: nn.Module, optimizer: SAM) -> tuple:
    return snapshot(model), buffers(model), state_of(optimizer), torch.get_rng_state()


def outcome(net: str, mask: str, base: str, method: Method | None, entry: str = "step_on", **options) -> tuple:
    """Weights, running statistics, the base's state and the random generator after four steps, and the losses."""
    model, optimizer = start(net, mask, base, method, **options)
    torch.manual_seed(5)
    seen = go(model, optimizer, batches(4), entry)
    return (*everything(model, optimizer), seen)


def resumed_and_uninterrupted(net: str, mask: str, base: str, method: Method, **options) -> tuple[list, list]:
    data = batches(6)
    model, optimizer = start(net, mask, base, method, **options)
    torch.manual_seed(5)
    go(model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()), file)
    file.seek(0)
    go(model, optimizer, data[3:])
    end = [*everything(model, optimizer), optimizer.memory.state_dict()]

    weights, state, rng = torch.load(file, weights_only=True)
    model, optimizer = start(net, mask, base, method, **options)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    torch.set_rng_state(rng)
    go(model, optimizer, data[3:])
    return [*everything(model, optimizer), optimizer.memory.state_dict()], end


def check_moves(net: str, mask: str, base: str, method: Method, **options) -> None:
    """No coordinate outside the mask is moved in any pass, some inside are, and all come back bit for bit."""
    model, optimizer = start(net, mask, base, method, **options)
    go(model, optimizer, batches(2))  # what the method remembers
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = snapshot(model)
    recorder = Recorder(model)
    take(optimizer, recorder, batches(3)[2], "step_on")
    assert same_bits(snapshot(model), before)
    keep = dict(zip((row.name for row in ParamTable.from_model(model)), optimizer.mask.dense(), strict=True))
    moved = {name: recorder.weights[-1][name] != w for name, w in before.items()}
    assert not any((moved[name] & ~keep[name]).any() for name in moved)
    assert any(m.any() for m in moved.values())


def passes(net: str, method: Method, entry: str, steps: int = 3) -> tuple[int, int]:
    """Forward and backward passes of that many steps."""
    model, optimizer = start(net, "norm", "sgd", method)
    count = {"forward": 0, "backward": 0}

    def loss_fn(batch: Batch) -> Tensor:
        count["forward"] += 1
        values = losses(model)(batch)
        values.register_hook(lambda _: count.__setitem__("backward", count["backward"] + 1))
        return values

    for batch in batches(steps):
        take(optimizer, loss_fn, batch, entry)
    return count["forward"], count["backward"]


Eps = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def check_quadratic(method: Method, form: str, entry: str, scope: str, eps_of: Eps, *, rho: float = 0.4) -> SAM:
    """Five steps of SGD with momentum and weight decay on changing batches, against numpy.

    Args:
        eps_of: from weights w, gradient g, coordinates that the norm is over, and momentum (0 before the first step)
            to eps before masking.
    """
    model = Quadratic()
    mask = quadratic_masks(model)[form]
    lr, momentum, decay = 0.02, 0.9, 0.1
    base = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=decay)
    optimizer = SAM(base, model, mask=mask, rho=rho, method=method, norm_scope=scope)
    recorder = Recorder(model, model)
    A = model.A.numpy()
    keep = np.concatenate([part.numpy().reshape(-1) for part in mask.dense()])
    over = keep if scope == "masked" else np.ones_like(keep)
    w, velocity = flat(list(model.parameters())), np.zeros(model.NUMEL)
    for t in range(5):
        batch = model.b[[t, (t + 2) % 5]]
        take(optimizer, recorder, batch, entry)
        b = batch.numpy().mean(0)
        eps = np.where(keep, eps_of(w, A @ w - b, over, velocity), 0.0)
        moved = flat(list(recorder.weights[-1].values())) - w
        np.testing.assert_allclose(moved, eps, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(float(optimizer.stats.radius), np.linalg.norm(eps), rtol=1e-11)
        velocity = momentum * velocity + A @ (w + eps) - b + decay * w
        w = w - lr * velocity
        np.testing.assert_allclose(flat(list(model.parameters())), w, rtol=1e-10, atol=1e-12)
    return optimizer
