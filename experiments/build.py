"""The parts of a run from its configuration: data, model, budget, base optimizer, device, clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.config import RunConfig
from experiments.data import ImageSet, load_data
from experiments.images import Images
from experiments.models import build_model, check_model
from experiments.schedule import OptimizerSpec
from experiments.seeds import derive_seed
from experiments.split import Split, make_split
from masks import Budget, Mask, MaskContext, MaskError, MaskSpec, ParamTable
from masks.errors import InputError
from sam import Method, MethodSpec
from sam.mup import MupOptimizer, mup_init_, mup_param_groups


@lru_cache(maxsize=4)
def load_cached(spec: str) -> ImageSet:
    """The data set, read once per process.

    Raises:
        InputError: it has one class only, or see :func:`load_data`.
    """
    data = load_data(spec)
    if data.num_classes < 2:
        found = ", ".join(data.class_names) or "0"
        raise InputError(f"data {spec} has one class only ({found}), and there is nothing to tell it from")
    return data


def pick_device(name: str) -> torch.device:
    """The device called "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: unknown, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for, and torch {torch.__version__} finds no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} was asked for; this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def initial_model(config: RunConfig, data: ImageSet) -> nn.Module:
    """The model with the seed's initial weights; the global generator is put back."""
    channels, height, width = data.image_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "init"))
        model = build_model(
            config.model,
            in_channels=channels,
            image_size=(height, width),
            num_classes=data.num_classes,
            width=config.width,
        )
    check_model(model, data.first(2), data.num_classes, name=config.model)
    freeze(model, config.trainable)
    return model


def split_of(config: RunConfig, data: ImageSet, workers: int = 0) -> Split:
    """The images of the run's seed; ``workers`` processes decode those that stay in files.

    Raises:
        InputError: sizes that the data set does not have.
    """
    return make_split(
        data,
        seed=config.seed,
        n_train=config.n_train,
        n_val=config.n_val,
        n_test=config.n_test,
        label_noise=config.label_noise or 0.0,
        tuning=config.tuning,
        workers=workers,
    )


def budget_of(config: RunConfig, spec: MaskSpec, model: nn.Module) -> Budget | None:
    """How many coordinates the run's mask keeps; None for masks of natural size.

    Raises:
        MaskError: the density is out of reach, or the mask to match is itself budgeted or cannot be built.
    """
    if spec.info.kind == "natural":
        return None
    table = ParamTable.from_model(model)
    if config.density is not None:
        return Budget.from_density(config.density, table.numel)
    reference = MaskSpec.parse(config.match)
    if reference.info.kind != "natural":
        raise MaskError(f"match must name a mask of natural size, and {reference.name} is budgeted; give a density")
    return Budget.matching(reference.build(MaskContext(model, table), None))


def batches_of(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Consecutive batches; the last one may be smaller."""
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True))


def sample_of(split: Split, n: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``n`` training images with their labels as given, or all, in an order drawn with the seed.

    A split is in the order of the data set, which for image folders and many files is class by class: its
    first images are of one class.
    """
    order = torch.randperm(len(split.train_y), generator=torch.Generator().manual_seed(derive_seed(seed, "sample")))
    index = order[:n]
    return split.train_images.to(device).read(index), split.train_y[index].to(device)


def in_order(images: Images, size: int) -> Iterator[Tensor]:
    """All images in consecutive batches; the last one may be smaller."""
    return images.batches(torch.split(torch.arange(len(images)), size)) if len(images) else iter(())


def correct(model: nn.Module, images: Images, y: Tensor, batch_size: int = 512) -> Tensor:
    """Whether each image is classified right, bool of shape (N,), on the CPU; the model must be in eval mode."""
    with torch.no_grad():
        found = [model(x).argmax(1) for x in in_order(images, batch_size)]
    return torch.cat(found).cpu() == y.cpu() if found else torch.zeros(0, dtype=torch.bool)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds that a run costs: processor time on CPUs, which other processes do not stretch much; on an
    accelerator the time on the wall, once it has finished what it was given."""
    if device.type != "cuda":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def norm_mask(table: ParamTable) -> Mask | None:
    """The mask of all normalization layers, or None in a model without."""
    if not any(row.is_norm for row in table):
        return None
    return Mask(table, tuple(row.is_norm for row in table))


def freeze(model: nn.Module, trainable: str) -> None:
    """Leave only the normalization layers' parameters trainable ("norm"), or all but them ("no_norm").

    Raises:
        InputError: nothing would be trained.
    """
    if trainable == "all":
        return
    table = ParamTable.from_model(model)
    for row, param in zip(table, table.tensors(model), strict=True):
        param.requires_grad_(row.is_norm == (trainable == "norm"))
    if not any(param.requires_grad for param in model.parameters()):
        raise InputError(f"trainable {trainable} leaves nothing to train: the model has no normalization parameters")


def base_optimizer(
    config: RunConfig, model: nn.Module, device: torch.device, mup_base: nn.Module | None = None
) -> Optimizer:
    """The optimizer that SAM is put around.

    Args:
        config: the run.
        model: its model.
        device: where it lies.
        mup_base: the model at its base width, for the learning rates of muP.

    Raises:
        InputError: an optimizer that cannot be had with these settings.
    """
    spec = OptimizerSpec.parse(config.optimizer)
    groups: list[dict[str, Any]]
    if mup_base is not None:
        if spec.name not in ("sgd", "adamw"):
            raise InputError(f"method {config.method} scales learning rates for sgd and adamw only, got {spec.name}")
        kind: MupOptimizer = "sgd" if spec.name == "sgd" else "adamw"
        groups = mup_param_groups(model, mup_base, config.lr, optimizer=kind, weight_decay=config.weight_decay)
        if not config.norm_weight_decay:
            raise InputError(f"method {config.method} decays all parameters alike; leave norm_weight_decay on")
        if config.rho_min is not None:
            raise InputError(f"method {config.method} has a learning rate per layer; leave rho_min out")
    else:
        table = ParamTable.from_model(model)
        params = list(zip(table, table.tensors(model), strict=True))
        apart = config.weight_decay > 0 and not config.norm_weight_decay
        groups = [{"params": [p for row, p in params if not (apart and row.is_norm)]}]
        if apart:
            groups.append({"params": [p for row, p in params if row.is_norm], "weight_decay": 0.0})
    return spec.build(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=device.type == "cuda",  # fused kernels skip a non-finite step without a synchronisation
    )


def prepared_method(config: RunConfig, model: nn.Module, data: ImageSet) -> tuple[Method, nn.Module | None]:
    """The run's method, and for one that scales with the width the model at the base width; the model's initial
    weights are then those of muP.

    Raises:
        InputError: no base width, or a model that did not grow as muP needs.
    """
    method = config.sam_method()
    if not MethodSpec.parse(config.method).info.needs_model:
        return method, None
    width = MethodSpec.parse(config.method).options["base_width"]
    if width is None:
        raise InputError(f"method {config.method} needs a base width: {config.method}:base_width=N")
    base = initial_model(replace(config, width=width), data)
    mup_init_(model, base)
    return method.prepared(model, base), base


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict, refusing one of another model with the first difference.

    Raises:
        InputError: names or shapes differ.
    """
    own = model.state_dict()
    for name in own.keys() ^ state.keys():
        where = "the checkpoint lacks" if name in own else "the model lacks"
        raise InputError(f"the checkpoint is of another model: {where} {name}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"the checkpoint is of another model: {name} has shape {tuple(state[name].shape)} there, "
                f"{tuple(tensor.shape)} here"
            )
    model.load_state_dict(state)
