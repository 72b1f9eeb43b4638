"""Training written out by hand, and what the optimizer of a run was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.data import ImageSet
from experiments.models import MLP, ResNetSmall, ViTSmall
from experiments.seeds import derive_seed
from experiments.split import Split, make_split
from experiments.train import Trained, train_run
from sam import SAM

CPU = torch.device("cpu")


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@dataclass
class Steps:
    """What the optimizer was given, step by step."""

    first: dict[str, Tensor] = field(default_factory=dict)
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    rng: list[Tensor] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    radius: list[float] = field(default_factory=list)


Watch = Callable[[RunConfig], tuple[Trained, Steps]]


def watching(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Trains and notes what every step was given."""
    original = SAM.step_on

    def watch(config: RunConfig) -> tuple[Trained, Steps]:
        steps = Steps()

        def step_on(sam: SAM, loss_fn: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            if not steps.batches:
                steps.first = {key: value.clone() for key, value in sam.model.state_dict().items()}
            steps.batches.append((batch[0].clone(), batch[1].clone()))
            steps.kept.append(sam.mask.num_kept)
            steps.rng.append(torch.get_rng_state())
            steps.lr.append(sam.param_groups[0]["lr"])
            loss = original(sam, loss_fn, batch)
            assert sam.stats is not None
            steps.radius.append(float(sam.stats.radius))
            return loss

        monkeypatch.setattr(SAM, "step_on", step_on)
        return train_run(config, CPU), steps

    return watch


def fresh(config: RunConfig, data: ImageSet) -> tuple[nn.Module, Split, list[Tensor]]:
    """Model, images and batches of a run, made here; the global generator is moved."""
    sizes = {"n_train": config.n_train, "n_val": config.n_val, "n_test": config.n_test}
    split = make_split(data, seed=config.seed, label_noise=0.2, tuning=config.tuning, **sizes)
    torch.manual_seed(derive_seed(config.seed, "init"))
    net = {"resnet_small": ResNetSmall, "vit_small": ViTSmall, "mlp": MLP}[config.model]
    model = net(1, (8, 8), 10, config.width or 0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    order = torch.Generator().manual_seed(derive_seed(config.seed, "order"))
    batches = [
        b
        for _ in range(config.epochs)
        for b in torch.randperm(len(split.train_x), generator=order).split(config.batch_size)
    ]
    return model, split, batches


def is_norm(name: str, model: nn.Module) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.BatchNorm2d, nn.LayerNorm))


def plain_loop(config: RunConfig, data: ImageSet) -> tuple[nn.Module, list[float], float]:
    """Training without SAM in thirty lines: the model, mean loss per epoch, validation accuracy."""
    model, split, batches = fresh(config, data)
    apart = [] if config.norm_weight_decay else [p for name, p in model.named_parameters() if is_norm(name, model)]
    held = {id(p) for p in apart}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in held]},
        *([{"params": apart, "weight_decay": 0.0}] if apart else []),
    ]
    if config.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    x, y = split.train_x.to(memory_format=torch.channels_last), split.train_y
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(batches))
    model.train()
    losses = []
    for index in batches:
        optimizer.zero_grad()
        out = model(x[index])
        loss = F.cross_entropy(out, y[index], reduction="none", label_smoothing=config.label_smoothing).mean()
        loss.backward()
        if config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    per_epoch = [float(np.mean(part)) for part in np.split(np.array(losses), config.epochs)]
    with torch.no_grad():
        right = (model(split.val_x).argmax(1) == split.val_y).double().mean().item()
    return model, per_epoch, right
