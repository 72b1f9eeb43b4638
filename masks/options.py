"""Options of what is registered: keyword-only arguments with a type and a default, read from text."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

from masks.errors import MaskError, unknown_name


@dataclass(frozen=True)
class Option:
    """One option: a keyword-only argument with a default and a type."""

    name: str
    type: Any
    default: Any

    @property
    def type_name(self) -> str:
        if get_origin(self.type) is Literal:
            return "|".join(map(str, get_args(self.type)))
        return self.type.__name__ if isinstance(self.type, type) and not get_args(self.type) else str(self.type)

    def convert(self, value: Any, owner: str) -> Any:
        """The value as the option's type; text is read as it would be on the command line.

        Args:
            value: the value or its text.
            owner: whose option it is, such as "mask norm".

        Raises:
            MaskError: it is not of that type.
        """
        converted = _convert(value, self.type)
        if converted is _WRONG:
            raise MaskError(f"option {self.name} of {owner} must be {self.type_name}, got {value!r}")
        return converted


_WRONG = object()


def option_text(value: Any) -> str:
    """An option's value as it is written on the command line: ``true``, ``none``, ``a+b``."""
    if isinstance(value, tuple):
        return "+".join(map(option_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _convert(value: Any, wanted: Any) -> Any:
    origin = get_origin(wanted)
    if origin is Literal:
        same = [arg for arg in get_args(wanted) if type(arg) is type(value) and arg == value]
        return next(iter(same or [arg for arg in get_args(wanted) if option_text(arg) == value]), _WRONG)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None if type(None) in get_args(wanted) else _WRONG
        found = [_convert(value, arm) for arm in get_args(wanted) if arm is not type(None)]
        return next((item for item in found if item is not _WRONG), _WRONG)
    if origin is tuple:
        items = (value.split("+") if value else ()) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            return _WRONG
        arms = get_args(wanted)
        if arms[-1] is Ellipsis:
            arms = arms[:1] * len(items)
        if len(arms) != len(items):
            return _WRONG
        out = tuple(map(_convert, items, arms))
        return _WRONG if _WRONG in out else out
    if wanted is bool:
        return {"true": True, "false": False}.get(str(value).lower(), _WRONG)
    if wanted is str:
        return value if isinstance(value, str) else _WRONG
    if wanted in (int, float) and not isinstance(value, bool):
        try:
            return wanted(value) if wanted is float or str(value) == str(int(value)) else _WRONG
        except (TypeError, ValueError, OverflowError):
            return _WRONG
    return _WRONG


def options_of(fn: Callable[..., Any], *, skip: int = 0) -> tuple[Option, ...]:
    """The options of a function: its arguments after the first ``skip``.

    Raises:
        MaskError: one of them is not keyword-only, or has no type, no default, or a default of another type.
    """
    hints = typing.get_type_hints(fn)
    out = []
    for name, parameter in list(inspect.signature(fn).parameters.items())[skip:]:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty or name not in hints:
            raise MaskError(f"argument {name} of {fn.__qualname__} must be keyword-only, with a type and a default")
        option = Option(name, hints[name], parameter.default)
        out.append(replace(option, default=option.convert(parameter.default, f"{fn.__qualname__} (its default)")))
    return tuple(out)


def resolve_options(options: tuple[Option, ...], given: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """All options with their values: those given, converted, and the defaults of the others.

    Args:
        options: what there is.
        given: what is set.
        owner: whose options they are, such as "mask norm".

    Raises:
        MaskError: an unknown option (the nearest are offered) or a value of another type.
    """
    known = {option.name: option for option in options}
    for name in given:
        if name not in known:
            raise MaskError(unknown_name(f"option of {owner}", name, known))
    return {
        name: option.convert(given[name], owner) if name in given else option.default for name, option in known.items()
    }


def parse_options(text: str, owner: str) -> tuple[str, dict[str, str]]:
    """Read ``name[:option=value...]``; returns the name and the texts of the options.

    Raises:
        MaskError: a part without "=", or an option given twice.
    """
    name, *parts = text.strip().split(":")
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise MaskError(f"option {part!r} of {owner} {name} must be written option=value")
        if key in options:
            raise MaskError(f"option {key} of {owner} {name} is given twice")
        options[key] = value
    return name, options


def options_text(name: str, options: tuple[Option, ...], values: Mapping[str, Any]) -> str:
    """The text that :func:`parse_options` reads; options at their default are left out."""
    defaults = {option.name: option.default for option in options}
    return name + "".join(f":{key}={option_text(value)}" for key, value in values.items() if value != defaults[key])
