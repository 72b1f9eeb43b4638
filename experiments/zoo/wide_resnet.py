"""Wide residual nets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.zoo.layers import Norm, convolution, end_of_branch, init_convolutions, make_norm


class _Block(nn.Module):
    """Norm and ReLU before each 3x3 convolution; where channels change, a 1x1 convolution of the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, num_branches: int) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, inputs)
        self.conv1 = convolution(norm, inputs, outputs, 3, stride)
        self.norm2 = make_norm(norm, outputs)
        self.conv2 = convolution(norm, outputs, outputs, 3)
        self.end = end_of_branch(norm, num_branches)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        out = self.end(self.conv2(F.relu(self.norm2(self.conv1(active)))))
        return out + (x if self.shortcut is None else self.shortcut(active))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """WRN-d-k of Zagoruyko and Komodakis (2016), block B(3,3), without dropout.

    A 3x3 stem of 16 channels, three stages of (d - 4) / 6 blocks with widths w, 2w, 4w, norm, ReLU, mean over the
    pixels, linear. ``width`` is w = 16 k. Convolutions start as in He et al. (2015), fan out; the rest as torch has
    it.

    Args:
        depth: number d of layers, 4 more than a multiple of 6.
        norm: see :func:`experiments.zoo.layers.make_norm`.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        num_classes: int,
        width: int,
        *,
        depth: int,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        if rest or count < 1:
            raise ValueError(f"depth must be 6 n + 4, got {depth}")
        self.stem = convolution(norm, in_channels, 16, 3)
        inputs, stages = 16, []
        for stage in range(3):
            outputs = width * 2**stage
            blocks = [_Block(inputs, outputs, 2 if stage else 1, norm, 3 * count)]
            blocks += [_Block(outputs, outputs, 1, norm, 3 * count) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.norm = make_norm(norm, inputs)
        self.head = nn.Linear(inputs, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.stages(self.stem(x)))).mean(dim=(2, 3)))  # type: ignore[no-any-return]
