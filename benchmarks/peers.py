"""Other curvature libraries as :class:`analysis.linear.SymmetricOperator`, with their products counted.

Each is used as its documentation says, on a model in evaluation mode, with what it leaves to its user done for it
(:func:`conditions`). None is needed outside of tests and benchmarks: ``pip install sam-masks[oracle]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from masks.context import Batch

PACKAGES = {
    "curvlinops": "curvlinops-for-pytorch",
    "pyhessian": "pyhessian",
    "hessian_eigenthings": "hessian-eigenthings",
}
"""Module and package of each."""


def versions() -> dict[str, str | None]:
    """The installed version of each package, None where it is missing."""

    def find(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {module: find(package) for module, package in PACKAGES.items()}


@contextmanager
def conditions() -> Iterator[None]:
    """Attention by its plain implementation: the fused kernels have no second derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Peer:
    """A peer's matrix.

    Attributes:
        own: the peer's own object, which its solvers take.
        num_products: products so far, whoever asked for them.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        first = next(model.parameters())
        self.name, self.dtype, self.device = name, first.dtype, first.device
        self.dimension = sum(p.numel() for p in model.parameters())
        self.num_products = 0
        self.own: Any = None
        self._product: Callable[[Tensor], Tensor]

    def matvec(self, vector: Tensor) -> Tensor:
        with conditions():
            return self._product(vector).detach()


def curvlinops(model: nn.Module, batches: Sequence[Batch], kind: str = "Hessian") -> Peer:
    """``HessianLinearOperator``, "GGN", or "EF" (empirical Fisher), without its check of determinism (two products)."""
    import curvlinops as package

    peer = Peer(f"{kind} of curvlinops", model)

    class Counted(getattr(package, f"{kind}LinearOperator")):  # type: ignore[misc]
        def _matmat(self, matrix: list[Tensor]) -> Any:
            peer.num_products += matrix[0].shape[-1]
            return super()._matmat(matrix)

    params = list(model.parameters())
    with conditions():
        peer.own = Counted(model.eval(), nn.CrossEntropyLoss(), params, list(batches), check_deterministic=False)
    peer._product = lambda vector: peer.own @ vector
    return peer


def eigenthings(model: nn.Module, batches: Sequence[Batch], kind: str = "Hessian") -> Peer:
    """``HessianOperator``, "GGN" or "EmpiricalFisher"."""
    import hessian_eigenthings as package

    peer = Peer(f"{kind} of hessian-eigenthings", model)
    criterion = nn.CrossEntropyLoss()
    arguments = {
        "Hessian": (package.supervised_loss(criterion),),
        "GGN": (package.supervised_forward, package.supervised_loss_of_output(criterion)),
        "EmpiricalFisher": (package.supervised_per_sample_loss(criterion),),
    }

    class Counted(getattr(package, f"{kind}Operator")):  # type: ignore[misc]
        def matvec(self, vector: Tensor) -> Tensor:
            peer.num_products += 1
            return super().matvec(vector)

    peer.own = Counted(model.eval(), list(batches), *arguments[kind])
    peer._product = peer.own.matvec
    return peer


def pyhessian(model: nn.Module, batches: Sequence[Batch]) -> Peer:
    """``hessian`` over a loader."""
    from pyhessian import hessian

    peer = Peer("Hessian of PyHessian", model)

    class Counted(hessian):
        def dataloader_hv_product(self, v: list[Tensor]) -> tuple[float, list[Tensor]]:
            peer.num_products += 1
            return super().dataloader_hv_product(v)

    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def product(vector: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        return torch.cat([part.flatten() for part in peer.own.dataloader_hv_product(parts)[1]])

    with conditions():
        peer.own = Counted(model, nn.CrossEntropyLoss(), dataloader=list(batches), cuda=False)
    peer._product = product
    return peer


PEERS: dict[str, Callable[..., Peer]] = {
    "curvlinops": curvlinops,
    "pyhessian": pyhessian,
    "hessian_eigenthings": eigenthings,
}
"""By module."""
