"""Products of the Hessian, restricted to a mask, with vectors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from analysis.evaluation import (
    check_batches,
    check_mask,
    describe_loss,
    describe_mask,
    evaluation_mode,
    losses,
    place,
    precision_of,
    whole_mask,
)
from masks.context import Batch, LossFn, cross_entropy
from masks.errors import InputError
from masks.mask import Mask


@dataclass(frozen=True, eq=False)
class _Block:
    """The kept coordinates of one tensor; ``index``: their C-order positions, None for the whole tensor."""

    param: Tensor
    index: Tensor | None
    size: int


class HessianOperator:
    """The Hessian of the mean loss over fixed data at the current weights, as a symmetric linear operator.

    ``H = d^2/dw^2 (1/N) sum_i loss(model(x_i; w), y_i)``, all N examples with equal weight however they are
    cut into batches, restricted to the rows and columns of the coordinates that the mask keeps. The model
    is in evaluation mode meanwhile and is left as it was (see :func:`analysis.evaluation.evaluation_mode`).

    A vector is a flat tensor of shape (``dimension``,) over the kept coordinates: tensors in table order,
    inside a tensor in C order. :meth:`unflatten` turns one into full tensors.

    Products are by double backward (Pearlmutter 1994). A mask of whole tensors restricts differentiation to
    these tensors, which saves work; inside a tensor that is kept in part the product is computed in full and
    cut.

    Args:
        model: the model, float32 or float64.
        batches: the data, a list of (inputs, targets); moved to the model's device and precision.
        mask: the coordinates; None for all trainable parameters.
        loss: per-example loss, ``(logits, targets) -> (B,)``.
        dtype: compute in this precision, in a copy of the model; None for the model's own.
        retain: keep the graph of every batch's gradient: a product then costs 2 gradients instead of 3, at
            the price of the memory of all graphs until :meth:`close` (leave the ``with`` block).

    Attributes:
        num_products: products so far.
        num_examples: N.

    Raises:
        InputError: empty mask, parameters in mixed or low precision, data that are no batches, a loss that
            is not finite, is not per example or does not depend on the weights.
        MaskError: the mask is of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        mask: Mask | None = None,
        loss: LossFn = cross_entropy,
        dtype: torch.dtype | None = None,
        retain: bool = True,
    ) -> None:
        self.mask = whole_mask(model) if mask is None else mask
        check_mask(self.mask)
        self.dtype, self.device = precision_of(model)
        self._watched = model
        self._model = model
        if dtype is not None and dtype != self.dtype:
            if dtype not in (torch.float32, torch.float64):
                raise InputError(f"dtype must be float32 or float64, got {dtype}")
            self.dtype = dtype
            self._model = copy.deepcopy(model).to(dtype)
        self._loss = loss
        self._given = check_batches(batches)
        self._batches = [place(batch, self.dtype, self.device) for batch in self._given]
        self.num_examples = sum(len(x) for x, _ in self._batches)
        self.num_products = 0
        self._blocks = [
            _Block(param, _positions(part, param), count)
            for param, part, count in zip(
                self.mask.table.tensors(self._model), self.mask.parts, self.mask.counts, strict=True
            )
            if count
        ]
        self._closed = False
        # The data are watched by version only: a copy could be larger than everything else.
        data = {id(t) for batch in self._given for t in batch}
        self._seen = {
            name: (t, t._version, None if id(t) in data else _bits(t).clone()) for name, t in self._live().items()
        }
        self._graphs: list[list[Tensor]] | None = None
        if retain:
            with evaluation_mode(self._model):
                self._graphs = [self._gradient(batch) for batch in self._batches]

    @property
    def dimension(self) -> int:
        """Number of kept coordinates."""
        return self.mask.num_kept

    @property
    def name(self) -> str:
        """What matrix this is, in full."""
        precision = str(self.dtype).removeprefix("torch.")
        return (
            f"Hessian of the mean loss over {self.num_examples} examples, {describe_mask(self.mask)}, "
            f"evaluation-mode normalization, {precision}{describe_loss(self._loss)}"
        )

    def __repr__(self) -> str:
        return f"HessianOperator({self.name})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the retained graphs; no product is possible afterwards."""
        self._graphs = None
        self._closed = True

    def matvec(self, vector: Tensor) -> Tensor:
        """``H v``.

        Args:
            vector: v, shape (dimension,), in the operator's dtype and on its device.

        Returns:
            A new tensor of the same shape, dtype and device.

        Raises:
            InputError: a vector that does not fit, a closed operator, weights, buffers or data that have
                changed since the operator was built, or (without retained graphs) a loss that is not finite.
        """
        if self._closed:
            raise InputError("this HessianOperator is closed; use it inside its with block")
        if vector.shape != (self.dimension,) or vector.dtype != self.dtype or vector.device != self.device:
            raise InputError(
                f"the vector must be {self.dtype} of shape ({self.dimension},) on {self.device}, "
                f"got {vector.dtype} of shape {tuple(vector.shape)} on {vector.device}"
            )
        self._check_unchanged()
        direction = self._expand(vector.detach())
        product = torch.zeros_like(vector)
        with evaluation_mode(self._model):
            for i, batch in enumerate(self._batches):
                retained = self._graphs is not None
                gradient = self._graphs[i] if self._graphs is not None else self._gradient(batch)
                # A gradient that is constant in the kept weights, or does not reach them, contributes nothing.
                pairs = [(g, v) for g, v in zip(gradient, direction, strict=True) if g.requires_grad]
                if pairs:
                    outputs, directions = zip(*pairs, strict=True)
                    second = torch.autograd.grad(
                        outputs, self._params(), directions, retain_graph=retained, materialize_grads=True
                    )
                    product += self._flatten(second)
        self.num_products += 1
        return product

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector as tensors of the parameters' shapes, zero outside the mask, by parameter name.

        Tensors that the mask does not touch are left out.
        """
        names = [row.name for row, count in zip(self.mask.table, self.mask.counts, strict=True) if count]
        return dict(zip(names, self._expand(vector), strict=True))

    # -- inside ---------------------------------------------------------------------------------------------

    def _params(self) -> list[Tensor]:
        return [block.param for block in self._blocks]

    def _gradient(self, batch: Batch) -> list[Tensor]:
        """The batch's part of the gradient of the mean loss, with its graph."""
        total = losses(self._model, batch, self._loss, self.dtype, "at the given weights").sum() / self.num_examples
        if not total.requires_grad:
            raise InputError("the loss does not depend on any trainable parameter (a forward pass without gradients?)")
        return list(torch.autograd.grad(total, self._params(), create_graph=True, materialize_grads=True))

    def _expand(self, vector: Tensor) -> list[Tensor]:
        out = []
        for block, chunk in zip(self._blocks, torch.split(vector, [b.size for b in self._blocks]), strict=True):
            if block.index is not None:
                chunk = vector.new_zeros(block.param.numel()).index_copy_(0, block.index, chunk)
            out.append(chunk.view(block.param.shape))
        return out

    def _flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = [
            tensor.reshape(-1) if block.index is None else tensor.reshape(-1).index_select(0, block.index)
            for block, tensor in zip(self._blocks, tensors, strict=True)
        ]
        return torch.cat(flat)

    def _live(self) -> dict[str, Tensor]:
        """Everything that H depends on, as it is now."""
        data = {f"{what} of batch {i}": t for i, xy in enumerate(self._given) for what, t in zip("xy", xy, strict=True)}
        return {**dict(self._watched.named_parameters()), **dict(self._watched.named_buffers()), **data}

    def _check_unchanged(self) -> None:
        """Autograd's version counters miss changes made through ``.data``: compare the content as well."""
        live = self._live()
        for name in [*self._seen, *live]:
            tensor, version, bits = self._seen.get(name, (None, 0, None))
            now = live.get(name)
            changed = now is None or now is not tensor or now._version != version
            if not changed and now is not None and bits is not None:
                changed = now.device != bits.device or not torch.equal(_bits(now), bits)
            if changed:
                raise InputError(f"{name} has changed since this HessianOperator was built; build a new one")


def _positions(part: bool | Tensor, param: Tensor) -> Tensor | None:
    return part.to(param.device).reshape(-1).nonzero().squeeze(1) if isinstance(part, Tensor) else None


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals itself and 0.0 does not equal -0.0."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
