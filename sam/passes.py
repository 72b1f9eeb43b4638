"""The forward and backward passes of one step on one batch, at whatever the weights are when they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from masks.errors import InputError
from masks.norm_stats import frozen_statistics
from masks.region import Region
from sam.parallel import Replicas
from sam.precision import LossScaling
from sam.tape import Tape

NormStatistics = Literal["first", "second", "both"]
LossFn = Callable[[Any], Tensor]

Role = Literal["clean", "inner", "final", "only"]
"""What a pass is to its step: "clean" is the first one, at w; "final" the one whose gradient is stepped with; "inner"
any between them; "only" the single pass of a step without a perturbation."""


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What the passes of one step must not disturb.

    Attributes:
        devices: where its parameters lie.
        norm_statistics: the pass in which running statistics of normalization layers are updated: the clean one
            ("first"), the final one ("second"), or both; inner ones never do.
        replay_rng: every pass draws the same dropout masks.
        zero_grad: clears all gradients.
        params: all tensors that may have one.
        statistics: the running statistics of normalization layers.
        scaling: of the losses, under a GradScaler; what the passes hand out is unscaled.
        replicas: of the model, in data-parallel training.
    """

    devices: Sequence[torch.device]
    norm_statistics: NormStatistics
    replay_rng: bool
    zero_grad: Callable[[], None]
    params: Callable[[], list[Tensor]]
    statistics: list[Tensor]
    scaling: LossScaling | None = None
    replicas: Replicas | None = None

    def apart(self) -> AbstractContextManager[None]:
        """Inside, gradients stay in this process."""
        return nullcontext() if self.replicas is None else self.replicas.apart()


class Passes(ABC):
    """Gradients on one batch, as often as a step needs them."""

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings
        self._rng: list[tuple[torch.device, Tensor]] | None = None

    @contextmanager
    def _pass(self, role: Role) -> Iterator[None]:
        around = self.surroundings
        if role == "only":
            yield
            return
        if around.replay_rng:
            if self._rng is None:
                self._rng = _rng_states(around.devices)
            else:
                _set_rng_states(self._rng)
        updates = {"clean": around.norm_statistics != "second", "inner": False}.get(
            role, around.norm_statistics != "first"
        )
        if updates:
            yield
            return
        with frozen_statistics(around.statistics):
            yield

    def gradients(self, region: Region, role: Role = "clean") -> tuple[Any, list[Tensor]]:
        """The loss, and the gradient of every tensor that the region touches; ``.grad`` is left alone.

        Raises:
            InputError: a gradient is sparse.
        """
        around = self.surroundings
        # The backward pass too lies inside: it refuses statistics that changed under it.
        with self._pass(role), around.apart():
            loss, gradients = self._gradients(region, role)
        gradients = dense(region, gradients)
        if around.scaling is not None:
            gradients = around.scaling.unscaled(gradients)
        if around.replicas is not None:
            gradients = around.replicas.ascent(gradients)
        return loss, gradients

    def backward(self, role: Role = "final") -> Any:
        """The loss; its gradient is in ``.grad`` of every parameter."""
        with self._pass(role):
            return self._backward(role)

    @abstractmethod
    def _gradients(self, region: Region, role: Role) -> tuple[Any, Sequence[Tensor]]:
        """As :meth:`gradients`, of the scaled loss."""

    @abstractmethod
    def _backward(self, role: Role) -> Any:
        """As :meth:`backward`; the gradient that it leaves is that of the loss, not of the scaled one."""

    def _scaled(self, loss: Tensor) -> Tensor:
        scaling = self.surroundings.scaling
        return loss if scaling is None else scaling.scale(loss)

    def _unscale(self) -> None:
        scaling = self.surroundings.scaling
        if scaling is not None:
            scaling.unscale_([p.grad for p in self.surroundings.params() if p.grad is not None])


