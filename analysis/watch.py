"""Whether anything that a measurement depends on has changed under it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from masks.context import Batch
from masks.errors import InputError


class Watch:
    """Parameters, buffers and data as they were, to refuse results that mix two states.

    Autograd's version counters miss changes made through ``.data``, so the content of parameters and buffers is
    compared as well, bit for bit. The data are watched by version only: a copy could be larger than everything else.

    Args:
        model: whose parameters and buffers.
        batches: the data.
        what: the name of the object that would become wrong, for the error's text.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], what: str) -> None:
        self._model, self._batches, self._what = model, batches, what
        data = {id(t) for batch in batches for t in batch}
        self._seen = {name: _Seen(t, content=id(t) not in data) for name, t in self._live().items()}

    def check(self) -> None:
        """Compare with the present.

        Raises:
            InputError: something has changed, was replaced, added or removed.
        """
        live = self._live()
        for name in dict.fromkeys([*self._seen, *live]):
            if name not in self._seen or not self._seen[name].is_still(live.get(name)):
                raise InputError(f"{name} has changed since this {self._what} was built; build a new one")

    def _live(self) -> dict[str, Tensor]:
        data = {
            f"{what} of batch {i}": t for i, xy in enumerate(self._batches) for what, t in zip("xy", xy, strict=True)
        }
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers()), **data}


class _Seen:
    """One tensor as it was; without ``content``, its version only."""

    def __init__(self, tensor: Tensor, *, content: bool) -> None:
        self._tensor, self._version, self._place = tensor, tensor._version, _place(tensor)
        # Its bits where they lie, made once since that takes as long as a comparison, and a copy of them.
        self._bits = (_bits(tensor), _bits(tensor).clone()) if content else None

    def is_still(self, now: Tensor | None) -> bool:
        if now is None or now is not self._tensor or now._version != self._version:
            return False
        if self._bits is None:
            return True
        there, before = self._bits
        if _place(now) != self._place:  # after ``tensor.data = other``
            there = _bits(now)
        return there.device == before.device and torch.equal(there, before)


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals itself and 0.0 does not equal -0.0."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
