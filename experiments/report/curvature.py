"""The section on curvature: spectral densities and loss slices, where the runs kept them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from analysis import plot, read_slice, read_spectrum
from experiments.plot.style import Style, label
from experiments.report.content import Absent, Block, picture
from experiments.report.findings import Findings

KEPT = {"spectrum": "Spectrum of the Hessian", "slice_1d": "Loss along a direction", "slice_2d": "Loss on a plane"}


def curvature(findings: Findings, style: dict[str, Style]) -> Iterator[Block]:
    """A figure for each metric that keeps its curve; how to have it where the runs do not."""
    asked = findings.comparison.measure.metrics
    for metric, what in KEPT.items():
        kept = _kept(findings, metric)
        if not kept:
            more = f"{asked},{metric}" if asked else metric
            why = f"the runs did not measure {metric}, and keep no weights"
            yield Absent(what, why, f"sam-masks compare with --metrics {more}, into another folder")
        elif metric == "spectrum":
            yield _spectrum(kept, style)
        elif metric == "slice_1d":
            yield _curves(kept, style)
        else:
            yield _surfaces(kept)


def _kept(findings: Findings, metric: str) -> dict[str, list[dict[str, Any]]]:
    """Settings of the metric of every run that has a value, by arm."""
    found = {
        arm: [
            one["settings"]
            for record in records
            if (one := record.result["metrics"].get(metric)) is not None and one["value"] is not None
        ]
        for arm, records in findings.comparison.records.items()
    }
    return {arm: settings for arm, settings in found.items() if settings}


def _counts(kept: dict[str, list[dict[str, Any]]]) -> str:
    """How many seeds, for each arm where they differ."""
    sizes = {arm: len(each) for arm, each in kept.items()}
    if len(set(sizes.values())) == 1:
        return f"n = {next(iter(sizes.values()))} seeds"
    return "seeds: " + ", ".join(f"{arm} n = {n}" for arm, n in sizes.items())


def _spectrum(kept: dict[str, list[dict[str, Any]]], style: dict[str, Style]) -> Block:
    densities = {label(arm): [read_spectrum(one) for one in each] for arm, each in kept.items()}
    first = next(iter(kept.values()))[0]
    return picture(
        plot.spectrum(densities, colours=[style[arm].colour for arm in kept]),
        "spectrum",
        KEPT["spectrum"],
        f"Mean over {_counts(kept)}, no band; stochastic Lanczos quadrature with {len(first['nodes'])} random vectors "
        f"of {len(first['nodes'][0])} steps for each, every mass widened to a normal distribution; final weights, "
        "training images with the labels trained on.",
    )


def _curves(kept: dict[str, list[dict[str, Any]]], style: dict[str, Style]) -> Block:
    slices = {label(arm): [read_slice(one) for one in each] for arm, each in kept.items()}
    return picture(
        plot.slice_curves(slices, colours=[style[arm].colour for arm in kept]),
        "slice-1d",
        KEPT["slice_1d"],
        f"Line: mean over {_counts(kept)}; band: their range. One filter-normalised random direction, the same noise "
        "for all runs; position 1: as long as the weights, filter by filter.",
    )


def _surfaces(kept: dict[str, list[dict[str, Any]]]) -> Block:
    return picture(
        plot.slice_surfaces({label(arm): read_slice(each[0]) for arm, each in kept.items()}),
        "slice-2d",
        KEPT["slice_2d"],
        "n = 1 seed per arm, the first one; no band. Two filter-normalised random directions, the same noise for all "
        "arms; the same colours everywhere.",
    )
