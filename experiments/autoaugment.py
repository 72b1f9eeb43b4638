"""AutoAugment on whole batches, with torchvision's policies and operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

POLICIES = ("cifar10", "imagenet", "svhn")
_LEVELS = 10
_UNSIGNED = ("Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")


class AutoAugment:
    """AutoAugment (Cubuk et al., 2019, table 7 and 9) as torchvision has it: nearest neighbour, black outside.

    Each image gets one of the policy's 25 sub-policies, drawn uniformly; each of its two operations is applied with
    its own probability, at its own level, and with a random sign where it has one. The images of a batch that get the
    same operation at the same level are changed together, so the Python of a batch is at most as many calls as the
    policy has operations (about 60) and not as many as it has images. The result is bitwise that of torchvision's
    transform, image by image, for the same draws.

    Args:
        policy: name of the data set that it was found on, one of :data:`POLICIES`.
    """

    def __init__(self, policy: str) -> None:
        from torchvision.transforms import AutoAugment as Source  # takes a second, and most runs do not need it
        from torchvision.transforms import AutoAugmentPolicy

        self._stages: list[tuple[list[tuple[str, int, int]], Tensor, Tensor]] = []
        for stage in zip(*Source(AutoAugmentPolicy(policy)).policies, strict=True):
            signed = [
                [(name, level or 0, 1 if name in _UNSIGNED else sign) for name, _, level in stage] for sign in (1, -1)
            ]
            known = sorted({operation for row in signed for operation in row})
            number = torch.tensor([[known.index(operation) for operation in row] for row in signed])
            self._stages.append((known, number, torch.tensor([probability for _, probability, _ in stage])))

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The random numbers of n images: their sub-policies, int64 (n); uniform numbers, (2, n), where at most the
        probability of an operation means that it is applied; whether its sign is negative, bool (2, n).
        """
        sub_policy = torch.randint(len(self._stages[0][2]), (n,), generator=generator)
        uniform = torch.rand((2, n), generator=generator)
        return sub_policy, uniform, torch.randint(2, (2, n), generator=generator).bool()

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The changed images.

        Args:
            images: uint8, N x C x H x W with 1 or 3 channels, on any device; changed in place.
            generator: on the CPU.
        """
        sub_policy, uniform, negative = self.draw(len(images), generator)
        for (operations, number, probability), u, minus in zip(self._stages, uniform, negative, strict=True):
            chosen = number[minus.long(), sub_policy].where(u <= probability[sub_policy], len(operations))
            sizes = torch.bincount(chosen, minlength=len(operations) + 1).tolist()
            order = chosen.argsort(stable=True).to(images.device, non_blocking=True)
            for operation, index in zip(operations, torch.split(order, sizes), strict=False):  # the last ones stay
                if len(index):
                    images[index] = _apply(images[index], *operation)
        return images


def _apply(images: Tensor, name: str, level: int, sign: int) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    def magnitude(top: float) -> float:
        return sign * float(torch.linspace(0.0, top, _LEVELS)[level])

    affine = partial(F.affine, images, angle=0.0, scale=1.0)
    operations: dict[str, Callable[[], Any]] = {
        "ShearX": lambda: affine(translate=[0, 0], shear=[_degrees(magnitude(0.3)), 0.0], center=[0, 0]),
        "ShearY": lambda: affine(translate=[0, 0], shear=[0.0, _degrees(magnitude(0.3))], center=[0, 0]),
        "TranslateX": lambda: affine(translate=[int(magnitude(150 / 331 * images.shape[3])), 0], shear=[0.0, 0.0]),
        "TranslateY": lambda: affine(translate=[0, int(magnitude(150 / 331 * images.shape[2]))], shear=[0.0, 0.0]),
        "Rotate": lambda: F.rotate(images, magnitude(30.0)),
        "Brightness": lambda: F.adjust_brightness(images, 1 + magnitude(0.9)),
        "Color": lambda: F.adjust_saturation(images, 1 + magnitude(0.9)),
        "Contrast": lambda: F.adjust_contrast(images, 1 + magnitude(0.9)),
        "Sharpness": lambda: F.adjust_sharpness(images, 1 + magnitude(0.9)),
        "Posterize": lambda: F.posterize(images, 8 - round(level / ((_LEVELS - 1) / 4))),
        "Solarize": lambda: F.solarize(images, 255 * float(torch.linspace(1.0, 0.0, _LEVELS)[level])),
        "AutoContrast": lambda: F.autocontrast(images),
        "Equalize": lambda: F.equalize(images),
        "Invert": lambda: F.invert(images),
    }
    return operations[name]()  # type: ignore[no-any-return]


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))
