"""Figures of curvature: eigenvalues, spectral densities, loss slices. Functions return matplotlib figures.

matplotlib is imported only when a figure is drawn; show one in a notebook by its name, keep it by ``savefig``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.eigen import EigenPairs
from analysis.landscape import Slice
from analysis.spectrum import SpectralDensity
from masks.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")
"""Okabe and Ito (2008), told apart under the common colour-vision deficiencies."""
FLOOR = 1e-6
"""Densities below this share of the highest one are not shown: they are tails of the normal distributions."""


def eigenvalues(pairs: EigenPairs) -> Figure:
    """The eigenvalues found, each with the bound of its residual, by their rank from each end."""
    figure, axes = _new(1)
    for values, name, colour in ((pairs.largest, "largest", COLOURS[2]), (pairs.smallest, "smallest", COLOURS[4])):
        if values:
            ranks = range(1, len(values) + 1)
            errors = [pair.residual for pair in values]
            style = {"fmt": "o", "capsize": 3, "color": colour, "label": name}
            axes[0].errorbar(ranks, [pair.value for pair in values], yerr=errors, **style)
    axes[0].set_xlabel("rank from the end of the spectrum")
    axes[0].set_ylabel("eigenvalue")
    axes[0].legend(frameon=False)
    return figure


def spectrum(
    densities: Mapping[str, Sequence[SpectralDensity]], *, sigma: float | None = None, colours: Sequence[str] = COLOURS
) -> Figure:
    """Densities of eigenvalues, log scale: for each name the mean over its densities (seeds, say).

    Args:
        densities: by the name to show.
        sigma: standard deviation of the normal distributions that masses are widened to; None for a hundredth of the
            range of all nodes, the same for all, so that widths can be compared.
        colours: one for each name, repeated where there are fewer.

    Raises:
        InputError: no densities; a sigma that is not positive.
    """
    nodes = [x for found in densities.values() for density in found for x in density.nodes]
    if not nodes:
        raise InputError("there is no spectral density to draw")
    low, high = (float(end([end(x) for x in nodes])) for end in (np.min, np.max))
    sigma = (high - low) / 100 if sigma is None else sigma
    at = np.linspace(low - 4 * sigma, high + 4 * sigma, 600)
    figure, axes = _new(1)
    top = 0.0
    for i, (name, found) in enumerate(densities.items()):
        mean = np.mean([density.density(at, sigma=sigma) for density in found], axis=0)
        top = max(top, float(mean.max()))
        axes[0].plot(at, mean, color=colours[i % len(colours)], label=name, linewidth=1.2)
    axes[0].set_yscale("log")
    axes[0].set_ylim(FLOOR * top, 2 * top)
    axes[0].set_xlabel("eigenvalue")
    axes[0].set_ylabel("density, 1 / eigenvalue")
    axes[0].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def slice_curves(slices: Mapping[str, Sequence[Slice]], *, colours: Sequence[str] = COLOURS) -> Figure:
    """Loss along one direction: for each name the mean over its slices and, shaded, their range.

    Raises:
        InputError: no slices, one of two directions, or slices of one name at different points.
    """
    figure, axes = _new(1)
    if not slices or not all(slices.values()):
        raise InputError("there is no slice to draw")
    for i, (name, found) in enumerate(slices.items()):
        if any(len(one.axes) != 1 for one in found) or len({one.axes for one in found}) != 1:
            raise InputError(f"the slices of {name} must be along one direction, at the same points")
        (at,), values = found[0].axes, np.array([one.values for one in found])
        colour = colours[i % len(colours)]
        axes[0].plot(at, values.mean(axis=0), color=colour, label=name)
        axes[0].fill_between(at, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axes[0].set_xlabel("position along the direction (0: the weights)")
    axes[0].set_ylabel("mean loss, nats")
    axes[0].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def slice_surfaces(slices: Mapping[str, Slice]) -> Figure:
    """Loss on a plane, a panel for each name with the same contour lines, evenly spaced in the logarithm.

    Raises:
        InputError: no slices, or one of a single direction.
    """
    if not slices or any(len(one.axes) != 2 for one in slices.values()):
        raise InputError("surfaces need slices along two directions")
    values = [np.array(one.values) for one in slices.values()]
    low, high = (float(end([end(v) for v in values])) for end in (np.min, np.max))
    low = low if low > 0 else max(high, 1.0) * FLOOR
    levels = np.geomspace(low, max(high, low * 1.001), 12)
    columns = min(4, len(slices))
    rows = -(-len(slices) // columns)
    figure, axes = _new(columns, rows)
    from matplotlib.colors import LogNorm

    for panel, (name, one), loss in zip(axes, slices.items(), values, strict=False):
        lines = panel.contourf(
            one.axes[1], one.axes[0], np.maximum(loss, low), levels, norm=LogNorm(low, levels[-1]), cmap="viridis"
        )
        panel.set_title(name, fontsize="medium")
        panel.set_xlabel("along direction 2")
        panel.set_ylabel("along direction 1")
    for unused in axes[len(slices) :]:
        unused.remove()
    bar = figure.colorbar(lines, ax=list(axes[: len(slices)]), label="mean loss, nats")
    bar.ax.set_yticks(levels[::2], [f"{level:.3g}" for level in levels[::2]])
    return figure


def _new(columns: int, rows: int = 1) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    size = (7.2, 3.6) if columns * rows == 1 else (1.2 + 2.4 * columns, 2.4 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes
