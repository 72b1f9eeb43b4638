"""List the registered masks, or build them on a model and print what they keep and what they cost."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from experiments.build import batches_of, load_cached, load_weights, sample_of
from experiments.checkpoint import read_weights
from experiments.cost import step_costs
from experiments.models import build_model, check_model
from experiments.seeds import derive_seed
from experiments.split import make_split
from masks import Batch, Budget, Mask, MaskContext, MaskError, MaskSpec, ParamTable, list_masks
from masks.errors import InputError

IMAGE_SHAPES = {"torchvision": (3, 224, 224)}
DEFAULT_SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Target:
    """The model that masks are built on.

    Attributes:
        model: as in a run.
        num_classes: number of classes; by default those of the data, else 10.
        width: width of a built-in model.
        init: checkpoint to load first.
        data: images to score on, None for none.
        score_images: how many.
        seed: seed of initial weights and random masks.
        shape: of the images where there is no data: channels, height, width; by default torchvision's or the digits'.
    """

    model: str
    num_classes: int | None = None
    width: int | None = None
    init: Path | None = None
    data: str | None = None
    score_images: int = 256
    seed: int = 0
    shape: tuple[int, int, int] | None = None

    def build(self) -> tuple[nn.Module, list[Batch], torch.Tensor]:
        """The model, batches to score on, and a sample input.

        Raises:
            InputError: the model, the checkpoint or the data cannot be had.
        """
        for name in ("num_classes", "score_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        batches: list[Batch] = []
        if self.data is None:
            shape = self.shape or IMAGE_SHAPES.get(self.model.partition(":")[0], DEFAULT_SHAPE)
            sample, classes = torch.zeros(2, *shape), 10
        else:
            data = load_cached(self.data)
            shape, sample, classes = data.image_shape, data.first(2), data.num_classes
            if self.num_classes is not None and self.num_classes < classes:
                raise InputError(f"num_classes is {self.num_classes}, but {self.data} has {classes} classes")
            split = make_split(data, seed=self.seed)
            batches = batches_of(*sample_of(split, self.score_images, self.seed, torch.device("cpu")), 64)
        classes = self.num_classes or classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "init"))
            model = build_model(
                self.model, in_channels=shape[0], image_size=shape[1:], num_classes=classes, width=self.width
            )
        if self.init is not None:
            load_weights(model, read_weights(self.init))
        if self.data is not None:
            check_model(model, sample, classes, name=self.model)
        return model, batches, sample


@dataclass(frozen=True)
class Anatomy:
    """What one mask keeps; ``skipped`` says why it was not built, and the numbers are None then."""

    name: str
    kind: str
    numel: int
    kept: int | None = None
    density: float | None = None
    matched: bool = False
    tensors: int | None = None
    jaccard_norm: float | None = None
    norm_share: float | None = None
    build_seconds: float | None = None
    predicted_cost: float | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class AnatomyReport:
    """All masks on one model."""

    model: str
    table: ParamTable
    budget: Budget
    budget_text: str
    masks: tuple[Anatomy, ...]

    def as_json(self) -> str:
        """A list of objects, one per mask."""
        return json.dumps([asdict(mask) for mask in self.masks], indent=1)

    def as_text(self) -> str:
        """A table, the skipped masks with their reasons, and how to read it."""
        built = [m for m in self.masks if m.skipped is None]
        text = pd.DataFrame(
            [
                {
                    "mask": m.name,
                    "kept": f"{m.kept:,}",
                    "density": f"{100 * (m.density or 0):.4g} %",
                    "matched": "yes" if m.matched else "natural size",
                    "tensors": f"{m.tensors} of {len(self.table)}",
                    "overlap with norm": "-" if m.jaccard_norm is None else f"{m.jaccard_norm:.4f}",
                    "norm share": "-" if m.norm_share is None else f"{100 * m.norm_share:.1f} %",
                    "build s": f"{m.build_seconds:.2f}",
                    "step cost": "-" if m.predicted_cost is None else f"{m.predicted_cost:.2f}x",
                }
                for m in built
            ]
        )
        frozen = f", {self.table.frozen_numel:,} frozen ones not counted" if self.table.frozen_numel else ""
        lines = [
            f"{self.model}: {self.table.numel:,} trainable coordinates in {len(self.table)} tensors{frozen}",
            f"budgeted masks keep {self.budget.num_kept:,} ({self.budget_text})",
            "",
            text.to_string(index=False) if built else "no mask could be built",
            "",
            *(f"skipped {m.name}: {m.skipped}" for m in self.masks if m.skipped is not None),
            "overlap: Jaccard index. step cost: relative to the base optimizer, from counted matrix and convolution "
            "operations. Score masks change with the weights: these are of the weights given.",
        ]
        return "\n".join(lines)


def build_all(
    target: Target,
    *,
    match: str = "norm",
    density: float | None = None,
    only: Sequence[str] | None = None,
    save: Path | None = None,
) -> AnatomyReport:
    """Build every registered mask, or some, on a model.

    Args:
        target: the model.
        match: budgeted masks keep as many coordinates as this mask of natural size.
        density: or this fraction.
        only: masks as in a run; default all that need no file.
        save: folder to write each mask to.

    Raises:
        InputError: the target, the budget or a mask named in ``only`` cannot be had.
    """
    model, batches, sample = target.build()
    table = ParamTable.from_model(model)
    context = MaskContext(model, table, batches=batches, seed=target.seed)
    if density is not None:
        budget, budget_text = Budget.from_density(density, table.numel), f"density {density:g}"
    else:
        reference = MaskSpec.parse(match)
        if reference.info.kind != "natural":
            raise MaskError(f"match must name a mask of natural size, and {reference.name} is budgeted")
        budget, budget_text = Budget.matching(reference.build(context, None)), f"as {match} does"
    norm = Mask(table, tuple(row.is_norm for row in table)) if any(row.is_norm for row in table) else None
    specs = [MaskSpec.parse(text) for text in only] if only else [MaskSpec(info.name) for info in list_masks()]
    built: dict[str, Anatomy] = {}
    touched: dict[str, set[str]] = {}
    for spec in specs:
        name = str(spec)
        start = time.perf_counter()
        try:
            mask = spec.build(context, budget)
        except Exception as error:  # whatever the builder of a plugin raises: one mask must not hide the others
            text = str(error) if isinstance(error, MaskError) else f"its builder raised {type(error).__name__}: {error}"
            if only:
                raise MaskError(text if name in text else f"mask {name}: {text}") from None
            built[name] = Anatomy(name, spec.info.kind, table.numel, skipped=text)
            continue
        seconds = time.perf_counter() - start
        touched[name] = {count.row.name for count in mask.per_layer() if count.kept}
        built[name] = Anatomy(
            name=name,
            kind=spec.info.kind,
            kept=mask.num_kept,
            numel=mask.numel,
            density=mask.density,
            matched=spec.info.kind == "budgeted",
            tensors=mask.num_tensors,
            jaccard_norm=None if norm is None else mask.jaccard(norm),
            norm_share=mask.norm_share if mask.num_kept else None,
            build_seconds=seconds,
        )
        if save is not None:
            _save(mask, save, name)
    costs = step_costs(model, sample, touched)
    masks = tuple(replace(anatomy, predicted_cost=costs.get(name)) for name, anatomy in built.items())
    return AnatomyReport(target.model, table, budget, budget_text, masks)


def _save(mask: Mask, folder: Path, name: str) -> None:
    path = folder / (re.sub(r"[^\w.=+@-]", "_", name).replace("=", "-") + ".npz")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and Mask.load(path) != mask:
            raise InputError(f"{path} holds another mask; choose another folder with --save")
        mask.save(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def describe_all(*, as_json: bool) -> str:
    """Every registered mask: kind, summary, paper, options, when it is built, origin."""
    infos = list_masks()
    if as_json:
        return json.dumps(
            [
                {
                    "name": info.name,
                    "kind": info.kind,
                    "summary": info.summary,
                    "source": info.source,
                    "origin": info.origin,
                    "needs_data": info.needs_data,
                    "schedule": str(info.schedule),
                    "options": [{"name": o.name, "type": o.type_name, "default": o.default} for o in info.options],
                }
                for info in infos
            ],
            indent=1,
        )
    lines = []
    for info in infos:
        data = ", scored on data" if info.needs_data else ""
        lines += [
            f"{info.name}  ({'natural size, unmatched' if info.kind == 'natural' else 'budgeted: exactly k'}{data})",
            f"    {info.summary}",
            f"    source: {info.source}; built: {info.schedule}; from {info.origin}",
            *(f"    option {o.name}: {o.type_name}, default {_default(o.default)}" for o in info.options),
        ]
    return "\n".join(lines)


def _default(value: object) -> str:
    return "+".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value).lower()
