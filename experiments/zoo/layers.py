"""What the convolutional families share: the choice of normalization, the start of the weights, pooling."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Norm = Literal["batch", "group", "layer", "rms", "none"]
NORMS: tuple[Norm, ...] = get_args(Norm)


class ChannelRMSNorm(nn.RMSNorm):
    """Each pixel's vector of channels divided by its root mean square, and scaled per channel.

    Zhang and Sennrich (2019), eq. 4, over the channels of images (B, C, H, W); there is no shift.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """The normalization of a convolution's output, with a scale and a shift per channel.

    - ``batch``: BatchNorm2d.
    - ``group``: GroupNorm (Wu and He, 2018) with their 32 groups; fewer, a power of two, where the channels do not make
      32 equal groups of two or more, for a group of one channel would be an instance norm.
    - ``layer``: over channels and pixels of an image, with a scale and a shift per channel, so that it has the
      coordinates of ``batch``: GroupNorm with one group, as Wu and He (2018) define it for images.
    - ``rms``: :class:`ChannelRMSNorm`, with a scale alone: half of the coordinates of ``batch``.
    - ``none``: nothing; see :func:`end_of_branch`.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "none":
        return nn.Identity()
    if norm == "rms":
        return ChannelRMSNorm(channels)
    return nn.GroupNorm(math.gcd(64, channels) // 2 or 1 if norm == "group" else 1, channels)


def has_bias(norm: Norm) -> bool:
    """Whether a convolution before this normalization has a bias: where no norm shifts its output."""
    return norm in ("rms", "none")


def convolution(norm: Norm, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of the image (divided by the stride); with bias as :func:`has_bias` says."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=has_bias(norm))


class Gain(nn.Module):
    """One learned factor; not a normalization layer, its parameter has the role ``weight``."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def end_of_branch(norm: Norm, num_branches: int) -> nn.Module:
    """What ends a residual branch in a net without normalization: SkipInit of De and Smith (2020), a learned factor.

    It starts at ``num_branches ** -0.5``, so that the sum of all branches has the size of one at first. De and Smith
    also start it at 0; then every convolution in a branch has gradient 0 at first, and scores of a mask would be ties.
    With a normalization it is the identity.
    """
    return Gain(num_branches**-0.5) if norm == "none" else nn.Identity()


def init_convolutions(model: nn.Module) -> None:
    """Normal weights with variance 2 / fan_out, He et al. (2015), section 2.2, backward case; biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
