"""Measure flatness metrics on a checkpoint of any model, also one that was never trained here."""

from __future__ import annotations

import json
import math
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
from analysis.examples import check_function
from analysis.metrics import MetricInfo, list_metrics, metric_info, resolve
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
from experiments.data import ImageSet
from experiments.measure import listed, results
from experiments.record import RunRecord, code_digest, content_digests, file_digest, finite, write_text
from experiments.split import Split
from experiments.store import CHECKPOINT, RESULT, read_run
from masks import Batch, Mask, MaskContext, MaskSpec, cross_entropy
from masks.errors import InputError

SCHEMA = "sam-masks/analysis/1"
DEFAULT_METRICS = (PRIMARY, "one_step_l2@middle", "lambda_max", "gradient_norm", "fisher_trace_empirical")
LIST = "list"
_BATCH = 256
_FROM_RECORD = ("data", "n_train", "n_val", "n_test", "label_noise", "width", "seed", "trainable", "tuning")
"""What the record beside a checkpoint says where the options do not: the images, and what of the model was trained."""


@dataclass(frozen=True)
class AnalyzeOptions:
    """What is measured, on which model and which images.

    A checkpoint that train wrote has its record beside it, from which the images are taken where they are not given.

    Args:
        model: resnet_small, vit_small, mlp, torchvision:NAME or module:function of your own.
        checkpoint: file with the weights (a state dict, or one that train wrote).
        data: digits, a torchvision image set by name, folder:DIR, stream:DIR@SIZE or npz:FILE (default: as in the
            record).
        standardise: what the model's inputs are, split (standardised by the training images, as train does), none
            (pixels from 0 to 1) or MEAN,STD, one number each or one per channel as 0.5+0.5+0.5,0.2+0.2+0.2 (default:
            split, with a warning where there is no record).
        width: width of a built-in model (default: as in the record, else its own).
        n_train: number of training images (default: as in the record, else as in train).
        n_val: number of validation images (default: likewise).
        n_test: number of test images (default: likewise).
        label_noise: share of training labels redrawn at random (default: as in the record, else 0).
        labels: training labels to measure on, as given (noisy ones included) or clean.
        images: training images to measure on, drawn with the seed; all where there are fewer.
        m: micro-batch size of worst-case sharpness; an incomplete last micro-batch is dropped.
        mask: only these coordinates move, as name[:option=value...] (default: all); see `sam-masks masks`.
        match: a budgeted mask keeps as many coordinates as this mask of natural size.
        density: a budgeted mask keeps this fraction instead of matching.
        radius: what one radius means for a mask: the same, equal root mean square, or equal relative size.
        metrics: names separated by commas; name@RHO for one radius, name for its whole grid (default: a fast set);
            list prints all of them.
        seed: seed of the run whose training images are taken, and of everything random (default: as in the record, else
            0).
        device: auto, cpu, cuda or cuda:N.
        plugin: modules to import for their masks and metrics, separated by commas.
        out: file that keeps every result as soon as it is there; the same command goes on from it, also with other
            metrics.
        quiet: no progress bar.
        json: print a list of objects.
    """

    model: str = ""
    checkpoint: str = ""
    data: str | None = None
    standardise: str | None = None
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
    seed: int | None = None
    device: str = "auto"
    plugin: str | None = None
    out: str | None = None
    quiet: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        missing = [f"--{name}" for name in ("model", "checkpoint") if not getattr(self, name)]
        if missing and self.metrics != LIST:
            raise InputError(f"missing: {', '.join(missing)}")
        if self.images < 1 or self.m < 1:
            raise InputError(f"images and m must be at least 1, got images={self.images} and m={self.m}")
        if self.labels not in ("given", "clean"):
            raise InputError(f"labels must be given or clean, got {self.labels!r}")

    def run_config(self, record: RunRecord | None = None) -> RunConfig:
        """The run whose model, images and mask these are.

        Raises:
            InputError: neither the options nor a record say which data.
        """
        given = {name: getattr(self, name, None) for name in _FROM_RECORD}
        known: dict[str, Any] = {"label_noise": 0.0, "seed": 0}
        if record is not None:
            known = {name: record.config[name] for name in _FROM_RECORD}
        if record is not None and record.config["model"] != self.model:
            known["width"] = None
        settings = known | {name: value for name, value in given.items() if value is not None}
        if "data" not in settings:
            raise InputError(f"missing: --data (there is no record of train beside {self.checkpoint} that names it)")
        return RunConfig(
            model=self.model, mask=self.mask or "all", match=self.match, density=self.density, **settings
        ).resolved()


