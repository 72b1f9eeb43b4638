"""What a SAM step under each mask costs, measured on this machine and on any model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.anatomy import Target
from experiments.build import pick_device
from experiments.cost import step_costs
from experiments.measure import listed
from experiments.timing import WARM_UP, Step, clock, environment, measure, quartiles, ratios
from masks import Budget, Mask, MaskContext, MaskError, MaskSpec, ParamTable, Region
from masks.errors import InputError
from sam import SAM

SCHEMA = "sam-masks/bench/1"
ROUNDS, FEWEST_ROUNDS = 9, 3
QUICK_SECONDS = 40.0


@dataclass(frozen=True)
class BenchOptions:
    """What to time.

    Args:
        model: as in a run: a built-in one, torchvision:NAME, timm:NAME or module:function.
        num_classes: number of classes (default: those of the data, else 10).
        width: width of a built-in model.
        data: images to step on and to score masks on (default: random ones).
        shape: images as CxHxW, such as 3x32x32 (default: 3x224x224 for torchvision, 1x8x8 otherwise); with data, its.
        batch_size: images per step.
        masks: masks to time, as name[:option=value...], separated by commas.
        match: budgeted masks keep as many coordinates as this mask.
        density: budgeted masks keep this fraction instead.
        rounds: steps of each variant.
        quick: at most about 40 seconds of steps: fewer rounds (3 to 9) and, where that is not enough, smaller batches.
        device: auto, cpu, cuda or cuda:N.
        plugin: modules to import for their masks, separated by commas.
        json: print one JSON object with every round.
    """

    model: str = "resnet_small"
    num_classes: int | None = None
    width: int | None = None
    data: str | None = None
    shape: str | None = None
    batch_size: int = 128
    masks: str = "all,norm,random,random_depth,magnitude,fisher"
    match: str = "norm"
    density: float | None = None
    rounds: int = ROUNDS
    quick: bool = False
    device: str = "auto"
    plugin: str | None = None
    json: bool = False


@dataclass(frozen=True)
class MaskCost:
    """What one mask costs.

    Attributes:
        mask: its text.
        kept: coordinates.
        tensors: tensors that it touches.
        build_seconds: to build it once.
        step: quartiles of a step's seconds relative to the base optimizer's in the same round.
        flop_limit: the same from counted matrix and convolution operations; None where they cannot be counted.
        held_bytes: kept between the two passes, and indices kept all the time.
    """

    mask: str
    kept: int
    tensors: int
    build_seconds: float
    step: dict[str, float]
    flop_limit: float | None
    held_bytes: int


@dataclass(frozen=True)
class BenchReport:
    """All masks on one model.

    Attributes:
        options: what was asked.
        batch_size: images per step.
        shape: of an image: channels, height, width.
        classes: outputs of the model.
        numel: trainable coordinates.
        tensors: of the model's trainable parameters.
        sgd: quartiles of the base optimizer's step, seconds.
        masks: per mask.
        rounds: every round: order and seconds.
        environment: versions and hardware.
    """

    options: BenchOptions
    batch_size: int
    shape: tuple[int, ...]
    classes: int
    numel: int
    tensors: int
    sgd: dict[str, float]
    masks: tuple[MaskCost, ...]
    rounds: list[dict[str, Any]]
    environment: dict[str, Any]

    def as_json(self) -> str:
        """One object with every number."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)

    def as_text(self) -> str:
        """A table, and how to read it."""
        options, per_step = self.options, self.sgd["median"]
        lines = pd.DataFrame(
            [
                {
                    "mask": m.mask,
                    "kept": f"{m.kept:,}",
                    "tensors": f"{m.tensors} of {self.tensors}",
                    "step": f"{m.step['median']:.2f}x",
                    "quartiles": f"{m.step['q1']:.2f}-{m.step['q3']:.2f}",
                    "limit": "-" if m.flop_limit is None else f"{m.flop_limit:.2f}x",
                    "held": f"{m.held_bytes / 1e6:,.2f} MB",
                    "building": f"{m.build_seconds / per_step:,.1f} steps",
                }
                for m in self.masks
            ]
        )
        env = self.environment
        on_cpu = env["device"].startswith("cpu")
        return "\n".join(
            [
                f"{options.model}: {self.numel:,} trainable coordinates, batch {self.batch_size} of "
                f"{'x'.join(map(str, self.shape))}, {self.classes} classes, "
                f"{len(self.rounds)} rounds on {env['cpu' if on_cpu else 'device']}, "
                f"{env['threads']} thread; a step of SGD takes {1e3 * per_step:.3g} ms "
                f"({'processor' if on_cpu else 'device'} time)",
                "",
                lines.to_string(index=False),
                "",
                "step: SAM under the mask over SGD on the same batch, median of the rounds, which run in shuffled "
                "order. limit: the same from counted matrix and convolution operations, without elementwise work. "
                "building: of the mask, in steps of SGD.",
                *(
                    [f"batches of {self.batch_size} instead of {options.batch_size}, to end within a minute"]
                    if self.batch_size != options.batch_size
                    else []
                ),
            ]
        )


