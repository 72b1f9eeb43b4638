"""Models by name: small built-in ones, torchvision's, and the user's own ``module:function``."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import reason
from masks.errors import InputError, unknown_name


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNetSmall(nn.Module):
    """BatchNorm ResNet: a 3x3 stem, stages of one basic block with widths w, 2w, 4w, mean pooling, linear.

    Each stage after the first halves the image. Images with a side below 16 have two stages and those with a
    side below 8 one: a third stage on 8x8 digits costs half as much time again and gains no accuracy.
    Convolutions start as He et al. (2015), fan out; the rest as torch has it.
    """

    def __init__(self, in_channels: int, image_size: tuple[int, int], num_classes: int, width: int) -> None:
        super().__init__()
        stages = 3 if min(image_size) >= 16 else 2 if min(image_size) >= 8 else 1
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        widths = [width, *(width * 2**i for i in range(stages))]
        self.stages = nn.Sequential(
            *(_BasicBlock(widths[i], widths[i + 1], stride=2 if i else 1) for i in range(stages))
        )
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


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


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ViTSmall(nn.Module):
    """LayerNorm vision transformer: pre-norm, 3 blocks, heads of 16 channels, mean pooling, no dropout.

    The patch side is the smallest power of two, from 2 on, that gives at most 64 tokens: 2 for 8x8 images
    (16 tokens), 4 for 28x28 (49) and 32x32 (64). Sides that it does not divide are padded with zeros.
    """

    def __init__(self, in_channels: int, image_size: tuple[int, int], num_classes: int, width: int) -> None:
        super().__init__()
        if width % 16:
            raise InputError(f"vit_small needs a width that is a multiple of 16 (one head each), found {width}")
        height, breadth = image_size
        self.patch = 2
        while math.ceil(height / self.patch) * math.ceil(breadth / self.patch) > 64:
            self.patch *= 2
        tokens = math.ceil(height / self.patch) * math.ceil(breadth / self.patch)
        self.embed = nn.Conv2d(in_channels, width, self.patch, self.patch)
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        # As large as the tokens: with the usual 0.02, 400 digits are learned to 72 % instead of 94 %.
        nn.init.normal_(self.position, std=0.5)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, width // 16) for _ in range(3)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))  # type: ignore[no-any-return]


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


_BUILT_IN: dict[str, tuple[Callable[[int, tuple[int, int], int, int], nn.Module], int, str]] = {
    "resnet_small": (ResNetSmall, 16, "BatchNorm ResNet, one block per stage, for 8x8 to 32x32 images"),
    "vit_small": (ViTSmall, 64, "LayerNorm vision transformer, 3 blocks, 16 to 64 tokens"),
    "mlp": (MLP, 128, "two hidden layers, no normalization layers: a control"),
}


def list_models() -> dict[str, str]:
    """The built-in models, each with a description of one line and its default width."""
    return {name: f"{text}; width {width}" for name, (_, width, text) in _BUILT_IN.items()}


def build_model(
    spec: str, *, in_channels: int, image_size: tuple[int, int], num_classes: int, width: int | None = None
) -> nn.Module:
    """Build a model with random initial weights.

    The weights come from torch's global generator alone: call ``torch.manual_seed`` first, and the same seed
    gives the same weights (for ``module:function``, if the function draws from nothing else).

    Args:
        spec: one of

            - a name of :func:`list_models`;
            - ``torchvision:NAME``, a classification model of torchvision, untrained. Most want 3 channels;
            - ``module:function``, imported from the current directory or the environment, and called with
              those of ``in_channels``, ``image_size``, ``num_classes``, ``width`` that it accepts (``width``
              only if one is given). It returns an ``nn.Module``.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.
        num_classes: outputs of the model.
        width: channels of the first stage (``resnet_small``), of the tokens (``vit_small``, a multiple of 16)
            or of the hidden layers (``mlp``); None for the model's own default.

    Raises:
        InputError: no such model, a width that the model does not take, or a function that cannot be imported,
            fails, or does not return a module.
    """
    if width is not None and width < 1:
        raise InputError(f"width must be at least 1, found {width}")
    if spec in _BUILT_IN:
        build, default, _ = _BUILT_IN[spec]
        return build(in_channels, image_size, num_classes, default if width is None else width)
    prefix, colon, name = spec.partition(":")
    if not colon:
        known = [*_BUILT_IN, "torchvision:NAME", "module:function"]
        raise InputError(unknown_name("model", spec, known))
    if prefix == "torchvision":
        return _torchvision_model(name, num_classes, width)
    options: dict[str, Any] = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
    if width is not None:
        options["width"] = width
    return _user_model(spec, prefix, name, options)


def _torchvision_model(name: str, num_classes: int, width: int | None) -> nn.Module:
    from torchvision import models  # takes a second, and most runs do not need it

    known = models.list_models(module=models)  # detection, segmentation and video are in modules of their own
    if name not in known:
        raise InputError(unknown_name("torchvision model", name, known))
    if width is not None:
        raise InputError(f"torchvision:{name} takes no width, found {width}; leave it out")
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    return model


def _user_model(spec: str, module_name: str, name: str, options: dict[str, Any]) -> nn.Module:
    here = os.getcwd()  # an installed command does not have it on its path
    sys.path.insert(0, here)
    try:
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever the user's module does when imported
            raise InputError(f"model {spec}: cannot import {module_name!r} ({reason(error)})") from error
        function = getattr(module, name, None)
        if not callable(function):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise InputError(unknown_name(f"function of {module_name}", name, known))
        try:
            parameters = inspect.signature(function).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                if "width" in options and "width" not in parameters:
                    raise InputError(f"model {spec} takes no width, found {options['width']}; leave it out")
                options = {key: value for key, value in options.items() if key in parameters}
            model = function(**options)
        except InputError:
            raise
        except Exception as error:  # whatever the user's function does
            given = ", ".join(f"{key}={value}" for key, value in options.items())
            raise InputError(f"model {spec} failed when called with {given} ({reason(error)})") from error
    finally:
        sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise InputError(f"model {spec} must return a torch.nn.Module, it returned {type(model).__name__}")
    return model


def check_model(model: nn.Module, x_sample: Tensor, num_classes: int, *, name: str = "model") -> None:
    """Run two examples through a copy of the model, once in training and once in evaluation mode.

    The model itself (parameters, buffers, mode) and torch's random streams stay as they are.

    Args:
        model: the model.
        x_sample: images, N x C x H x W; the first two are used (the first one twice if N is 1).
        num_classes: the width that the output must have.
        name: what messages call the model, such as its spec.

    Raises:
        InputError: the model does not take such images, or its output is not a finite floating-point tensor of
            shape (2, num_classes).
    """
    x = x_sample[[0, min(1, len(x_sample) - 1)]]
    size = "x".join(str(n) for n in x.shape[1:])
    try:
        trial = copy.deepcopy(model)
    except Exception as error:  # the user's model may hold anything
        raise InputError(f"model {name} cannot be copied ({reason(error)})") from error
    for mode in ("training", "evaluation"):
        trial.train(mode == "training")
        try:
            with torch.random.fork_rng(), torch.no_grad():
                out = trial(x)
        except Exception as error:  # a wrong shape fails in many ways, and the model may be the user's own
            raise InputError(f"model {name} does not take images of {size} ({reason(error)})") from error
        if not isinstance(out, Tensor):
            raise InputError(
                f"model {name} returns {type(out).__name__} in {mode} mode; it must return one tensor of shape "
                f"(images, {num_classes}), without auxiliary outputs"
            )
        if tuple(out.shape) != (2, num_classes):
            raise InputError(
                f"model {name} returns shape {tuple(out.shape)} for 2 images of {size} in {mode} mode; with "
                f"{num_classes} classes it must be (2, {num_classes})"
            )
        if not out.is_floating_point() or not bool(out.isfinite().all()):
            raise InputError(
                f"model {name} returns {out.dtype} with {int((~out.isfinite()).sum())} of {out.numel()} values not "
                f"finite in {mode} mode; outputs must be finite floats"
            )
