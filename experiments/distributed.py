"""One run over several processes: who they are, how they agree, and how all of them end when one does.

Each process (rank) trains a replica of the model on its shard of every batch, under DistributedDataParallel; rank 0
leads: it reads, measures, writes and prints. A launcher starts the processes and says in the environment who each one
is (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``: torchrun and most schedulers).
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, TextIO, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from experiments.build import pick_device
from experiments.config import RunConfig
from masks.errors import InputError

T = TypeVar("T")

_MEET = timedelta(minutes=10)
_WAIT = timedelta(days=30)
"""For the others while rank 0 measures or writes."""
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0
"""For a rank that has been told of another one's end, to end by itself, and for the first to let the others hear."""
_END = "sam-masks/end"
_HEARD = "sam-masks/heard"


@dataclass(frozen=True)
class Place:
    """Who this process is.

    Attributes:
        rank: from 0 to ``size - 1``.
        size: number of processes on all machines.
        local_rank: rank among those of this machine.
    """

    rank: int
    size: int
    local_rank: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place | None:
        """What a launcher says; None for a process that is alone.

        Raises:
            InputError: it says half of it, or something that cannot be.
        """
        if not {"RANK", "WORLD_SIZE"} & environment.keys():
            return None
        found = {}
        for name, default in (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", "0")):
            text = environment.get(name, default)
            if text is None or not (text.isascii() and text.isdigit()):
                said = "is not set" if text is None else f"is {text!r}"
                raise InputError(f"a launcher sets RANK and WORLD_SIZE to whole numbers; here {name} {said}")
            found[name] = int(text)
        if found["RANK"] >= found["WORLD_SIZE"]:
            raise InputError(f"RANK must be below WORLD_SIZE; found {found['RANK']} and {found['WORLD_SIZE']}")
        if found["WORLD_SIZE"] == 1:
            return None
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise InputError(f"WORLD_SIZE is {found['WORLD_SIZE']}, and {name}, where rank 0 is met, is not set")
        return cls(found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"])


class RankFailed(RuntimeError):
    """Another rank failed with an error that is not the user's."""


@dataclass(frozen=True)
class _End:
    """Why all ranks end.

    Attributes:
        rank: which one was the first.
        line: what it told the user.
        code: exit code.
        text: the error itself.
        refused: whether it is the user's.
    """

    rank: int
    line: str
    code: int
    text: str
    refused: bool


def attempt(store: Store, rank: int, size: int) -> str:
    """A name that these processes alone agree on, as torchrun keeps its store, and what was said in it, when it starts
    failed processes again.

    Each rank asks rank 0 under a name of its own, which no earlier process answers to. (torchrun's count of restarts
    will not do: machines count their own.)

    Raises:
        RuntimeError: the others did not come within :data:`_MEET`.
    """
    own = uuid4().hex
    if rank:
        store.set(f"sam-masks/asks/{rank}", own)
        name = store.get(f"sam-masks/answer/{own}").decode()
        store.set(f"{name}/{rank}", "")
        return name
    waiting, until = {*range(1, size)}, time.monotonic() + _MEET.total_seconds()
    while waiting:
        for other in sorted(waiting):
            asks = f"sam-masks/asks/{other}"
            if store.check([f"{own}/{other}"]):
                waiting.remove(other)
            elif store.check([asks]):
                store.set(f"sam-masks/answer/{store.get(asks).decode()}", own)
        if waiting and time.monotonic() > until:
            raise RuntimeError(f"no word of rank {min(waiting)}")
        time.sleep(_POLL_SECONDS / 4)
    return own


class Team:
    """The processes that train one model together, seen from one of them. All methods but those named below must be
    called by every rank, in the same order.

    Control messages go over gloo whatever the device, with a time limit of days: rank 0 may measure for hours.

    Args:
        place: who this process is.

    Raises:
        InputError: the others did not come.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.rank, self.size = place, place.rank, place.size
        try:
            # Not in this thread, in which Python hears signals only between calls.
            self._store = ThreadPoolExecutor(1).submit(self._meet).result()
            self._listener = self._store.clone()
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            why = str(error).partition("\n")[0]
            raise InputError(f"rank {self.rank} of {self.size} did not meet the others at {where}: {why}") from None
        self._end: _End | None = None
        self._lock = threading.Lock()
        self._left = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _meet(self) -> Store:
        store, *_ = next(rendezvous("env://", timeout=_MEET))
        store = PrefixStore(attempt(store, self.rank, self.size), store)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=_WAIT)
        return store

    @property
    def leads(self) -> bool:
        """Whether this is rank 0. Any rank may ask alone."""
        return self.rank == 0

    # -- training -------------------------------------------------------------------------------------------

    def device(self, name: str) -> torch.device:
        """The device of this rank: its own one of the machine's CUDA devices. Any rank may ask alone.

        Raises:
            InputError: one device for all, or fewer devices than ranks on this machine.
        """
        device = pick_device(name)
        if device.type != "cuda":
            return device
        if device.index is not None:
            raise InputError(f"device {name} would be shared by {self.size} processes; say cuda, and each has its own")
        local, found = self.place.local_rank, torch.cuda.device_count()
        if local >= found:
            raise InputError(f"LOCAL_RANK is {local}; this machine has {found} CUDA devices, one for each process")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def wrapped(self, model: nn.Module, device: torch.device) -> DistributedDataParallel:
        """The model's replica, with rank 0's weights and buffers.

        Without ``find_unused_parameters`` DDP deals the gradients out to other buckets after its first step, also
        after the first step of a resumed run; with 3 replicas or more the order of a sum depends on the bucket, and
        resuming would not be bitwise.
        """
        cuda = device.type == "cuda"
        return DistributedDataParallel(
            model,
            device_ids=[device] if cuda else None,
            process_group=dist.new_group(backend="nccl" if cuda else "gloo", timeout=timedelta(minutes=30)),
            find_unused_parameters=True,
        )

    def shard(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch whose length is a multiple of ``size``. Any rank may ask alone."""
        each = len(batch) // self.size
        return batch[self.rank * each : (self.rank + 1) * each]

    # -- agreement ------------------------------------------------------------------------------------------

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is set on some rank."""
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in found.tolist())

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks, float64 on the CPU."""
        total = values.double().cpu().clone()
        dist.all_reduce(total)
        return total / self.size

    def by_leader(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, where alone it is called, on all ranks.

        Raises:
            InputError: it did, on rank 0, and so on all.
        """
        made: list[Any] = [None, None]
        if self.leads:
            try:
                made[0] = make()
            except InputError as error:
                made[1] = error
        dist.broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        found: T = made[0]
        return found

    def gather(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's plain values and tensors, these on the CPU; on rank 0, and nothing on the others."""
        buffer = io.BytesIO()
        torch.save(own, buffer)
        found: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(buffer.getvalue(), found)
        return [torch.load(io.BytesIO(part), map_location="cpu", weights_only=True) for part in found or []]

    def wait(self) -> None:
        """Until all ranks are here; signals are heard meanwhile."""
        barrier = dist.all_reduce(torch.zeros(1), async_op=True)
        while not barrier.is_completed():
            time.sleep(0.02)
        barrier.wait()

    # -- the end: any rank may call these alone -----------------------------------------------------------------

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Inside, what a collective raises because another rank has ended becomes that rank's error.

        Raises:
            InputError: the other rank's.
            RankFailed: the other rank's, of another kind.
        """
        try:
            yield
        except RuntimeError as error:
            until = time.monotonic() + _GRACE_SECONDS / 2
            while self._end is None and time.monotonic() < until:
                time.sleep(_POLL_SECONDS / 4)
            if self._end is None and not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            if self._end is None:
                raise RankFailed("another rank ended without a word, as if killed or out of memory") from error
            if self._end.refused:
                raise InputError(self._end.text) from error
            raise RankFailed(f"rank {self._end.rank}: {self._end.text}") from error

    def is_first(self, error: BaseException, line: str, code: int) -> bool:
        """Whether no other rank has ended with an error before; it is then told to them."""
        own = _End(self.rank, line, code, _text(error), isinstance(error, InputError))
        try:
            said = json.loads(self._store.compare_set(_END, "", json.dumps(asdict(own))))
        except RuntimeError:  # with the store rank 0 has gone, and it could not say so
            return self._end is None and self.rank == 1
        if said != asdict(own):
            self._hear(_End(**said))
            return False
        self._left.set()
        return True

    def exit_code(self, own: int) -> int:
        """That of the first rank that ended, as far as this one has heard of it."""
        return own if self._end is None else self._end.code

    def dismiss(self) -> None:
        """Let the others hear of the end before the store that tells them goes."""
        until = time.monotonic() + _GRACE_SECONDS
        with suppress(RuntimeError):
            while self._store.add(_HEARD, 0) < self.size - 1 and time.monotonic() < until:
                time.sleep(_POLL_SECONDS / 4)

    def leave(self) -> None:
        """After the last message of all ranks."""
        self._left.set()
        dist.destroy_process_group()

    def _hear(self, end: _End) -> None:
        with self._lock:
            if self._end is None:
                self._end = end
                with suppress(RuntimeError):
                    self._listener.add(_HEARD, 1)

    def _watch(self) -> None:
        """Hear of another rank's end; a process that is stuck in a collective (NCCL) is then ended from here."""
        code = 1
        while not self._left.wait(_POLL_SECONDS):
            try:
                if not self._listener.check([_END]):
                    continue
                end = _End(**json.loads(self._listener.get(_END)))
                self._hear(end)
                code = end.code
            except RuntimeError:  # the store has gone, and rank 0 with it
                pass
            if not self._left.wait(_GRACE_SECONDS):
                os._exit(code)


def device_for(name: str, team: Team | None) -> torch.device:
    """The device of this process; see :func:`experiments.build.pick_device` and :meth:`Team.device`."""
    return pick_device(name) if team is None else team.device(name)


def placed(config: RunConfig, team: Team | None) -> RunConfig:
    """The configuration with the number of processes that there are.

    Raises:
        InputError: it says another one, or its batches cannot be dealt out to so many.
    """
    size = 1 if team is None else team.size
    if config.world_size not in (None, size):
        raise InputError(
            f"the configuration says world_size {config.world_size}, and processes that train together: {size}; start "
            f"it with torchrun --nproc-per-node {config.world_size}, or leave world_size out"
        )
    return replace(config, world_size=size)


_current: list[Team] = []


def current() -> Team | None:
    """The team of this process, inside :func:`together`; None for a process that is alone."""
    return _current[0] if _current else None


def together(place: Place, work: Callable[[], int], ending: Callable[[BaseException], tuple[str, int]]) -> int:
    """Do a command's work as one of several processes; only rank 0 prints, and one error line is printed by one rank.

    An error ends the process at once, as the others wait for messages that will not come, and so would a tidy end.

    Args:
        place: who this process is.
        work: of the command; returns its exit code.
        ending: what the user is told of an error, and the exit code.

    Returns:
        The exit code.
    """
    team = None
    with _voice() as stderr, open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (sys.stdout, stderr) if place.rank == 0 else (nowhere, nowhere)
        with redirect_stdout(out), redirect_stderr(err):
            try:
                team = Team(place)
                _current.append(team)
                code = work()
                team.wait()
                team.leave()
                return code
            except (Exception, KeyboardInterrupt) as error:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it to all once one has ended
                line, code = ending(error)
                if team is None:
                    print(line, file=stderr if place.local_rank == 0 else nowhere, flush=True)
                elif team.is_first(error, line, code):
                    print(line, file=stderr, flush=True)
                    team.dismiss()
                else:
                    code = team.exit_code(code)
                with suppress(OSError):
                    sys.stdout.flush()
                os._exit(code)
            finally:
                _current.clear()


@contextmanager
def _voice() -> Iterator[TextIO]:
    """Where errors are printed. Inside, what torch itself writes from outside Python, some lines for each lost
    connection, goes nowhere, unless the user wants to see where an error comes from."""
    if os.environ.get("SAM_MASKS_TRACEBACK"):
        yield sys.stderr
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, open(kept, "w", encoding="utf-8") as voice:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield voice
        finally:
            voice.flush()
            os.dup2(kept, 2)


def _text(error: BaseException) -> str:
    text = str(error) if isinstance(error, (InputError, RankFailed)) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
