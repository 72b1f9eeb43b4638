"""The section on masks: what they keep, how they overlap, how rebuilt ones change."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from experiments.plot import masks as plot
from experiments.plot.style import Style
from experiments.report.anatomy import MaskAnatomy
from experiments.report.content import Absent, Block, grid, picture
from experiments.report.findings import Findings
from experiments.table import Table, shown

MOST_PANELS = 4


def masks(findings: Findings, style: dict[str, Style]) -> Iterator[Block]:
    found = findings.masks
    if found is None:
        yield Absent("The masks' anatomy", findings.absent["masks"], "keep mask.npz beside each run's record")
        return
    n = findings.table.rows[0].n
    yield grid(_sizes(findings.table))
    layers = found.layers.pivot(index="tensor", columns="arm", values="density")
    layers = layers.loc[found.layers["tensor"].unique(), list(found.overlap)]
    yield picture(
        plot.layers(layers),
        "layers",
        "Density per layer",
        f"Share of each tensor that the final mask keeps, mean over n = {n} seeds, without an interval; "
        "logarithmic; white: nothing.",
    )
    yield picture(
        plot.overlap(found.overlap),
        "overlap",
        "Overlap between the masks",
        f"Jaccard index of the final masks of two arms in runs of the same seed, mean over n = {n} seeds, "
        "without an interval.",
    )
    yield from _over_time(found, style, n)


def _sizes(table: Table) -> pd.DataFrame:
    rows = [row for row in table.rows if row.arm.rho]
    text = shown(Table(tuple(rows), ()))[["kept", "density", "matched", "overlap"]]
    text.insert(3, "tensors", [str(row.num_tensors) for row in rows])
    text.insert(4, "in norm layers", ["-" if r.norm_share is None else f"{100 * r.norm_share:.1f} %" for r in rows])
    return text.rename(columns={"overlap": "overlap with norm"}).reset_index()


def _over_time(found: MaskAnatomy, style: dict[str, Style], n: int) -> Iterator[Block]:
    if not found.shares:
        yield Absent("Masks over time", "every mask was built once", "choose one that is rebuilt, as magnitude@every=1")
        return
    shares = dict(list(found.shares.items())[:MOST_PANELS])
    left = [arm for arm in found.shares if arm not in shares]
    yield picture(
        plot.rebuilt(shares),
        "masks-over-time",
        "Density per layer over training, of the masks that are rebuilt",
        f"Share of each tensor that the mask built at that epoch keeps, mean over n = {n} seeds, without an interval; "
        "logarithmic; white: nothing." + (f" {', '.join(left)}: only in mask_builds.csv." if left else ""),
    )
    known = found.builds.dropna(subset=["norm_share"])
    curves = {
        str(arm): dict(zip(part["epoch"].astype(int), part["norm_share"], strict=True))
        for arm, part in known.groupby("arm", sort=False)
    }
    if curves:
        yield picture(
            plot.norm_share(curves, style),
            "norm-share",
            "Share of the kept coordinates that belong to normalization layers, over training",
            f"Masks that are rebuilt; mean over n = {n} seeds, without an interval.",
        )
