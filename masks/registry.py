"""The registry of masks: what exists, where it comes from, and how it is built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from torch import Tensor

from masks.budget import Budget
from masks.context import MaskContext
from masks.errors import BuilderError, MaskError, unknown_name
from masks.mask import Mask, Provenance
from masks.options import Option, options_of, resolve_options
from masks.params import model_digest
from masks.schedule import EVERY_EPOCH, INIT, Schedule
from masks.select import select

Kind = Literal["budgeted", "natural"]
ENTRY_POINT_GROUP = "sam_masks.masks"

ScoreFn = Callable[..., Sequence[Tensor]]
BuilderFn = Callable[..., Mask]


@dataclass(frozen=True)
class MaskInfo:
    """What the registry knows of a mask.

    Attributes:
        name: its name.
        kind: "budgeted" keeps exactly as many coordinates as its budget says; "natural" keeps what it keeps
            and is never called matched.
        summary: one line.
        source: the paper or code that it follows.
        origin: who registered it.
        options: what can be set.
        needs_data: whether it is scored on batches.
        schedule: when it is built unless told otherwise.
        build: the builder.
    """

    name: str
    kind: Kind
    summary: str
    source: str
    origin: str
    options: tuple[Option, ...]
    needs_data: bool
    schedule: Schedule
    build: BuilderFn

    def resolve_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values: those given, converted, and the defaults of the others.

        Raises:
            MaskError: an unknown option (the nearest are offered) or a value of another type.
        """
        return resolve_options(self.options, options, f"mask {self.name}")


_registry: dict[str, MaskInfo] = {}
_contested: dict[str, str] = {}
_broken: dict[str, str] = {}
_origin: list[str] = []
_builtins_loaded = False
_discovered = False


def _options(fn: Callable[..., Any], reserved: int) -> tuple[Option, ...]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = list(inspect.signature(fn).parameters.values())[:reserved]
    if [p.kind in positional for p in first] != [True] * reserved:
        raise MaskError(f"{fn.__qualname__} must take {('context', 'context and budget')[reserved - 1]} by position")
    return options_of(fn, skip=reserved)


def _origin_of(fn: Callable[..., Any]) -> str:
    if _origin:
        return _origin[-1]
    if fn.__module__.startswith("masks.builders."):
        return "sam-masks"
    _load_builtins()  # whoever comes first, the names of the built-in masks are taken
    return fn.__module__


def _register(info: MaskInfo, fn: Callable[..., Any]) -> None:
    old = _registry.get(info.name)
    if old is not None:
        same = getattr(old.build, "__wrapped__", old.build)
        if (same.__module__, same.__qualname__) != (fn.__module__, fn.__qualname__):
            raise MaskError(
                f"mask {info.name!r} is already registered by {old.origin}; {info.origin} must rename its own"
            )
    if not info.name.isidentifier() or info.name != info.name.lower():
        raise MaskError(f"a mask's name must be snake_case, got {info.name!r}")
    _registry[info.name] = info


def register_mask(
    name: str,
    *,
    kind: Kind,
    summary: str,
    source: str,
    needs_data: bool = False,
    schedule: Schedule = INIT,
) -> Callable[[BuilderFn], BuilderFn]:
    """Register a full builder: ``fn(context, budget, *, option: type = default, ...) -> Mask``.

    ``budget`` is a :class:`~masks.budget.Budget` for the kind "budgeted" and None for "natural".

    Raises:
        MaskError: the name is taken (both origins are named), is not snake_case, or an option has no type or
            default.
    """

    def decorate(fn: BuilderFn) -> BuilderFn:
        info = MaskInfo(name, kind, summary, source, _origin_of(fn), _options(fn, 2), needs_data, schedule, fn)
        _register(info, fn)
        return fn

    return decorate


_SCORE_OPTIONS = (
    Option("order", Literal["largest", "smallest"], "largest"),
    Option("scope", Literal["global", "per_layer"], "global"),
    Option("exclude_norm", bool, False),
)


def register_score(
    name: str,
    *,
    summary: str,
    source: str,
    needs_data: bool = False,
    schedule: Schedule = EVERY_EPOCH,
) -> Callable[[ScoreFn], ScoreFn]:
    """Register a score: ``fn(context, *, option: type = default, ...) -> one tensor per parameter``.

    The mask keeps exactly as many coordinates as its budget says, those of the largest scores. Every score
    mask also has the options ``order`` ("largest", "smallest"), ``scope`` ("global", "per_layer": every
    tensor at the same density) and ``exclude_norm`` (keep no coordinate of a normalization layer).

    Raises:
        MaskError: see :func:`register_mask`.
    """

    def decorate(fn: ScoreFn) -> ScoreFn:
        def build(
            context: MaskContext, budget: Budget, *, order: str, scope: str, exclude_norm: bool, **options: Any
        ) -> Mask:
            parts = select(
                context.table,
                fn(context, **options),
                budget.num_kept,
                largest=order == "largest",
                per_layer=scope == "per_layer",
                eligible=[not (exclude_norm and row.is_norm) for row in context.table],
            )
            return Mask(context.table, parts)

        build.__wrapped__ = fn  # type: ignore[attr-defined]
        own = _options(fn, 1)
        for option in own:
            if option.name in {common.name for common in _SCORE_OPTIONS}:
                raise MaskError(f"score {name!r} cannot have an option {option.name}: every score mask has one")
        info = MaskInfo(
            name, "budgeted", summary, source, _origin_of(fn), own + _SCORE_OPTIONS, needs_data, schedule, build
        )
        _register(info, fn)
        return fn

    return decorate


