"""A model as a fixed function of its weights, looked at without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from masks.context import Batch, LossFn, cross_entropy
from masks.errors import InputError
from masks.mask import Mask, Provenance
from masks.params import ParamTable


def whole_mask(model: nn.Module) -> Mask:
    """The mask of all trainable parameters."""
    table = ParamTable.from_model(model)
    return Mask(table, (True,) * len(table), Provenance("all"))


def describe_mask(mask: Mask) -> str:
    """The mask as it stands in a metric's name."""
    if mask.num_kept == mask.numel:
        frozen = mask.table.frozen_numel
        return f"all trainable parameters ({frozen:,} coordinates frozen)" if frozen else "all parameters"
    return f"mask {mask.provenance.builder} ({mask.num_kept:,} of {mask.numel:,} coordinates)"


def describe_loss(loss: LossFn) -> str:
    """What a metric's name adds for a loss other than :func:`cross_entropy`."""
    return "" if loss is cross_entropy else f", loss {getattr(loss, '__qualname__', repr(loss))}"


def check_mask(mask: Mask) -> None:
    """Refuse a mask that keeps nothing.

    Raises:
        InputError: the mask has no coordinates.
    """
    if not mask.num_kept:
        raise InputError(f"the mask {mask.provenance.builder!r} keeps no coordinate: there is nothing to perturb")


def precision_of(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The one dtype and device of all parameters.

    Raises:
        InputError: the parameters are not all float32 or all float64, or not all on one device.
    """
    params = dict(model.named_parameters())
    if not params:
        raise InputError("the model has no parameters")
    first_name, first = next(iter(params.items()))
    for name, param in params.items():
        if param.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"parameter {name} is {param.dtype}: curvature needs float32 or float64; call model.float()"
            )
        if param.dtype != first.dtype:
            raise InputError(f"parameters of mixed precision: {first_name} is {first.dtype}, {name} is {param.dtype}")
        if param.device != first.device:
            raise InputError(f"parameters on two devices: {first_name} on {first.device}, {name} on {param.device}")
    return first.dtype, first.device


def check_batches(batches: Sequence[Batch]) -> list[Batch]:
    """The batches as a list.

    Raises:
        InputError: not a non-empty list or tuple of (inputs, targets) tensors of equal, non-zero length. A
            data loader is refused since it may shuffle: pass ``list(loader)``.
    """
    if not isinstance(batches, list | tuple) or not batches:
        raise InputError(
            f"batches must be a non-empty list of (inputs, targets), got {type(batches).__name__}; "
            "pass list(loader) for a loader, [(x, y)] for one batch"
        )
    for i, batch in enumerate(batches):
        if not isinstance(batch, list | tuple) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
            raise InputError(f"batch {i} is not a pair of tensors (inputs, targets)")
        x, y = batch
        if x.is_inference() or y.is_inference():
            raise InputError(
                f"batch {i} was made inside torch.inference_mode(): it cannot enter a derivative; clone it"
            )
        if not x.dim() or not y.dim() or len(x) != len(y) or not len(x):
            raise InputError(f"batch {i}: inputs of shape {tuple(x.shape)}, targets of shape {tuple(y.shape)}")
    return [(x, y) for x, y in batches]


def place(batch: Batch, dtype: torch.dtype, device: torch.device) -> Batch:
    """A batch on the device, its floating-point tensors (inputs or targets) in the dtype."""
    x, y = (t.to(device, dtype if t.is_floating_point() else t.dtype) for t in batch)
    return x, y


def losses(model: nn.Module, batch: Batch, loss: LossFn, dtype: torch.dtype, where: str) -> Tensor:
    """The per-example losses of a batch, shape (B,), checked.

    Args:
        model: the model.
        batch: inputs and targets, placed.
        loss: per-example loss.
        dtype: the precision in which they must come out.
        where: at which weights, for the error's text.

    Raises:
        InputError: wrong shape or precision, or a loss that is not finite.
    """
    x, y = batch
    values = loss(model(x), y)
    if not isinstance(values, Tensor) or values.shape != (len(x),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"the loss must return one number per example, shape ({len(x)},), got {got}; use reduction='none'"
        )
    if values.dtype != dtype:
        raise InputError(
            f"the loss came out as {values.dtype}, the parameters are {dtype}: lower precision inside the model"
        )
    finite = torch.isfinite(values.detach())
    if not bool(finite.all()):
        raise InputError(f"the loss is not finite for {int((~finite).sum())} of {len(x)} examples {where}")
    return values


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Make the model a deterministic, twice differentiable function of its weights, and put everything back.

    Inside: every module in evaluation mode (normalization by running statistics, no dropout), gradients on,
    autocast and reduced-precision (TF32, bfloat16) products off, attention by its plain implementation: the
    fused kernels have no second derivative, and a second code path would differ by rounding. On exit, also
    after an exception: training flags, random state and buffers as they were.

    Raises:
        InputError: inside ``torch.inference_mode()``; on exit, if the model drew random numbers or changed a buffer
            though in evaluation mode: its loss is then not a function of the weights.
    """
    training = [(module, module.training) for module in model.modules()]
    buffers = [
        (m, n, b, b._version, b.clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None
    ]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    random = _random_state(devices)
    try:
        with exact_arithmetic(cuda=bool(devices)):
            model.eval()
            yield
        if any(not torch.equal(a, b) for a, b in zip(random, _random_state(devices), strict=True)):
            raise InputError(
                "the model or the loss draws random numbers in evaluation mode: its loss is not a fixed function"
            )
        for module, name, buffer, version, _ in buffers:
            if module._buffers[name] is not buffer or buffer._version != version:
                raise InputError(
                    f"buffer {name} of {type(module).__name__} changes in evaluation mode: the loss is not fixed"
                )
    finally:
        for module, flag in training:
            module.training = flag
        for module, name, buffer, version, saved in buffers:
            module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(saved)
        _set_random_state(random, devices)


@contextmanager
def exact_arithmetic(*, cuda: bool) -> Iterator[None]:
    """Twice differentiable operations in the precision of their inputs: what :func:`evaluation_mode` sets in torch.

    Args:
        cuda: also on CUDA devices.

    Raises:
        InputError: inside ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("derivatives cannot be taken inside torch.inference_mode(); leave it, or use torch.no_grad()")
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for kind in ["cpu", *(["cuda"] if cuda else [])]:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_plain_kernels())
        yield


def _random_state(devices: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


def _set_random_state(states: Sequence[Tensor], devices: Sequence[int]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """float32 arithmetic in float32, and no fused inference path of nn.MultiheadAttention and its like."""
    b: Any = torch.backends
    products = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
    precisions = [product.fp32_precision for product in products]
    fast_path = b.mha.get_fastpath_enabled()
    try:
        for product in products:
            product.fp32_precision = "ieee"
        b.mha.set_fastpath_enabled(False)
        yield
    finally:
        for product, precision in zip(products, precisions, strict=True):
            product.fp32_precision = precision
        b.mha.set_fastpath_enabled(fast_path)
