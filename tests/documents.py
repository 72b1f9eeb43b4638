"""What the tests of README and docs share: the blocks of code in a page, and its commands read as the shell does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from experiments import cli

ROOT = Path(__file__).parents[1]


def blocks(text: str, *languages: str) -> list[str]:
    """The blocks of code in these languages, in order."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def file_of(block: str) -> str | None:
    """The file that a block is saved in, or is added to: a comment in its first line names it."""
    named = re.match(r"# (\w+\.py)$", block, flags=re.MULTILINE)
    return named[1] if named else None


def commands(shell: list[str]) -> list[list[str]]:
    """The words of every command in blocks for a shell, without comments; "&&" ends a command."""
    found: list[list[str]] = []
    for line in "".join(shell).replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if words:
                found.append(words)
    return found


def understood(words: list[str]) -> Any:
    """The options of a command of sam-masks as the command line reads them; it must understand them.

    The word "..." stands for options that the page leaves out.
    """
    assert words[0].endswith("sam-masks")
    parser = cli.build_parser()
    parser.command = words[1]
    given = [cli._underscored(word) for word in words[1:] if word != "..."]
    return parser.parse_args(cli._config_first(given))[words[1]]
