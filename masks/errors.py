"""The errors that this project raises for a user's input.

Each says what was asked, what was found, and what to do; the command line prints it as one line and exits
with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What a user asked for cannot be done; the message is for the user."""


class MaskError(InputError):
    """A mask, a budget or a mask builder cannot do what was asked of it."""


class BuilderError(MaskError):
    """A registered builder broke its contract: the fault of its author, not of what was asked."""


class MaskFileError(MaskError):
    """A mask file is truncated, damaged or not a mask file."""


_MOST_LISTED = 24


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that is not known, with the nearest known ones, or the first ones of them all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    listed = ", ".join(known[:_MOST_LISTED]) or "none"
    more = f", ... ({len(known)} in all)" if len(known) > _MOST_LISTED else ""
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {listed}{more}"
    return f"unknown {kind} {name!r}; {hint}"
