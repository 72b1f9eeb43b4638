"""Masks: which layers they keep, how they overlap, how rebuilt ones change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.plot.style import Style, epochs, label, legend, new

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LABELS = 60
"""Up to so many tensors each has its name on the axis."""
LEAST = 0.01
"""Percent below which all shares have one colour."""


def layers(density: pd.DataFrame) -> Figure:
    """A field per tensor (row) and arm (column), coloured by the share of the tensor that the mask keeps."""
    figure, axes = new(width=2.6 + 0.6 * density.shape[1], height=1.2 + 0.19 * min(len(density), MOST_LABELS))
    image = _shares(axes, density)
    _tensors(axes, [str(name) for name in density.index])
    axes.set_xticks(range(density.shape[1]), [label(str(name)) for name in density], rotation=45, ha="right")
    figure.colorbar(image, ax=axes, label="kept of the tensor, %")
    return figure


def overlap(matrix: pd.DataFrame) -> Figure:
    """The Jaccard index of each pair of arms, written into its field."""
    size = len(matrix)
    figure, axes = new(width=3.0 + 0.62 * size, height=1.4 + 0.42 * size)
    values = matrix.to_numpy(float)
    axes.grid(visible=False)
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis")
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="small", color="w" if value < 0.6 else "k")
    axes.set_xticks(range(size), [label(str(name)) for name in matrix], rotation=45, ha="right")
    axes.set_yticks(range(size), [label(str(name)) for name in matrix])
    figure.colorbar(image, ax=axes, label="overlap: Jaccard index")
    return figure


def rebuilt(shares: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel per arm: the share of each tensor (row) that the mask built in each epoch (column) keeps."""
    tensors = len(next(iter(shares.values())))
    height = 1.1 + 0.19 * min(tensors, MOST_LABELS)
    figure, axes = new(width=3.4 + 2.2 * len(shares), height=height, columns=len(shares), sharey=True)
    panels = [axes] if len(shares) == 1 else list(axes)
    for one, (name, share) in zip(panels, shares.items(), strict=True):
        image = _shares(one, share)
        one.set_title(label(name), fontsize="medium")
        every = max(1, -(-share.shape[1] // 6))
        one.set_xticks(range(0, share.shape[1], every), [str(column) for column in share.columns[::every]])
        one.set_xlabel("built after epoch")
    _tensors(panels[0], [str(name) for name in next(iter(shares.values())).index])
    figure.colorbar(image, ax=panels, label="kept of the tensor, %")
    return figure


def norm_share(curves: Mapping[str, Mapping[int, float]], style: Mapping[str, Style]) -> Figure:
    """Share of the kept coordinates that belong to normalization layers, over the epochs in which masks were built."""
    figure, axes = new(height=3.0)
    for name, curve in curves.items():
        own, x, y = style[name], list(curve), [100 * value for value in curve.values()]
        axes.plot(x, y, own.line, marker=own.marker, markersize=4, color=own.colour, label=label(name))
    axes.set_ylim(-3, 103)
    epochs(axes, "built after epoch")
    axes.set_ylabel("kept in normalization layers, %")
    legend(axes)
    return figure


def _shares(axes: Any, shares: pd.DataFrame) -> Any:
    """Shares as percent, logarithmic; nothing kept is left white. The lightness of viridis rises evenly, so that it
    reads without colour, too."""
    from matplotlib.colors import LogNorm

    axes.grid(visible=False)
    values = np.ma.masked_less_equal(100 * shares.to_numpy(float), 0.0)
    norm = LogNorm(LEAST, 100.0, clip=True)
    return axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)


def _tensors(axes: Any, names: Sequence[str]) -> None:
    every = -(-len(names) // MOST_LABELS)
    axes.set_yticks(range(0, len(names), every), [label(name) for name in names[::every]], fontsize="x-small")
    axes.set_ylabel("tensor, in the order of the model")
