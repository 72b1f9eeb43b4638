"""The final pass without what no perturbed weight reaches: its forward operations are not computed a second time.

Both forward passes of a step run the whole Python code of the loss function. While the first one runs, every tensor
that depends on nothing but the batch, unperturbed weights and buffers gets a *value number*: a name for how it came
about, as compilers number values to find equal expressions (Cocke and Schwartz 1970, Programming Languages and Their
Compilers; Alpern, Wegman and Zadeck 1988, POPL). Where the final pass asks for an operation with the same number, it
gets the tensor that the first one computed; so nothing need be known of the model, and no cut be declared. Whatever
cannot be numbered is computed: what depends on a perturbed weight, on random numbers, on memory that is not known.

Autograd lies above: it records the final pass as ever, so gradients are those of all parameters, and nothing of the
first pass's graph is kept. Every number is the same, bit for bit, with and without.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_BATCH_NORMS = frozenset({"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"})
_MEAN, _VARIANCE, _TRAINING, _MOMENTUM = 3, 4, 5, 6
"""Their arguments; in training the first two are changed without a word of it in the schema."""

_UNSAVED = {"aten::relu": _BATCH_NORMS | {"aten::add"}, "aten::add": _BATCH_NORMS}
"""Operators that do without their arguments in the backward pass, and by which operators the arguments are computed
again: to hold them would take memory that autograd gives back, and as much time."""


@dataclass(frozen=True)
class _Facts:
    """What an operator's schema says.

    Attributes:
        view: it only looks at the memory of an argument in another way.
        written: positions, or names, of the arguments that it changes.
        filled: it fills the memory that it returns, from tensors.
        random: it may draw random numbers.
        dropout: position of the argument without which it draws none; None where there is no such argument.
        product: it is a matrix product or a convolution.
    """

    view: bool
    written: tuple[int | str, ...]
    filled: bool
    random: bool
    dropout: int | None
    product: bool

    def repeatable(self, args: Sequence[Any]) -> bool:
        """Whether its results depend on its arguments alone."""
        draws = self.random and (self.dropout is None or (len(args) > self.dropout and args[self.dropout] != 0))
        return self.filled and not draws


@cache
def _facts(func: Any) -> _Facts | None:
    """None for what has no schema."""
    if not isinstance(func, OpOverload):
        return None
    schema = func._schema
    written = tuple(
        argument.name if argument.kwarg_only else i
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    name = schema.name.removeprefix("aten::")
    names = [argument.name for argument in schema.arguments]
    return _Facts(
        view=not written and any(result.alias_info is not None for result in schema.returns),
        written=written,
        # Memory made to be filled may be filled by code that torch does not see.
        filled=name != schema.name
        and not name.startswith(("empty", "new_"))
        and not name.endswith("_like")
        and any("Tensor" in str(argument.type) for argument in schema.arguments),
        random=torch.Tag.nondeterministic_seeded in func.tags,
        dropout=names.index("dropout_p") if "dropout_p" in names else None,
        product=func.overloadpacket in flop_registry,
    )


class _Unknown(Exception):
    """A tensor without a value number is among the arguments."""


@dataclass(eq=False)
class _Call:
    """An operation of the first pass.

    Attributes:
        operator: its name.
        key: operator and arguments; None where these have no numbers.
        held: what it gave, apart from autograd; None where it must be computed again.
    """

    operator: str
    key: object
    held: Any = None


@dataclass(frozen=True, eq=False)
class _Value:
    """What a storage holds.

    Attributes:
        alive: while it is here no other storage gets the same address.
        number: which operation filled it, counted from the beginning, and which of its results it is.
        version: of its tensors, as autograd counts changes: another one means a change that was not seen.
    """

    alive: StorageWeakRef
    number: tuple[int, int]
    version: int


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One step's operations: noted in the clean pass, given back in the final one.

    Args:
        known: tensors that no pass changes unseen: weights outside the mask, buffers, the batch.
        kept_still: the running statistics that the final pass leaves as they are; a BatchNorm with others is computed
            again, for its effect on them.

    Attributes:
        products: matrix products and convolutions of the final pass.
        reused: how many of them were not computed again.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let what is compiled within the loss function be compiled as without this mode."""
        return True

    def __init__(self, known: Iterable[Tensor], kept_still: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive = list(known)  # so that their addresses stay theirs
        self._known = {address_of(tensor): i for i, tensor in enumerate(self._alive) if address_of(tensor)}
        self._kept_still = {address_of(tensor) for tensor in kept_still}
        self._calls: list[_Call] = []
        self._holders: dict[int, list[_Call]] = {}
        self._values: dict[int, _Value] = {}
        self._next: int | None = None
        self._recorded = False
        self.products = self.reused = 0

    @contextmanager
    def during(self, role: str) -> Iterator[None]:
        """Around the forward computation of a pass; only the first clean and the first final one matter."""
        if role == "clean" and not self._recorded:
            self._recorded = True
        elif role == "final" and self._recorded and self._next is None:
            self._next, self._values, self._holders = 0, {}, {}
        else:
            yield
            return
        with self:
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        facts = _facts(func)
        if facts is None:
            out = func(*args, **kwargs)
            self._forget([args, kwargs, out])
            return out
        if facts.view:  # costs nothing; its result lies in numbered memory, or does not
            return func(*args, **kwargs)
        self.products += facts.product and self._next is not None
        written = tensors_in([kwargs.get(i) if isinstance(i, str) else args[i] for i in facts.written])
        normalises = func._schema.name in _BATCH_NORMS and args[_TRAINING]
        key = None
        if facts.repeatable(args) and not any(address_of(tensor) in self._known for tensor in written):
            key = self._key(func, args, kwargs, skip=(_MEAN, _VARIANCE, _MOMENTUM) if normalises else ())
        out, number = self._call(key, func, args, kwargs)
        if self._next is None and key is not None and not written:
            if func._schema.name in _UNSAVED:
                for tensor in tensors_in(args):
                    self._release(address_of(tensor), _UNSAVED[func._schema.name])
            means = tensors_in(args[_MEAN : _VARIANCE + 1]) if normalises else []
            if self._kept_still.issuperset(map(address_of, means)):
                self._hold(out)
        for tensor in written:
            self._release(address_of(tensor))
        if normalises:
            self._forget(args[_MEAN : _VARIANCE + 1])
        if number is None:
            self._forget([written, out])
        else:
            self._number(written or tensors_in(out), number, changed=bool(written))
        return out

    def _call(self, key: object, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int | None]:
        """The results of an operation, and their number: its place in the order of operations."""
        if self._next is None:
            self._calls.append(_Call(func._schema.name, key))
            return func(*args, **kwargs), None if key is None else len(self._calls) - 1
        number = self._next
        self._next += 1
        if key is None or number >= len(self._calls) or self._calls[number].key != key:
            return func(*args, **kwargs), None
        held, self._calls[number].held = self._calls[number].held, None
        if held is None:
            return func(*args, **kwargs), number
        self.reused += func.overloadpacket in flop_registry
        return held, number

    def _key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], skip: Sequence[int]) -> object:
        """The operator with the numbers and forms of its arguments; None where one has no number."""
        try:
            positional = [None if i in skip else self._describe(value) for i, value in enumerate(args)]
            return func, positional, {name: self._describe(value) for name, value in kwargs.items()}
        except _Unknown:
            return None

    def _describe(self, value: Any) -> object:
        if isinstance(value, Tensor):
            address = address_of(value)
            found = self._values.get(address)
            if found is None and address in self._known:
                number = (-1 - self._known[address], value._version)
            elif found is not None and value._version == found.version:
                number = found.number
            else:
                self._release(address)
                raise _Unknown
            return number, value.storage_offset(), value.shape, value.stride(), value.dtype
        if isinstance(value, (list, tuple)):
            return [self._describe(item) for item in value]
        if isinstance(value, torch.Generator):
            raise _Unknown
        return type(value), repr(value) if isinstance(value, float) else value  # -0.0 is not 0.0

    def _hold(self, out: Any) -> None:
        """Keep the results of the last operation for the final pass."""
        call = self._calls[-1]
        call.held = _apart(out)
        for tensor in tensors_in(out):
            self._holders.setdefault(address_of(tensor), []).append(call)

    def _release(self, address: int, operators: Collection[str] | None = None) -> None:
        """Hold no longer what lies there, if one of these operators computed it; None: whichever did."""
        for call in self._holders.get(address, []):
            if operators is None or call.operator in operators:
                call.held = None

    def _number(self, tensors: Sequence[Tensor], number: int, *, changed: bool) -> None:
        for i, tensor in enumerate(tensors):
            storage = tensor.untyped_storage()
            # Autograd counts a change in place once it has its result.
            alive = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._values[storage._cdata] = _Value(alive, (number, i), tensor._version + changed)

    def _forget(self, found: Any) -> None:
        for tensor in tensors_in(found):
            address = address_of(tensor)
            self._values.pop(address, None)
            self._known.pop(address, None)


def address_of(tensor: Tensor) -> int:
    """Of a tensor's storage; 0 where it has none of the plain kind."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return 0
    if tensor.dtype.is_complex or tensor.is_inference():
        return 0
    address: int = tensor.untyped_storage()._cdata
    return address


def tensors_in(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found] if address_of(found) else []
    if isinstance(found, dict):
        found = found.values()
    elif not isinstance(found, (list, tuple)):
        return []
    return [tensor for item in found for tensor in tensors_in(item)]


def _apart(out: Any) -> Any:
    """The same memory in tensors that autograd has not seen."""
    if isinstance(out, Tensor):
        return out.detach()
    return type(out)(_apart(item) for item in out) if isinstance(out, (list, tuple)) else out
