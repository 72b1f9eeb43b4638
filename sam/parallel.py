"""Data-parallel training: whose gradient is ascended along, and what all replicas must agree on."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from masks.errors import InputError
from masks.mask import Mask
from sam.wrappers import layers, unwrapped

AscentGradient = Literal["replica", "synchronised"]


@dataclass(frozen=True, eq=False)
class Replicas:
    """The replicas of a model under DistributedDataParallel, seen from one of them.

    DDP averages the gradients of the final pass with equal weights, whatever the sizes of the shards; so do the
    collectives here. DDP broadcasts rank 0's running statistics at the first pass; those of other ranks stay their own
    where the step keeps that pass's statistics still (``norm_statistics="second"``).

    Attributes:
        wrapper: this process's wrapper.
        ascent_gradient: "replica": every replica ascends along the gradient of its own shard, without communication;
            "synchronised": all along the average of these gradients, so that eps is the same everywhere.
    """

    wrapper: DistributedDataParallel
    ascent_gradient: AscentGradient

    @property
    def place(self) -> tuple[int, int]:
        """This process's rank and the number of replicas."""
        group = self.wrapper.process_group
        return dist.get_rank(group), dist.get_world_size(group)

    def apart(self) -> AbstractContextManager[None]:
        """Inside, DDP neither averages gradients nor waits for them to come."""
        return self.wrapper.no_sync()

    def ascent(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """What this replica ascends along, from its own gradients."""
        if self.ascent_gradient == "replica":
            return list(gradients)
        averaged: dict[int, Tensor] = {}
        for dtype in {g.dtype for g in gradients}:
            of_dtype = [i for i, g in enumerate(gradients) if g.dtype == dtype]
            flat = torch.cat([gradients[i].reshape(-1) for i in of_dtype])  # one message, not one per tensor
            self._reduce(flat, dist.ReduceOp.SUM)
            flat.div_(dist.get_world_size(self.wrapper.process_group))
            parts = torch.split(flat, [gradients[i].numel() for i in of_dtype])
            averaged |= {i: part.view(gradients[i].shape) for i, part in zip(of_dtype, parts, strict=True)}
        return [averaged[i] for i in range(len(gradients))]

    def agree(self, finite: Tensor) -> Tensor:
        """Whether ``finite`` (0-dim bool) is True on every replica."""
        everywhere = finite.to(torch.int32)
        self._reduce(everywhere, dist.ReduceOp.MIN)
        return everywhere.bool()

    def check_same(self, mask: Mask) -> None:
        """Refuse masks that differ between replicas; every replica must call this.

        Raises:
            InputError: on every replica alike.
        """
        group = self.wrapper.process_group
        device = next(self.wrapper.parameters()).device
        own = torch.tensor(list(bytes.fromhex(mask.digest())), dtype=torch.uint8, device=device)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        first, *others = [bytes(t.tolist()).hex() for t in gathered]
        for rank, digest in enumerate(others, start=1):
            if digest != first:
                raise InputError(
                    f"the replicas have different masks: digest {first[:16]} on rank 0, {digest[:16]} on rank {rank}; "
                    "build the mask on one rank, save it, and load it on the others"
                )

    def _reduce(self, tensor: Tensor, how: dist.ReduceOp.RedOpType) -> None:
        dist.all_reduce(tensor, op=how, group=self.wrapper.process_group)


def find_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around a model: part of what is given, or alive elsewhere in this process.

    Raises:
        InputError: it was made with ``static_graph``, there are several, or parts of the model are wrapped one by one.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    bare = unwrapped(model)
    for name, module in bare.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise InputError(f"only {name} is wrapped in DistributedDataParallel; wrap the whole model")
    found = [layer for layer in layers(model) if isinstance(layer, DistributedDataParallel)]
    # A model whose wrapper only the loss function knows: without no_sync() the first pass would upset DDP.
    found = found or [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), DistributedDataParallel) and unwrapped(thing) is bare
    ]
    if not found:
        return None
    if len(found) > 1:
        raise InputError(
            f"{len(found)} DistributedDataParallel wrappers of this model are alive; give SAM the right one"
        )
    if found[0].static_graph:
        raise InputError("static_graph=True fixes what is averaged in every pass, but the first one of a step is not")
    return found[0]


def check_not_sharded(model: nn.Module) -> None:
    """Refuse parameters that are split over processes.

    Raises:
        InputError: DTensors (``fully_shard``, tensor parallelism), or FullyShardedDataParallel.
    """
    # A sharded parameter exists only where these have been imported; importing them takes most of a second.
    tensor, fsdp = sys.modules.get("torch.distributed.tensor"), sys.modules.get("torch.distributed.fsdp")
    what = None
    if tensor is not None and any(isinstance(p, tensor.DTensor) for p in model.parameters()):
        what = "DTensors (fully_shard or tensor parallelism)"
    elif fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        what = "parts of FullyShardedDataParallel's flat parameters"
    if what is not None:
        raise InputError(
            f"the parameters are {what}: a mask and the norm of a perturbation are of whole tensors, which no process "
            "holds; use DistributedDataParallel"
        )
