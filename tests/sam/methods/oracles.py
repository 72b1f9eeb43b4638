"""What single methods must give, in plain numpy on the quadratic, and mSAM by hand on any net."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from masks import Mask
from sam import SAM, Method
from tests.sam.nets import Quadratic, Recorder, flat, quadratic_masks, take

FORMS = ("whole", "index", "dense", "mixed", "all")
"""Masks of :func:`tests.sam.nets.quadratic_masks`."""


@dataclass(frozen=True)
class World:
    """The quadratic in numpy before one step: L_i(w) = w^T A w / 2 - b_i^T w.

    Attributes:
        A: the Hessian.
        b: one row per example of the step's batch.
        keep: the coordinates that the mask keeps.
        over: those that the norm of eps is over.
        rho: radius.
        velocity: the base optimizer's momentum; 0 before the first step.
    """

    A: np.ndarray
    b: np.ndarray
    keep: np.ndarray
    over: np.ndarray
    rho: float
    velocity: np.ndarray

    def gradient(self, w: np.ndarray, rows: Sequence[int] | slice = slice(None)) -> np.ndarray:
        return self.A @ w - self.b[rows].mean(0)

    def eps(self, g: np.ndarray) -> np.ndarray:
        return np.where(self.keep, self.rho * g / np.linalg.norm(g[self.over]), 0)


@dataclass(frozen=True)
class Expected:
    """Of one step: the gradient to step with; eps of its last pass, where that is one; a move after the step, in units
    of the learning rate."""

    gradient: np.ndarray
    eps: np.ndarray | None = None
    after: np.ndarray | float = 0.0


StepFn = Callable[[World, np.ndarray, int], Expected]
"""From the world, the weights and the step's number."""
EpsFn = Callable[[World, np.ndarray, np.ndarray], np.ndarray]
"""From the world, the weights and the gradient to eps before masking."""


def perturbed_by(eps_of: EpsFn) -> StepFn:
    """A step with the gradient at w + eps."""

    def step(world: World, w: np.ndarray, t: int) -> Expected:
        eps = np.where(world.keep, eps_of(world, w, world.gradient(w)), 0.0)
        return Expected(world.gradient(w + eps), eps)

    return step


def assert_closed_form(
    method: Method, form: str, step: StepFn, *, entry: str = "step_on", scope: str = "masked", steps: int = 6
) -> None:
    """Gradients, eps and weights of steps with momentum and weight decay on changing batches equal those of numpy."""
    model = Quadratic()
    mask = quadratic_masks(model)[form]
    lr, momentum, decay, rho = 0.05, 0.9, 0.1, 0.4
    base = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=decay)
    optimizer = SAM(base, model, mask=mask, rho=rho, method=method, norm_scope=scope)
    recorder = Recorder(model, model)
    keep = flat(mask.dense())
    over = keep if scope == "masked" else np.ones_like(keep)
    w, velocity = flat(list(model.parameters())), np.zeros(model.NUMEL)
    for t in range(steps):
        batch = model.b.roll(t, 1)
        take(optimizer, recorder, batch, entry)
        expected = step(World(model.A.numpy(), batch.numpy(), keep, over, rho, velocity), w, t)
        if expected.eps is not None:
            moved = flat(list(recorder.weights[-1].values())) - w
            np.testing.assert_allclose(moved, expected.eps, rtol=1e-10, atol=1e-13)
            np.testing.assert_allclose(float(optimizer.stats.radius), np.linalg.norm(expected.eps), rtol=1e-11)
        np.testing.assert_allclose(
            flat([p.grad for p in model.parameters()]), expected.gradient, rtol=1e-10, atol=1e-12
        )
        velocity = momentum * velocity + expected.gradient + decay * w
        w = w - lr * velocity + lr * expected.after
        np.testing.assert_allclose(flat(list(model.parameters())), w, rtol=1e-10, atol=1e-12)


def perpendicular(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The component of a orthogonal to b, by a QR decomposition."""
    q, _ = np.linalg.qr(b[:, None])
    return a - q[:, 0] * (q[:, 0] @ a)


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
