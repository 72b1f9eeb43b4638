"""Training runs, comparisons and their reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["load_results"]


def load_results(folder: Path | str) -> pd.DataFrame:
    """All completed runs below a folder as one table; see :func:`experiments.runs.load_results`."""
    from experiments import runs  # late, so that importing a part of the package does not import all of it

    return runs.load_results(folder)