@contextmanager
def _registering_as(origin: str) -> Iterator[None]:
    """Registrations inside belong to ``origin``; if anything fails, none of them stays."""
    before = dict(_registry)
    _origin.append(origin)
    try:
        yield
    except BaseException:
        _registry.clear()
        _registry.update(before)
        raise
    finally:
        _origin.pop()


def _load_builtins() -> None:
    global _builtins_loaded
    if not _builtins_loaded:
        with _registering_as("sam-masks"):
            importlib.import_module("masks.builders")
        _builtins_loaded = True


def _points() -> list[EntryPoint]:
    return sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: (p.name, p.value))


def _origin_of_point(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version} ({point.value})" if point.dist else point.value


def _discover() -> None:
    """Import the built-in masks and, once, the plugins of other distributions."""
    global _discovered
    if _discovered:
        return
    _load_builtins()
    _discovered = True
    for point in _points():
        origin = _origin_of_point(point)
        before = set(_registry)
        try:
            with _registering_as(origin):
                point.load()
        except MaskError as error:
            _broken[origin] = str(error)
            _contested.update({name: str(error) for name in before if f"mask {name!r} is already" in str(error)})
        except Exception as error:  # whatever a plugin raises must not break the others
            _broken[origin] = f"failed to import: {type(error).__name__}: {error}"


def load_plugin(module: str) -> None:
    """Import a module that registers masks.

    Raises:
        MaskError: it cannot be imported or takes a name that is already used; none of its masks is kept.
    """
    _discover()
    try:
        with _registering_as(module):
            importlib.import_module(module)
    except MaskError as error:
        raise MaskError(f"plugin {module}: {error}") from None
    except Exception as error:
        raise MaskError(f"plugin {module} failed to import: {type(error).__name__}: {error}") from None


def broken_plugins() -> dict[str, str]:
    """Installed plugins that could not be used, with the reason."""
    _discover()
    return dict(_broken)


def installed_plugins() -> tuple[str, ...]:
    """Origins of the installed plugins, broken ones included: distribution, version and module."""
    return tuple(map(_origin_of_point, _points()))


def list_masks() -> tuple[MaskInfo, ...]:
    """All registered masks, by name."""
    _discover()
    return tuple(info for _, info in sorted(_registry.items()))


def mask_info(name: str) -> MaskInfo:
    """The registry's entry for a name.

    Raises:
        MaskError: unknown (the nearest names are offered), or claimed by two origins.
    """
    _discover()
    if name in _contested:
        raise MaskError(f"{_contested[name]}, or be uninstalled, before {name!r} can be used")
    if name not in _registry:
        message = f"{unknown_name('mask', name, _registry)}; one of your own is known with --plugin MODULE"
        broken = "".join(f"; plugin {origin} {reason}" for origin, reason in _broken.items())
        raise MaskError(message + broken)
    return _registry[name]


def build_mask(
    name: str, context: MaskContext, budget: Budget | None = None, options: Mapping[str, Any] | None = None
) -> Mask:
    """Build a registered mask.

    Args:
        name: its name.
        context: the model and what is known of it; it is left as it is.
        budget: required for budgeted masks, refused for masks of natural size.
        options: see ``sam-masks masks``.

    Returns:
        The mask, with its provenance.

    Raises:
        MaskError: an unknown name or option, a missing, superfluous or unreachable budget, or missing data.
        BuilderError: a builder that did not keep what its budget says, or did not return a mask of the model.
    """
    info = mask_info(name)
    resolved = info.resolve_options(options or {})
    if info.kind == "natural" and budget is not None:
        raise MaskError(f"mask {name} has a natural size and takes no budget")
    if info.kind == "budgeted":
        if budget is None:
            raise MaskError(f"mask {name} needs a budget: a density, or a mask to match")
        if budget.numel != context.table.numel:
            raise MaskError(f"the budget counts {budget.numel} coordinates, the model has {context.table.numel}")
    if info.needs_data and not context.batches:
        raise MaskError(f"mask {name} is scored on data, and none was given")
    state = model_digest(context.model)
    mask = info.build(context, budget, **resolved)
    if not isinstance(mask, Mask):
        raise BuilderError(f"the builder of mask {name} ({info.origin}) returned {type(mask).__name__}, not a Mask")
    try:
        context.table.check_same(mask.table, f"the builder of mask {name} ({info.origin}) used another model's table")
    except MaskError as error:
        raise BuilderError(str(error)) from None
    if budget is not None and mask.num_kept != budget.num_kept:
        raise BuilderError(
            f"the builder of mask {name} ({info.origin}) kept {mask.num_kept} coordinates, "
            f"its budget is {budget.num_kept}"
        )
    provenance = Provenance(
        builder=name,
        options=resolved,
        seed=context.seed,
        model_digest=state,
        built_at=context.built_at,
        kind=info.kind,
    )
    return replace(mask, provenance=provenance)
