"""Runs compared at equal training loss: each metric read off the run's own trajectory where it reached that loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.reliability import REPEAT
from experiments.study import Study
from masks.errors import InputError

Floats = NDArray[np.float64]


class NotReached(InputError):
    """No level of training loss that every run passed through while it was measured."""


def at_equal_loss(study: Study, arms: Sequence[str]) -> tuple[pd.DataFrame, float, tuple[int, int]]:
    """The runs of some arms with every metric as it was when the run reached a training loss that all of them reached.

    The level is the largest over runs of the smallest training loss that was measured (evaluation mode, all training
    images, labels as given). A metric there is read off by :func:`value_at`. The test error stays that of the final
    weights.

    Args:
        study: runs that were measured along training.
        arms: whose runs.

    Returns:
        Rows like those of ``study.frame``, the level in nats, and the first and the last epoch at whose end a run had
        been measured at or below it for the first time.

    Raises:
        NotReached: a run was below the level when it was first measured.
        InputError: a run was measured at its end only, or its training loss is not a positive number.
    """
    paths = {key: path for key, path in study.trajectories.items() if key[0] in arms}
    for (arm, seed, rho), path in paths.items():
        where = f"{arm}, rho {rho:g}, seed {seed}"
        if len(path) < 2:
            raise InputError(
                f"{where} was measured at its end only; equal training loss needs sam-masks compare --measure-every 1"
            )
        losses = path["train_loss"].to_numpy()
        if not (np.isfinite(losses).all() and losses.min() > 0):
            raise InputError(f"{where}: the training loss along the run must be positive and finite")
    level = float(max(path["train_loss"].min() for path in paths.values()))
    below = [key for key, path in paths.items() if path["train_loss"].iloc[0] < level]
    if below:
        arm, seed, rho = below[0]
        raise NotReached(
            f"not reached: the loss that every run reached, {level:.3g}, is above the first one measured of "
            f"{len(below)} of {len(paths)} runs ({arm}, rho {rho:g}, seed {seed}: "
            f"{paths[below[0]]['train_loss'].iloc[0]:.3g}); measure more often, or leave the arm that fits worse out"
        )
    columns = [name for metric in study.metrics for name in (metric, metric + REPEAT) if name in study.frame.columns]
    rows, epochs = [], []
    for path in paths.values():
        losses = path["train_loss"].to_numpy()
        epochs.append(int(path["epoch"].iloc[int(np.flatnonzero(losses <= level)[0])]))
        metrics = {name: value_at(level, losses, path[name].to_numpy(dtype=np.float64)) for name in columns}
        final = {str(name): value for name, value in path.iloc[-1].items() if name != "epoch"}
        rows.append(final | {"train_loss": level} | metrics)
    return pd.DataFrame(rows), level, (min(epochs), max(epochs))


def value_at(level: float, losses: Floats, values: Floats) -> float:
    """The metric when the training loss first fell to the level: log metric linear in log loss between measurements.

    Args:
        level: the loss, at most ``losses[0]`` and at least their minimum.
        losses: training losses along the run, positive, shape (T,).
        values: the metric, shape (T,).

    Returns:
        nan where the metric is not positive or not measured there.
    """
    after = int(np.flatnonzero(losses <= level)[0])
    near = values[after:][:1] if losses[after] == level else values[after - 1 : after + 1]
    if not (near > 0).all():
        return float("nan")
    if len(near) == 1:
        return float(near[0])
    above, below = np.log(losses[after - 1]), np.log(losses[after])
    share = (above - np.log(level)) / (above - below)
    return float(np.exp((1 - share) * np.log(values[after - 1]) + share * np.log(values[after])))
