"""Whether the masks of a comparison kept exactly as many coordinates, read off its records."""

from __future__ import annotations

from experiments.compare import Comparison
from experiments.config import BASELINE, Arm
from masks import MaskSpec


def _counts(comparison: Comparison, arm: Arm) -> set[int]:
    """Sizes of the arm's mask over all seeds and buildings."""
    return {int(b["num_kept"]) for r in comparison.records[arm.name] for b in r.result["mask_builds"]}


def _is_budgeted(arm: Arm) -> bool:
    return MaskSpec.parse(arm.mask).info.kind == "budgeted"


def matched_count(comparison: Comparison) -> int | None:
    """The one size of all budgeted masks, read off the records; None if there is none, or more than one."""
    config = comparison.config
    counts = set().union(*(_counts(comparison, arm) for arm in config.arms if _is_budgeted(arm)))
    if counts and config.density is None:
        counts = counts.union(*(_counts(comparison, arm) for arm in config.arms if _is_reference(config.match, arm)))
    return counts.pop() if len(counts) == 1 else None


def _is_reference(match: str, arm: Arm) -> bool:
    one, other = MaskSpec.parse(arm.mask), MaskSpec.parse(match)
    return (one.name, one.options) == (other.name, other.options)


def matched(comparison: Comparison, arm: Arm, count: int | None) -> str:
    """How an arm's size relates to the common count, in the words of :class:`experiments.table.Row`."""
    if arm.name == BASELINE:
        return "baseline"
    if _is_budgeted(arm):
        return "yes" if count is not None and _counts(comparison, arm) == {count} else "NO"
    if MaskSpec.parse(arm.mask).name == "none":
        return "no mask"
    anything = comparison.config.density is None and any(map(_is_budgeted, comparison.config.arms))
    return "reference" if anything and _is_reference(comparison.config.match, arm) else "unmatched"
