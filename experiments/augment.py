"""Random changes of training images, on whole batches and on the device of the batch: no Python per image.

``resized_crop`` alone is done where images are decoded (:mod:`experiments.stream`), since it needs the whole image. All
random numbers come from one generator on the CPU, so that the same seed gives the same changes on every device and
in every arm of a comparison. A batch is changed once, before the step: both passes of SAM see the same images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.autoaugment import POLICIES, AutoAugment
from experiments.images import Images
from masks.errors import InputError, unknown_name

_DEFAULTS: dict[str, Any] = {"resized_crop": True, "crop": 4, "flip": True, "autoaugment": "cifar10", "cutout": 16}
"""The parts, in the order in which they are applied, and what each means without a value."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, in this order, which is that of Cubuk et al. (2019), section 4.

    Attributes:
        crop: the image is padded with this many black pixels (0 before standardisation) on each side, and a window of
            its own size is cut out at a place drawn uniformly; 0 for no crop. 4 is the custom for CIFAR.
        flip: it is mirrored left to right with probability 1/2.
        autoaugment: policy of AutoAugment (Cubuk et al., 2019), see
            :class:`experiments.autoaugment.AutoAugment`; empty for none.
        cutout: side of the square that Cutout (DeVries and Taylor, 2017) sets to the mean of the training images
            (0 after standardisation); its centre is drawn uniformly from all pixels, so that a part of it may lie
            outside; 0 for none. They use 16 for CIFAR-10 and 8 for CIFAR-100.
        resized_crop: before all that, a window of random area and aspect ratio is cut out of the image as it is in its
            file and scaled, see :meth:`experiments.stream.FileImages.cropped`; with ``flip``, the custom for ImageNet.

    Raises:
        InputError: a negative number, or an unknown policy.
    """

    crop: int = 0
    flip: bool = False
    autoaugment: str = ""
    cutout: int = 0
    resized_crop: bool = False

    def __post_init__(self) -> None:
        for name in ("crop", "cutout"):
            if getattr(self, name) < 0:
                raise InputError(f"augmentation {name} must be at least 0, got {getattr(self, name)}")
        if self.autoaugment and self.autoaugment not in POLICIES:
            raise InputError(unknown_name("AutoAugment policy", self.autoaugment, POLICIES))

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Read such as ``crop+flip``, ``crop+flip+autoaugment+cutout=16``, or ``none``.

        Parts may come in any order and are applied in that of the class. Without a value, ``crop`` is 4, ``cutout`` 16
        and ``autoaugment`` the policy found on CIFAR-10.

        Raises:
            InputError: an unknown part, one that is given twice, or a bad value; the line names it.
        """
        found: dict[str, Any] = {}
        for part in [] if text == "none" else text.split("+"):
            name, equals, value = part.strip().partition("=")
            if name not in _DEFAULTS:
                raise InputError(f"augmentation {text!r}: {unknown_name('part', name, [*_DEFAULTS, 'none'])}")
            if name in found:
                raise InputError(f"augmentation {text!r} has {name} twice")
            if _DEFAULTS[name] is True and equals:
                raise InputError(f"augmentation {text!r}: {name} takes no value, found {value!r}")
            if equals and name != "autoaugment" and not (value.isascii() and value.isdigit() and int(value) > 0):
                raise InputError(f"augmentation {text!r}: {name} must be a number of pixels from 1 on, found {value!r}")
            if equals and name == "autoaugment" and not value:
                raise InputError(f"augmentation {text!r}: autoaugment= lacks its policy: {', '.join(POLICIES)}")
            found[name] = _DEFAULTS[name] if not equals else value if name == "autoaugment" else int(value)
        return cls(**found)

    def __str__(self) -> str:
        """The canonical text, for configurations and digests: ``parse(str(a)) == a``."""
        parts = []
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value:
                parts.append(name if value == default and name != "cutout" else f"{name}={value}")
        return "+".join(parts) or "none"


