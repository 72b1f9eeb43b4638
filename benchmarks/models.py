"""The networks that are timed: CIFAR-style residual nets and a small vision transformer, 32x32 inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut (1x1 convolution where the shape changes)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual net with a 3x3 stem; ``blocks`` per stage, each stage at half the resolution, twice the width."""

    def __init__(self, width: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        width_in = width
        for stage, count in enumerate(blocks):
            for i in range(count):
                layers.append(Block(width_in, width * 2**stage, 2 if stage and not i else 1))
                width_in = width * 2**stage
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(width_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class ViT(nn.Module):
    """Pre-norm transformer over 4x4 patches, mean-pooled."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 64, dim) * 0.02)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.0, F.gelu, batch_first=True, norm_first=True)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


MODELS = {
    "resnet18_w16": lambda: ResNet(16, (2, 2, 2, 2)),
    "resnet18_w32": lambda: ResNet(32, (2, 2, 2, 2)),
    "resnet20": lambda: ResNet(16, (3, 3, 3)),
    "vit_d128": lambda: ViT(128, 4),
}

CLASSIFIER = ("fc.", "head.")
LAST_STAGE = {
    "resnet18_w16": ("layers.6.", "layers.7.", *CLASSIFIER),
    "resnet18_w32": ("layers.6.", "layers.7.", *CLASSIFIER),
    "resnet20": ("layers.6.", "layers.7.", "layers.8.", *CLASSIFIER),
    "vit_d128": ("blocks.3.", "norm.", *CLASSIFIER),
}
"""How the names of the parameters of the last stage, or block, and of what follows it begin."""
