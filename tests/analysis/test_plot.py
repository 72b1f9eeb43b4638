"""Curvature figures: what is drawn is what was given."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest

from analysis import EigenPairs, EigenResult, Slice, SpectralDensity, plot
from masks.errors import InputError


def density(shift: float) -> SpectralDensity:
    nodes = (np.array([0.0, 1.0, 10.0]) + shift,)
    return SpectralDensity("s", nodes, (np.array([0.9, 0.09, 0.01]),), 3, 100, 0)


def slice_of(*values: float) -> Slice:
    return Slice("s", ((-1.0, 0.0, 1.0),), values, {})


SURFACE = Slice("s", ((-1.0, 1.0), (-2.0, 0.0, 2.0)), ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), {})


def drawn(figure) -> None:
    """It can be rendered, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="svg")


def test_a_spectrum_is_the_mean_density_on_a_logarithmic_scale():
    figure = plot.spectrum({"a": [density(0.0), density(1.0)], "b": [density(0.0)]}, colours=["#111111", "#222222"])
    (axes,) = figure.axes
    for line, found in zip(axes.lines, ([density(0.0), density(1.0)], [density(0.0)]), strict=True):
        at = line.get_xdata()
        want = np.mean([one.density(at, sigma=11.0 / 100) for one in found], axis=0)
        assert line.get_ydata() == pytest.approx(want)
        assert np.trapezoid(line.get_ydata(), at) == pytest.approx(1, abs=1e-3)  # all of the mass is in view
    assert [line.get_color() for line in axes.lines] == ["#111111", "#222222"]
    assert axes.get_yscale() == "log"
    drawn(figure)


def test_curves_are_means_and_ranges():
    figure = plot.slice_curves({"a": [slice_of(3.0, 1.0, 2.0), slice_of(5.0, 1.0, 4.0)]})
    (axes,) = figure.axes
    assert axes.lines[0].get_xdata().tolist() == [-1, 0, 1]
    assert axes.lines[0].get_ydata().tolist() == [4, 1, 3]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band} >= {(-1, 3), (-1, 5), (1, 2), (1, 4)}
    drawn(figure)


def test_surfaces_have_the_same_levels_and_their_axes():
    figure = plot.slice_surfaces({"a": SURFACE, "b": SURFACE, "c": SURFACE, "d": SURFACE, "e": SURFACE})
    panels = [axes for axes in figure.axes if axes.get_xlabel()]
    assert [axes.get_title() for axes in panels] == list("abcde")
    assert panels[0].get_xlim() == (-2, 2)  # the second direction
    assert panels[0].get_ylim() == (-1, 1)
    levels = [axes.collections[0].levels for axes in panels]
    assert all(np.array_equal(one, levels[0]) for one in levels)
    assert (levels[0][0], levels[0][-1]) == pytest.approx((1, 6))
    drawn(figure)


def test_a_flat_surface_can_be_drawn():
    flat = Slice("s", SURFACE.axes, ((0.0,) * 3,) * 2, {})
    figure = plot.slice_surfaces({"a": flat})
    assert figure.axes[0].get_title() == "a"
    assert figure.axes[0].collections
    drawn(figure)


def test_eigenvalues_have_the_bars_of_their_residuals():
    pairs = EigenPairs(
        tuple(EigenResult("x", v, r, 9, True, 1e-3) for v, r in ((5.0, 0.5), (3.0, 0.1))), (), 9, 0, None, None
    )
    figure = plot.eigenvalues(pairs)
    (container,) = figure.axes[0].containers
    assert container.lines[0].get_ydata().tolist() == [5, 3]
    bars = [segment[:, 1].tolist() for segment in container.lines[2][0].get_segments()]
    assert np.array(bars) == pytest.approx(np.array([[4.5, 5.5], [2.9, 3.1]]))
    drawn(figure)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.spectrum({}), "no spectral density"),
        (lambda: plot.slice_curves({}), "no slice"),
        (lambda: plot.slice_curves({"a": [SURFACE]}), "slices of a must be along one direction"),
        (lambda: plot.slice_surfaces({"a": slice_of(1.0, 2.0, 3.0)}), "two directions"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(InputError, match=message):
        draw()
