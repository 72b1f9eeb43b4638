"""Normalization by the statistics of the batch at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_RUNNING = ("running_mean", "running_var")


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Make BatchNorm and its like normalize by the batch though in evaluation mode, running statistics unread.

    They are neither read nor written inside, since the layers do not see them: other ways (training mode with
    momentum 0) write the buffers. For ``torch.nn``'s layers and subclasses that keep their forward pass. Put back
    on exit.
    """
    layers: list[tuple[Any, bool, dict[str, Any]]] = [
        (m, m.track_running_stats, {name: m._buffers[name] for name in _RUNNING})
        for m in model.modules()
        if isinstance(m, _NormBase) and m.running_mean is not None
    ]
    try:
        for layer, _, _ in layers:
            layer.track_running_stats = False
            layer._buffers.update(dict.fromkeys(_RUNNING))
        yield
    finally:
        for layer, track, buffers in layers:
            layer.track_running_stats = track
            layer._buffers.update(buffers)
