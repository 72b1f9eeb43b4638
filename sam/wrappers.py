"""Modules that wrap another one and prefix the names of its parameters: data parallelism, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from masks.mask import Mask
from masks.params import ParamTable

_PREFIXES = ("module.", "_orig_mod.")


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """A model, what it wraps, what that wraps, and so on; the last one is the model itself."""
    while True:
        yield model
        inner = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else None
        inner = inner or getattr(model, "_orig_mod", None)  # what torch.compile calls it
        if not isinstance(inner, nn.Module):
            return
        model = inner


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without what is wrapped around it."""
    *_, last = layers(model)
    return last


def unwrapped_mask(mask: Mask, model: nn.Module) -> Mask:
    """The mask in the names of ``model``, if it was built on a wrapper around it; else the mask itself.

    Args:
        mask: the mask.
        model: the model without wrappers.
    """
    known = {name for name, _ in model.named_parameters()}
    names = [row.name for row in mask.table]
    strip = 0
    while any(names) and not known.issuperset(names):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            return mask
        names = [name.removeprefix(prefix) for name in names]
        strip += len(prefix)
    if not strip:
        return mask
    rows = tuple(
        replace(row, name=name, module_name=row.module_name[strip:], aliases=tuple(a[strip:] for a in row.aliases))
        for row, name in zip(mask.table, names, strict=True)
    )
    return replace(mask, table=ParamTable(rows, mask.table.frozen_numel))
