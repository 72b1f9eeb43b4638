"""One training run: model, data, base optimizer and SAM from a configuration; deterministic given the seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.data import ImageSet, load_data
from experiments.models import build_model, check_model
from experiments.seeds import derive_seed
from experiments.split import Split, make_split
from masks import Budget, BuilderError, Mask, MaskContext, MaskError, MaskSpec, ParamTable, cross_entropy
from masks.errors import InputError
from sam import SAM


@dataclass(frozen=True)
class Epoch:
    """Means over the steps of one epoch.

    Attributes:
        loss: training loss L(w) at the steps of the epoch.
        ascent: ascent strength L(w + eps) - L(w).
        radius: ||eps||_2.
        observed: what was measured on the weights after the epoch; None where nothing was.
    """

    loss: float
    ascent: float
    radius: float
    observed: dict[str, Any] | None = None


@dataclass(frozen=True)
class MaskBuild:
    """One building of the run's mask: when, what, and its anatomy.

    Attributes:
        norm_share: None for an empty mask.
        error: why the mask could not be built, because training had diverged; the old mask was then kept.
    """

    epoch: int
    step: int
    digest: str
    num_kept: int
    numel: int
    num_tensors: int
    norm_share: float | None
    jaccard_norm: float | None
    kept_per_tensor: dict[str, int]
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run, before it is measured.

    Attributes:
        config: what was asked.
        model: the trained model, in evaluation mode.
        sam: its optimizer.
        split: its data.
        history: per epoch.
        builds: per building of the mask.
        val_accuracy: after the last epoch.
        skipped_steps: steps with a non-finite gradient.
        train_seconds: processor seconds of training, mask building included, measurements along the way not.
        mask_seconds: processor seconds of mask building.
        observe_seconds: processor seconds of measurements along the way.
    """

    config: RunConfig
    model: nn.Module
    sam: SAM
    split: Split
    history: tuple[Epoch, ...]
    builds: tuple[MaskBuild, ...]
    val_accuracy: float
    skipped_steps: int
    train_seconds: float
    mask_seconds: float
    observe_seconds: float
    mask: Mask = field(repr=False)

    @property
    def diverged(self) -> str | None:
        """Why the run counts as diverged, or None."""
        if self.skipped_steps:
            return f"{self.skipped_steps} steps with a non-finite gradient"
        for build in self.builds:
            if build.error:
                return f"the mask could not be built in epoch {build.epoch}: {build.error}"
        first, last, guess = self.history[0].loss, self.history[-1].loss, math.log(self.split.num_classes)
        if not last <= max(first, guess):
            return f"training loss {last:.3g} at the end, above the start ({first:.3g}) and guessing ({guess:.3g})"
        return None


@lru_cache(maxsize=4)
def load_cached(spec: str) -> ImageSet:
    """The data set, read once per process."""
    return load_data(spec)


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
    check_model(model, data.x[:2], data.num_classes, name=config.model)
    return model


def split_of(config: RunConfig, data: ImageSet) -> Split:
    """The images of the run's seed.

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
    order = torch.randperm(len(split.train_x), generator=torch.Generator().manual_seed(derive_seed(seed, "sample")))
    index = order[:n]
    return split.train_x[index].to(device), split.train_y[index].to(device)


def correct(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 512) -> Tensor:
    """Whether each image is classified right, bool of shape (N,), on the CPU; the model must be in eval mode."""
    with torch.no_grad():
        right = [model(xs).argmax(1) == ys for xs, ys in batches_of(x, y, batch_size)]
    return torch.cat(right).cpu() if right else torch.zeros(0, dtype=torch.bool)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds that a run costs: processor time on CPUs, which other processes do not stretch much; on an
    accelerator the time on the wall, once it has finished what it was given."""
    if device.type != "cuda":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


