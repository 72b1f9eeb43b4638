"""Images of one size, read by position, wherever they lie: what a data set and the parts of a split hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from masks.errors import InputError


class Images(Protocol):
    """N images of C x H x W, float32: in the data set from 0 to 1 (or as the source has them), in a split standardised.

    A position is a number from 0 to N - 1; in the data set it is the image's id. All methods leave the object as it is.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H and W."""

    def __len__(self) -> int:
        """N."""

    def read(self, positions: Tensor) -> Tensor:
        """The images at these positions (int64, n), n x C x H x W."""

    def batches(self, positions: Sequence[Tensor], epoch: int = 0) -> Iterator[Tensor]:
        """The images of each batch of positions. The epoch matters only after :meth:`cropped`.

        Raises:
            InputError: an image can no longer be read.
        """

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Images:
        """The same images; what is read lies on the device, in this format."""

    def using(self, workers: int) -> Images:
        """The same images, decoded by so many processes where they must be decoded; 0 for this one."""

    def cropped(self, seed: int) -> Images:
        """The same images with the crop of Inception and ResNet, see :meth:`experiments.stream.FileImages.cropped`.

        Raises:
            InputError: they are not read from files, each in its own size.
        """

    def part(self, ids: Tensor, mean: Tensor, std: Tensor) -> Images:
        """The images with these ids, minus ``mean`` (C) and divided by ``std`` (C)."""

    def moments(self, ids: Tensor, seed: int) -> tuple[Tensor, Tensor, int]:
        """Mean and standard deviation per channel (float32, C; 1 for a deviation of 0) of the images with these ids, or
        of as many of them, drawn with the seed, as the third value says."""

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Least and largest value per image and channel, each N x C, or bounds of them; NaN where there is a NaN."""

    def content(self) -> bytes | memoryview:
        """What the digest of the data set is made of."""


@dataclass(frozen=True, eq=False)
class TensorImages:
    """Images in memory.

    Args:
        x: float32, N x C x H x W, C from 1 to 4.

    Raises:
        InputError: another type or shape.
    """

    x: Tensor

    def __post_init__(self) -> None:
        if self.x.dtype != torch.float32 or self.x.ndim != 4 or not 1 <= self.x.shape[1] <= 4:
            raise InputError(
                f"images must be float32 N x C x H x W with C from 1 to 4, found {self.x.dtype} of shape "
                f"{tuple(self.x.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, channels, height, width = self.x.shape
        return n, channels, height, width

    def __len__(self) -> int:
        return len(self.x)

    def read(self, positions: Tensor) -> Tensor:
        return self.x[positions.to(self.x.device)]

    def batches(self, positions: Sequence[Tensor], epoch: int = 0) -> Iterator[Tensor]:
        return map(self.read, positions)

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> TensorImages:
        return TensorImages(self.x.to(device, memory_format=memory_format))

    def using(self, workers: int) -> TensorImages:
        return self

    def cropped(self, seed: int) -> TensorImages:
        raise InputError("augmentation resized_crop needs images that are read from files: data stream:DIR@SIZE")

    def part(self, ids: Tensor, mean: Tensor, std: Tensor) -> TensorImages:
        return TensorImages(self.x[ids].sub_(mean[:, None, None]).div_(std[:, None, None]))

    def moments(self, ids: Tensor, seed: int) -> tuple[Tensor, Tensor, int]:
        # Sums in float64: in float32 the deviation of 6000 images of 28x28 comes out 0.2 % too small, and a
        # constant channel does not come out constant.
        x = self.x[ids]
        mean = x.flatten(2).mean(dim=2, dtype=torch.float64).mean(dim=0).float()
        norm = torch.linalg.vector_norm(x.sub_(mean[:, None, None]), dim=(0, 2, 3), dtype=torch.float64)
        return mean, deviation(norm, x.numel() // x.shape[1]), len(ids)

    def ranges(self) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(self.x.flatten(2), dim=2)
        return low, high

    def content(self) -> bytes | memoryview:
        return self.x.contiguous().numpy().data


def deviation(norm: Tensor, n: int) -> Tensor:
    """The standard deviation, float32, of n values per channel from the norm of their deviations; 1 where that is 0."""
    std: Tensor = (norm / n**0.5).float()
    std[std == 0] = 1
    return std
