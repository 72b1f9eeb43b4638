"""Models and registries for the tests of ``masks``."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from masks import params, registry


class Block(nn.Module):
    """A residual block whose shortcut's normalization layer is called ``downsample.1``."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, 2, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class SmallResNet(nn.Module):
    """(B, 3, 8, 8) to 4 logits; 208 of its 4,756 coordinates belong to normalization layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.block1 = Block(8, 12)
        self.block2 = Block(12, 20)
        self.fc = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block2(self.block1(self.stem(x).relu())).mean((2, 3)))


@pytest.fixture
def small_resnet() -> SmallResNet:
    torch.manual_seed(0)
    return SmallResNet()


@pytest.fixture
def images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(4, (n,), generator=generator)) for n in (8, 8, 5)
    ]


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Whatever a test registers or breaks is undone."""
    registry.list_masks()
    held = (registry._registry, registry._contested, registry._broken)
    saved = [dict(part) for part in held]
    flags = registry._builtins_loaded, registry._discovered
    modules = set(sys.modules)
    yield
    for part, before in zip(held, saved, strict=True):
        part.clear()
        part.update(before)
    registry._origin.clear()
    registry._builtins_loaded, registry._discovered = flags
    for name in set(sys.modules) - modules:
        if name.startswith("plugin_"):
            del sys.modules[name]


@pytest.fixture
def clean_norm_types() -> Iterator[None]:
    """Normalization types that a test registers are forgotten."""
    saved = params._norm_types
    yield
    params._norm_types = saved