class _Run:
    """The state of a run in progress."""

    def __init__(self, config: RunConfig, device: torch.device, initial: dict[str, Tensor] | None) -> None:
        self.config, self.device = config, device
        self.clock = clock_of(device)
        data = load_cached(config.data)
        self.split = split_of(config, data)
        self.x = self.split.train_x.to(device, memory_format=torch.channels_last)
        self.y = self.split.train_y.to(device)
        self.model = initial_model(config, data)
        if initial is not None:
            load_weights(self.model, initial)
        # Convolutions on CPUs and tensor cores are faster with the channels last; other models are not affected.
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.spec = MaskSpec.parse(config.mask)
        self.table = ParamTable.from_model(self.model)
        self.budget = budget_of(config, self.spec, self.model)
        self.norm = _norm_mask(self.table)
        self.builds: list[MaskBuild] = []
        self.mask_seconds = 0.0
        self.sam = SAM(
            _base_optimizer(config, self.model, device),
            self.model,
            mask=Mask(self.table, (False,) * len(self.table)),
            rho=config.rho,
            rule=config.sam_rule(),
            norm_scope=config.norm_scope,
            norm_statistics=config.norm_statistics,
        )
        self.scored = sample_of(self.split, config.score_images, config.seed, device)
        self.order = torch.Generator().manual_seed(derive_seed(config.seed, "order"))

    def build_mask(self, epoch: int, step: int) -> None:
        start = self.clock()
        context = MaskContext(
            self.model,
            self.table,
            batches=batches_of(*self.scored, self.config.batch_size),
            seed=derive_seed(self.config.seed, "mask", str(len(self.builds))),
            built_at=f"epoch {epoch}, step {step}",
        )
        mask, failure = self.sam.mask, None
        try:
            mask = self.spec.build(context, self.budget)
            self.sam.set_mask(mask)
        except MaskError as error:
            # A run that diverges is a result; a mask that cannot be had from the start, or that its builder
            # gets wrong, is an error.
            finite = all(bool(torch.isfinite(p).all()) for p in context.parameters())
            if step == 0 or (finite and isinstance(error, BuilderError)):
                raise
            failure = str(error)
        self.builds.append(
            MaskBuild(
                epoch=epoch,
                step=step,
                digest=mask.digest(),
                num_kept=mask.num_kept,
                numel=mask.numel,
                num_tensors=mask.num_tensors,
                norm_share=mask.norm_share if mask.num_kept else None,
                jaccard_norm=mask.jaccard(self.norm) if self.norm is not None else None,
                kept_per_tensor={c.row.name: c.kept for c in mask.per_layer() if c.kept},
                error=failure,
            )
        )
        self.mask_seconds += self.clock() - start

    def epoch_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches in a new order. A last batch of one image is left out: it has no statistics."""
        order = torch.randperm(len(self.x), generator=self.order).to(self.device)
        for index in torch.split(order, self.config.batch_size):
            if len(index) > 1:
                yield self.x[index], self.y[index]


Observer = Callable[[nn.Module, Split], dict[str, Any]]
"""What is measured along training: plain values from the model, which it leaves as it was, and the data."""


def train_run(
    config: RunConfig,
    device: torch.device,
    *,
    initial: dict[str, Tensor] | None = None,
    observer: Observer | None = None,
) -> Trained:
    """Train one model. The test images are not looked at.

    Args:
        config: the run.
        device: where it runs; on the same CPU, the same configuration gives bitwise the same result.
        initial: weights to start from instead of the seed's.
        observer: called after every ``config.measure_every`` epochs but the last one; training is bitwise the same
            with it.

    Raises:
        InputError: the data, the model, the mask or a setting cannot be had.
    """
    config = config.resolved()
    run = _Run(config, device, initial)
    steps = number_of_steps(config, len(run.x))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.sam, T_max=steps)
    history: list[Epoch] = []
    start, step, observe_seconds = run.clock(), 0, 0.0

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(run.model(batch[0]), batch[1])

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(config.seed, "train"))  # dropout
        for epoch in range(config.epochs):
            run.model.train()
            stats: list[Tensor] = []
            for i, batch in enumerate(run.epoch_batches()):
                if run.spec.schedule.due(epoch, step, epoch_start=i == 0):
                    run.build_mask(epoch, step)
                run.sam.step_on(loss_fn, batch)
                scheduler.step()
                last = run.sam.stats
                if last is not None:
                    stats.append(torch.stack((last.loss.double(), last.ascent.double(), last.radius.double())))
                step += 1
            history.append(Epoch(*torch.stack(stats).mean(0).tolist()))
            if observer and epoch + 1 < config.epochs and config.measures_after(epoch):
                before = run.clock()
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    history[-1] = replace(history[-1], observed=observer(run.model, run.split))
                observe_seconds += run.clock() - before
    seconds = run.clock() - start - observe_seconds
    run.model.eval()
    right = correct(run.model, run.split.val_x.to(device), run.split.val_y.to(device))
    return Trained(
        config=config,
        model=run.model,
        sam=run.sam,
        split=run.split,
        history=tuple(history),
        builds=tuple(run.builds),
        val_accuracy=right.double().mean().item() if len(right) else math.nan,
        skipped_steps=int(run.sam.skipped_steps),
        train_seconds=seconds,
        mask_seconds=run.mask_seconds,
        observe_seconds=observe_seconds,
        mask=run.sam.mask,
    )


def number_of_steps(config: RunConfig, n_train: int) -> int:
    """Steps of the run: a last batch of one image is left out.

    Raises:
        InputError: there is none, or the mask's schedule builds it after the last one.
    """
    steps = config.epochs * (n_train // config.batch_size + (n_train % config.batch_size > 1))
    if not steps:
        raise InputError(f"{n_train} training images give no batch of at least 2")
    schedule = MaskSpec.parse(config.mask).schedule
    end = config.epochs if schedule.unit == "epoch" else steps
    if schedule.kind == "after" and schedule.n >= end:
        raise InputError(f"mask {config.mask} would never be built: the run ends after {end} {schedule.unit}s")
    return steps


def _norm_mask(table: ParamTable) -> Mask | None:
    if not any(row.is_norm for row in table):
        return None
    return Mask(table, tuple(row.is_norm for row in table))


def _base_optimizer(config: RunConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    fused = device.type == "cuda"  # fused kernels skip a non-finite step without a synchronisation
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            params, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
        )
    return torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


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


def result_of(trained: Trained) -> dict[str, Any]:
    """The deterministic part of a run's record, without measurements of the final weights."""
    return {
        "val_accuracy": trained.val_accuracy,
        "diverged": trained.diverged,
        "skipped_steps": trained.skipped_steps,
        "history": [{k: v for k, v in asdict(epoch).items() if v is not None} for epoch in trained.history],
        "mask_builds": [asdict(build) for build in trained.builds],
        "data_digest": trained.split.digest,
        "test_is_shared": trained.split.test_is_shared,
        "train_images": len(trained.split.train_y),
        "val_images": len(trained.split.val_y),
        "test_images": len(trained.split.test_y),
    }
