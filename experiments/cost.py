"""What a step under a mask costs, from counted floating-point operations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from masks import Mask, ParamTable, Region
from masks.norm_stats import statistics
from sam.prefix import WORTH_IT, Prefix
from sam.tape import Tape


def step_costs(
    model: nn.Module, x: Tensor, touched: Mapping[str, Set[str]], *, every_gradient: bool = False
) -> dict[str, float | None]:
    """Cost of a SAM step relative to the base optimizer's, by counting matrix and convolution operations.

    A step of the base optimizer is one forward and one full backward pass. A step of :meth:`sam.SAM.step_on` adds a
    forward pass and a backward pass that asks only for the tensors that the mask touches, and leaves out of its final
    forward pass what no perturbed weight reaches where :class:`sam.SAM` would (``reuse_prefix="auto"``, on the model's
    device). Elementwise work (normalization, activations, perturbing) is not counted, so small nets measure higher.

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

        def cost(names: Set[str]) -> float:
            if not names:
                return 1.0
            first = _count(twin, inputs, [p for n, p in params.items() if every_gradient or n in names])
            return 1.0 + (first - _reused(model, twin, inputs, names)) / full

        return {name: cost(names) for name, names in touched.items()}
    except Exception:  # a model of the user's own may look at values, which meta tensors do not have
        return dict.fromkeys(touched)


def _count(model: nn.Module, x: Tensor, params: list[nn.Parameter]) -> int:
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(model(x).sum(), params, allow_unused=True)
    return int(counter.get_total_flops())


def _reused(model: nn.Module, twin: nn.Module, x: Tensor, names: Set[str]) -> int:
    """The operations of a forward pass that the final pass of a step does not repeat."""
    table = ParamTable.from_model(model)
    region = Region(Mask(table, tuple(row.name in names for row in table)), model)
    if Prefix("auto", model, region).reason is not None:
        return 0
    params = [param for name, param in twin.named_parameters() if name not in names]
    tape = Tape([*params, *twin.buffers(), x], statistics(twin))
    with FlopCounterMode(display=False) as counter:
        with tape.during("clean"):
            twin(x)
        forward = counter.get_total_flops()
        with tape.during("final"):
            twin(x)
    worth_it = tape.reused >= WORTH_IT * tape.products
    return int(2 * forward - counter.get_total_flops()) if worth_it else 0