class ClosurePasses(Passes):
    """Passes through a closure of torch's convention, which zeroes the gradients and calls ``backward``."""

    def __init__(self, surroundings: Surroundings, closure: Callable[[], Any]) -> None:
        super().__init__(surroundings)
        self._closure = closure
        surroundings.zero_grad()  # a closure that forgets to would ascend along old gradients

    def _gradients(self, region: Region, role: Role) -> tuple[Any, list[Tensor]]:
        loss = self._closure()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in region.params]
        self.surroundings.zero_grad()  # taken away, so that the next call starts from none
        return loss, gradients

    def _backward(self, role: Role) -> Any:
        loss = self._closure()
        self._unscale()
        return loss


class BatchPasses(Passes):
    """Passes of a per-example loss on a batch.

    Args:
        tape: what the final pass finds there it does not compute again; see :mod:`sam.prefix`.

    Attributes:
        weight: share of the step's gradient that this batch has; None for all of it.
        clean_losses: the losses of the clean pass, shape (B,), detached; None before it.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        loss_fn: LossFn,
        batch: Any,
        *,
        weight: float | None = None,
        tape: Tape | None = None,
    ) -> None:
        super().__init__(surroundings)
        self._loss_fn, self._batch, self.weight, self._tape = loss_fn, batch, weight, tape
        self.clean_losses: Tensor | None = None

    def losses(self, role: Role) -> Tensor:
        """Per-example losses without a graph, shape (B,).

        Raises:
            InputError: the loss function returns something else.
        """
        with torch.no_grad(), self._pass(role):
            return self._losses(role)

    def _losses(self, role: Role) -> Tensor:
        with nullcontext() if self._tape is None else self._tape.during(role):
            losses = per_example(self._loss_fn(self._batch))
        if role == "clean":
            self.clean_losses = losses.detach()
        return losses

    def _gradients(self, region: Region, role: Role) -> tuple[Tensor, Sequence[Tensor]]:
        loss = self._losses(role).mean()
        return loss.detach(), restricted(self._scaled(loss), region)

    def _backward(self, role: Role) -> Tensor:
        """Times ``weight`` if there is one, the gradient is added to what is there."""
        loss = self._losses(role).mean()
        scaled = self._scaled(loss if self.weight is None else loss * self.weight)
        if self.surroundings.scaling is None:
            scaled.backward()  # type: ignore[no-untyped-call]
        else:
            with fresh_gradients(self.surroundings.params()):
                scaled.backward()  # type: ignore[no-untyped-call]
                self._unscale()
        return loss.detach()

    @contextmanager
    def graph(self, region: Region) -> Iterator[list[Tensor]]:
        """The gradients of an inner pass with their graph, for a second derivative, which must be taken inside.

        Only inside, because the pass keeps running statistics still by putting them back, and autograd refuses
        buffers that changed under it.

        Raises:
            InputError: a gradient is sparse; see also :func:`check_second_derivative`, :func:`twice_differentiable`.
        """
        around = self.surroundings
        check_second_derivative(around.scaling is not None, around.replicas is not None)
        with self._pass("inner"):
            loss = self._losses("inner").mean()
            with twice_differentiable():
                gradients = torch.autograd.grad(
                    loss, region.params, create_graph=True, allow_unused=True, materialize_grads=True
                )
            yield dense(region, gradients)

    def narrowed(self, index: Tensor) -> BatchPasses:
        """The same passes on some examples of the batch.

        Args:
            index: their positions, int64, shape (n,).

        Raises:
            InputError: the batch's tensors do not all have one entry per loss.
        """
        examples = self.num_examples
        if self.clean_losses is not None and len(self.clean_losses) != examples:
            raise InputError(
                f"this method chooses examples of the batch by their losses; the batch has {examples} entries and "
                f"loss_fn gave {len(self.clean_losses)} losses"
            )
        part = BatchPasses(self.surroundings, self._loss_fn, take(self._batch, index), weight=self.weight)
        part._rng = self._rng
        return part

    def split(self, sizes: Sequence[int]) -> list[BatchPasses]:
        """Passes on consecutive parts of the batch, weighted by their size; the batch itself if it is one part.

        Args:
            sizes: numbers of examples, summing to the batch's.
        """
        if len(sizes) == 1:
            return [self]
        out, start, device = [], 0, self.surroundings.devices[0]
        for size in sizes:
            index = torch.arange(start, start + size, device=device)
            weight = size / sum(sizes)
            out.append(BatchPasses(self.surroundings, self._loss_fn, take(self._batch, index), weight=weight))
            start += size
        return out

    @property
    def num_examples(self) -> int:
        """Length of the batch's tensors along their first dimension.

        Raises:
            InputError: it holds no tensor, or tensors of different lengths.
        """
        lengths = {len(t) for t in tensors_of(self._batch) if t.ndim}
        if len(lengths) != 1:
            raise InputError(
                f"this method divides the batch, whose tensors must all have one entry per example; found lengths "
                f"{sorted(lengths)}"
            )
        return lengths.pop()


def take(batch: Any, index: Tensor) -> Any:
    """The examples at these positions of a tensor, or of a tuple, list or dict of them."""
    if isinstance(batch, Tensor):
        return batch.index_select(0, index.to(batch.device)) if batch.ndim else batch
    if isinstance(batch, (tuple, list)):
        items = [take(item, index) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if isinstance(batch, dict):
        return {key: take(item, index) for key, item in batch.items()}
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors in a tuple, list or dict of them."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            yield from tensors_of(item)
    elif isinstance(batch, dict):
        yield from tensors_of(list(batch.values()))


def dense(region: Region, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the tensors that a region touches.

    Raises:
        InputError: one is sparse.
    """
    for piece, gradient in zip(region.pieces, gradients, strict=True):
        if gradient.is_sparse:
            raise InputError(f"{piece.row.name} has a sparse gradient, which SAM does not take")
    return list(gradients)