def record_beside(checkpoint: Path) -> RunRecord | None:
    """The record that train wrote beside its checkpoint; None where there is none.

    Raises:
        InputError: there is one and it cannot be read.
    """
    if checkpoint.name != CHECKPOINT or not (checkpoint.parent / RESULT).exists():
        return None
    return read_run(checkpoint.parent)


def analyze(
    options: AnalyzeOptions,
    *,
    on_result: Callable[[dict[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    quiet: bool = True,
) -> list[dict[str, Any]]:
    """Measure the metrics on the checkpoint.

    Args:
        options: what to measure.
        on_result: called with every object as soon as it is there, so that nothing is lost on interruption.
        on_note: called with every line that a reader must see before the numbers: what was assumed, what differs from
            the record, and how well the model fits the images measured on. They also stand in the results' settings.
        quiet: no progress bar.

    Returns:
        One object per metric, in plain values; see :func:`experiments.measure.results`.

    Raises:
        InputError: what was asked for cannot be had (unknown metric, a checkpoint of another model, ...), the file
            ``out`` holds the results of something else, or not one metric could be measured.
    """
    names = resolve(listed(options.metrics) or DEFAULT_METRICS)
    record = record_beside(Path(options.checkpoint))
    config, device = options.run_config(record), pick_device(options.device)
    weights = read_weights(Path(options.checkpoint))
    data = load_cached(config.data)
    model = initial_model(config, data)
    _check_precision(model, weights)
    load_weights(model, weights)
    model.to(device)
    split, standard = _standardised(split_of(config, data), data, options.standardise)
    if options.labels == "clean":
        split = replace(split, train_y=split.train_y_clean)
    batches = batches_of(*sample_of(split, options.images, config.seed, device), _BATCH)
    fit = _fit(model, batches)
    mask = _mask(options, config, model, batches)
    content = content_digests([options.mask] if options.mask else [], config, data.digest)
    content |= {"checkpoint": file_digest(Path(options.checkpoint)), "device": device.type}
    noise = f"{100 * (config.label_noise or 0):g} % redrawn at random"
    labels = f"labels as given ({noise})" if options.labels == "given" else "clean labels"
    notes = _warnings(options, config, record, names)
    first = (
        f"mean loss {fit['mean_loss']:.4g}, accuracy {100 * fit['accuracy']:.1f} % on {fit['images']} training images "
        f"of {config.data}, {labels}, inputs {standard['inputs']}"
    )
    for note in (*(f"warning: {note}" for note in notes), first):
        if on_note is not None:
            on_note(note)
    shared = {
        "model": options.model,
        "checkpoint": options.checkpoint,
        "checkpoint_digest": content["checkpoint"],
        "record": None if record is None else record.run_id,
        "data": config.data,
        "labels": options.labels,
        "label_noise": config.label_noise,
        "sample_seed": config.seed,
        "mask": str(MaskSpec.parse(options.mask)) if options.mask else None,
        **standard,
        **fit,
        "notes": notes,
    }
    kept = _Kept(replace(options, **{n: getattr(config, n) for n in _FROM_RECORD if hasattr(options, n)}), content)
    settings = {"m": options.m, "radius": options.radius, "seed": config.seed}
    out: list[dict[str, Any]] = []
    with tqdm(total=len(names), unit="metric", disable=quiet, dynamic_ncols=True, desc=names[0]) as bar:
        for result in results(model, batches, names, shared=shared, known=kept.results, mask=mask, **settings):
            if result["metric"] not in kept.results and result["value"] is not None:
                result["settings"]["name"] += f", {labels}"
            out.append(finite(result))
            kept.add(out[-1])
            if on_result is not None:
                on_result(out[-1])
            bar.set_description(names[min(len(out), len(names) - 1)], refresh=False)
            bar.update()
    if all(result["value"] is None for result in out):
        raise InputError(out[0]["settings"]["reason"])
    return out


def _warnings(options: AnalyzeOptions, config: RunConfig, record: RunRecord | None, names: Sequence[str]) -> list[str]:
    """One line for each thing that may be other than the user thinks."""
    out = []
    if record is None and options.standardise is None:
        out.append(
            "no record of train beside the checkpoint: inputs are standardised by the training split; if the model was "
            "trained on others, say so with --standardise none or MEAN,STD"
        )
    if record is not None:
        own = {name: getattr(config, name) for name in ("model", *_FROM_RECORD)}
        other = [f"{n} {record.config[n]} (here {own[n]})" for n in own if record.config[n] != own[n]]
        if options.standardise not in (None, "split"):
            other.append(f"inputs standardised by the training split (here {options.standardise})")
        if other:
            out.append(f"the checkpoint's record says another {', '.join(other)}")
    if options.radius != "same":
        ignore = [n for n in dict.fromkeys(name.partition("@")[0] for name in names) if not metric_info(n).convention]
        if ignore:
            out.append(f"radius {options.radius} has no effect on {', '.join(ignore)}")
    return out


def _standardised(split: Split, data: ImageSet, how: str | None) -> tuple[Split, dict[str, Any]]:
    """The split with its training images as the model takes them, and what was subtracted and divided by.

    Raises:
        InputError: neither split, none, nor finite numbers for each channel, the second ones positive.
    """
    channels = len(split.mean)
    if how in (None, "split"):
        mean, std = split.mean.tolist(), split.std.tolist()
        return split, {"standardise": "split", "inputs": "standardised by the training split", "mean": mean, "std": std}
    if how == "none":
        pixels = data.images.part(split.train_index, torch.zeros(channels), torch.ones(channels))
        return replace(split, train_images=pixels), {
            "standardise": "none", "inputs": "pixels from 0 to 1", "mean": [0.0] * channels, "std": [1.0] * channels
        }  # fmt: skip
    try:
        mean, std = ([float(number) for number in part.split("+")] for part in str(how).split(","))
    except ValueError:
        mean, std = [], []
    mean, std = (part * channels if len(part) == 1 else part for part in (mean, std))
    fine = len(mean) == len(std) == channels and all(map(math.isfinite, mean + std)) and min(std) > 0
    if not fine:
        raise InputError(
            f"standardise must be split, none or MEAN,STD with one number each or {channels} for the channels, joined "
            f"by +, every STD positive; got {how!r}"
        )
    text = f"pixels minus {'+'.join(f'{v:g}' for v in mean)} over {'+'.join(f'{v:g}' for v in std)}"
    moved = data.images.part(split.train_index, torch.tensor(mean), torch.tensor(std))
    return replace(split, train_images=moved), {"standardise": str(how), "inputs": text, "mean": mean, "std": std}


def _fit(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """Mean loss and accuracy on the images measured on; refuses what no metric can be measured on.

    Raises:
        InputError: parameters that are not float32 or float64, or as :func:`analysis.examples.check_function`.
    """
    dtype, device = precision_of(model)
    right = 0
    with evaluation_mode(model):
        losses = torch.cat(check_function(model, batches, cross_entropy))
        with torch.no_grad():
            for x, y in (place(batch, dtype, device) for batch in batches):
                right += int((model(x).argmax(1) == y).sum())
    return {"mean_loss": float(losses.mean()), "accuracy": right / len(losses), "images": len(losses)}


def describe_metrics(*, as_json: bool) -> str:
    """All registered metrics: name, radii, cost in gradients of all images, invariances, source."""
    infos = list_metrics()
    if as_json:
        return json.dumps([asdict(info) for info in infos], indent=1)
    return "\n".join(f"{info.name}\n  {info.summary}\n  {_facts(info)}" for info in infos)


def _facts(info: MetricInfo) -> str:
    facts = [
        f"larger is {info.direction}",
        f"about {info.cost:g} gradients",
        f"radii {', '.join(f'{rho:g}' for rho in info.grid)}" if info.grid else "no radius",
        f"invariant to {', '.join(info.invariances).replace('_', ' ')}" if info.invariances else "no invariance",
        *([] if info.masked else ["whole model only"]),
        info.source,
    ]
    return "; ".join(facts)


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


def _mask(options: AnalyzeOptions, config: RunConfig, model: nn.Module, batches: Sequence[Batch]) -> Mask | None:
    if options.mask is None:
        return None
    spec = MaskSpec.parse(options.mask)
    context = MaskContext(model, batches=batches, seed=config.seed, built_at="checkpoint")
    mask = spec.build(context, budget_of(config, spec, model))
    if not mask.num_kept:
        raise InputError(f"mask {options.mask} keeps no coordinate of {options.model}: there is nothing to measure")
    return mask
