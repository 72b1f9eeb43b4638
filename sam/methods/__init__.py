"""The members of the family: one file and one registration each. Importing this package registers all of them.

Left out, because their formulas are known here only from abstracts and secondary sources, which do not settle what a
step computes: GAM (gradient norm aware minimization), K-SAM (top-k examples), AE-SAM (adaptive policy of when to
perturb), RST (perturbed steps at random), SAMPa (both gradients in parallel). Each would be one file here, of slots
that exist; none is to be written from a guess.
"""

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
