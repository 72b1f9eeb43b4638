"""Small networks of the three kinds that matter, and their dense Hessians as oracles."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks.small_nets import SMALL_NETS, dense_hessian, trained

torch.set_num_threads(1)

SIZES = (64, 64, 22)  # uneven on purpose: a plain mean over batches is wrong by 20 %


@dataclass(frozen=True)
class Case:
    """A briefly trained float64 network in training mode, its data, and its dense Hessian in evaluation mode."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    hessian: Tensor

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(SIZES), self.y.split(SIZES), strict=True))

    def fresh(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return copy.deepcopy(self.model).to(dtype)


@pytest.fixture(scope="session", params=list(SMALL_NETS))
def case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


@pytest.fixture(scope="session")
def conv_case() -> Case:
    return _case("conv_bn")


_cache: dict[str, Case] = {}


def _case(name: str) -> Case:
    if name in _cache:
        return _cache[name]
    found = trained(name)
    _cache[name] = Case(name, found.model, found.x, found.y, dense_hessian(found.model, found.x, found.y))
    return _cache[name]


class Snapshot:
    """Everything about a model and torch that a measurement must leave alone, compared bit for bit."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._take()

    def _take(self) -> dict[str, object]:
        return {
            "state": {k: (id(v), v.detach().clone().view(torch.uint8) if v.dim() else v.item())
                      for k, v in self.model.state_dict(keep_vars=True).items()},
            "grad": {k: (id(p.grad), None if p.grad is None else p.grad.clone())
                     for k, p in self.model.named_parameters()},
            "training": [m.training for m in self.model.modules()],
            "requires_grad": [p.requires_grad for p in self.model.parameters()],
            "random": torch.get_rng_state(),
            "grad_enabled": torch.is_grad_enabled(),
            "fast_path": torch.backends.mha.get_fastpath_enabled(),
            "precision": torch.backends.mkldnn.matmul.fp32_precision,
        }  # fmt: skip

    def check(self) -> None:
        after = self._take()
        for key, value in self.before.items():
            assert _same(value, after[key]), key


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture
def snapshot() -> type[Snapshot]:
    return Snapshot
