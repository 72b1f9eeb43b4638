"""mSAM: every part of the batch has a perturbation of its own."""

from __future__ import annotations

from dataclasses import dataclass

from masks.errors import InputError
from sam.method import Data, Method
from sam.passes import BatchPasses
from sam.registry import register_method


@dataclass(frozen=True)
class MicroBatches(Data):
    """Consecutive parts of the batch, by their number or by their size.

    Args:
        number: how many parts, of sizes that differ by at most one, the larger ones first; a batch of fewer examples
            has one part per example.
        size: examples per part; the last one has what is left.

    Raises:
        InputError: both or neither is given, or it is below 1.
    """

    number: int | None
    size: int | None
    batch = True

    def __post_init__(self) -> None:
        if (self.number is None) == (self.size is None):
            raise InputError(
                "micro_batch_sam divides a batch by number (parts=4:size=none) or by size (parts=none:size=32); "
                f"got parts={self.number}, size={self.size}"
            )
        name, value = ("parts", self.number) if self.size is None else ("size", self.size)
        if value is not None and value < 1:
            raise InputError(f"{name} of micro_batch_sam must be >= 1, got {value}")

    def sizes(self, examples: int) -> list[int]:
        """The sizes of the parts of a batch."""
        if self.size is not None:
            whole, left = divmod(examples, self.size)
            return [self.size] * whole + [left] * (left > 0)
        parts = min(self.number or 1, examples)
        return [examples // parts + (i < examples % parts) for i in range(parts)]

    def parts(self, passes: BatchPasses) -> list[BatchPasses]:
        return passes.split(self.sizes(passes.num_examples))


@register_method(
    "micro_batch_sam",
    summary="every part of the batch has its own perturbation; their gradients are averaged by size (m-sharpness)",
    source="mSAM, Behdin et al. 2022, arXiv 2212.04343 and 2302.09693; m-sharpness: Foret et al. 2021",
    passes="2",
    tuned_on="nothing: the paper's number of parts was not at hand",
    limits=("needs step_on with the batch in one piece: a closure hides the batch, and so does Accumulated",),
)
def micro_batch_sam(*, parts: int | None = 4, size: int | None = None) -> Method:
    """``sum_i |B_i|/|B| grad L_{B_i}(w + eps_i)``, ``eps_i = rho g_i / ||g_i||`` with g_i the gradient on part B_i.

    Parts are consecutive examples, by number (``parts``) or by size (``parts=none``, ``size``); the literature writes m
    for either. One part is ``sam``. In data-parallel training with a perturbation per process this is what happens
    with one part per process. The two passes cost the same arithmetic as ``sam``, in smaller pieces.

    Each part is a batch of its own to BatchNorm, in both of its passes (ghost BatchNorm), and running statistics are
    updated once per part: with momentum c, ``parts`` times per step. Gradient accumulation is another thing: it has one
    perturbation for all parts.
    """
    return Method(data=MicroBatches(parts, size))
