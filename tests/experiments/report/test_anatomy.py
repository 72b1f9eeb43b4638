"""Mask anatomy against the mask files and the records, counted anew."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.compare import Comparison
from experiments.report.anatomy import MaskAnatomy, mask_anatomy
from masks import Mask
from masks.errors import InputError


@pytest.fixture(scope="module")
def anatomy(comparison: Comparison) -> MaskAnatomy:
    return mask_anatomy(comparison)


def flat(comparison: Comparison, arm: str, seed: int) -> torch.Tensor:
    path = comparison.folder / "runs" / comparison.records[arm][seed].run_id / "mask.npz"
    return torch.cat([part.flatten() for part in Mask.load(path).dense()])


def test_overlap_is_intersection_over_union_in_runs_of_one_seed(comparison: Comparison, anatomy: MaskAnatomy) -> None:
    arms = list(anatomy.overlap)
    assert arms == list(anatomy.overlap.index) == ["all", "no_norm", "norm", "random", "fisher"]
    for one in arms:
        for other in arms:
            values = []
            for seed in range(3):
                a, b = flat(comparison, one, seed), flat(comparison, other, seed)
                values.append(int((a & b).sum()) / int((a | b).sum()))
            assert anatomy.overlap.loc[one, other] == pytest.approx(np.mean(values), abs=1e-12)
    assert anatomy.overlap.loc["norm", "no_norm"] == 0 < anatomy.overlap.loc["random", "no_norm"] < 1


def test_layers_are_the_counts_of_the_final_masks(comparison: Comparison, anatomy: MaskAnatomy) -> None:
    for arm, part in anatomy.layers.groupby("arm"):
        records = comparison.records[str(arm)]
        for row in part.itertuples():
            counts = [r.result["mask_builds"][-1]["kept_per_tensor"].get(row.tensor, 0) for r in records]
            assert row.kept == pytest.approx(np.mean(counts))
            assert row.density == pytest.approx(row.kept / row.numel)
        assert part["kept"].sum() == pytest.approx(records[0].result["mask_builds"][-1]["num_kept"])
        assert part["numel"].sum() == records[0].result["mask_builds"][-1]["numel"]


def test_only_rebuilt_masks_have_a_history_and_it_is_the_records(comparison: Comparison, anatomy: MaskAnatomy) -> None:
    assert list(anatomy.shares) == ["fisher"] == list(anatomy.builds["arm"].unique())
    records = comparison.records["fisher"]
    share = anatomy.shares["fisher"]
    numel = anatomy.layers.drop_duplicates("tensor").set_index("tensor")["numel"]
    assert list(share.columns) == [0, 1] == anatomy.builds["epoch"].tolist()
    for epoch in (0, 1):
        builds = [b for r in records for b in r.result["mask_builds"] if b["epoch"] == epoch]
        for tensor in share.index:
            counts = [b["kept_per_tensor"].get(tensor, 0) for b in builds]
            assert share.loc[tensor, epoch] == pytest.approx(np.mean(counts) / numel[tensor])
        line = anatomy.builds.set_index("epoch").loc[epoch]
        for key in ("num_kept", "norm_share", "num_tensors", "jaccard_norm"):
            assert line[key] == pytest.approx(np.mean([b[key] for b in builds]))
        assert line["n"] == 3


def test_masks_of_other_runs_or_none_are_refused(comparison: Comparison, tmp_path: Path) -> None:
    copy = replace(comparison, folder=Path(shutil.copytree(comparison.folder, tmp_path / "copy")))
    one, other = (copy.folder / "runs" / comparison.records[a][0].run_id / "mask.npz" for a in ("norm", "random"))
    shutil.copy(one, other)
    with pytest.raises(InputError, match="is not the final mask of its run"):
        mask_anatomy(copy)
    other.unlink()
    with pytest.raises(InputError, match="cannot read mask file"):
        mask_anatomy(copy)
