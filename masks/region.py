"""A mask bound to a model's tensors: read, move and put back exactly the kept coordinates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor, nn

from masks.mask import Mask
from masks.params import ParamRow

INDEX_BELOW = 0.10
"""Density of a tensor below which its kept coordinates are held as indices: measured on CPU, indices cost
less than whole-tensor arithmetic up to about one coordinate in ten."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The kept coordinates of one tensor, in one of three forms.

    Whole (``index`` and ``keep`` are None), index (``index``: int64 positions in the tensor's *storage*, so that
    channels-last weights need no copy) or dense (``keep``: boolean tensor).
    *Values* of a piece have the tensor's shape for the first and last form, shape (n,) for the second: the kept
    coordinates in C order, whatever the tensor's layout, so that values outlive a change of it.
    """

    row: ParamRow
    position: int
    param: Tensor
    index: Tensor | None = None
    keep: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        return self.index is None and self.keep is None

    @property
    def shape(self) -> torch.Size:
        """The shape of its values."""
        return self.param.shape if self.index is None else self.index.shape

    def gather(self, like: Tensor) -> Tensor:
        """The values of a tensor of the parameter's shape; zero outside the mask in the dense form.

        The whole form returns ``like`` itself: do not change the result in place.
        """
        if self.index is not None:
            return storage_order(like, self.param).index_select(0, self.index)
        if self.keep is not None:
            return torch.where(self.keep, like, 0)
        return like

    def scatter(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`gather`: a new tensor of the parameter's shape, zero outside the mask."""
        if self.index is None:
            return values.clone()
        out = torch.zeros_like(self.param, dtype=values.dtype)
        storage_order(out, self.param).index_copy_(0, self.index, values)
        return out


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of storage, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def storage_order(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """A flat view of a tensor in the storage order of ``like`` (a copy if it is laid out otherwise).

    Without ``like``: in its own order (in C order, as a copy, if it has gaps or overlaps).
    """
    if like is None:
        return (
            tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
            if _is_dense(tensor)
            else tensor.reshape(-1)
        )
    if tensor.stride() != like.stride():
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class Region:
    """The coordinates of ``model`` that ``mask`` keeps.

    Only tensors that the mask touches are held; :meth:`save` copies only what the mask keeps (the whole
    tensor in the dense form), and :meth:`restore` copies it back into the same storage, bit for bit.

    Args:
        mask: the mask.
        model: the model; its parameters must be those of the mask's table.

    Raises:
        MaskError: the model's parameters are not those of the mask's table.
    """

    def __init__(self, mask: Mask, model: nn.Module) -> None:
        self.mask = mask
        self.pieces: tuple[Piece, ...] = tuple(
            _piece(row, i, param.detach(), part)
            for i, (row, param, part) in enumerate(zip(mask.table, mask.table.tensors(model), mask.parts, strict=True))
            if part is not False
        )
        # The parameters themselves, for autograd; the pieces hold detached views of the same storage.
        params = mask.table.tensors(model)
        self.params: list[Tensor] = [params[piece.position] for piece in self.pieces]
        self._sort()

    def _sort(self) -> None:
        self._whole = [i for i, piece in enumerate(self.pieces) if piece.index is None]
        self._indexed = [i for i, piece in enumerate(self.pieces) if piece.index is not None]

    def only(self, kept: Sequence[bool]) -> Region:
        """The region in some of its tensors, sharing their indices; its ``mask`` is still the whole one.

        Args:
            kept: one per piece.
        """
        part = copy.copy(self)
        part.pieces = tuple(compress(self.pieces, kept))
        part.params = list(compress(self.params, kept))
        part._sort()
        return part

    @property
    def is_empty(self) -> bool:
        return not self.pieces

    @property
    def is_whole(self) -> bool:
        """Whether the mask is made of whole tensors only."""
        return all(piece.is_whole for piece in self.pieces)

    @property
    def is_current(self) -> bool:
        """Whether the parameters lie where they lay: ``module.to(...)`` moves them, also to another layout.

        The region of parameters that moved must be made anew: it would act on their old storage.
        """
        return all(
            param.data_ptr() == piece.param.data_ptr()
            and param.stride() == piece.param.stride()
            and param.requires_grad
            for piece, param in zip(self.pieces, self.params, strict=True)
        )

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The values of tensors given one per piece, each of the shape of the piece's parameter."""
        return [piece.gather(tensor) for piece, tensor in zip(self.pieces, tensors, strict=True)]

    def weights(self) -> list[Tensor]:
        """The current values of the parameters; do not change them in place."""
        return self.gather([piece.param for piece in self.pieces])

    def scatter(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Full tensors from values, zero outside the mask."""
        return [piece.scatter(value) for piece, value in zip(self.pieces, values, strict=True)]

    def add_(self, values: Sequence[Tensor]) -> None:
        """Move the kept coordinates by these values (zero outside the mask, as from :meth:`gather`), in place."""
        if self._whole:
            torch._foreach_add_([self.pieces[i].param for i in self._whole], [values[i] for i in self._whole])
        for i in self._indexed:
            piece = self.pieces[i]
            assert piece.index is not None
            storage_order(piece.param).index_add_(0, piece.index, values[i])

    def save(self) -> list[Tensor]:
        """A copy of what :meth:`add_` may change."""
        saved = [
            torch.empty_like(piece.param) if piece.index is None else piece.gather(piece.param) for piece in self.pieces
        ]
        if self._whole:
            torch._foreach_copy_([saved[i] for i in self._whole], [self.pieces[i].param for i in self._whole])
        return saved

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Put back what :meth:`save` returned, in place and bit for bit."""
        if self._whole:
            torch._foreach_copy_([self.pieces[i].param for i in self._whole], [saved[i] for i in self._whole])
        for i in self._indexed:
            piece = self.pieces[i]
            assert piece.index is not None
            storage_order(piece.param).index_copy_(0, piece.index, saved[i])

    @property
    def index_nbytes(self) -> int:
        """Bytes that the region itself holds (indices and boolean tensors)."""
        held = [t for piece in self.pieces for t in (piece.index, piece.keep) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)


def _piece(row: ParamRow, position: int, param: Tensor, part: bool | Tensor) -> Piece:
    if isinstance(part, bool):
        return Piece(row, position, param)
    keep = part.to(param.device)
    if _is_dense(param) and int(keep.sum()) < INDEX_BELOW * row.numel:
        strides = torch.tensor(param.stride(), dtype=torch.int64, device=param.device)
        return Piece(row, position, param, index=(keep.nonzero() * strides).sum(1))
    return Piece(row, position, param, keep=keep)
