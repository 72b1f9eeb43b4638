"""Measure flatness metrics on a checkpoint of any model, also one that was never trained here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis import PRIMARY
from analysis.evaluation import evaluation_mode, place, precision_of
from analysis.examples import check_repeatable
from analysis.metrics import resolve
from experiments.build import (
    batches_of,
    budget_of,
    initial_model,
    load_cached,
    load_weights,
    pick_device,
    sample_of,
    split_of,
)
from experiments.checkpoint import read_weights
from experiments.config import RunConfig
from experiments.measure import listed, results
from experiments.record import code_digest, content_digests, file_digest, finite, write_text
from experiments.split import Split
from masks import Batch, Mask, MaskContext, MaskSpec, cross_entropy
from masks.errors import InputError

SCHEMA = "sam-masks/analysis/1"
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
        out: file that keeps every result as soon as it is there; the same command goes on from it, also with other
            metrics.
        quiet: no progress bar.
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
    out: str | None = None
    quiet: bool = False
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
    options: AnalyzeOptions, *, on_result: Callable[[dict[str, Any]], None] | None = None, quiet: bool = True
) -> list[dict[str, Any]]:
    """Measure the metrics on the checkpoint.

    Args:
        options: what to measure.
        on_result: called with every object as soon as it is there, so that nothing is lost on interruption.
        quiet: no progress bar.

    Returns:
        One object per metric, in plain values; see :func:`experiments.measure.results`.

    Raises:
        InputError: what was asked for cannot be had (unknown metric, a checkpoint of another model, ...), the file
            ``out`` holds the results of something else, or not one metric could be measured.
    """
    names = resolve(listed(options.metrics) or DEFAULT_METRICS)
    config, device = options.run_config(), pick_device(options.device)
    data = load_cached(options.data)
    weights = read_weights(Path(options.checkpoint))
    model = initial_model(config, data)
    _check_precision(model, weights)
    load_weights(model, weights)
    model.to(device)
    split = split_of(config, data)
    batches = _batches(split, options, device)
    _check_loss(model, batches)
    mask = _mask(options, config, model, batches)
    content = content_digests([options.mask] if options.mask else [], config, data.digest)
    content |= {"checkpoint": file_digest(Path(options.checkpoint)), "device": device.type}
    shared = {
        "model": options.model,
        "checkpoint": options.checkpoint,
        "checkpoint_digest": content["checkpoint"],
        "data": options.data,
        "labels": options.labels,
        "label_noise": config.label_noise,
        "sample_seed": options.seed,
        "mask": str(MaskSpec.parse(options.mask)) if options.mask else None,
    }
    kept = _Kept(options, content)
    settings = {"m": options.m, "radius": options.radius, "seed": options.seed}
    out: list[dict[str, Any]] = []
    with tqdm(total=len(names), unit="metric", disable=quiet, dynamic_ncols=True, desc=names[0]) as bar:
        for result in results(model, batches, names, shared=shared, known=kept.results, mask=mask, **settings):
            out.append(finite(result))
            kept.add(out[-1])
            if on_result is not None:
                on_result(out[-1])
            bar.set_description(names[min(len(out), len(names) - 1)], refresh=False)
            bar.update()
    if all(result["value"] is None for result in out):
        raise InputError(out[0]["settings"]["reason"])
    return out


class _Kept:
    """The results in the file ``options.out``, if there is one.

    Raises:
        InputError: it is not such a file, holds results of other weights, data, settings or code, or cannot be written.
    """

    def __init__(self, options: AnalyzeOptions, content: dict[str, str]) -> None:
        how = ("metrics", "checkpoint", "device", "plugin", "out", "quiet", "json")
        settings = {name: value for name, value in asdict(options).items() if name not in how}
        self._request = {"settings": settings, "content": content, "version": {"version of the code": code_digest()}}
        self._path = None if options.out is None else Path(options.out)
        self.results: dict[str, dict[str, Any]] = {}
        if self._path is None:
            return
        if not os.access(self._path.absolute().parent, os.W_OK | os.X_OK):
            raise InputError(f"cannot write {self._path}: its folder is not there or cannot be written to")
        if self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["schema"] != SCHEMA:
                raise InputError(f"{path} has another schema than {SCHEMA}; choose another file with --out")
            request = {part: dict(found["request"][part]) for part in self._request}
            self.results = {one["metric"]: one for one in found["results"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} does not hold results of analyze; choose another file with --out") from None
        other = sorted(
            name
            for part, mine in self._request.items()
            for name in mine.keys() | request[part].keys()
            if mine.get(name) != request[part].get(name)
        )
        if other:
            raise InputError(f"{path} holds results of another {', '.join(other)}; choose another file with --out")

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result; no file is begun for one that could not be measured."""
        self.results[result["metric"]] = result
        if self._path is None or all(one["value"] is None for one in self.results.values()):
            return
        content = {"schema": SCHEMA, "request": self._request, "results": list(self.results.values())}
        try:
            write_text(self._path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from None


def _check_loss(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Refuse, before anything is measured, what no metric can be measured on.

    Raises:
        InputError: parameters that are not float32 or float64, a loss that is not finite, or that a second pass over
            the same data does not repeat.
    """
    dtype, device = precision_of(model)
    with evaluation_mode(model):
        for batch in batches:
            check_repeatable(model, place(batch, dtype, device), cross_entropy, dtype)


def _check_precision(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Refuse weights that would be rounded or widened without a word.

    Raises:
        InputError: a tensor of another dtype than the model's.
    """
    for name, own in model.state_dict().items():
        if name in weights and weights[name].dtype != own.dtype:
            raise InputError(
                f"{name} is {weights[name].dtype} in the checkpoint and {own.dtype} in the model: sharpness of rounded "
                f"weights is not that of the trained ones; save the checkpoint in {own.dtype}"
            )


def as_text(result: dict[str, Any]) -> str:
    """One line for a result."""
    if result["value"] is None:
        return f"{result['metric']}: not measured: {result['settings']['reason']}"
    error = "" if result["error"] is None else f" +- {result['error']:.2g}"
    return f"{result['metric']}: {result['value']:.5g}{error} (n={result['n']}; {result['settings']['name']})"


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
