"""Products of the empirical and of the true Fisher matrix with vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from analysis.gauss_newton import Middle, OutputOperator
from analysis.operator import MEMORY_BUDGET, Statistics
from masks.context import Batch, cross_entropy
from masks.errors import InputError, unknown_name
from masks.mask import Mask


class EmpiricalFisherOperator(OutputOperator):
    """``(1/N) sum_i g_i g_i^T``, ``g_i`` the gradient of the loss of example i on the label of the data.

    Its trace is the mean squared norm of the examples' gradients. It is not the Fisher: where the labels are fitted it
    vanishes, while the Hessian need not (Kunstner, Hennig, Balles 2019, Limitations of the empirical Fisher
    approximation). The loss of an example must depend on its own outputs only. See
    :class:`analysis.operator.CurvatureOperator` for the options.
    """

    matrix = "empirical Fisher"

    def _middle(self, i: int, outputs: Tensor) -> Middle:
        f = outputs.requires_grad_()
        (slope,) = torch.autograd.grad(self._loss(f, self._batches[i][1]).sum(), f)
        return lambda u: slope * _per_example(slope * u)


class FisherOperator(OutputOperator):
    """``(1/N) sum_i E_y [g_iy g_iy^T]``, ``g_iy`` the gradient of ``-log p(y | x_i)``, ``p = softmax(logits)``.

    "exact": the expectation over y is the sum over all classes, ``J^T (diag(p) - p p^T) J``, at the cost of one
    product. "sampled": ``num_samples`` labels per example are drawn once from ``p`` and kept for all products, so that
    the operator is a fixed matrix whose expectation over seeds is the exact one; its rank is at most
    ``N num_samples``. The labels of the data are not used.

    Args:
        model: the model; its outputs are logits of shape (B, classes).
        batches: see :class:`analysis.operator.CurvatureOperator`, as for the options not listed here.
        labels: "exact" or "sampled".
        num_samples: labels per example.
        seed: of the labels. The draws do not depend on the device or on how the data are cut into batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        labels: Literal["exact", "sampled"] = "exact",
        num_samples: int = 1,
        seed: int = 0,
        mask: Mask | None = None,
        dtype: torch.dtype | None = None,
        scale: Literal["abs"] | None = None,
        statistics: Statistics = "evaluation",
        retain: bool | Literal["auto"] = "auto",
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        if labels not in ("exact", "sampled"):
            raise InputError(unknown_name("labels", labels, ("exact", "sampled")))
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}")
        self._sampling = None if labels == "exact" else (num_samples, seed)
        drawn = f"Fisher with {num_samples} sampled label{'s' * (num_samples > 1)} per example (seed {seed})"
        self.matrix = "true Fisher" if labels == "exact" else drawn
        super().__init__(
            model,
            batches,
            mask=mask,
            loss=cross_entropy,
            dtype=dtype,
            scale=scale,
            statistics=statistics,
            retain=retain,
            memory_budget=memory_budget,
        )

    def _middle(self, i: int, outputs: Tensor) -> Middle:
        p = torch.softmax(outputs, dim=1)
        if self._sampling is None:
            return lambda u: p * (u - _per_example(p * u))
        q = self._frequencies(i, p, *self._sampling)
        # sum_c q_c (e_c - p)(e_c - p)^T, q the labels' frequencies
        return lambda u: q * (u - _per_example(p * u)) - p * (_per_example(q * u) - _per_example(p * u))

    def _frequencies(self, i: int, p: Tensor, num_samples: int, seed: int) -> Tensor:
        """How often each class was drawn for the examples of batch i, shape (B, classes), rows sum to 1."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(self.num_examples, num_samples, generator=generator, dtype=torch.float64)
        start = sum(len(x) for x, _ in self._batches[:i])
        bounds = p.double().cpu().cumsum(1)
        bounds /= bounds[:, -1:].clone()
        drawn = torch.searchsorted(bounds, uniform[start : start + len(p)].contiguous(), right=True)
        counts = torch.zeros(p.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
        return (counts / num_samples).to(p.device, p.dtype)


def _per_example(values: Tensor) -> Tensor:
    """The sum over each example's outputs, shape (B, 1, ...)."""
    return values.flatten(1).sum(1).reshape(-1, *[1] * (values.dim() - 1))
