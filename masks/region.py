"""A mask bound to a model's tensors: read, move and put back exactly the kept coordinates."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor, nn

from masks.mask import Mask
from masks.params import ParamRow

INDEX_BELOW = 0.10
"""Density of a tensor below which its kept coordinates are held as indices: measured on CPU, indices cost
less than whole-tensor arithmetic up to about one coordinate in ten."""

_TOGETHER = 1 << 16
"""Entries up to which tensors on a CPU are moved together: few enough to stay in its cache, and for the allocator to
hand the same memory out again; fresh memory costs more than the arithmetic. A larger tensor is moved by itself."""


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
            return _zero_outside(self.keep, like)
        return like

    def scatter(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`gather`: a new tensor of the parameter's shape, zero outside the mask."""
        if self.index is None:
            return values.clone()
        out = torch.zeros_like(self.param, dtype=values.dtype)
        storage_order(out, self.param).index_copy_(0, self.index, values)
        return out


def _zero_outside(keep: Tensor, values: Tensor) -> Tensor:
    """The values where ``keep`` is True, else 0, whatever they were: NaN, too."""
    if values.device.type != "cpu" or values.requires_grad:
        return torch.where(keep, values, 0)
    # On CPUs, where() decides entry by entry, and guesses wrong on scattered masks: 8 to 27 times the time of this.
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return keep.to(bits).neg_().bitwise_and_(values.view(bits)).view(values.dtype)


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


def like_storage(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`storage_order`: a view of a flat tensor in the shape of ``like``, laid out as it is."""
    if not _is_dense(like):
        return flat.view(like.shape)
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


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
        pieces = tuple(
            _piece(row, i, param.detach(), part)
            for i, (row, param, part) in enumerate(zip(mask.table, mask.table.tensors(model), mask.parts, strict=True))
            if part is not False
        )
        # The parameters themselves, for autograd; the pieces hold detached views of the same storage.
        params = mask.table.tensors(model)
        self._bind(pieces, [params[piece.position] for piece in pieces])

    def _bind(self, pieces: tuple[Piece, ...], params: list[Tensor]) -> None:
        self.pieces, self.params = pieces, params
        self._groups = _together(pieces)
        self._backup: list[Tensor] | None = None

    def only(self, kept: Sequence[bool]) -> Region:
        """The region in some of its tensors, sharing their indices; its ``mask`` is still the whole one.

        Args:
            kept: one per piece.
        """
        part = copy.copy(self)
        part._bind(tuple(compress(self.pieces, kept)), list(compress(self.params, kept)))
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

    def add_(self, values: Sequence[Tensor], times: Tensor | None = None) -> None:
        """Move the kept coordinates by these values (zero outside the mask, as from :meth:`gather`), in place.

        Args:
            values: one tensor per piece; not changed.
            times: what the values are multiplied by first, 0-dim; None for 1. The products are rounded before they are
                added, and on a CPU they never lie in memory all at once.
        """
        for group in self._groups:
            self._add(group, values, times)

    def save(self) -> list[Tensor]:
        """A copy of what :meth:`add_` may change."""
        saved = self._room()
        self._save(range(len(self.pieces)), saved)
        return saved

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Put back what :meth:`save` returned, in place and bit for bit."""
        self._restore(range(len(self.pieces)), saved)

    @contextmanager
    def moved(self, values: list[Tensor], times: Tensor | None = None) -> Iterator[None]:
        """Inside, the kept coordinates are moved as by :meth:`add_`; on the way out, whatever happens, put back.

        The memory of the copy is kept for the next time: on a CPU, fresh memory may cost more than the copying.

        Args:
            values: the list is emptied, so that nothing holds its memory through what happens inside.
            times: see :meth:`add_`.
        """
        saved, self._backup = self._backup or self._room(), None  # inside, another move has a copy of its own
        done: list[int] = []
        try:
            for group in self._groups:  # saved and moved while it is in the cache
                self._save(group, saved)
                done += group
                self._add(group, values, times)
            values.clear()
            yield
        finally:
            self._restore(done[::-1], saved)  # backwards: tensors of a foreign model may overlap
            self._backup = saved

    def _room(self) -> list[Tensor]:
        return [
            torch.empty_like(piece.param if piece.index is None else piece.index, dtype=piece.param.dtype)
            for piece in self.pieces
        ]

    def _add(self, which: Sequence[int], values: Sequence[Tensor], times: Tensor | None) -> None:
        whole, indexed = self._by_form(which)
        if whole:
            moves = [values[i] for i in whole]
            torch._foreach_add_(
                [self.pieces[i].param for i in whole], moves if times is None else torch._foreach_mul(moves, times)
            )
        for i, index, storage in indexed:
            storage.index_add_(0, index, values[i] if times is None else values[i] * times)

    def _save(self, which: Sequence[int], saved: Sequence[Tensor]) -> None:
        whole, indexed = self._by_form(which)
        if whole:
            torch._foreach_copy_([saved[i] for i in whole], [self.pieces[i].param for i in whole])
        for i, index, storage in indexed:
            torch.index_select(storage, 0, index, out=saved[i])

    def _restore(self, which: Sequence[int], saved: Sequence[Tensor]) -> None:
        whole, indexed = self._by_form(which)
        if whole:
            torch._foreach_copy_([self.pieces[i].param for i in whole], [saved[i] for i in whole])
        for i, index, storage in indexed:
            storage.index_copy_(0, index, saved[i])

    def _by_form(self, which: Sequence[int]) -> tuple[list[int], list[tuple[int, Tensor, Tensor]]]:
        """The pieces in whole or dense form; those in index form with their indices and storages."""
        whole, indexed = [], []
        for i in which:
            piece = self.pieces[i]
            if piece.index is None:
                whole.append(i)
            else:
                indexed.append((i, piece.index, storage_order(piece.param)))
        return whole, indexed

    @property
    def index_nbytes(self) -> int:
        """Bytes of the region's indices and boolean tensors."""
        held = [t for piece in self.pieces for t in (piece.index, piece.keep) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)


def _together(pieces: Sequence[Piece]) -> list[list[int]]:
    """The numbers of the pieces, divided into what is moved together: on an accelerator all, in few launches."""
    groups: list[list[int]] = []
    room = 0
    for i, piece in enumerate(pieces):
        room -= piece.shape.numel()
        if not groups or (room < 0 and piece.param.device.type == "cpu"):
            groups.append([])
            room = _TOGETHER - piece.shape.numel()
        groups[-1].append(i)
    return groups


def _piece(row: ParamRow, position: int, param: Tensor, part: bool | Tensor) -> Piece:
    if isinstance(part, bool):
        return Piece(row, position, param)
    if _is_dense(param) and int(part.sum()) < INDEX_BELOW * row.numel:
        strides = torch.tensor(param.stride(), dtype=torch.int64, device=part.device)
        return Piece(row, position, param, index=(part.nonzero() * strides).sum(1).to(param.device))
    # In the layout of the parameter, as its gradient will be.
    return Piece(row, position, param, keep=torch.empty_like(param, dtype=torch.bool).copy_(part))
