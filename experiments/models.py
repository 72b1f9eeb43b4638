"""Models by name: the built-in ones of :mod:`experiments.zoo`, torchvision's, timm's, and ``module:function``."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.data import reason
from experiments.zoo.layers import NORMS
from experiments.zoo.mlp import MLP
from experiments.zoo.resnet import ResNet, ResNetSmall, ResNeXt
from experiments.zoo.vgg import VGG
from experiments.zoo.vit import ViT, ViTSmall
from experiments.zoo.wide_resnet import WideResNet
from masks.errors import InputError, unknown_name
from masks.params import register_norm_type


@dataclass(frozen=True)
class _BuiltIn:
    """A built-in model.

    Attributes:
        build: called with in_channels, image_size, num_classes, width and the options of the spec.
        width: the default.
        text: one line.
        options: per option of the spec its possible values; none listed means an integer.
    """

    build: Callable[..., nn.Module]
    width: int
    text: str
    options: dict[str, Sequence[str]] = field(default_factory=dict)


_NORM: dict[str, Sequence[str]] = {"norm": NORMS}
_PATCH: dict[str, Sequence[str]] = {"patch": ()}
_BUILT_IN: dict[str, _BuiltIn] = {
    "resnet_small": _BuiltIn(ResNetSmall, 16, "BatchNorm ResNet, one block per stage, for 8x8 to 32x32 images", _NORM),
    "vit_small": _BuiltIn(ViTSmall, 64, "LayerNorm vision transformer, 3 blocks, 16 to 64 tokens"),
    "mlp": _BuiltIn(MLP, 128, "two hidden layers, no normalization layers: a control"),
    "resnet18": _BuiltIn(partial(ResNet, blocks=(2, 2, 2, 2)), 64, "ResNet-18 with a 3x3 stem, for CIFAR", _NORM),
    "resnet20": _BuiltIn(
        partial(ResNet, blocks=(3, 3, 3), shortcut="padding"), 16, "ResNet-20 for CIFAR, He et al. 2016", _NORM
    ),
    "resnet56": _BuiltIn(
        partial(ResNet, blocks=(9, 9, 9), shortcut="padding"), 16, "ResNet-56 for CIFAR, He et al. 2016", _NORM
    ),
    "wrn16_4": _BuiltIn(partial(WideResNet, depth=16), 64, "WRN-16-4, Zagoruyko and Komodakis 2016", _NORM),
    "wrn28_10": _BuiltIn(partial(WideResNet, depth=28), 160, "WRN-28-10, Zagoruyko and Komodakis 2016", _NORM),
    "resnext29_32x4d": _BuiltIn(
        partial(ResNeXt, cardinality=32, bottleneck=4), 64, "ResNeXt-29, 32x4d, Xie et al. 2017", _NORM
    ),
    "resnext29_8x64d": _BuiltIn(
        partial(ResNeXt, cardinality=8, bottleneck=64), 64, "ResNeXt-29, 8x64d, Xie et al. 2017", _NORM
    ),
    "vgg16_bn": _BuiltIn(VGG, 64, "VGG-16 with BatchNorm and one linear layer, for CIFAR"),
    "vit_t": _BuiltIn(ViT, 192, "ViT-T, DeiT's sizes, patch side 4", _PATCH),
    "vit_s": _BuiltIn(ViT, 384, "ViT-S, DeiT's sizes, patch side 4", _PATCH),
}


def list_models() -> dict[str, str]:
    """The built-in models, each with a description of one line, its default width and its options."""
    out = {}
    for name, model in _BUILT_IN.items():
        options = [f"{key}={'|'.join(values) or 'N'}" for key, values in model.options.items()]
        out[name] = "; ".join((model.text, f"width {model.width}", *options))
    return out


def build_model(
    spec: str, *, in_channels: int, image_size: tuple[int, int], num_classes: int, width: int | None = None
) -> nn.Module:
    """Build a model with random initial weights.

    The weights come from torch's global generator alone: call ``torch.manual_seed`` first, and the same seed
    gives the same weights (for ``module:function``, if the function draws from nothing else).

    Args:
        spec: one of

            - a name of :func:`list_models`, with options as in ``wrn28_10:norm=group`` or ``vit_t:patch=8``;
              ``norm`` is batch, group, layer, rms or none, see :func:`experiments.zoo.layers.make_norm`;
            - ``torchvision:NAME``, a classification model of torchvision, untrained. Most want 3 channels;
            - ``timm:NAME``, a model of timm (the extra ``timm``), untrained, with timm's defaults;
            - ``module:function``, imported from the current directory or the environment, and called with
              those of ``in_channels``, ``image_size``, ``num_classes``, ``width`` that it accepts (``width``
              only if one is given). It returns an ``nn.Module``.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.
        num_classes: outputs of the model.
        width: of a built-in model: channels of the first stage (ResNets, WRN, VGG), of the stem (ResNeXt, 64 scales
            nothing), of the tokens (``vit_small``: a multiple of 16; ViTs: of 64) or of the hidden layers (``mlp``);
            None for the model's own default.

    Raises:
        InputError: no such model or option, a width that the model does not take, timm is not installed, or a
            function that cannot be imported, fails, or does not return a module.
    """
    if width is not None and width < 1:
        raise InputError(f"width must be at least 1, found {width}")
    name, colon, rest = spec.partition(":")
    if name in _BUILT_IN and (not colon or "=" in rest):
        model = _BUILT_IN[name]
        options = _options(spec, name, rest) if colon else {}
        return model.build(in_channels, image_size, num_classes, model.width if width is None else width, **options)
    if not colon and Path(f"{spec.removesuffix('.py')}.py").is_file():
        raise InputError(f"model {spec!r} is a module; name its function too: {spec.removesuffix('.py')}:FUNCTION")
    if not colon:
        known = [*_BUILT_IN, "torchvision:NAME", "timm:NAME", "module:function"]
        raise InputError(unknown_name("model", spec, known))
    if name == "torchvision":
        return _torchvision_model(rest, num_classes, width)
    if name == "timm":
        return _timm_model(rest, in_channels, image_size, num_classes, width)
    options = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
    if width is not None:
        options["width"] = width
    return _user_model(spec, name, rest, options)


def user_module(spec: str) -> str | None:
    """The module of the user's own that a spec names; None for models that come with the project or a library."""
    name, colon, rest = spec.partition(":")
    ours = name in ("torchvision", "timm") or (name in _BUILT_IN and "=" in rest)
    return name if colon and not ours else None


