"""What a mask builder is given: the model, its parameters, data to score on, and a random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from masks.errors import MaskError
from masks.mask import Mask
from masks.norm_stats import reestimated_copy
from masks.params import ParamTable, model_digest

Batch = tuple[Tensor, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Per-example cross-entropy: (B, classes) and (B,) to (B,)."""
    return functional.cross_entropy(logits, targets, reduction="none")


@dataclass(frozen=True, eq=False)
class MaskContext:
    """The model and all that a builder may look at. Builders leave the model as they found it.

    Attributes:
        model: the model to be masked, in whatever state it is.
        table: its parameters; read off the model if not given.
        batches: (inputs, targets) to score on; empty for masks that need no data.
        loss: per-example loss of (logits, targets).
        seed: seed of the mask's own random stream.
        built_at: when in training this is, for the record.
        previous: the mask that this builder made last, for masks that evolve; None for the first.
        progress: fraction of training that is done, in [0, 1].

    Raises:
        MaskError: the table or the previous mask is of another model, or the progress is out of range.
    """

    model: nn.Module
    table: ParamTable = None  # type: ignore[assignment]
    batches: Sequence[Batch] = ()
    loss: LossFn = cross_entropy
    seed: int = 0
    built_at: str = "init"
    previous: Mask | None = None
    progress: float = 0.0
    _twin: dict[str, nn.Module] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        table = ParamTable.from_model(self.model)
        if self.table is None:
            object.__setattr__(self, "table", table)
        else:
            table.check_same(self.table, "the table is of another model")
        if self.previous is not None:
            table.check_same(self.previous.table, "the previous mask is of another model")
        if not 0 <= self.progress <= 1:
            raise MaskError(f"progress must lie between 0 and 1, got {self.progress}")

    @property
    def device(self) -> torch.device:
        return self.table.tensors(self.model)[0].device

    def generator(self, *names: str) -> torch.Generator:
        """A CPU generator for one purpose; the same seed and names give the same stream on any device."""
        text = "/".join(["mask", str(self.seed), *names])
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)

    def parameters(self) -> list[Tensor]:
        """The current weights in table order, detached; do not change them."""
        return [p.detach() for p in self.table.tensors(self.model)]

    def scoring_model(self) -> nn.Module:
        """A copy in evaluation mode whose running statistics are those of the batches.

        Scores taken with statistics that have seen no data, or other weights' data, rank layers by an
        artefact (at initialization only 28 % of a Fisher mask survives the re-estimation). The copy is kept
        for the next mask of this context, as long as the model's state is the same.

        Raises:
            MaskError: there are no batches.
        """
        if not self.batches:
            raise MaskError("this mask is scored on data, and none was given")
        state = model_digest(self.model)
        if state not in self._twin:
            self._twin.clear()
            self._twin[state] = reestimated_copy(self.model, (x for x, _ in self.batches))
        return self._twin[state]
