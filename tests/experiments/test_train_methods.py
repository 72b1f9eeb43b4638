"""Every registered method in a run: it learns, twice the same, and interrupted and resumed at any place the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.build import initial_model
from experiments.config import RunConfig
from experiments.data import ImageSet
from experiments.resume import Checkpointing, Interrupted
from experiments.seeds import derive_seed
from experiments.split import make_split
from experiments.train import Trained, result_of, train_run
from masks import Mask
from sam import SAM, MethodSpec, list_methods
from tests.experiments.by_hand import same_weights

CPU = torch.device("cpu")
Tiny = Callable[..., RunConfig]
NAMES = [info.name for info in list_methods()]
STEPS = 4
"""Per epoch: 100 images in batches of 32."""


def settings(name: str) -> dict[str, Any]:
    """A run of a method that is small, and stable at its radius; those with a mask of their own have theirs."""
    spec = MethodSpec(name)
    changes: dict[str, Any] = {"method": name, "rho": spec.info.rho / 10 if name == "universal_sam" else spec.info.rho}
    if name == "momentum_sam":
        changes["rho"] = 0.3
    if name == "mup_sam":
        changes |= {"method": "mup_sam:base_width=4", "width": 8, "model": "mlp", "mask": "all", "lr": 0.3}
    elif "mask" not in spec.preset:
        changes["mask"] = "all"
    return changes


# -- it learns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_method_learns_and_twice_the_same(tiny: Tiny, name: str) -> None:
    config = tiny(**{"epochs": 6, "lr": 0.05, **settings(name)})
    one, other = (train_run(config, CPU) for _ in range(2))
    assert same_weights(one.model, other.model)
    assert json.dumps(result_of(one)) == json.dumps(result_of(other))
    assert one.diverged is None
    assert one.history[-1].loss < 0.97 * one.history[0].loss
    assert one.history[-1].radius > 0
    base = train_run(replace(config, method="sam", mask="none", norm_scope="masked"), CPU)
    assert not same_weights(one.model, base.model)


def test_the_seed_of_a_method_is_the_runs(tiny: Tiny) -> None:
    runs = [train_run(tiny(method="esam", mask="all", rho=0.2, seed=seed, epochs=1), CPU) for seed in (0, 1)]
    seeds = [run.sam.memory.generator.initial_seed() for run in runs]
    assert seeds == [derive_seed(seed, "method") for seed in (0, 1)]


def test_at_the_base_width_mup_sam_is_sam(tiny: Tiny) -> None:
    common = {"model": "mlp", "width": 8, "mask": "all", "rho": 0.2, "epochs": 2}
    sam, mup = (train_run(tiny(method=m, **common), CPU) for m in ("sam", "mup_sam:base_width=8"))
    assert same_weights(sam.model, mup.model)
    assert sam.history == mup.history
    assert not same_weights(sam.model, train_run(tiny(method="mup_sam:base_width=4", **common), CPU).model)


# -- against loops written here, in float64 -----------------------------------------------------------------


def by_hand(
    config: RunConfig, data: ImageSet, eps: Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]
) -> tuple[list[Tensor], list[float], list[float]]:
    """One epoch of SGD with momentum, perturbed by ``eps(weights, gradients, velocity)``: weights, losses at w, at
    w + eps."""
    model = initial_model(config, data).double()
    split = make_split(data, seed=0, n_train=100, n_val=30, n_test=50, label_noise=0.2)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(derive_seed(0, "order")))
    names = [name for name, _ in model.named_parameters()]
    weights = [p.detach() for p in model.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    clean, perturbed = [], []

    def gradients(at: list[Tensor], x: Tensor, y: Tensor) -> tuple[float, list[Tensor]]:
        at = [w.clone().requires_grad_() for w in at]
        loss = F.cross_entropy(torch.func.functional_call(model, dict(zip(names, at, strict=True)), (x,)), y)
        return loss.item(), list(torch.autograd.grad(loss, at))

    for step, index in enumerate(order.split(32)):
        x, y = split.train_x[index].double(), split.train_y[index]
        loss, g = gradients(weights, x, y)
        moved = [w + e for w, e in zip(weights, eps(weights, g, velocity), strict=True)]
        high, g = gradients(moved, x, y)
        rate = config.lr * (1 + math.cos(math.pi * step / STEPS)) / 2
        velocity = [config.momentum * v + s for v, s in zip(velocity, g, strict=True)]
        weights = [w - rate * v for w, v in zip(weights, velocity, strict=True)]
        clean.append(loss)
        perturbed.append(high)
    return weights, clean, perturbed


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).norm()


HAND = {"mask": "all", "model": "mlp", "width": 8, "weight_decay": 0.0, "epochs": 1, "lr": 0.1}


def close(trained: Trained, weights: list[Tensor]) -> None:
    for p, q in zip(trained.model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5)


def test_an_epoch_of_asam_by_hand(tiny: Tiny, digits: ImageSet) -> None:
    config = tiny(method="asam", rho=0.5, **HAND)

    def eps(weights: list[Tensor], g: list[Tensor], velocity: list[Tensor]) -> list[Tensor]:
        scale = [w.abs() + 0.01 if w.ndim > 1 else torch.ones_like(w) for w in weights]
        total = norm([t * d for t, d in zip(scale, g, strict=True)])
        return [0.5 * t * t * d / total for t, d in zip(scale, g, strict=True)]

    weights, clean, perturbed = by_hand(config, digits, eps)
    trained = train_run(config, CPU)
    close(trained, weights)
    assert trained.history[0].loss == pytest.approx(np.mean(clean), rel=1e-5)
    assert trained.history[0].ascent == pytest.approx(np.mean(perturbed) - np.mean(clean), rel=1e-3)


def test_an_epoch_of_momentum_sam_by_hand_and_what_it_knows(tiny: Tiny, digits: ImageSet) -> None:
    config = tiny(method="momentum_sam", rho=0.7, **HAND)

    def eps(weights: list[Tensor], g: list[Tensor], velocity: list[Tensor]) -> list[Tensor]:
        total = norm(velocity)
        return [-0.7 * v / total if total else torch.zeros_like(v) for v in velocity]

    weights, clean, perturbed = by_hand(config, digits, eps)
    trained = train_run(config, CPU)
    close(trained, weights)
    (epoch,) = trained.history
    assert abs(np.mean(clean) - np.mean(perturbed)) > 0.001
    assert epoch.loss == pytest.approx(np.mean(perturbed), rel=1e-5)  # L(w) is never computed
    assert epoch.ascent is None
    assert epoch.radius == pytest.approx(0.7 * (STEPS - 1) / STEPS, rel=1e-5)  # no momentum yet in the first step
    (said,) = json.loads(json.dumps(result_of(trained), allow_nan=False))["history"]
    assert said == {"loss": epoch.loss, "ascent": None, "radius": epoch.radius}


# -- masks that methods bring -------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.5, 0.8])
def test_ssam_d_exchanges_as_many_as_it_says_and_its_live_count_is_constant(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, density: float
) -> None:
    masks: list[Tensor] = []
    original = SAM.set_mask

    def set_mask(sam: SAM, mask: Mask) -> None:
        if mask.num_kept:
            masks.append(torch.cat([part.flatten() for part in mask.dense()]))
        original(sam, mask)

    monkeypatch.setattr(SAM, "set_mask", set_mask)
    epochs, rate = 6, 0.4
    config = tiny(method=f"ssam_d:drop_rate={rate}", density=density, rho=0.1, epochs=epochs)
    trained = train_run(config, CPU)
    total = trained.mask.numel
    kept = math.floor(density * total + 0.5)
    assert [build.num_kept for build in trained.builds] == [kept] * epochs
    assert [int(mask.sum()) for mask in masks] == [kept] * epochs
    for epoch in range(1, epochs):
        old, new = masks[epoch - 1], masks[epoch]
        share = rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        exchanged = min(round(share * kept), total - kept)
        assert exchanged > 0
        assert (int((old & ~new).sum()), int((new & ~old).sum())) == (exchanged, exchanged)


def test_ssam_f_is_sam_with_its_mask_and_scope(tiny: Tiny) -> None:
    preset = train_run(tiny(method="ssam_f:every=2", density=0.5, rho=0.1, epochs=4), CPU)
    plain = train_run(tiny(method="sam", mask="fisher@every=2", norm_scope="full", density=0.5, rho=0.1, epochs=4), CPU)
    assert same_weights(preset.model, plain.model)
    assert [build.epoch for build in preset.builds] == [0, 2]
    assert preset.history[0].radius < 0.1  # of the full norm, the mask has a share


def test_sam_on_is_sam_or_asam_under_the_norm_mask(tiny: Tiny) -> None:
    for method, mine in (("sam_on", "sam"), ("sam_on:rule=elementwise_l2", "asam")):
        one, other = train_run(tiny(method=method), CPU), train_run(tiny(method=mine, mask="norm"), CPU)
        assert same_weights(one.model, other.model)


# -- interrupted and resumed --------------------------------------------------------------------------------


def everything(trained: Trained) -> dict[str, Any]:
    """All that a run leaves behind."""
    state = trained.sam.state_dict()
    return {
        "model": trained.model.state_dict(),
        "base": state["base"]["state"],
        "groups": state["base"]["param_groups"],
        "memory": state["memory"],
        "mask": state["mask"],
        "result": json.dumps(result_of(trained)),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def stop_at(step: int) -> Callable[[], bool]:
    """Asks to stop after this step; it is asked after every step."""
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) == step

    return stop


class Dropping(nn.Sequential):
    """BatchNorm, whose statistics are state, and dropout, which draws random numbers in every pass."""


def net(num_classes: int) -> nn.Module:
    return Dropping(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(144, num_classes),
    )


QUICK = ("friendly_sam", "esam", "looksam", "momentum_sam", "ssam_d")


@pytest.mark.parametrize("augment", ["none", "crop=2+flip"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_interrupted_in_the_middle_of_an_epoch_it_goes_on_bit_for_bit(
    tiny: Tiny, tmp_path: Path, name: str, augment: str, step: int
) -> None:
    changes = settings(name)
    if name != "mup_sam":
        changes |= {"model": f"{__name__}:net", "width": None, "rho_min": changes["rho"] / 2}
    config = tiny(
        augment=augment, epochs=3, warmup=1, clip_grad_norm=5.0, label_smoothing=0.1, sam_epochs="0..2", **changes
    )
    whole = everything(train_run(config, CPU))
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Interrupted):
        train_run(config, CPU, checkpoints=Checkpointing(path, stop=stop_at(step)))
    torch.manual_seed(99)  # what else the process did is of no account
    resumed = train_run(config, CPU, checkpoints=Checkpointing(path))
    assert same(everything(resumed), whole)
    assert len(resumed.history) == 3
    assert same(whole["model"], everything(train_run(config, CPU))["model"])
    # The test can fail: a run whose state is lost is another one.
    other = everything(train_run(tiny(**{**changes, "seed": 1}, augment=augment, epochs=3, warmup=1), CPU))
    assert not same(other["model"], whole["model"])
