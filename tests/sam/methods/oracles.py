"""What the tests of single methods share: identities with SAM, steps in numpy, counts of passes, mSAM by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from masks import Mask
from sam import SAM, Method, MethodSpec
from tests.sam.nets import (
    BASES,
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

FORMS = ("whole", "index", "dense", "mixed", "all")
IDENTITY_CASES = list(itertools.product(("resnet", "vit"), ("all", "norm", "mixed"), ("sgd", "adamw")))


def trained(method: Method, net: str, mask: str, base: str, *, entry: str = "step_on", steps: int = 3) -> tuple:
    """Everything that some steps leave behind, with dropout and, on the ResNet, BatchNorm."""
    model = make(net, dropout=0.2)
    chosen = mixed_mask(model) if mask == "mixed" else build(model, mask)
    optimizer = SAM(BASES[base](model.parameters()), model, mask=chosen, rho=0.3, method=method)
    torch.manual_seed(5)
    stats, radii = [], []
    for batch in batches(steps):
        take(optimizer, losses(model), batch, entry)
        stats.append((optimizer.stats.loss, optimizer.stats.perturbed_loss.detach()))
        radii.append(optimizer.stats.radius.item())
    return snapshot(model), buffers(model), state_of(optimizer), stats, torch.get_rng_state(), radii


def assert_same_training(a: Method, b: Method, net: str, mask: str, base: str, **options: Any) -> None:
    (*one, radii), (*other, others) = (trained(method, net, mask, base, **options) for method in (a, b))
    assert same_bits(one, other)
    assert radii == pytest.approx(others, rel=3e-7)  # a rule's is that of eps before it was rounded


@dataclass
class World:
    """The quadratic in numpy: L_i(w) = w^T A w / 2 - b_i^T w, and the coordinates that a mask keeps."""

    A: np.ndarray
    b: np.ndarray
    keep: np.ndarray
    rho: float

    def gradient(self, w: np.ndarray, rows: Sequence[int] | slice = slice(None)) -> np.ndarray:
        return self.A @ w - self.b[rows].mean(0)

    def eps(self, g: np.ndarray) -> np.ndarray:
        return np.where(self.keep, self.rho * g / np.linalg.norm(g[self.keep]), 0)


def perpendicular(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The component of a orthogonal to b, by a QR decomposition."""
    q, _ = np.linalg.qr(b[:, None])
    return a - q[:, 0] * (q[:, 0] @ a)


StepFn = Callable[[World, np.ndarray, int], tuple[np.ndarray, np.ndarray | float]]
"""From the world, the weights and the step's number: the gradient to step with, and a move after the step."""


def assert_closed_form(method: Method, form: str, step: StepFn, *, entry: str = "step_on", steps: int = 6) -> None:
    """Gradients and weights of steps with momentum and weight decay equal those of plain numpy."""
    model = Quadratic()
    mask = quadratic_masks(model)[form]
    lr, momentum, decay, rho = 0.05, 0.9, 0.1, 0.4
    base = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=decay)
    optimizer = SAM(base, model, mask=mask, rho=rho, method=method)
    world = World(model.A.numpy(), model.b.numpy(), flat(mask.dense()), rho)
    w, velocity = flat(list(model.parameters())), 0.0
    for t in range(steps):
        take(optimizer, model, model.b, entry)
        g, after = step(world, w, t)
        np.testing.assert_allclose(flat([p.grad for p in model.parameters()]), g, rtol=1e-10, atol=1e-12)
        velocity = momentum * velocity + g + decay * w
        w = w - lr * velocity + lr * after
        np.testing.assert_allclose(flat(list(model.parameters())), w, rtol=1e-10, atol=1e-12)


def measured_passes(spec: str, *, steps: int, size: int = 12) -> float:
    """Forward and backward passes over the whole batch per step; a forward pass without a gradient counts a third."""
    model = make("resnet")
    method = MethodSpec.parse(spec).build()
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=build(model, "all"), method=method)
    seen = []

    def counting(batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(len(batch[1]) * (1 if torch.is_grad_enabled() else 1 / 3))
        return losses(model)(batch)

    for batch in batches(steps, size=size):
        optimizer.step_on(counting, batch)
    return sum(seen) / size / steps


def assert_passes_as_stated(spec: str, *, steps: int) -> None:
    parsed = MethodSpec.parse(spec)
    assert measured_passes(spec, steps=steps) == pytest.approx(parsed.info.num_passes(**parsed.options))


def recorded_eps(optimizer: SAM, model: Quadratic, *, first: int = 0, second: int = 1) -> np.ndarray:
    """eps of one step on the quadratic."""
    recorder = Recorder(model, model)
    optimizer.step_on(recorder, model.b)
    return flat(list(recorder.eps(first, second).values()))


def micro_batch_gradient(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], parts: Sequence[Any], mask: Mask, rho: float
) -> list[Tensor]:
    """The gradient that mSAM steps with, straight from its definition, on copies of the model.

    ``sum_i |B_i|/|B| grad L_{B_i}(w + eps_i)``, ``eps_i = rho m g_i / ||m g_i||``. The model is left as it is; it
    should draw no random numbers. For data-parallel training with a perturbation per process, ``parts`` are the
    batches of the processes.

    Args:
        model: in the mode and with the statistics of the step.
        loss_fn: (model, part) to per-example losses.
        parts: the parts of the batch.
        mask: which coordinates are perturbed.
        rho: radius.

    Returns:
        One tensor per parameter that asks for a gradient, in their order.
    """
    total: list[Tensor] = []
    count = 0
    for part in parts:
        twin = copy.deepcopy(model)
        params = [p for p in twin.parameters() if p.requires_grad]
        g = torch.autograd.grad(loss_fn(twin, part).mean(), params)
        kept = [torch.where(m, x, 0) for m, x in zip(mask.dense(), g, strict=True)]
        norm = torch.sqrt(sum((x.double() ** 2).sum() for x in kept))
        with torch.no_grad():
            for p, x in zip(params, kept, strict=True):
                p.add_((rho / norm * x.double()).to(p.dtype))
        loss = loss_fn(twin, part)
        h = torch.autograd.grad(loss.mean(), params)
        total = [t + x * len(loss) for t, x in zip(total or [0.0] * len(h), h, strict=True)]
        count += len(loss)
    return [t / count for t in total]
