"""VGG with batch normalization for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from experiments.zoo.layers import convolution, init_convolutions, make_norm


class VGG(nn.Module):
    """The convolutions of VGG-16 (Simonyan and Zisserman, 2015, configuration D), each with BatchNorm and ReLU, and
    one linear layer in the place of three, as is customary for CIFAR.

    Stages of widths w, 2w, 4w, 8w, 8w with w = 64, each followed by 2x2 max pooling that rounds up, so that images
    smaller than 32x32 do not vanish; then the mean over the pixels that are left (one for 32x32). The convolutions
    have no bias, which BatchNorm would cancel.

    Args:
        blocks: number of convolutions of each stage.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        num_classes: int,
        width: int,
        *,
        blocks: Sequence[int] = (2, 2, 3, 3, 3),
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for stage, count in enumerate(blocks):
            outputs = width * 2 ** min(stage, 3)
            for _ in range(count):
                layers += [convolution("batch", inputs, outputs, 3), make_norm("batch", outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]