class Augmenter:
    """Applies an :class:`Augmentation` to batches of standardised images.

    The generator is the only state; save and restore it with ``generator.get_state()`` and ``set_state``.

    Args:
        augmentation: what is done.
        images: the standardised training images, to check that it can be done to them.
        mean: of the training images per channel, C; what was subtracted.
        std: what they were divided by, C.
        device: of the batches.
        seed: of the generator.

    Raises:
        InputError: the images are smaller than the augmentation needs, or AutoAugment is asked for images that do not
            have 1 or 3 channels and values from 0 to 1 before standardisation.
    """

    def __init__(
        self, augmentation: Augmentation, images: Images, mean: Tensor, std: Tensor, device: torch.device, seed: int
    ) -> None:
        self.augmentation = augmentation
        self.generator = torch.Generator().manual_seed(seed)
        self._mean, self._std = (t.to(device)[:, None, None] for t in (mean, std))
        self._policy = AutoAugment(augmentation.autoaugment) if augmentation.autoaugment else None
        _, channels, height, width = images.shape
        side = min(height, width)
        if augmentation.crop >= side or augmentation.cutout >= 2 * side:
            raise InputError(
                f"augmentation {augmentation} does not fit images of {height}x{width}: crop must be below {side} and "
                f"cutout below {2 * side}"
            )
        if self._policy is not None:
            least, greatest = images.ranges()
            raw = least.amin(0)[:, None, None].to(device), greatest.amax(0)[:, None, None].to(device)
            low, high = (v * self._std + self._mean for v in raw)
            if channels not in (1, 3) or float(low.min()) < -1e-3 or float(high.max()) > 1 + 1e-3:
                raise InputError(
                    f"AutoAugment needs images with 1 or 3 channels and values from 0 to 1; found {channels} "
                    f"channels and values from {float(low.min()):.4g} to {float(high.max()):.4g}"
                )

    def __call__(self, x: Tensor) -> Tensor:
        """The changed images of a batch, float32, N x C x H x W, on its device; ``x`` stays as it is."""
        if self.augmentation.crop or self.augmentation.flip:
            x = self._crop_and_flip(x)
        if self._policy is not None:
            raw = (x * self._std + self._mean).mul_(255).round_().clamp_(0, 255)
            pixels = self._policy(raw.to(torch.uint8, memory_format=torch.contiguous_format), self.generator)
            # As the data set was read and standardised: 8-bit images that no operation touched keep their bits.
            x = pixels.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(self._mean).div_(self._std)
        return self._cut_out(x) if self.augmentation.cutout else x

    def _draw(self, end: int, *shape: int) -> Tensor:
        """Uniform integers from 0 to ``end - 1``, on the CPU."""
        return torch.randint(end, shape, generator=self.generator)

    def _crop_and_flip(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        pad = self.augmentation.crop
        down, right = self._draw(2 * pad + 1, 2, n)[:, :, None]
        columns = torch.arange(width).expand(n, -1)
        if self.augmentation.flip:
            columns = torch.where(self._draw(2, n)[:, None].bool(), columns.flip(1), columns)
        # The pixels of all padded images in one list, so that one look-up crops, flips and orders channels last.
        rows = torch.arange(n)[:, None] * (height + 2 * pad) + torch.arange(height) + down
        rows, columns = (t.to(x.device, non_blocking=True) for t in (rows * (width + 2 * pad), columns + right))
        index = (rows[:, :, None] + columns[:, None]).flatten()
        padded = (-self._mean / self._std).view(channels).repeat(n, height + 2 * pad, width + 2 * pad, 1)
        padded[:, pad : pad + height, pad : pad + width] = x.permute(0, 2, 3, 1)
        pixels = padded.view(-1, channels).index_select(0, index)
        return pixels.view(n, height, width, channels).permute(0, 3, 1, 2)

    def _cut_out(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        side = self.augmentation.cutout
        inside = []
        for length in (height, width):
            offset = torch.arange(length) - (self._draw(length, n)[:, None] - side // 2)
            inside.append(((offset >= 0) & (offset < side)).to(x.device, non_blocking=True))
        square = inside[0][:, :, None] & inside[1][:, None]
        return x.masked_fill(square[:, None], 0)
