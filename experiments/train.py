"""One training run from a configuration: deterministic given the seed, interrupted and resumed or not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.augment import Augmentation, Augmenter
from experiments.build import (
    base_optimizer,
    batches_of,
    budget_of,
    clock_of,
    correct,
    initial_model,
    load_cached,
    load_weights,
    norm_mask,
    prepared_method,
    sample_of,
    split_of,
)
from experiments.config import RunConfig
from experiments.resume import Checkpointing, Interrupted, rng_state, set_rng_state
from experiments.schedule import scheduler
from experiments.seeds import derive_seed
from experiments.split import Split
from masks import BuilderError, Mask, MaskContext, MaskError, MaskSpec, ParamTable
from masks.errors import InputError
from sam import SAM, RadiusFollowsLR


@dataclass(frozen=True)
class Epoch:
    """Means over the steps of one epoch.

    Attributes:
        loss: training loss L(w) at the steps of the epoch.
        ascent: ascent strength L(w + eps) - L(w); None for a method that does not compute L(w), whose loss is then
            that at w + eps.
        radius: ||eps||_2.
        observed: what was measured on the weights after the epoch; None where nothing was.
    """

    loss: float
    ascent: float | None
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


Observer = Callable[[nn.Module, Split], dict[str, Any]]
"""What is measured along training: plain values from the model, which it leaves as it was, and the data."""


class Training:
    """A run in progress: everything that changes while it runs, so that it can be saved after any step.

    Args:
        config: the run, resolved.
        device: where it runs.
        initial: weights to start from instead of the seed's.
        observer: see :func:`train_run`.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, initial: dict[str, Tensor] | None, observer: Observer | None
    ) -> None:
        self.config, self.device, self.observer = config, device, observer
        self.clock = clock_of(device)
        data = load_cached(config.data)
        self.split = split_of(config, data)
        self.x = self.split.train_x.to(device, memory_format=torch.channels_last)
        self.y = self.split.train_y.to(device)
        self.model = initial_model(config, data)
        method, mup_base = prepared_method(config, self.model, data)
        if initial is not None:
            load_weights(self.model, initial)
        # Convolutions on CPUs and tensor cores are faster with the channels last; other models are not affected.
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.spec = MaskSpec.parse(config.mask)
        self.table = ParamTable.from_model(self.model)
        self.budget = budget_of(config, self.spec, self.model)
        self.norm = norm_mask(self.table)
        self.sam = SAM(
            base_optimizer(config, self.model, device, mup_base),
            self.model,
            mask=Mask(self.table, (False,) * len(self.table)),
            rho=config.rho,
            method=method,
            norm_scope=config.norm_scope or "masked",
            norm_statistics=config.norm_statistics,
            clip_grad_norm=config.clip_grad_norm,
            seed=derive_seed(config.seed, "method"),
        )
        self.steps = number_of_steps(config, len(self.x))
        self.scheduler = scheduler(self.sam, config.schedule, self.steps, config.warmup * self.steps // config.epochs)
        self.radius = None
        if config.rho_min is not None and config.lr > 0:
            self.radius = RadiusFollowsLR(self.sam, rho_max=config.rho, rho_min=config.rho_min, lr_max=config.lr)
        self.window = config.window()
        self.augment = Augmenter(
            Augmentation.parse(config.augment),
            self.x,
            self.split.mean,
            self.split.std,
            derive_seed(config.seed, "augment"),
        )
        self.scored = sample_of(self.split, config.score_images, config.seed, device)
        self.order = torch.Generator().manual_seed(derive_seed(config.seed, "order"))
        self.epoch_order = self.order.get_state()
        self.epoch = self.step = self.step_in_epoch = 0
        self.stats: list[Tensor] = []
        self.history: list[Epoch] = []
        self.builds: list[MaskBuild] = []
        self.seconds = {"train": 0.0, "mask": 0.0, "observe": 0.0}

    # -- the loop -------------------------------------------------------------------------------------------

    def run(self, checkpoints: Checkpointing | None) -> None:
        """Train to the end, from wherever it stands.

        Raises:
            Interrupted: ``checkpoints`` was asked to stop.
        """
        while self.epoch < self.config.epochs:
            self.model.train()
            batches = self._batches()
            while self.step_in_epoch < len(batches):
                start = self.clock()
                self._step(batches[self.step_in_epoch])
                self.seconds["train"] += self.clock() - start
                if self.step_in_epoch < len(batches) and checkpoints is not None:
                    self._maybe_save(checkpoints, epoch_end=False)
            self._end_epoch()
            if checkpoints is not None:  # after the last epoch, too: what is measured then may take long
                self._maybe_save(checkpoints, epoch_end=True)

    def _batches(self) -> list[Tensor]:
        """Positions of the images of the epoch's batches, in a new order.

        A last batch of one image is left out: it has no statistics.
        """
        self.epoch_order = self.order.get_state()
        order = torch.randperm(len(self.x), generator=self.order).to(self.device)
        return [index for index in torch.split(order, self.config.batch_size) if len(index) > 1]

    def _step(self, index: Tensor) -> None:
        if self.spec.schedule.due(self.epoch, self.step, epoch_start=self.step_in_epoch == 0):
            self._build_mask()
        self.sam.enabled = self.epoch in self.window
        self.sam.step_on(self._loss, (self.augment(self.x[index]), self.y[index]))
        self.scheduler.step()
        if self.radius is not None:
            self.radius.step()
        last = self.sam.stats
        if last is not None:
            values = last.loss, last.perturbed_loss, last.ascent, last.radius
            self.stats.append(torch.stack([value.double() for value in values]))
        self.step += 1
        self.step_in_epoch += 1

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        smoothing = self.config.label_smoothing
        return F.cross_entropy(self.model(batch[0]), batch[1], reduction="none", label_smoothing=smoothing)

    def _end_epoch(self) -> None:
        loss, perturbed, ascent, radius = torch.stack(self.stats).mean(0).tolist()
        # Momentum-SAM never computes L(w): its loss is that at w + eps, and its ascent strength is not known.
        knows_loss = self.config.method.partition(":")[0] != "momentum_sam"
        self.history.append(Epoch(loss if knows_loss else perturbed, ascent if knows_loss else None, radius))
        self.stats = []
        if self.observer and self.epoch + 1 < self.config.epochs and self.config.measures_after(self.epoch):
            before = self.clock()
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                self.history[-1] = replace(self.history[-1], observed=self.observer(self.model, self.split))
            self.seconds["observe"] += self.clock() - before
        self.epoch += 1
        self.step_in_epoch = 0
        self.epoch_order = self.order.get_state()

    def _build_mask(self) -> None:
        start = self.clock()
        context = MaskContext(
            self.model,
            self.table,
            batches=batches_of(*self.scored, self.config.batch_size),
            seed=derive_seed(self.config.seed, "mask", str(len(self.builds))),
            built_at=f"epoch {self.epoch}, step {self.step}",
            previous=self.sam.mask if self.builds else None,
            progress=self.step / self.steps,
        )
        mask, failure = self.sam.mask, None
        try:
            mask = self.spec.build(context, self.budget)
            self.sam.set_mask(mask)
        except MaskError as error:
            # A run that diverges is a result; a mask that cannot be had from the start, or that its builder
            # gets wrong, is an error.
            finite = all(bool(torch.isfinite(p).all()) for p in context.parameters())
            if self.step == 0 or (finite and isinstance(error, BuilderError)):
                raise
            failure = str(error)
        if not mask.num_kept and failure is None and self.spec.name != "none":
            raise InputError(
                f"mask {self.spec} keeps none of the {mask.numel} trainable coordinates; to perturb nothing, use none"
            )
        self.builds.append(
            MaskBuild(
                epoch=self.epoch,
                step=self.step,
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
        self.seconds["mask"] += self.clock() - start

    # -- interruption and resume ----------------------------------------------------------------------------

    def _maybe_save(self, checkpoints: Checkpointing, *, epoch_end: bool) -> None:
        stop = checkpoints.stop()
        if stop or checkpoints.due(self.epoch, epoch_end=epoch_end):
            checkpoints.save(self.state_dict())
        if stop:
            raise Interrupted

    def _identity(self) -> str:
        return json.dumps(asdict(self.config), sort_keys=True) + self.split.digest

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bitwise resume needs, in plain values and tensors."""
        return {
            "run": self._identity(),
            "model": self.model.state_dict(),
            "sam": self.sam.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "order": self.epoch_order,
            "position": [self.epoch, self.step, self.step_in_epoch],
            "stats": self.stats,
            # JSON keeps every double as it is.
            "log": json.dumps([[asdict(e) for e in self.history], [asdict(b) for b in self.builds], self.seconds]),
            "augment": self.augment.generator.get_state(),
            "rng": rng_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken.

        Raises:
            InputError: it is of another run.
        """
        if state.get("run") != self._identity():
            raise InputError("the checkpoint is of another run; remove it to start anew")
        load_weights(self.model, state["model"])
        self.sam.load_state_dict(state["sam"], adopt_mask=True)
        self.scheduler.load_state_dict(state["scheduler"])
        self.order.set_state(state["order"])
        self.epoch, self.step, self.step_in_epoch = state["position"]
        self.stats = [row.to(self.device) for row in state["stats"]]
        history, builds, self.seconds = json.loads(state["log"])
        self.history = [Epoch(**epoch) for epoch in history]
        self.builds = [MaskBuild(**build) for build in builds]
        self.augment.generator.set_state(state["augment"])
        set_rng_state(state["rng"], self.device)


def train_run(
    config: RunConfig,
    device: torch.device,
    *,
    initial: dict[str, Tensor] | None = None,
    observer: Observer | None = None,
    checkpoints: Checkpointing | None = None,
) -> Trained:
    """Train one model. The test images are not looked at.

    Args:
        config: the run.
        device: where it runs; on the same CPU, the same configuration gives bitwise the same result, also when it was
            interrupted and resumed.
        initial: weights to start from instead of the seed's.
        observer: called after every ``config.measure_every`` epochs but the last one; training is bitwise the same
            with it.
        checkpoints: where the run is saved on its way, and from where it goes on.

    Raises:
        InputError: the data, the model, the mask or a setting cannot be had.
        Interrupted: ``checkpoints.stop`` asked for it; the run is saved.
    """
    training = Training(config.resolved(), device, initial, observer)
    saved = checkpoints.load() if checkpoints is not None else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(config.seed, "train"))  # dropout
        if saved is not None:
            training.load_state_dict(saved)
        training.run(checkpoints)
    model, split = training.model.eval(), training.split
    right = correct(model, split.val_x.to(device), split.val_y.to(device))
    return Trained(
        config=training.config,
        model=model,
        sam=training.sam,
        split=split,
        history=tuple(training.history),
        builds=tuple(training.builds),
        val_accuracy=right.double().mean().item() if len(right) else math.nan,
        skipped_steps=int(training.sam.skipped_steps),
        train_seconds=training.seconds["train"],
        mask_seconds=training.seconds["mask"],
        observe_seconds=training.seconds["observe"],
        mask=training.sam.mask,
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


def _epoch(epoch: Epoch) -> dict[str, Any]:
    values = asdict(epoch)
    if epoch.observed is None:
        del values["observed"]
    return values


def result_of(trained: Trained) -> dict[str, Any]:
    """The deterministic part of a run's record, without measurements of the final weights."""
    return {
        "val_accuracy": trained.val_accuracy,
        "diverged": trained.diverged,
        "skipped_steps": trained.skipped_steps,
        "history": [_epoch(epoch) for epoch in trained.history],
        "mask_builds": [asdict(build) for build in trained.builds],
        "data_digest": trained.split.digest,
        "test_is_shared": trained.split.test_is_shared,
        "train_images": len(trained.split.train_y),
        "val_images": len(trained.split.val_y),
        "test_images": len(trained.split.test_y),
    }
