"""The members of the family: one file and one registration each. Importing this package registers all of them."""

from sam.methods import (
    asam,
    esam,
    exact_sam,
    fisher_sam,
    friendly_sam,
    gsam,
    looksam,
    micro_batch_sam,
    momentum_sam,
    mup_sam,
    sam,
    sam_on,
    ssam,
    universal_sam,
    vasso,
    wsam,
)

__all__ = [
    "asam",
    "esam",
    "exact_sam",
    "fisher_sam",
    "friendly_sam",
    "gsam",
    "looksam",
    "micro_batch_sam",
    "momentum_sam",
    "mup_sam",
    "sam",
    "sam_on",
    "ssam",
    "universal_sam",
    "vasso",
    "wsam",
]
