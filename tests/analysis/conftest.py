"""Small networks of the three kinds that matter, and their dense Hessians as oracles."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)

SIZES = (64, 64, 22)  # uneven on purpose: a plain mean over batches is wrong by 20 %


class ConvBN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(self.drop(F.avg_pool2d(x, 2).flatten(1)))


class ViT(nn.Module):
    """Pre-norm, four tokens, attention through the fused kernel where autograd lets it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 4, width) * 0.1)
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, dropout=0.1)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm3 = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))


BUILDERS = {"mlp": _mlp, "conv_bn": ConvBN, "vit": ViT}


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


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Row by row through functional_call on all data at once: shares nothing with the package."""
    twin = copy.deepcopy(model).eval()
    params = {k: p.detach() for k, p in twin.named_parameters()}
    flat = torch.cat([p.flatten() for p in params.values()]).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        parts = flat.split([p.numel() for p in params.values()])
        weights = {k: v.view(p.shape) for (k, p), v in zip(params.items(), parts, strict=True)}
        loss = F.cross_entropy(functional_call(twin, weights, (x,)), y)
        (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
        rows = [torch.autograd.grad(g, flat, retain_graph=True)[0] for g in gradient]
    return torch.stack(rows)


@pytest.fixture(scope="session", params=list(BUILDERS))
def case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


@pytest.fixture(scope="session")
def conv_case() -> Case:
    return _case("conv_bn")


_cache: dict[str, Case] = {}


def _case(name: str) -> Case:
    if name in _cache:
        return _cache[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = torch.randint(5, (sum(SIZES),))
        x = torch.randn(5, 1, 8, 8)[y] + 1.5 * torch.randn(len(y), 1, 8, 8)
        x = x.double()
        model = BUILDERS[name]().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
    _cache[name] = Case(name, model, x, y, dense_hessian(model, x, y))
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
