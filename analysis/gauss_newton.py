"""Products of matrices ``J^T M J`` with the Jacobian J of the model's outputs; the Gauss-Newton matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from analysis.operator import BatchGraph, CurvatureOperator, pull_back
from masks.errors import InputError

Middle = Callable[[Tensor], Tensor]
"""u to ``M u``, both of the shape of a batch's outputs."""


class OutputOperator(CurvatureOperator):
    """``(1/N) sum_i J_i^T M_i J_i``, where ``J_i`` is the Jacobian of example i's outputs (the logits).

    ``J v`` is the derivative of ``J^T u`` in u, taken backward: no forward-mode differentiation, which is wrong
    through some fused kernels. See :class:`analysis.operator.CurvatureOperator` for the options.
    """

    @abstractmethod
    def _middle(self, i: int, outputs: Tensor) -> Middle:
        """M for batch i with the given outputs (detached), N not counted."""

    def _record(self, i: int) -> BatchGraph:
        seen: list[Tensor] = []

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            seen.append(outputs)
            return self._loss(outputs, targets)

        self._losses(i, loss)
        outputs = seen[0]
        size = len(self._batches[i][0])
        if not isinstance(outputs, Tensor) or outputs.dtype != self.dtype or not outputs.dim() or len(outputs) != size:
            got = f"{outputs.dtype} of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs)
            raise InputError(
                f"the model's output must be one {self.dtype} tensor with a row for each of {size} examples, got {got}"
            )
        return _Pullback(outputs, self._coordinates.params, self._middle(i, outputs.detach()), self.num_examples)


class _Pullback:
    """A batch's outputs and ``J^T u`` as a function of u."""

    def __init__(self, outputs: Tensor, params: Sequence[Tensor], middle: Middle, num_examples: int) -> None:
        self._outputs, self._params, self._middle, self._n = outputs, params, middle, num_examples
        self._u = torch.zeros_like(outputs, requires_grad=True)
        self._pulled = torch.autograd.grad(outputs, params, self._u, create_graph=True, materialize_grads=True)

    def product(self, direction: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor] | None:
        # The graph of the outputs is shared by both derivatives, hence kept in the first.
        pushed = pull_back(self._pulled, direction, [self._u], keep=True)
        if pushed is None:
            return None
        return pull_back([self._outputs], [self._middle(pushed[0]) / self._n], self._params, keep=keep)


class GaussNewtonOperator(OutputOperator):
    """The (generalised) Gauss-Newton matrix ``G = (1/N) sum_i J_i^T (d^2 loss_i / d f_i^2) J_i``.

    The Hessian without the curvature of the model (Schraudolph 2002, Fast curvature matrix-vector products);
    positive semidefinite where the loss is convex in the outputs ``f``, as cross-entropy is. For cross-entropy it is
    the true Fisher (Martens 2020, section 9).
    """

    matrix = "Gauss-Newton matrix"

    def _middle(self, i: int, outputs: Tensor) -> Middle:
        f = outputs.requires_grad_()
        total = self._loss(f, self._batches[i][1]).sum()
        (slope,) = torch.autograd.grad(total, f, create_graph=True)

        def multiply(u: Tensor) -> Tensor:
            product = pull_back([slope], [u], [f], keep=True)
            return torch.zeros_like(u) if product is None else product[0]

        return multiply
