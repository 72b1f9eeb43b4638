"""Briefly trained networks of three kinds, below 3,000 parameters, small enough for their dense Hessians."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

NUM_EXAMPLES = 150


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


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))


SMALL_NETS = {"mlp": mlp, "conv_bn": ConvBN, "vit": ViT}


@dataclass(frozen=True)
class Trained:
    """A float64 network in training mode and its data: x (150, 1, 8, 8), y (150,) of five classes."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def cut(self, sizes: int | tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """The data in batches of these sizes."""
        return list(zip(self.x.split(sizes), self.y.split(sizes), strict=True))


def trained(name: str) -> Trained:
    """60 full-batch steps of Adam on noisy class means, always the same; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = torch.randint(5, (NUM_EXAMPLES,))
        x = torch.randn(5, 1, 8, 8)[y] + 1.5 * torch.randn(len(y), 1, 8, 8)
        x = x.double()
        model = SMALL_NETS[name]().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
    return Trained(model, x, y)


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
