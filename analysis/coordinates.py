"""The coordinates that a mask keeps, as one flat vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masks.mask import Mask


@dataclass(frozen=True, eq=False)
class _Block:
    """The kept coordinates of one tensor; ``index``: their C-order positions, None for the whole tensor."""

    name: str
    param: Tensor
    index: Tensor | None
    size: int


class Coordinates:
    """Flat vectors over the kept coordinates: tensors in table order, inside a tensor in C order.

    Attributes:
        params: the tensors that the mask touches.
        names: their names.
    """

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        rows = zip(mask.table, mask.table.tensors(model), mask.parts, mask.counts, strict=True)
        self._blocks = [_Block(row.name, param, _positions(part, param), n) for row, param, part, n in rows if n]
        self.params = [block.param for block in self._blocks]
        self.names = [block.name for block in self._blocks]

    def expand(self, vector: Tensor) -> list[Tensor]:
        """A flat vector, shape (num_kept,), as tensors of the parameters' shapes, zero outside the mask."""
        out = []
        for block, chunk in zip(self._blocks, torch.split(vector, [b.size for b in self._blocks]), strict=True):
            if block.index is not None:
                chunk = vector.new_zeros(block.param.numel()).index_copy_(0, block.index, chunk)
            out.append(chunk.view(block.param.shape))
        return out

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The kept entries of tensors of the parameters' shapes, shape (num_kept,); a new tensor."""
        flat = [
            tensor.reshape(-1) if block.index is None else tensor.reshape(-1).index_select(0, block.index)
            for block, tensor in zip(self._blocks, tensors, strict=True)
        ]
        return torch.cat(flat)


def _positions(part: bool | Tensor, param: Tensor) -> Tensor | None:
    return part.to(param.device).reshape(-1).nonzero().squeeze(1) if isinstance(part, Tensor) else None
