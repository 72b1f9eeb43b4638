"""What is measured on the weights of a run: test accuracy, once, the fit to the training images, and flatness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analysis import Estimate, measurements
from analysis.metrics import metric_info, resolve
from experiments.build import batches_of, correct, in_order, sample_of
from experiments.split import Split
from experiments.train import Trained
from masks import Batch, cross_entropy
from masks.errors import InputError

FAST = "one_step_linf_adaptive_normalised@middle"
LAMBDA_MAX = "lambda_max"
_BATCH = 256


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured at the end of every run of a report.

    Two measurements on disjoint images cost about 10 % of the default comparison, and without them nobody knows how
    much of a metric is noise; hence ``repeats`` is 2. The primary metric of a verdict costs as much as three epochs,
    hence it is not in the default set but its one-step relative is.

    Args:
        images: training images, with their labels as given, that flatness is measured on; drawn with the seed, the
            same in every arm.
        sharpness_m: micro-batch size m of the worst-case m-sharpness.
        sharpness_rho: radius of the m-sharpness in the table, l2 over all parameters, the same for every arm.
        metrics: metrics beside the table's lambda_max and m-sharpness, separated by commas; name@RHO for one radius,
            name@middle for the middle of its grid, name for the whole grid.
        repeats: 2 to measure twice, on disjoint images with another probe seed, which tells a metric's reliability;
            each time on `images` images, or on half of the training images where there are not so many. 1 for once.
    """

    images: int = 256
    sharpness_m: int = 64
    sharpness_rho: float = 0.1
    metrics: str = FAST
    repeats: int = 2

    def __post_init__(self) -> None:
        if self.images < 1 or self.sharpness_m < 1:
            raise InputError(f"images and sharpness_m must be at least 1, got {self.images} and {self.sharpness_m}")
        if not (math.isfinite(self.sharpness_rho) and self.sharpness_rho > 0):
            raise InputError(f"sharpness_rho must be a positive finite number, got {self.sharpness_rho}")
        if self.repeats not in (1, 2):
            raise InputError(f"repeats must be 1 or 2, got {self.repeats}")
        object.__setattr__(self, "metrics", ",".join(resolve(listed(self.metrics))) if listed(self.metrics) else "")

    @property
    def m_sharpness(self) -> str:
        """Name of the m-sharpness of the table: one step, l2."""
        return f"one_step_l2@{float(self.sharpness_rho)!r}"

    def names(self) -> list[str]:
        """All metrics in full, those of the table first."""
        return resolve([LAMBDA_MAX, self.m_sharpness, *listed(self.metrics)])


def listed(text: str | None) -> tuple[str, ...]:
    """The parts of a list separated by commas; none for an empty one."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def measure(trained: Trained, config: MeasureConfig, device: torch.device) -> dict[str, Any]:
    """Read the test images, once, and measure fit and flatness on the training images.

    Returns:
        Plain values: ``test_correct`` (one 0 or 1 per test image), ``test_index``, ``test_accuracy``, and those of
        :func:`observe`.
    """
    split = trained.split
    right = correct(trained.model, split.test_images.to(device), split.test_y)
    return {
        "test_accuracy": right.double().mean().item(),
        "test_correct": "".join("1" if r else "0" for r in right.tolist()),
        "test_index": split.test_index.tolist() if not split.test_is_shared else None,
        **observe(trained.model, split, trained.config.seed, config, device),
    }


def observe(model: nn.Module, split: Split, seed: int, config: MeasureConfig, device: torch.device) -> dict[str, Any]:
    """Fit and flatness of a model, which is left as it was, bit for bit, mode and random state included.

    Returns:
        ``fit``, see :func:`fit_of`; ``metrics`` and, measured anew on other images with another probe seed,
        ``metrics_repeat``: an object like those of :func:`results` by the metric's full name. No repeat where
        ``config.repeats`` is 1 or where half of the training images hold no micro-batch.
    """
    n = len(split.train_y)
    repeats = config.repeats if n // config.repeats >= config.sharpness_m else 1
    size = min(config.images, n // repeats)
    x, y = sample_of(split, repeats * size, seed, device)
    found: dict[str, Any] = {"fit": fit_of(model, split, device)}
    for i, key in enumerate(("metrics", "metrics_repeat")[:repeats]):
        batches = batches_of(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size], _BATCH)
        taken = results(model, batches, config.names(), m=config.sharpness_m, seed=i)
        found[key] = {one.pop("metric"): one for one in taken}
    return found


def fit_of(model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
    """How well the model fits all its training images, in evaluation mode.

    Returns:
        ``train_loss`` (mean cross-entropy, nats) and ``train_error`` (a fraction), on the labels as given;
        ``train_loss_clean`` and ``train_error_clean``, on the labels before noise; ``weight_norm``, l2 over all
        trainable parameters.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    labels = {"": split.train_y.to(device), "_clean": split.train_y_clean.to(device)}
    losses: dict[str, list[Tensor]] = {suffix: [] for suffix in labels}
    predicted: list[Tensor] = []
    start = 0
    try:
        with torch.no_grad():
            for x in in_order(split.train_images.to(device), 2 * _BATCH):
                logits = model(x)
                predicted.append(logits.argmax(1))
                for suffix, y in labels.items():  # the logits themselves may be larger than the images
                    losses[suffix].append(cross_entropy(logits, y[start : start + len(x)]))
                start += len(x)
    finally:
        for module, flag in training:
            module.training = flag
    out: dict[str, float] = {}
    for suffix, y in labels.items():
        out[f"train_loss{suffix}"] = float(torch.cat(losses[suffix]).double().mean())
        out[f"train_error{suffix}"] = float((torch.cat(predicted) != y).double().mean())
    squares = [p.detach().double().square().sum() for p in model.parameters() if p.requires_grad]
    return out | {"weight_norm": float(torch.stack(squares).sum().sqrt())}


def results(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str],
    *,
    shared: Mapping[str, Any] | None = None,
    known: Mapping[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """Measure metrics one after the other.

    Args:
        model, batches, names, settings: see :func:`analysis.measurements`.
        shared: what to add to the settings of each result.
        known: results of an earlier call by their metric's name, given back instead of measured again.

    Yields:
        For each metric an object of plain values: ``metric`` (its name in full, with the radius), ``value``, ``error``
        (what it is stands in ``settings.error_kind``; None where there is none), ``n``, ``settings``. A metric that
        does not apply, or whose loss is not finite, has value and error None and the line in ``settings.reason``.

    Raises:
        InputError: unknown names or settings, at once.
    """
    planned = measurements(model, batches, names, **settings)
    return (known[name] if known and name in known else _result(name, take, shared or {}) for name, take in planned)


def _result(name: str, take: Callable[[], Estimate], shared: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = take()
    except InputError as why:
        direction = metric_info(name.partition("@")[0]).direction
        settings = {"name": name, "direction": direction, "reason": str(why), **shared}
        return {"metric": name, "value": None, "error": None, "n": 0, "settings": settings}
    # An eigenvalue has no standard error but the bound of its residual; error_kind says which.
    error = found.standard_error if found.standard_error is not None else found.settings.get("residual")
    direction = metric_info(name.partition("@")[0]).direction
    settings = {"name": found.name, "direction": direction, **found.settings, **shared}
    return {"metric": name, "value": found.value, "error": error, "n": found.n, "settings": settings}