def per_example(losses: Any) -> Tensor:
    """What a loss function returned, if it is per-example losses, shape (B,).

    Raises:
        InputError: it is something else.
    """
    if not isinstance(losses, Tensor) or losses.ndim != 1 or not losses.numel() or not losses.is_floating_point():
        found = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(f"loss_fn must return per-example losses of shape (batch,), got {found}; use reduction='none'")
    return losses


def restricted(loss: Tensor, region: Region) -> tuple[Tensor, ...]:
    """The gradients of the tensors that a region touches, and no others; they are the same, bit for bit."""
    return torch.autograd.grad(loss, region.params, allow_unused=True, materialize_grads=True)


def check_second_derivative(scaled: bool, replicated: bool) -> None:
    """Refuse a second derivative of a scaled loss, or of one that replicas share.

    Raises:
        InputError: it is one.
    """
    if scaled or replicated:
        raise InputError(
            "this method takes a second derivative, which goes with neither a GradScaler nor DistributedDataParallel; "
            "train it in one process, without a scaler"
        )


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Around the two derivatives of a loss: where torch cannot take them, that is an :class:`InputError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(
            "this method needs second derivatives of the loss, which torch could not take; a compiled model and "
            f"cuDNN's recurrent layers have none: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def fresh_gradients(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, ``.grad`` starts from none; on the way out, what was there before is added."""
    earlier = [(p, p.grad) for p in params if p.grad is not None]
    for p, _ in earlier:
        p.grad = None
    yield
    for p, grad in earlier:
        p.grad = grad if p.grad is None else p.grad.add_(grad)


def _rng_states(devices: Sequence[torch.device]) -> list[tuple[torch.device, Tensor]]:
    states = [(torch.device("cpu"), torch.get_rng_state())]
    return states + [(d, torch.cuda.get_rng_state(d)) for d in devices if d.type == "cuda"]


def _set_rng_states(states: Sequence[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
