"""When a difference of a table counts as significant, and whether so few seeds can show it at all."""

from __future__ import annotations

from analysis import seeds_needed

ALPHA = 0.05
EXACT_SEEDS = 16
"""Up to so many seeds the sign-flip test enumerates all patterns."""


def too_few_seeds(seeds: int, main: int, control: int) -> list[str]:
    """Whether a result can be significant at all, for each family of so many contrasts."""
    out = []
    for family, size in (("main", main), ("control", control)):
        needed = seeds_needed(size, ALPHA) if size else 0
        if seeds < needed:
            out.append(
                f"TOO FEW SEEDS: with {size} {family} contrasts no result can reach p = {ALPHA} after Holm from "
                f"{seeds} seeds; at least {needed} are needed."
            )
    return out
