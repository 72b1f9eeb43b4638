"""Vision transformers for small images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masks.errors import InputError


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Written out: torch's fused attention has no second derivative, which Hessian products need.
        weights = (q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, width))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def _num_patches(image_size: tuple[int, int], patch: int) -> int:
    return math.ceil(image_size[0] / patch) * math.ceil(image_size[1] / patch)


def _tokens(embed: nn.Conv2d, x: Tensor, patch: int) -> Tensor:
    """One token per patch, N x tokens x width; sides that the patch does not divide are padded with zeros."""
    return embed(F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch))).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class ViTSmall(nn.Module):
    """LayerNorm vision transformer: pre-norm, 3 blocks, heads of 16 channels, mean pooling, no dropout.

    The patch side is the smallest power of two, from 2 on, that gives at most 64 tokens: 2 for 8x8 images
    (16 tokens), 4 for 28x28 (49) and 32x32 (64). Sides that it does not divide are padded with zeros.
    """

    def __init__(self, in_channels: int, image_size: tuple[int, int], num_classes: int, width: int) -> None:
        super().__init__()
        if width % 16:
            raise InputError(f"vit_small needs a width that is a multiple of 16 (one head each), found {width}")
        self.patch = 2
        while _num_patches(image_size, self.patch) > 64:
            self.patch *= 2
        self.embed = nn.Conv2d(in_channels, width, self.patch, self.patch)
        self.position = nn.Parameter(torch.empty(1, _num_patches(image_size, self.patch), width))
        # As large as the tokens: with the usual 0.02, 400 digits are learned to 72 % instead of 94 %.
        nn.init.normal_(self.position, std=0.5)
        self.blocks = nn.Sequential(*(_Block(width, width // 16, 2 * width, 1e-5) for _ in range(3)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = _tokens(self.embed, x, self.patch) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """ViT of Dosovitskiy et al. (2021) with the sizes of DeiT (Touvron et al., 2021), for small images.

    12 pre-norm blocks, heads of 64 channels, a hidden layer of 4 times the width, a class token, learned positions,
    no dropout and no stochastic depth. ViT-T has width 192 (3 heads) and ViT-S width 384 (6 heads); the patch side is
    4 instead of 16, which makes 64 tokens of a 32x32 image. Linear weights, positions and the class token start as
    normal numbers with deviation 0.02 (``trunc_normal_``, as DeiT), biases at 0, the embedding as torch has it.

    Args:
        patch: side of a patch in pixels; sides of images that it does not divide are padded with zeros.
        depth: number of blocks.

    Raises:
        InputError: a width that is no multiple of 64, or a patch side below 1.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        num_classes: int,
        width: int,
        *,
        patch: int = 4,
        depth: int = 12,
    ) -> None:
        super().__init__()
        if width % 64:
            raise InputError(f"a ViT needs a width that is a multiple of 64 (one head each), found {width}")
        if patch < 1:
            raise InputError(f"a ViT needs a patch side of at least 1, found {patch}")
        self.patch = patch
        self.embed = nn.Conv2d(in_channels, width, patch, patch)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, 1 + _num_patches(image_size, patch), width))
        self.blocks = nn.Sequential(*(_Block(width, width // 64, 4 * width, 1e-6) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, num_classes)
        for tensor in (self.token, self.position, *(m.weight for m in self.modules() if isinstance(m, nn.Linear))):
            nn.init.trunc_normal_(tensor, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(len(x), -1, -1), _tokens(self.embed, x, self.patch)), dim=1)
        return self.head(self.norm(self.blocks(x + self.position))[:, 0])  # type: ignore[no-any-return]
