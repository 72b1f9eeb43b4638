"""The registry of methods: the members of the SAM family by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from masks.errors import InputError, unknown_name
from masks.options import Option, options_of, options_text, parse_options, resolve_options
from sam.method import Method

MethodFn = Callable[..., Method]


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method.

    Attributes:
        name: its name.
        summary: one line.
        source: paper and equation.
        passes: forward and backward passes per step, in units of one of the base optimizer's, under a mask that does
            not restrict the first pass: a number, or a formula in the options.
        num_passes: the same as a function of the options; a forward pass alone counts a third.
        state_per_masked: numbers that it keeps from step to step per masked coordinate, in the form of
            :class:`masks.region.Region`: of a tensor of which the mask keeps a tenth or more, but not all, every
            entry is stored. Per parameter under ``norm_scope="full"``.
        state_per_parameter: numbers that it keeps per parameter, masked or not.
        tuned_on: what the defaults come from.
        rho: the default radius.
        limits: which masks, optimizers or entries it does not support, each with the reason.
        preset: from options to the settings of a run that the method fixes, such as its own mask; :class:`sam.SAM`
            refuses others (:attr:`sam.Method.required`).
        needs_model: whether options alone do not make it: it is made for a model, by a function of its module.
        options: what can be set.
        make: from options to the method.
    """

    name: str
    summary: str
    source: str
    passes: str
    num_passes: Callable[..., float] = field(repr=False)
    state_per_masked: int
    state_per_parameter: int
    tuned_on: str
    rho: float
    limits: tuple[str, ...]
    preset: Callable[..., Mapping[str, str]] = field(repr=False)
    needs_model: bool
    options: tuple[Option, ...]
    make: MethodFn = field(repr=False)

    def resolve_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values: those given, converted, and the defaults of the others.

        Raises:
            InputError: an unknown option (the nearest are offered) or a value of another type.
        """
        return resolve_options(self.options, options, f"method {self.name}")


_registry: dict[str, MethodInfo] = {}


def register_method(
    name: str,
    *,
    summary: str,
    source: str,
    passes: str,
    tuned_on: str,
    num_passes: Callable[..., float] | None = None,
    rho: float = 0.05,
    state_per_masked: int = 0,
    state_per_parameter: int = 0,
    limits: Sequence[str] = (),
    preset: Callable[..., Mapping[str, str]] | None = None,
    needs_model: bool = False,
) -> Callable[[MethodFn], MethodFn]:
    """Register a method: ``fn(*, option: type = default, ...) -> Method``.

    Args:
        num_passes: see :class:`MethodInfo`, as for all others; may be left out where ``passes`` is a number.

    Raises:
        InputError: a name that is taken or not snake_case, an option without a type or default.
    """

    def decorate(fn: MethodFn) -> MethodFn:
        old = _registry.get(name)
        if old is not None and (old.make.__module__, old.make.__qualname__) != (fn.__module__, fn.__qualname__):
            raise InputError(f"method {name!r} is already registered by {old.make.__module__}; rename this one")
        if not name.isidentifier() or name != name.lower():
            raise InputError(f"a method's name must be snake_case, got {name!r}")
        _registry[name] = MethodInfo(
            name=name,
            summary=summary,
            source=source,
            passes=passes,
            num_passes=num_passes or _constant(float(passes)),
            state_per_masked=state_per_masked,
            state_per_parameter=state_per_parameter,
            tuned_on=tuned_on,
            rho=rho,
            limits=tuple(limits),
            preset=preset or (lambda **options: {}),
            needs_model=needs_model,
            options=options_of(fn),
            make=fn,
        )
        return fn

    return decorate


def _constant(value: float) -> Callable[..., float]:
    return lambda **options: value


def list_methods() -> tuple[MethodInfo, ...]:
    """All registered methods, by name."""
    importlib.import_module("sam.methods")
    return tuple(info for _, info in sorted(_registry.items()))


def method_info(name: str) -> MethodInfo:
    """The registry's entry for a name.

    Raises:
        InputError: unknown; the nearest names are offered.
    """
    importlib.import_module("sam.methods")
    if name not in _registry:
        raise InputError(unknown_name("method", name, _registry))
    return _registry[name]


@dataclass(frozen=True)
class MethodSpec:
    """A method as it is written down: name and options.

    Attributes:
        name: registry name.
        options: all options, resolved.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", self.info.resolve_options(self.options))

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Read ``name[:option=value...]``, such as ``friendly_sam:sigma=1:decay=0.9``.

        Raises:
            InputError: an unknown name or option, an option given twice, a part without "=".
        """
        return cls(*parse_options(text, "method"))

    def __str__(self) -> str:
        """The text that :meth:`parse` reads; options at their default are left out."""
        return options_text(self.name, self.info.options, self.options)

    @property
    def info(self) -> MethodInfo:
        return method_info(self.name)

    @property
    def preset(self) -> dict[str, str]:
        """Settings of a run that the method fixes."""
        return dict(self.info.preset(**self.options))

    def build(self) -> Method:
        """The method.

        Raises:
            InputError: values that are out of range or do not go together.
        """
        return replace(self.info.make(**self.options), required=self.preset)


def build_method(name: str, **options: Any) -> Method:
    """The method of a name with these options, for :class:`sam.SAM`.

    Raises:
        InputError: an unknown name or option, or a value that is out of range.
    """
    return MethodSpec(name, options).build()
