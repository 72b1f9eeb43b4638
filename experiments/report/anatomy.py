"""What the masks of a comparison keep: by layer, of each other, and over time where they are rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path

import pandas as pd

from experiments.compare import Comparison
from experiments.record import RunRecord
from masks import Mask
from masks.errors import InputError

MASK_FILE = "mask.npz"


@dataclass(frozen=True, eq=False)
class MaskAnatomy:
    """The masks of all arms that have one.

    Attributes:
        layers: one line per arm and tensor: ``arm``, ``tensor``, ``role``, ``numel``, and, over the seeds' final masks,
            ``kept`` (mean number of coordinates) and ``density`` (``kept / numel``).
        overlap: mean over seeds of the Jaccard index of the final masks of two arms in runs of the same seed, arms by
            arms.
        builds: one line per arm and epoch in which its mask was built, for arms that build theirs more than once:
            ``arm``, ``epoch``, ``num_kept``, ``norm_share`` (None for an empty mask), ``num_tensors``,
            ``jaccard_norm``, means over seeds; ``n``.
        shares: for each of these arms the share that is kept of each tensor (rows) in each epoch (columns).
    """

    layers: pd.DataFrame
    overlap: pd.DataFrame
    builds: pd.DataFrame
    shares: dict[str, pd.DataFrame]


def mask_anatomy(comparison: Comparison) -> MaskAnatomy:
    """Read the final masks and the buildings of every run of the report.

    Raises:
        InputError: a mask file that is missing or damaged, or masks of different models.
    """
    arms = [arm.name for arm in comparison.config.arms if arm.rho]
    seeds = range(len(next(iter(comparison.records.values()))))
    runs = comparison.folder / "runs"
    kept: dict[str, list[tuple[int, ...]]] = {arm: [] for arm in arms}
    jaccard: dict[tuple[str, str], list[float]] = {}
    table = None
    for i in seeds:  # the masks of one seed are in memory at a time
        masks = {arm: _final(runs, comparison.records[arm][i]) for arm in arms}
        for arm, mask in masks.items():
            kept[arm].append(mask.counts)
            table = mask.table if table is None else table
            table.check_same(mask.table, "the masks of this comparison are of different models")
        for one, other in combinations_with_replacement(arms, 2):
            jaccard.setdefault((one, other), []).append(masks[one].jaccard(masks[other]))
    if table is None:
        raise InputError("no arm has a mask")
    overlap = pd.DataFrame(index=arms, columns=arms, dtype=float)
    for (one, other), values in jaccard.items():
        overlap.loc[one, other] = overlap.loc[other, one] = sum(values) / len(values)
    rows = [
        {"arm": arm, "tensor": row.name, "role": row.role, "numel": row.numel, "kept": sum(counts) / len(counts)}
        for arm in arms
        for row, counts in zip(table, zip(*kept[arm], strict=True), strict=True)
    ]
    layers = pd.DataFrame(rows)
    layers["density"] = layers["kept"] / layers["numel"]
    numel = {row.name: row.numel for row in table}
    again = [arm for arm in arms if any(len(r.result["mask_builds"]) > 1 for r in comparison.records[arm])]
    shares = {arm: _shares(comparison.records[arm], numel) for arm in again}
    builds = pd.DataFrame([line for arm in again for line in _builds(arm, comparison.records[arm])])
    return MaskAnatomy(layers, overlap, builds, shares)


def _final(runs: Path, record: RunRecord) -> Mask:
    mask = Mask.load(runs / record.run_id / MASK_FILE)
    stated = record.result["mask_builds"][-1]["digest"]
    if mask.digest() != stated:
        raise InputError(
            f"{runs / record.run_id / MASK_FILE} is not the final mask of its run: its digest is "
            f"{mask.digest()[:12]}, the record says {stated[:12]}"
        )
    return mask


def _by_epoch(records: Sequence[RunRecord]) -> dict[int, list[dict[str, object]]]:
    """The last building in each epoch, of every seed that has one."""
    found: dict[int, list[dict[str, object]]] = {}
    for record in records:
        for epoch, build in {build["epoch"]: build for build in record.result["mask_builds"]}.items():
            found.setdefault(int(epoch), []).append(build)
    return dict(sorted(found.items()))


def _shares(records: Sequence[RunRecord], numel: dict[str, int]) -> pd.DataFrame:
    columns = {}
    for epoch, builds in _by_epoch(records).items():
        counts = pd.DataFrame([build["kept_per_tensor"] for build in builds]).reindex(columns=list(numel))
        columns[epoch] = counts.fillna(0).mean() / pd.Series(numel)
    return pd.DataFrame(columns).fillna(0.0)  # 0 / 0 of a tensor without entries


def _builds(arm: str, records: Sequence[RunRecord]) -> list[dict[str, object]]:
    means = ("num_kept", "norm_share", "num_tensors", "jaccard_norm")
    lines: list[dict[str, object]] = []
    for epoch, builds in _by_epoch(records).items():
        found = pd.DataFrame(builds)[list(means)].astype(float).mean()
        lines.append({"arm": arm, "epoch": epoch, **{name: found[name] for name in means}, "n": len(builds)})
    return lines
