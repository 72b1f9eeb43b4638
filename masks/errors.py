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


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that is not known, with the nearest known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
    return f"unknown {kind} {name!r}; {hint}"
