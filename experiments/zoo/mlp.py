"""A net of linear layers."""

from __future__ import annotations

import math

from torch import nn


class MLP(nn.Sequential):
    """Two hidden ReLU layers; no normalization layer."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], num_classes: int, width: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(in_channels * math.prod(image_size), width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, num_classes),
        )
