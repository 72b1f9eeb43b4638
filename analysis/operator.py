"""Products of curvature matrices, restricted to a mask, with vectors; the Hessian."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from analysis.affine_norm import AffineNorm
from analysis.batch_statistics import batch_statistics
from analysis.coordinates import Coordinates
from analysis.evaluation import (
    check_batches,
    check_mask,
    describe_loss,
    describe_mask,
    evaluation_mode,
    exact_arithmetic,
    losses,
    place,
    precision_of,
    whole_mask,
)
from analysis.examples import check_function, data_digest
from analysis.linear import as_scipy
from analysis.watch import Watch
from masks.context import Batch, LossFn, cross_entropy
from masks.errors import InputError, unknown_name
from masks.mask import Mask

Statistics = Literal["evaluation", "batch"]
STATISTICS = {"evaluation": "evaluation-mode normalization", "batch": "normalization by each batch's statistics"}
MEMORY_BUDGET = 2 * 2**30


class BatchGraph(Protocol):
    """What autograd has recorded of one batch, from which products are taken."""

    def product(self, direction: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor] | None:
        """The batch's part of the product, tensors of the parameters' shapes; None for zero.

        ``direction`` has one tensor per parameter; ``keep``: the graph is needed again.
        """
        ...


class CurvatureOperator(ABC):
    """A curvature matrix of the mean loss over fixed data at the current weights, as a symmetric linear operator.

    All N examples have equal weight however they are cut into batches. The rows and columns are those of the
    coordinates that the mask keeps. The model is in evaluation mode meanwhile and is left as it was (see
    :func:`analysis.evaluation.evaluation_mode`).

    A vector is a flat tensor of shape (``dimension``,) over the kept coordinates: tensors in table order,
    inside a tensor in C order. :meth:`unflatten` turns one into full tensors.

    That the loss is a fixed function of the weights in their precision is checked once, by two passes over the data
    without gradients (:func:`analysis.examples.check_function`), 2/3 of the work of one gradient.

    A mask of whole tensors restricts differentiation to these tensors, which saves work; inside a tensor that is
    kept in part the product is computed in full and cut.

    Args:
        model: the model, float32 or float64.
        batches: the data, a list of (inputs, targets); moved to the model's device and precision.
        mask: the coordinates; None for all trainable parameters.
        loss: per-example loss, ``(logits, targets) -> (B,)``.
        dtype: compute in this precision, in a copy of the model; None for the model's own.
        scale: None, or "abs" for ``C A C`` with ``C = diag(|w|)``, the curvature in the coordinates of elementwise
            adaptive sharpness (Kwon et al. 2021, ASAM), which rescaling a ReLU network's neurons leaves as it is.
        statistics: what BatchNorm normalizes by: "evaluation", the running statistics; or "batch", those of each
            batch, through which derivatives then pass: the matrix depends on how the data are cut, and the
            running statistics are not touched.
        retain: keep autograd's record of every batch, at the price of its memory until :meth:`close` (leave the
            ``with`` block): a Hessian product then costs 2 gradients instead of 3. True, False, or "auto": of as
            many of the first batches as fit into the budget; the others are rebuilt at every product.
        memory_budget: for "auto", in bytes of what autograd holds, the weights aside: the first batch is weighed,
            the others count in proportion to their inputs.

    Attributes:
        num_products: products so far.
        num_examples: N.

    Raises:
        InputError: empty mask, parameters in mixed or low precision, data that are no batches, a loss that
            is not finite, is not per example or does not depend on the weights, losses that differ between two passes,
            half precision inside the model, BatchNorm without running statistics unless ``statistics="batch"``, an
            unknown option.
        MaskError: the mask is of another model.
    """

    matrix: str
    """What the matrix is called."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        mask: Mask | None = None,
        loss: LossFn = cross_entropy,
        dtype: torch.dtype | None = None,
        scale: Literal["abs"] | None = None,
        statistics: Statistics = "evaluation",
        retain: bool | Literal["auto"] = "auto",
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        if statistics not in STATISTICS:
            raise InputError(unknown_name("statistics", statistics, STATISTICS))
        if scale not in (None, "abs"):
            raise InputError(f"scale must be None or 'abs', got {scale!r}")
        if retain not in (True, False, "auto") or memory_budget < 0:
            raise InputError(
                f"retain must be True, False or 'auto', memory_budget not negative; got {retain!r}, {memory_budget}"
            )
        self.mask = whole_mask(model) if mask is None else mask
        check_mask(self.mask)
        self.dtype, self.device = precision_of(model)
        self._model = model
        if dtype is not None and dtype != self.dtype:
            if dtype not in (torch.float32, torch.float64):
                raise InputError(f"dtype must be float32 or float64, got {dtype}")
            self.dtype = dtype
            self._model = copy.deepcopy(model).to(dtype)
        self._loss = loss
        self._statistics = statistics
        given = check_batches(batches)
        self._batches = [place(batch, self.dtype, self.device) for batch in given]
        self.num_examples = sum(len(x) for x, _ in self._batches)
        self.num_products = 0
        self._coordinates = Coordinates(self._model, self.mask)
        self._scale = None if scale is None else self._coordinates.flatten(self._coordinates.params).detach().abs()
        self._closed = False
        self._watch = Watch(model, given, type(self).__name__)
        self._given = given
        with self._mode():
            self._graphs = self._retained(retain, memory_budget)
        with self._mode(), self._explained("one of the batches"):
            check_function(self._model, self._batches, loss, batch_statistics=statistics == "batch")

    @property
    def dimension(self) -> int:
        """Number of kept coordinates."""
        return self.mask.num_kept

    @property
    def num_retained(self) -> int:
        """Number of batches whose records are kept."""
        return len(self._graphs)

    @property
    def name(self) -> str:
        """What matrix this is, in full."""
        matrix = self.matrix if self._scale is None else f"|w|-scaled {self.matrix}"
        return (
            f"{matrix} of the mean loss over {self.num_examples} examples, {describe_mask(self.mask)}, "
            f"{STATISTICS[self._statistics]}, {str(self.dtype).removeprefix('torch.')}{describe_loss(self._loss)}"
        )

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What a number from this operator was computed on and how, in plain values."""
        cut = {"batch_sizes": [len(x) for x, _ in self._batches]} if self._statistics == "batch" else {}
        return {
            "matrix": self.matrix,
            "scale": None if self._scale is None else "abs",
            "statistics": self._statistics,
            **cut,
            "num_examples": self.num_examples,
            "data_digest": data_digest(self._given),
            "mask_digest": self.mask.digest(),
            "num_kept": self.dimension,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the retained records; no product is possible afterwards."""
        self._graphs = []
        self._closed = True

    def matvec(self, vector: Tensor) -> Tensor:
        """``A v``.

        Args:
            vector: v, shape (dimension,), in the operator's dtype and on its device.

        Returns:
            A new tensor of the same shape, dtype and device.

        Raises:
            InputError: a vector that does not fit, a closed operator, weights, buffers or data that have
                changed since the operator was built, or (where records are rebuilt) a loss that is not finite.
        """
        if self._closed:
            raise InputError(f"this {type(self).__name__} is closed; use it inside its with block")
        if vector.shape != (self.dimension,) or vector.dtype != self.dtype or vector.device != self.device:
            raise InputError(
                f"the vector must be {self.dtype} of shape ({self.dimension},) on {self.device}, "
                f"got {vector.dtype} of shape {tuple(vector.shape)} on {vector.device}"
            )
        self._watch.check()
        vector = vector.detach()
        direction = self._coordinates.expand(vector if self._scale is None else self._scale * vector)
        product = torch.zeros_like(vector)
        # Retained records do not run the model.
        runs = len(self._graphs) < len(self._batches)
        with self._mode() if runs else exact_arithmetic(cuda=self.device.type == "cuda"):
            for i in range(len(self._batches)):
                keep = i < len(self._graphs)
                part = (self._graphs[i] if keep else self._record(i)).product(direction, keep=keep)
                if part is not None:
                    product += self._coordinates.flatten(part)
        self.num_products += 1
        return product if self._scale is None else product.mul_(self._scale)

    def as_scipy(self) -> LinearOperator:
        """The operator for ``scipy.sparse.linalg``, on NumPy vectors."""
        return as_scipy(self)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector as tensors of the parameters' shapes, zero outside the mask, by parameter name.

        Tensors that the mask does not touch are left out.
        """
        return dict(zip(self._coordinates.names, self._coordinates.expand(vector), strict=True))

    # -- inside ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _record(self, i: int) -> BatchGraph:
        """The record of batch i; its products add up to those of the matrix."""

    def _losses(self, i: int, loss: LossFn) -> Tensor:
        """The losses of batch i, shape (B,), with their graph."""
        with self._explained(f"batch {i}"), AffineNorm():
            values = losses(self._model, self._batches[i], loss, self.dtype, "at the given weights")
        if not values.requires_grad:
            raise InputError("the loss does not depend on any trainable parameter (a forward pass without gradients?)")
        return values

    @contextmanager
    def _explained(self, which: str) -> Iterator[None]:
        """Layers refuse a batch that is too small to have statistics with an error of their own."""
        try:
            yield
        except ValueError as error:
            if self._statistics == "batch" and not isinstance(error, InputError):
                raise InputError(f"{which} has no statistics: {error}") from error
            raise

    @contextmanager
    def _mode(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self._model))
            if self._statistics == "batch":
                stack.enter_context(batch_statistics(self._model))
            yield

    def _retained(self, retain: bool | Literal["auto"], budget: int) -> list[BatchGraph]:
        keep = len(self._batches) if retain is True else 0
        if retain == "auto":
            sizes = np.cumsum([x.numel() for x, _ in self._batches])
            keep = int(np.count_nonzero(sizes * (self._weight() / sizes[0]) <= budget))
        return [self._record(i) for i in range(keep)]

    def _weight(self) -> int:
        """Bytes of the tensors that the record of the first batch holds, parameters aside."""
        held: dict[int, int] = {}

        def weigh(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself would make a reference cycle, freed only by the collector

        # A record made under these hooks is thrown away: autograd does not see in-place changes of what it holds.
        with saved_tensors_hooks(weigh, lambda tensor: tensor):
            self._record(0)
        own = {param.untyped_storage().data_ptr() for param in self._model.parameters()}
        return sum(size for pointer, size in held.items() if pointer not in own)


class HessianOperator(CurvatureOperator):
    """The Hessian ``H = d^2/dw^2 (1/N) sum_i loss(model(x_i; w), y_i)``, see :class:`CurvatureOperator`.

    Products are by double backward (Pearlmutter 1994, Fast exact multiplication by the Hessian).
    """

    matrix = "Hessian"

    def _record(self, i: int) -> BatchGraph:
        total = self._losses(i, self._loss).sum() / self.num_examples
        params = self._coordinates.params
        return _Gradient(params, torch.autograd.grad(total, params, create_graph=True, materialize_grads=True))


class _Gradient:
    """A batch's part of the gradient of the mean loss."""

    def __init__(self, params: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        self._params, self._gradient = params, gradient

    def product(self, direction: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor] | None:
        return pull_back(self._gradient, direction, self._params, keep=keep)


def pull_back(
    outputs: Sequence[Tensor], weights: Sequence[Tensor], inputs: Sequence[Tensor], *, keep: bool
) -> Sequence[Tensor] | None:
    """``sum_j J_j^T weight_j`` for outputs with Jacobians ``J_j``; constant outputs contribute nothing."""
    pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not pairs:
        return None
    moving, factors = zip(*pairs, strict=True)
    return torch.autograd.grad(moving, inputs, factors, retain_graph=keep, materialize_grads=True)
