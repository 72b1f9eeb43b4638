"""Evaluation-mode BatchNorm as one multiplication and addition per channel, whose second derivatives are cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AffineNorm(TorchFunctionMode):
    """Inside, ``F.batch_norm`` by running statistics is ``y = s x + t``, ``s = weight / sqrt(var + eps)``.

    With ``t = bias - mean s``: the same function, up to rounding. The backward pass of torch's own kernel is several
    times slower than such arithmetic, and its second derivative recomputes a training-mode formula. Normalization by
    the batch is left to torch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    given = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if training or running_mean is None or running_var is None or any(t.dtype != x.dtype for t in given):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (1, -1, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.view(shape), x, scale.view(shape))