def _options(spec: str, name: str, text: str) -> dict[str, Any]:
    """The options of a built-in model's spec, ``key=value`` separated by colons."""
    known = _BUILT_IN[name].options
    options: dict[str, Any] = {}
    for part in text.split(":"):
        key, _, value = part.partition("=")
        if key not in known:
            raise InputError(f"model {spec}: {unknown_name(f'option of {name}', key, known)}")
        if key in options:
            raise InputError(f"model {spec} gives {key} twice")
        if known[key] and value not in known[key]:
            raise InputError(f"model {spec}: {unknown_name(key, value, known[key])}")
        if not known[key] and not (value.isascii() and value.isdigit()):
            raise InputError(f"model {spec}: {key} must be a whole number, found {value!r}")
        options[key] = value if known[key] else int(value)
    return options


def _torchvision_model(name: str, num_classes: int, width: int | None) -> nn.Module:
    from torchvision import models  # takes a second, and most runs do not need it

    known = models.list_models(module=models)  # detection, segmentation and video are in modules of their own
    if name not in known:
        raise InputError(unknown_name("torchvision model", name, known))
    if width is not None:
        raise InputError(f"torchvision:{name} takes no width, found {width}; leave it out")
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    return model


def _timm_model(
    name: str, in_channels: int, image_size: tuple[int, int], num_classes: int, width: int | None
) -> nn.Module:
    try:
        import timm
        from timm.layers import norm
    except ImportError as error:
        raise InputError(
            f"model timm:{name} needs timm, which cannot be imported ({reason(error)}); install sam-masks[timm]"
        ) from None
    known = timm.list_models()
    if name not in known:
        raise InputError(unknown_name("timm model", name, known))
    if width is not None:
        raise InputError(f"timm:{name} takes no width, found {width}; leave it out")
    for cls in vars(norm).values():  # most are subclasses of torch's, but not its RmsNorm and its like
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == norm.__name__:
            register_norm_type(cls)
    options: dict[str, Any] = {"pretrained": False, "in_chans": in_channels, "num_classes": num_classes}
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):  # others have no such argument
        options["img_size"] = image_size
    try:
        model: nn.Module = timm.create_model(name, **options)
    except Exception as error:  # some want a patch that divides the image, or three channels
        raise InputError(
            f"model timm:{name} cannot be built for {in_channels} channels of {image_size[0]}x{image_size[1]} "
            f"({reason(error)})"
        ) from None
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            # torch's fused attention has no second derivative
            module.fused_attn = False  # type: ignore[assignment]
    return model


def _user_model(spec: str, module_name: str, name: str, options: dict[str, Any]) -> nn.Module:
    here = os.getcwd()  # an installed command does not have it on its path
    sys.path.insert(0, here)
    try:
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever the user's module does when imported
            hint = ""  # none where what the module imports is missing
            absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
            if absent or module_name.startswith("."):
                hint = "; name one of the current folder or an installed one, as Python does, without path and .py"
            raise InputError(f"model {spec}: cannot import {module_name!r} ({reason(error)}){hint}") from error
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
    if {p.dtype for p in trial.parameters()} == {torch.float64}:
        x = x.double()
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