def bench(options: BenchOptions) -> BenchReport:
    """Time a step of SGD and one of SAM under each mask, interleaved, in an order shuffled every round.

    Raises:
        InputError: the model, the data, a mask or the device cannot be had, or a number is out of range.
    """
    for name in ("batch_size", "rounds"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(options, name)}")
    device = pick_device(options.device)
    target = Target(
        options.model, options.num_classes, options.width, data=options.data, shape=_shape(options.shape, options.data)
    )
    model, batches, sample = target.build()
    layout = torch.channels_last
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    classes = model(sample.to(device)).shape[1]
    if batches:
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        index = torch.arange(options.batch_size) % len(x)
        x, y = x[index], y[index]
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(options.batch_size, *sample.shape[1:], generator=generator)
        y = torch.randint(classes, (options.batch_size,), generator=generator)
        batches = [(x, y)]
    batch = x.to(device, memory_format=layout), y.to(device)
    masks, build_seconds = _masks(options, model, [(a.to(device), b.to(device)) for a, b in batches])
    touched = {name: {c.row.name for c in mask.per_layer() if c.kept} for name, mask in masks.items()}
    limits = step_costs(model, sample, touched)
    model.train()
    size, rounds = options.batch_size, options.rounds
    if options.quick:
        predicted = 1 + sum(limit or 2.0 for limit in limits.values())
        size, rounds = _plan(model, batch, predicted, device)
        batch = batch[0][:size], batch[1][:size]
    found = measure(_steps(model, batch, masks), rounds, 0, device)
    costs = []
    for name, mask in masks.items():
        region = Region(mask, model)
        held = sum(t.untyped_storage().nbytes() for t in region.save()) + region.index_nbytes
        costs.append(
            MaskCost(
                mask=name,
                kept=mask.num_kept,
                tensors=mask.num_tensors,
                build_seconds=build_seconds[name],
                step=ratios(found, name, _SGD),
                flop_limit=limits[name],
                held_bytes=held,
            )
        )
    table = next(iter(masks.values())).table
    return BenchReport(
        options=options,
        batch_size=size,
        shape=tuple(batch[0].shape[1:]),
        classes=classes,
        numel=table.numel,
        tensors=len(table),
        sgd=quartiles([r["seconds"][_SGD] for r in found]),
        masks=tuple(costs),
        rounds=found,
        environment=environment(device),
    )


_SGD = "(sgd)"


def _shape(text: str | None, data: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    if data is not None:
        raise InputError("shape has no effect with data, whose images have one; leave one of them out")
    numbers = text.split("x")
    if len(numbers) != 3 or not all(n.isascii() and n.isdigit() and int(n) > 0 for n in numbers):
        raise InputError(f"shape must be CxHxW such as 3x32x32, found {text!r}")
    channels, height, width = map(int, numbers)
    return channels, height, width


def _masks(
    options: BenchOptions, model: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Mask], dict[str, float]]:
    """The masks by their text, and the seconds that building each took."""
    table = ParamTable.from_model(model)
    context = MaskContext(model, table, batches=batches)
    device = batches[0][0].device
    specs = [MaskSpec.parse(text) for text in listed(options.masks)]
    budget = None
    if options.density is not None:
        budget = Budget.from_density(options.density, table.numel)
    elif any(spec.info.kind == "budgeted" for spec in specs):
        reference = MaskSpec.parse(options.match)
        if reference.info.kind != "natural":
            raise MaskError(f"match must name a mask of natural size, and {reference.name} is budgeted")
        budget = Budget.matching(reference.build(context, None))
    masks: dict[str, Mask] = {}
    seconds: dict[str, float] = {}
    for spec in specs:

        def build(spec: MaskSpec = spec) -> None:
            masks[str(spec)] = spec.build(context, budget)

        seconds[str(spec)] = clock(build, device)
    if not masks:
        raise InputError("no masks to time; --masks all,norm")
    return masks, seconds


def _steps(model: nn.Module, batch: tuple[Tensor, Tensor], masks: Mapping[str, Mask]) -> dict[str, Step]:
    """One function per variant; each has a base optimizer of its own over the same parameters."""

    def losses(of: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(of[0]), of[1], reduction="none")

    def base() -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=batch[0].device.type == "cuda")

    def plain(optimizer: torch.optim.Optimizer) -> Step:
        def step() -> None:
            optimizer.zero_grad()
            losses(batch).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    def sam(mask: Mask) -> Step:
        optimizer = SAM(base(), model, mask=mask)
        return lambda: optimizer.step_on(losses, batch)

    return {_SGD: plain(base()), **{name: sam(mask) for name, mask in masks.items()}}


def _plan(
    model: nn.Module, batch: tuple[Tensor, Tensor], steps_per_round: float, device: torch.device
) -> tuple[int, int]:
    """Batch size and number of rounds that end within :data:`QUICK_SECONDS`.

    A batch is halved until the fewest rounds fit; a step's time is taken to be proportional to it.
    """
    size = len(batch[0])
    probe = max(2, size // 8)
    small = batch[0][:probe], batch[1][:probe]
    plain = _steps(model, small, {})[_SGD]
    clock(plain, device)  # the first one allocates
    seconds = clock(plain, device) * size / probe * steps_per_round
    while size > 2 and seconds * (FEWEST_ROUNDS + WARM_UP) > QUICK_SECONDS:
        size, seconds = size // 2, seconds / 2
    return size, max(FEWEST_ROUNDS, min(ROUNDS, int(QUICK_SECONDS / seconds) - WARM_UP))
