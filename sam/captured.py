"""The whole SAM step as one CUDA graph: recorded once, replayed without Python between its kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from masks.errors import InputError
from masks.region import Region
from sam.method import When
from sam.optimizer import SAM
from sam.parallel import find_wrapper
from sam.passes import LossFn, tensors_of
from sam.step import StepStats

Body = Callable[[], tuple[Tensor, StepStats]]


class Recorder(Protocol):
    """How steps are recorded."""

    def eager(self, body: Body) -> tuple[Tensor, StepStats]:
        """Run it as it will be recorded."""

    def record(self, body: Body) -> Body:
        """A function that does again what ``body`` does, and returns the same tensors with new values; nothing has
        happened when this returns."""


class CudaRecorder:
    """CUDA graphs on a stream and in a memory pool of their own.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def eager(self, body: Body) -> tuple[Tensor, StepStats]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = body()
        current.wait_stream(self._stream)
        return found

    def record(self, body: Body) -> Body:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            found = body()

        def replay() -> tuple[Tensor, StepStats]:
            graph.replay()
            return found

        return replay


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A recorded step, the batch that it reads, and the learning rates and radii that it reads per group."""

    replay: Body
    batch: Any
    settings: list[dict[str, Tensor]]


_READ = ("lr", "rho")


class CapturedStep:
    """:meth:`sam.SAM.step_on`, recorded and replayed: for steps so small that Python is slower than the GPU.

    The first steps for every shape of batch run as usual, and are as good as any; then one is recorded. Learning rate
    and radius are read from ``param_groups`` at every step, so schedulers work; a new mask, another setting of the base
    optimizer, ``enabled`` or a switch of modules between training and evaluation mode makes a new recording. So does
    new memory of weights, buffers or the base optimizer's state (``load_state_dict``, ``model.to``), and everything is
    recorded anew then. A replayed step takes the learning rate as float32, so that a trajectory differs from the eager
    one by roundings.

    Args:
        optimizer: on a CUDA device; its base optimizer fused (``fused=True``), so that nothing is read by the host.
        loss_fn: as for :meth:`sam.SAM.step_on`; it must do the same work at every step, whatever the values.
        eager_steps: steps per shape of batch before one is recorded, at least 1.
        recorder: by default CUDA graphs.

    Raises:
        InputError: parameters that are not on a CUDA device, an optimizer that decides on the host, a GradScaler, or
            DistributedDataParallel.
    """

    def __init__(
        self, optimizer: SAM, loss_fn: LossFn, *, eager_steps: int = 3, recorder: Recorder | None = None
    ) -> None:
        if eager_steps < 1:
            raise InputError(f"eager_steps must be at least 1, got {eager_steps}")
        self.optimizer, self._loss_fn, self._eager_steps = optimizer, loss_fn, eager_steps
        self._check()
        if recorder is None:
            if self._device.type != "cuda":
                where = f"the parameters are on {self._device}"
                raise InputError(f"steps are recorded on CUDA devices, and {where}; use step_on")
            recorder = CudaRecorder(self._device)
        self._recorder = recorder
        self._obstacle = ""
        self._tied: tuple[Region, list[int]] | None = None
        self._seen: dict[object, int] = {}
        self._recorded: dict[object, _Recorded] = {}

    def __call__(self, batch: Any) -> Tensor:
        """One step.

        Args:
            batch: a tensor, or a tuple, list or dict of tensors, on the device.

        Returns:
            The mean loss of the first pass, 0-dim, detached. ``optimizer.stats`` is set, too.

        Raises:
            InputError: the step cannot be recorded: it remembers something from step to step, or draws random numbers
                that both passes must share. It has not been taken.
        """
        if self._obstacle:
            raise InputError(f"this step cannot be recorded: {self._obstacle}, or use step_on")
        if self._tied_to() != self._tied:
            self._seen, self._recorded = {}, {}
        key = self._key(batch)
        seen = self._seen.get(key, 0)
        if seen < self._eager_steps:
            self._seen[key] = seen + 1
            return self._eager(batch)
        if key not in self._recorded:
            self._recorded[key] = self._record(batch)
        recorded = self._recorded[key]
        for static, new in zip(tensors_of(recorded.batch), tensors_of(batch), strict=True):
            static.copy_(new, non_blocking=True)
        for settings, group in zip(recorded.settings, self.optimizer.param_groups, strict=True):
            for name, tensor in settings.items():
                tensor.fill_(group[name])
        loss, stats = recorded.replay()
        self.optimizer.memory.steps += 1
        # The graph writes its results to the same place every time.
        self.optimizer.stats = StepStats(*(t.clone() for t in vars(stats).values()))
        return loss.clone()

    @property
    def recordings(self) -> int:
        """How many recordings are held."""
        return len(self._recorded)

    def _check(self) -> None:
        optimizer, base = self.optimizer, self.optimizer.base_optimizer
        fused = getattr(base, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in base.param_groups)  # type: ignore[union-attr]
        why = None
        if not fused:
            why = f"{type(base).__name__} is not fused, and decides on the host; give it fused=True"
        elif optimizer.on_nonfinite != "skip":
            why = 'on_nonfinite="raise" reads a scalar after every step; use "skip"'
        elif optimizer.scaler is not None:
            why = "a GradScaler adapts its scale from step to step; use bfloat16, which needs none"
        elif type(optimizer.method.when) is not When:
            why = f"its method does not do the same in every step ({optimizer.method.when})"
        elif find_wrapper(optimizer.model) is not None:
            why = "the model is under DistributedDataParallel"
        if why is not None:
            raise InputError(f"this step cannot be recorded: {why}, or use step_on")

    def _key(self, batch: Any) -> object:
        optimizer = self.optimizer
        settings = tuple(
            tuple((k, v if isinstance(v, (int, float, bool, str, tuple, type(None))) else id(v)) for k, v in g.items())
            for g in ({k: v for k, v in group.items() if k not in (*_READ, "params")} for group in self._groups)
        )
        shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors_of(batch))
        modes = tuple(module.training for module in optimizer.model.modules())
        return shapes, optimizer.enabled, modes, settings

    def _tied_to(self) -> tuple[Region, list[int]]:
        """What a recording is tied to and others may replace: the mask's region, which has memory of its own and is
        made anew with every mask that is set, and the addresses of weights, buffers and the base optimizer's state."""
        model, state = self.optimizer.model, tensors_of(list(self.optimizer.state.values()))
        return self.optimizer._region, [t.data_ptr() for t in chain(model.parameters(), model.buffers(), state)]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _body(self, batch: Any) -> tuple[Tensor, StepStats]:
        steps = self.optimizer.memory.steps
        loss = self.optimizer.step_on(self._loss_fn, batch)
        self.optimizer.memory.steps = steps  # counted by the caller: a replay does not come past here
        assert self.optimizer.stats is not None
        return loss, self.optimizer.stats

    def _eager(self, batch: Any) -> Tensor:
        """A step as it will be recorded; afterwards it is known whether it can be."""
        optimizer, memory = self.optimizer, self.optimizer.memory
        before = self._rng_states()
        loss, _ = self._recorder.eager(lambda: self._body(batch))
        memory.steps += 1
        found = self._tied_to()
        if found != self._tied:  # state appears in a parameter's first step: no reason to count from the beginning
            self._recorded, self._tied = {}, found
        cpu, own, drawn = (not torch.equal(b, a) for b, a in zip(before, self._rng_states(), strict=True))
        if cpu or own:
            self._obstacle = "it draws random numbers on the CPU"
        elif drawn and optimizer.replay_rng:
            self._obstacle = "both passes must draw the same random numbers (dropout); give SAM replay_rng=False"
        elif memory.nbytes:
            self._obstacle = "its method remembers tensors from step to step"
        return loss

    def _rng_states(self) -> list[Tensor]:
        """Of the default generator on the CPU, of the method, and on the device."""
        device = self._device
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(())
        return [torch.get_rng_state(), self.optimizer.memory.generator.get_state(), on_device]

    @property
    def _device(self) -> torch.device:
        return self.optimizer.skipped_steps.device

    def _record(self, batch: Any) -> _Recorded:
        static = copy.deepcopy(batch)
        with self._device_settings() as settings, self._without_rng():
            try:
                replay = self._recorder.record(lambda: self._body(static))
            except RuntimeError as error:
                raise InputError(
                    f"this step cannot be recorded: {' '.join(str(error).split())[:300]}; use step_on"
                ) from None
        return _Recorded(replay, static, settings)

    @contextmanager
    def _device_settings(self) -> Iterator[list[dict[str, Tensor]]]:
        """Inside, learning rates and radii are tensors on the device."""
        device = self._device
        before = [{name: group[name] for name in _READ} for group in self._groups]
        # Fused kernels read the learning rate as float32; the radius is multiplied in float64.
        kinds = {"lr": torch.float32, "rho": torch.float64}
        tensors = [
            {name: torch.tensor(float(values[name]), dtype=kinds[name], device=device) for name in _READ}
            for values in before
        ]
        try:
            for group, values in zip(self._groups, tensors, strict=True):
                group.update(values)
            yield tensors
        finally:
            for group, values in zip(self._groups, before, strict=True):
                group.update(values)

    @contextmanager
    def _without_rng(self) -> Iterator[None]:
        """Inside, generators are not looked at, which a recording forbids; that nothing is drawn twice is known."""
        replay, self.optimizer.replay_rng = self.optimizer.replay_rng, False
        try:
            yield
        finally:
            self.optimizer.replay_rng = replay
