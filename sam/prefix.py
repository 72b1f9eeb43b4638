"""Whether the final pass of a step reuses the forward computation that no perturbed weight reaches."""

from __future__ import annotations

from itertools import islice
from typing import Any, Literal

from torch import nn

from masks.region import Region
from sam.passes import LossFn, Surroundings, tensors_of
from sam.tape import Tape, address_of

ReusePrefix = Literal["auto", "on", "off"]

WORTH_IT = 0.25
"""Share of matrix products and convolutions below which looking at every operation may cost more than it saves."""


class Prefix:
    """The part of a model that a mask does not reach, found anew for every mask.

    Args:
        reuse: as in :class:`sam.SAM`.
        model: the model without wrappers.
        region: what is perturbed.

    Attributes:
        share: of the matrix products and convolutions of the last final pass, how many were not computed again; 0
            before one.
        reason: why nothing is reused; None while something is, or while that is not known yet.
    """

    def __init__(self, reuse: ReusePrefix, model: nn.Module, region: Region) -> None:
        self.share = 0.0
        self._reuse = reuse
        moved = {address_of(param) for param in region.params}
        held = [*model.parameters(), *model.buffers()]
        self._known = [tensor for tensor in held if address_of(tensor) not in moved]
        self._tape: Tape | None = None
        self.reason = self._obstacle(model, region)

    def _obstacle(self, model: nn.Module, region: Region) -> str | None:
        if self._reuse == "off":
            return "it is switched off"
        if region.is_empty:
            return "the mask is empty"
        if any(hasattr(module, "_orig_mod") for module in model.modules()):
            return "a part of the model is compiled"
        if self._reuse == "on":
            return None
        if region.params[0].device.type != "cpu":
            return 'its gain was measured on CPUs only; reuse_prefix="on" reuses on any device'
        # In the order of registration, mostly that of the computation; where it is not, only time is lost.
        before = islice(region.mask.table, region.pieces[0].position)
        if sum(len(row.shape) > 1 for row in before) < 2:
            return "the mask touches the first layers"
        return None

    def tape(self, around: Surroundings, loss_fn: LossFn, batch: Any) -> Tape | None:
        """What the passes of one step are to run under; None where nothing is reused."""
        if self.reason is not None or around.replicas is not None or hasattr(loss_fn, "_torchdynamo_orig_callable"):
            return None
        kept_still = around.statistics if around.norm_statistics == "first" else []
        self._tape = Tape([*self._known, *tensors_of(batch)], kept_still)
        return self._tape

    def finish(self) -> None:
        """After the step: whether it was worth it."""
        tape, self._tape = self._tape, None
        if tape is None or not tape.products:
            return
        self.share = tape.reused / tape.products
        if self._reuse == "auto" and self.share < WORTH_IT:
            self.reason = f"only {tape.reused} of {tape.products} matrix products and convolutions could be reused"
