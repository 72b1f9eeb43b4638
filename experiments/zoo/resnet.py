"""Residual nets with basic blocks, and ResNeXt's blocks, for small images: a 3x3 stem, no pooling after it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.zoo.layers import Norm, convolution, end_of_branch, has_bias, init_convolutions, make_norm
from masks.errors import InputError


class _Padding(nn.Module):
    """Option A of He et al. (2016), section 4.2: every ``stride``-th pixel, new channels zero; no parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def _shortcut(kind: str, norm: Norm, inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "padding":
        return _Padding(outputs - inputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=has_bias(norm)), make_norm(norm, outputs))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, shortcut: str, num_branches: int) -> None:
        super().__init__()
        self.conv1 = convolution(norm, inputs, outputs, 3, stride)
        self.norm1 = make_norm(norm, outputs)
        self.conv2 = convolution(norm, outputs, outputs, 3)
        self.norm2 = make_norm(norm, outputs)
        self.end = end_of_branch(norm, num_branches)
        self.shortcut = _shortcut(shortcut, norm, inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.end(self.norm2(self.conv2(out))) + self.shortcut(x))


class _GroupedBlock(nn.Module):
    """Figure 3(c) of Xie et al. (2017): 1x1, grouped 3x3, 1x1; the stride is in the 3x3."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Norm, num_branches: int, inner: int, groups: int
    ) -> None:
        super().__init__()
        self.conv1 = convolution(norm, inputs, inner, 1)
        self.norm1 = make_norm(norm, inner)
        self.conv2 = convolution(norm, inner, inner, 3, stride, groups)
        self.norm2 = make_norm(norm, inner)
        self.conv3 = convolution(norm, inner, outputs, 1)
        self.norm3 = make_norm(norm, outputs)
        self.end = end_of_branch(norm, num_branches)
        self.shortcut = _shortcut("convolution", norm, inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = F.relu(self.norm2(self.conv2(out)))
        return F.relu(self.end(self.norm3(self.conv3(out))) + self.shortcut(x))


class _Residual(nn.Module):
    """Stem, stages of blocks (each after the first halves the image), mean over the pixels, linear.

    Args:
        widths: channels of the stem and of the output of each stage.
        blocks: number of blocks of each stage.
        block: makes one from its inputs, outputs, stride and the number of its stage, counted from 0.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        norm: Norm,
        block: Callable[[int, int, int, int], nn.Module],
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(norm, in_channels, widths[0], 3), make_norm(norm, widths[0]), nn.ReLU())
        stages = []
        for stage, ((inputs, outputs), count) in enumerate(zip(itertools.pairwise(widths), blocks, strict=True)):
            first = block(inputs, outputs, 2 if stage else 1, stage)
            stages.append(nn.Sequential(first, *(block(outputs, outputs, 1, stage) for _ in range(count - 1))))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class ResNet(_Residual):
    """ResNet of He et al. (2016) for small images, blocks of two 3x3 convolutions; widths w, 2w, 4w, ...

    ResNet-20 and ResNet-56 are those of its section 4.2: w = 16, three stages of 3 or 9 blocks, option A. ResNet-18 is
    the one for ImageNet (w = 64, four stages of 2 blocks, option B) with a 3x3 stem and no pooling, as is customary
    for CIFAR. Convolutions start as in He et al. (2015); the rest as torch has it.

    Args:
        blocks: number of blocks of each stage.
        shortcut: where a block changes the shape, "padding" (option A) or "convolution" (option B: 1x1 and norm).
        norm: see :func:`experiments.zoo.layers.make_norm`.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        num_classes: int,
        width: int,
        *,
        blocks: Sequence[int],
        shortcut: Literal["padding", "convolution"] = "convolution",
        norm: Norm = "batch",
    ) -> None:
        widths = [width, *(width * 2**stage for stage in range(len(blocks)))]

        def block(inputs: int, outputs: int, stride: int, stage: int) -> nn.Module:
            return _BasicBlock(inputs, outputs, stride, norm, shortcut, sum(blocks))

        super().__init__(in_channels, num_classes, widths, blocks, norm, block)


class ResNetSmall(ResNet):
    """One block per stage, option B. Images with a side below 16 have two stages and those below 8 one: a third
    stage on 8x8 digits costs half as much time again and gains no accuracy.
    """

    def __init__(
        self, in_channels: int, image_size: tuple[int, int], num_classes: int, width: int, *, norm: Norm = "batch"
    ) -> None:
        stages = 3 if min(image_size) >= 16 else 2 if min(image_size) >= 8 else 1
        super().__init__(in_channels, image_size, num_classes, width, blocks=(1,) * stages, norm=norm)


class ResNeXt(_Residual):
    """ResNeXt of Xie et al. (2017), section 5.2, for CIFAR: three stages, block outputs 4w, 8w, 16w with w = 64.

    With cardinality C and bottleneck width d, the grouped convolutions of the stages have C groups and C d, 2 C d,
    4 C d channels; another ``width`` w scales d by w / 64.

    Args:
        cardinality: number C of groups.
        bottleneck: channels d of a group in the first stage.
        blocks: number of blocks of each stage; three stages of 3 make 29 layers.

    Raises:
        InputError: a width with which d is no whole number.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        num_classes: int,
        width: int,
        *,
        cardinality: int,
        bottleneck: int,
        blocks: Sequence[int] = (3, 3, 3),
        norm: Norm = "batch",
    ) -> None:
        if bottleneck * width % 64:
            raise InputError(
                f"a ResNeXt with groups of {bottleneck} channels at width 64 takes a width of which {bottleneck} / 64 "
                f"is a whole number, found {width}"
            )
        inner = cardinality * bottleneck * width // 64

        def block(inputs: int, outputs: int, stride: int, stage: int) -> nn.Module:
            return _GroupedBlock(inputs, outputs, stride, norm, sum(blocks), inner * 2**stage, cardinality)

        widths = [width, *(4 * width * 2**stage for stage in range(len(blocks)))]
        super().__init__(in_channels, num_classes, widths, blocks, norm, block)
