"""What a step under a mask costs, from counted floating-point operations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def step_costs(
    model: nn.Module, x: Tensor, touched: Mapping[str, Set[str]], *, every_gradient: bool = False
) -> dict[str, float | None]:
    """Cost of a SAM step relative to the base optimizer's, by counting matrix and convolution operations.

    A step of the base optimizer is one forward and one full backward pass. A SAM step adds a forward pass and
    a backward pass that asks only for the tensors that the mask touches. Elementwise work (normalization,
    activations, perturbing) is not counted, so small nets measure higher.

    Args:
        model: the model; it is copied to the meta device, nothing is computed.
        x: a few inputs, (B, ...).
        touched: for each name, the parameters that the mask touches.
        every_gradient: the first pass needs all gradients (``norm_scope="full"``).

    Returns:
        The relative cost by name; 1 for an empty set; None for a model that does not run on the meta device.
    """
    try:
        twin = copy.deepcopy(model).to("meta").train()
        inputs = torch.empty_like(x, device="meta")
        params = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        full = _count(twin, inputs, list(params.values()))
        if not full:
            return dict.fromkeys(touched)
        return {
            name: 1.0
            if not names
            else 1.0 + _count(twin, inputs, [p for n, p in params.items() if every_gradient or n in names]) / full
            for name, names in touched.items()
        }
    except Exception:  # a model of the user's own may look at values, which meta tensors do not have
        return dict.fromkeys(touched)


def _count(model: nn.Module, x: Tensor, params: list[nn.Parameter]) -> int:
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(model(x).sum(), params, allow_unused=True)
    return int(counter.get_total_flops())
