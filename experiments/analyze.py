"""Measure flatness metrics on a checkpoint of any model, also one that was never trained here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from analysis import PRIMARY, Estimate, measurements
from experiments.checkpoint import read_weights
from experiments.config import RunConfig
from experiments.record import file_digest
from experiments.split import Split
from experiments.train import (
    batches_of,
    budget_of,
    initial_model,
    load_cached,
    load_weights,
    pick_device,
    sample_of,
    split_of,
)
from masks import Batch, Mask, MaskContext, MaskSpec
from masks.errors import InputError

DEFAULT_METRICS = (PRIMARY, "one_step_l2@middle", "lambda_max", "gradient_norm", "fisher_trace_empirical")
_BATCH = 256


@dataclass(frozen=True)
class AnalyzeOptions:
    """What is measured, on which model and which images.

    Args:
        model: resnet_small, vit_small, mlp, torchvision:NAME or module:function of your own.
        checkpoint: file with the weights (a state dict, or one that train wrote).
        data: digits, a torchvision image set by name, folder:DIR or npz:FILE.
        width: width of a built-in model (default: its own).
        n_train: number of training images (default: as in train).
        n_val: number of validation images (default: as in train).
        n_test: number of test images (default: as in train).
        label_noise: share of training labels redrawn at random (default: as in train).
        labels: training labels to measure on, as given (noisy ones included) or clean.
        images: training images to measure on, drawn with the seed; all where there are fewer.
        m: micro-batch size of worst-case sharpness; an incomplete last micro-batch is dropped.
        mask: only these coordinates move, as name[:option=value...] (default: all); see `sam-masks masks`.
        match: a budgeted mask keeps as many coordinates as this mask of natural size.
        density: a budgeted mask keeps this fraction instead of matching.
        radius: what one radius means for a mask: the same, equal root mean square, or equal relative size.
        metrics: names separated by commas; name@RHO for one radius, name for its whole grid (default: a fast set).
        seed: seed of the run whose training images are taken, and of everything random.
        device: auto, cpu, cuda or cuda:N.
        plugin: modules to import for their masks and metrics, separated by commas.
        json: print a list of objects.
    """

    model: str
    checkpoint: str
    data: str
    width: int | None = None
    n_train: int | None = None
    n_val: int | None = None
    n_test: int | None = None
    label_noise: float | None = None
    labels: Literal["given", "clean"] = "given"
    images: int = 1024
    m: int = 128
    mask: str | None = None
    match: str = "norm"
    density: float | None = None
    radius: Literal["same", "rms", "relative"] = "same"
    metrics: str | None = None
    seed: int = 0
    device: str = "auto"
    plugin: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if self.images < 1 or self.m < 1:
            raise InputError(f"images and m must be at least 1, got images={self.images} and m={self.m}")
        if self.labels not in ("given", "clean"):
            raise InputError(f"labels must be given or clean, got {self.labels!r}")

    def run_config(self) -> RunConfig:
        """The run whose model, images and mask these are."""
        return RunConfig(
            data=self.data,
            n_train=self.n_train,
            n_val=self.n_val,
            n_test=self.n_test,
            label_noise=self.label_noise,
            model=self.model,
            width=self.width,
            mask=self.mask or "all",
            match=self.match,
            density=self.density,
            seed=self.seed,
        ).resolved()


def analyze(
    options: AnalyzeOptions, *, on_result: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Measure the metrics on the checkpoint.

    Args:
        options: what to measure.
        on_result: called with every object as soon as it is there, so that nothing is lost on interruption.

    Returns:
        One object per metric, in plain values: ``metric`` (its name in full, with the radius), ``value``, ``error``
        (what it is stands in ``settings.error_kind``; None where there is none), ``n``, ``settings``. A metric that
        does not apply, or whose loss is not finite, has value and error None and the line in ``settings.reason``.

    Raises:
        InputError: what was asked for cannot be had (unknown metric, a checkpoint of another model, ...), or not one
            metric could be measured.
    """
    config, device = options.run_config(), pick_device(options.device)
    data = load_cached(options.data)
    weights = read_weights(Path(options.checkpoint))
    model = initial_model(config, data)
    load_weights(model, weights)
    model.to(device)
    split = split_of(config, data)
    batches = _batches(split, options, device)
    mask = _mask(options, config, model, batches)
    names = [part.strip() for part in (options.metrics or "").split(",") if part.strip()] or DEFAULT_METRICS
    shared = {
        "model": options.model,
        "checkpoint": options.checkpoint,
        "checkpoint_digest": file_digest(Path(options.checkpoint)),
        "data": options.data,
        "labels": options.labels,
        "label_noise": config.label_noise,
        "sample_seed": options.seed,
        "mask": str(MaskSpec.parse(options.mask)) if options.mask else None,
    }
    results: list[dict[str, Any]] = []
    failures: list[InputError] = []
    for name, measure in measurements(
        model, batches, names, mask=mask, m=options.m, radius=options.radius, seed=options.seed
    ):
        try:
            results.append(_result(name, measure(), shared))
        except InputError as error:
            failures.append(error)
            settings = {"reason": str(error), **shared}
            results.append({"metric": name, "value": None, "error": None, "n": 0, "settings": settings})
        if on_result is not None:
            on_result(results[-1])
    if len(failures) == len(results):
        raise failures[0]
    return results


def as_text(result: dict[str, Any]) -> str:
    """One line for a result."""
    if result["value"] is None:
        return f"{result['metric']}: not measured: {result['settings']['reason']}"
    error = "" if result["error"] is None else f" +- {result['error']:.2g}"
    return f"{result['metric']}: {result['value']:.5g}{error} (n={result['n']}; {result['settings']['name']})"


def _result(name: str, found: Estimate, shared: dict[str, Any]) -> dict[str, Any]:
    # An eigenvalue has no standard error but the bound of its residual; error_kind says which.
    error = found.standard_error if found.standard_error is not None else found.settings.get("residual")
    settings = {"name": found.name, **found.settings, **shared}
    return {"metric": name, "value": found.value, "error": error, "n": found.n, "settings": settings}


def _batches(split: Split, options: AnalyzeOptions, device: torch.device) -> list[Batch]:
    if options.labels == "clean":
        split = replace(split, train_y=split.train_y_clean)
    return batches_of(*sample_of(split, options.images, options.seed, device), _BATCH)


def _mask(options: AnalyzeOptions, config: RunConfig, model: nn.Module, batches: Sequence[Batch]) -> Mask | None:
    if options.mask is None:
        return None
    spec = MaskSpec.parse(options.mask)
    context = MaskContext(model, batches=batches, seed=options.seed, built_at="checkpoint")
    mask = spec.build(context, budget_of(config, spec, model))
    if not mask.num_kept:
        raise InputError(f"mask {options.mask} keeps no coordinate of {options.model}: there is nothing to measure")
    return mask
