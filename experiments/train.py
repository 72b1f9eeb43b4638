"""One training run from a configuration: deterministic given the seed, interrupted and resumed or not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

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
from experiments.distributed import Team, placed
from experiments.resume import Checkpointing, Interrupted, rng_state, set_rng_state
from experiments.schedule import scheduler
from experiments.seeds import derive_seed
from experiments.split import Split
from experiments.tensorboard import Board
from masks import BuilderError, Mask, MaskContext, MaskError, MaskSpec, ParamTable
from masks.errors import InputError
from sam import SAM, CapturedStep, RadiusFollowsLR


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
        val_accuracy: after the last epoch; NaN without validation images, and in processes that do not lead.
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
        observer, workers, team, board: see :func:`train_run`.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        initial: dict[str, Tensor] | None,
        observer: Observer | None,
        workers: int = 0,
        team: Team | None = None,
        board: Board | None = None,
    ) -> None:
        self.config, self.device, self.observer, self.team, self.board = config, device, observer, team, board
        self.clock = clock_of(device)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        data = load_cached(config.data)
        self.split = split_of(config, data, workers)
        augmentation = Augmentation.parse(config.augment)
        self.images = self.split.train_images.to(device, memory_format=self.layout)
        if augmentation.resized_crop:
            self.images = self.images.cropped(derive_seed(config.seed, "resized_crop"))
        self.y = self.split.train_y.to(device)
        self.model = initial_model(config, data)
        method, mup_base = prepared_method(config, self.model, data)
        if initial is not None:
            load_weights(self.model, initial)
        # Convolutions on CPUs and tensor cores are faster with the channels last; other models are not affected.
        self.model.to(device, memory_format=self.layout)  # type: ignore[call-overload]
        self.spec = MaskSpec.parse(config.mask)
        self.table = ParamTable.from_model(self.model)
        self.budget = budget_of(config, self.spec, self.model)
        self.norm = norm_mask(self.table)
        self.net: nn.Module = self.model if team is None else team.wrapped(self.model, device)
        self.sam = SAM(
            base_optimizer(config, self.model, device, mup_base),
            self.net,
            mask=Mask(self.table, (False,) * len(self.table)),
            rho=config.rho,
            method=method,
            norm_scope=config.norm_scope or "masked",
            norm_statistics=config.norm_statistics,
            clip_grad_norm=config.clip_grad_norm,
            seed=derive_seed(config.seed, "method"),
            ascent_gradient=config.ascent_gradient,
        )
        self._take: Callable[[tuple[Tensor, Tensor]], Tensor] = partial(self.sam.step_on, self._loss)
        if config.cuda_graph and device.type != "cuda":
            raise InputError(f"cuda_graph records steps of a CUDA device, and this run is on {device}; leave it out")
        if config.cuda_graph:
            self._take = CapturedStep(self.sam, self._loss)
        self.steps = number_of_steps(config, len(self.images))
        self.scheduler = scheduler(self.sam, config.schedule, self.steps, config.warmup * self.steps // config.epochs)
        self.radius = None
        if config.rho_min is not None and config.lr > 0:
            self.radius = RadiusFollowsLR(self.sam, rho_max=config.rho, rho_min=config.rho_min, lr_max=config.lr)
        self.window = config.window()
        self.augment = Augmenter(
            augmentation,
            self.images,
            self.split.mean,
            self.split.std,
            device,
            derive_seed(config.seed, "augment"),
        )
        self.scored = sample_of(self.split, config.score_images, config.seed, device)
        self.order = torch.Generator().manual_seed(derive_seed(config.seed, "order"))
        self.epoch_order = self.order.get_state()
        self.epoch = self.step = self.step_in_epoch = 0
        self.stats: list[Tensor] = []
        self.history: list[Epoch] = []
        self.rate = config.lr
        self.rates: list[float] = []  # the learning rate of each epoch's last step
        self.builds: list[MaskBuild] = []
        self.seconds = {"train": 0.0, "mask": 0.0, "observe": 0.0}

    # -- the loop -------------------------------------------------------------------------------------------

    def run(self, checkpoints: Checkpointing | None, after_step: Callable[[], object] = lambda: None) -> None:
        """Train to the end, from wherever it stands.

        Args:
            checkpoints: where it is saved on its way.
            after_step: called after each step.

        Raises:
            Interrupted: ``checkpoints`` was asked to stop.
        """
        while self.epoch < self.config.epochs:
            self.model.train()
            batches = self._batches()
            images = self.images.batches(batches[self.step_in_epoch :], self.epoch)  # may be read ahead of the steps
            while self.step_in_epoch < len(batches):
                start = self.clock()
                self._step(next(images), batches[self.step_in_epoch])
                self.seconds["train"] += self.clock() - start
                after_step()
                if self.step_in_epoch < len(batches) and checkpoints is not None:
                    self._maybe_save(checkpoints, epoch_end=False)
            self._end_epoch()
            if checkpoints is not None:  # after the last epoch, too: what is measured then may take long
                self._maybe_save(checkpoints, epoch_end=True)

    def _batches(self) -> list[Tensor]:
        """Positions of the images of the epoch's batches, in a new order; with several processes, of its own shards."""
        self.epoch_order = self.order.get_state()
        order = torch.randperm(len(self.images), generator=self.order).to(self.device)
        sizes = batch_sizes(self.config, len(order))
        batches = torch.split(order[: sum(sizes)], sizes)
        return [index if self.team is None else self.team.shard(index) for index in batches]

    def _step(self, images: Tensor, index: Tensor) -> None:
        if self.spec.schedule.due(self.epoch, self.step, epoch_start=self.step_in_epoch == 0):
            self._build_mask()
        self.sam.enabled = self.epoch in self.window
        self._take((self._augmented(images), self.y[index]))
        self.rate = self.sam.param_groups[0]["lr"]
        self.scheduler.step()
        if self.radius is not None:
            self.radius.step()
        last = self.sam.stats
        if last is not None:
            values = last.loss, last.perturbed_loss, last.ascent, last.radius
            self.stats.append(torch.stack([value.double() for value in values]))
        self.step += 1
        self.step_in_epoch += 1

    def _augmented(self, images: Tensor) -> Tensor:
        """The images of a step, changed. A shard is changed at its place in the whole batch, for which every process
        draws: the changes are those of a run in one process."""
        if self.team is None:
            return self._laid_out(self.augment(images))
        shape = self.team.size * len(images), *images.shape[1:]
        whole = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=self.layout).zero_()
        self.team.shard(whole).copy_(images)
        return self.team.shard(self._laid_out(self.augment(whole)))

    def _laid_out(self, images: Tensor) -> Tensor:
        if self.config.channels_last:
            return images.contiguous(memory_format=self.layout)
        # As one line and back: convolutions go by the strides, which `contiguous` leaves where there is one channel.
        return images.flatten().view(images.shape)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = self.net(batch[0])
        smoothing = self.config.label_smoothing
        return F.cross_entropy(logits.float(), batch[1], reduction="none", label_smoothing=smoothing)

    def _end_epoch(self) -> None:
        means = torch.stack(self.stats).mean(0)
        loss, perturbed, ascent, radius = (means if self.team is None else self.team.mean(means)).tolist()
        # Momentum-SAM never computes L(w): its loss is that at w + eps, and its ascent strength is not known.
        knows_loss = self.config.method.partition(":")[0] != "momentum_sam"
        self.history.append(Epoch(loss if knows_loss else perturbed, ascent if knows_loss else None, radius))
        self.rates.append(self.rate)
        self.stats = []
        measures = self.epoch + 1 < self.config.epochs and self.config.measures_after(self.epoch)
        if self.observer and measures:
            before = self.clock()
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                self.history[-1] = replace(self.history[-1], observed=self.observer(self.model, self.split))
            self.seconds["observe"] += self.clock() - before
        if self.team is not None and measures:
            self.team.wait()  # the next collective has a time limit, which rank 0's measurements may exceed
        if self.board is not None:
            self.board.epoch(self.step, self.history[-1], self.rate)
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
            mask = self._agreed(lambda: self.spec.build(context, self.budget))
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
        if self.board is not None:
            self.board.build(self.builds[-1])
        self.seconds["mask"] += self.clock() - start

    def _agreed(self, build: Callable[[], Mask]) -> Mask:
        """The mask of rank 0: on accelerators the scores of two ranks may differ in their last bits."""
        return build() if self.team is None else self.team.by_leader(build)

    # -- interruption and resume ----------------------------------------------------------------------------

    def _maybe_save(self, checkpoints: Checkpointing, *, epoch_end: bool) -> None:
        stop, due = checkpoints.stop(), checkpoints.due(self.epoch, epoch_end=epoch_end)
        if self.team is not None:
            stop, due = self.team.any(stop, due)
        if stop or due:
            state = self.state_dict()
            if self.team is None or self.team.leads:
                checkpoints.save(state)
            if self.team is not None:
                self.team.wait()
        if stop:
            raise Interrupted

    def _identity(self) -> str:
        return json.dumps(asdict(self.config), sort_keys=True) + self.split.digest

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bitwise resume needs, in plain values and tensors; with several processes every one must
        ask, and rank 0's is the whole."""
        return {
            "run": self._identity(),
            "model": self.model.state_dict(),
            "sam": self.sam.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "order": self.epoch_order,
            "position": [self.epoch, self.step, self.step_in_epoch],
            # JSON keeps every double as it is.
            "log": json.dumps(
                [[asdict(e) for e in self.history], self.rates, [asdict(b) for b in self.builds], self.seconds]
            ),
            "augment": self.augment.generator.get_state(),
            "own": [self._own_state()] if self.team is None else self.team.gather(self._own_state()),
        }

    def _own_state(self) -> dict[str, Any]:
        """What every process has of its own."""
        own: dict[str, Any] = {"stats": self.stats, "rng": rng_state(self.device)}
        if self.team is not None:
            own["buffers"] = dict(self.model.named_buffers())
            own["memory"] = self.sam.memory.state_dict() if self.sam.memory.replica else None
        return own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken.

        Raises:
            InputError: it is of another run.
        """
        if state.get("run") != self._identity():
            raise InputError("the checkpoint is of another run; remove it to start anew")
        load_weights(self.model, state["model"])
        own = state["own"][0 if self.team is None else self.team.rank]
        buffers = dict(self.model.named_buffers())
        for name, value in own.get("buffers", {}).items():
            buffers[name].copy_(value)
        memory = own.get("memory") or state["sam"]["memory"]
        self.sam.load_state_dict(state["sam"] | {"memory": memory}, adopt_mask=True)
        self.scheduler.load_state_dict(state["scheduler"])
        self.order.set_state(state["order"])
        self.epoch, self.step, self.step_in_epoch = state["position"]
        self.stats = [row.to(self.device) for row in own["stats"]]
        history, self.rates, builds, self.seconds = json.loads(state["log"])
        self.history = [Epoch(**epoch) for epoch in history]
        self.builds = [MaskBuild(**build) for build in builds]
        self.augment.generator.set_state(state["augment"])
        set_rng_state(own["rng"], self.device)
        if self.board is not None:
            for n, (epoch, rate) in enumerate(zip(self.history, self.rates, strict=True), start=1):
                self.board.epoch(n * self.steps // self.config.epochs, epoch, rate)
            for build in self.builds:
                self.board.build(build)


def train_run(
    config: RunConfig,
    device: torch.device,
    *,
    initial: dict[str, Tensor] | None = None,
    observer: Observer | None = None,
    checkpoints: Checkpointing | None = None,
    workers: int = 0,
    team: Team | None = None,
    board: Board | None = None,
    quiet: bool = True,
) -> Trained:
    """Train one model. The test images are not looked at.

    Args:
        config: the run.
        device: where it runs; on the same CPU, the same configuration gives bitwise the same result, also when it was
            interrupted and resumed.
        initial: weights to start from instead of the seed's.
        observer: called after every ``config.measure_every`` epochs but the last one; training is bitwise the same
            with it.
        checkpoints: where the run is saved on its way, and from where it goes on; with several processes, rank 0's.
        workers: processes that decode images, where they stay in their files; changes no number.
        team: the processes that train the model together, all of which must call this; what is measured, with the
            running statistics of the process, is of use on rank 0.
        board: shows the run while it trains.
        quiet: no progress bar.

    Raises:
        InputError: the data, the model, the mask or a setting cannot be had.
        Interrupted: ``checkpoints.stop`` asked for it, in any process; the run is saved.
    """
    with nullcontext() if team is None else team.explained():
        training = Training(placed(config, team).resolved(), device, initial, observer, workers, team, board)
        _train(training, checkpoints, quiet)
    model, split = training.model.eval(), training.split
    accuracy = math.nan
    if len(split.val_y) and (team is None or team.leads):
        accuracy = correct(model, split.val_images.to(device), split.val_y).double().mean().item()
    if board is not None:
        board.accuracy(training.steps, accuracy)
    return Trained(
        config=training.config,
        model=model,
        sam=training.sam,
        split=split,
        history=tuple(training.history),
        builds=tuple(training.builds),
        val_accuracy=accuracy,
        skipped_steps=int(training.sam.skipped_steps),
        train_seconds=training.seconds["train"],
        mask_seconds=training.seconds["mask"],
        observe_seconds=training.seconds["observe"],
        mask=training.sam.mask,
    )


def _train(training: Training, checkpoints: Checkpointing | None, quiet: bool) -> None:
    """Train to the end, from the beginning or from where it was saved."""
    team, device = training.team, training.device
    saved = None
    if checkpoints is not None:
        saved = checkpoints.load() if team is None else team.by_leader(checkpoints.load)
    rank = [] if team is None or team.leads else [f"rank {team.rank}"]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(training.config.seed, "train", *rank))  # dropout
        if saved is not None:
            training.load_state_dict(saved)
        if quiet:  # in the processes of a study, whose end a bar's lock would outlive
            training.run(checkpoints)
            return
        done, total = training.step, training.steps
        with tqdm(initial=done, total=total, desc="training", unit="step", disable=None, dynamic_ncols=True) as bar:
            training.run(checkpoints, bar.update)


def batch_sizes(config: RunConfig, n_train: int) -> list[int]:
    """Sizes of the batches of an epoch, those of all processes together.

    The last one may be smaller. It is cut to a multiple of the number of processes, whose shards count equally and so
    must be equal, and is left out if one image or none is each one's share: one has no statistics.
    """
    processes = config.world_size or 1
    full, rest = divmod(n_train, config.batch_size)
    share = rest // processes
    return [config.batch_size] * full + [processes * share] * (share > 1)


def number_of_steps(config: RunConfig, n_train: int) -> int:
    """Steps of the run.

    Raises:
        InputError: there is none, or the mask's schedule builds it after the last one.
    """
    steps = config.epochs * len(batch_sizes(config, n_train))
    if not steps:
        raise InputError(f"{n_train} training images give no batch of at least {2 * (config.world_size or 1)}")
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
        **({"measured_in": "float32"} if trained.config.precision != "float32" else {}),
        **_standardised_by(trained.split),
    }


def _standardised_by(split: Split) -> dict[str, Any]:
    """What the images were standardised by where that is not all training images."""
    if split.num_moments == len(split.train_y):
        return {}
    mean, std = split.mean.tolist(), split.std.tolist()
    return {"standardised_by": {"images": split.num_moments, "mean": mean, "std": std}}
