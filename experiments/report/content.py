"""What a report says, before it is written as HTML or Markdown: sections of plain text, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from experiments.plot.style import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning is one that must not be overlooked."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Notes:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        columns: their names.
        rows: cells, as many as columns.
        grouped: whether neighbouring cells of the first column that are equal are one.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    grouped: bool = False

    @property
    def spans(self) -> tuple[int, ...]:
        """For each row, over how many rows its first cell goes; 0 where it is part of the one above."""
        names = [row[0] for row in self.rows]
        out = [1] * len(names)
        for i in reversed(range(1, len(names))):
            if self.grouped and names[i] == names[i - 1]:
                out[i - 1], out[i] = out[i - 1] + out[i], 0
        return tuple(out)


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: of its file, without an ending; unique in the report.
        title: one line: what it shows.
        caption: title, n, what bands and marks are.
        svg: the figure.
    """

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Absent:
    """A figure that the data do not allow: what, why, and the command or option that adds it."""

    what: str
    why: str
    remedy: str

    @property
    def text(self) -> str:
        """One line."""
        return f"{self.what}: not shown, because {self.why.rstrip('.')}. To have it: {self.remedy.rstrip('.')}."


@dataclass(frozen=True)
class Details:
    """Text as it is, folded away on a page."""

    summary: str
    text: str


Block = Text | Notes | Grid | Picture | Absent | Details


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]


def picture(figure: Figure, name: str, title: str, caption: str) -> Picture:
    """A figure with its words; the caption goes on from the title."""
    return Picture(name, title, f"{title}. {caption}", svg(figure, name, title, caption))


def grid(table: pd.DataFrame, *, grouped: bool = False) -> Grid:
    """A table of text."""
    rows = tuple(tuple(map(str, row)) for row in table.itertuples(index=False))
    return Grid(tuple(map(str, table.columns)), rows, grouped)


def sentences(items: Sequence[str]) -> Notes:
    """Each with one full stop."""
    return Notes(tuple(f"{item.rstrip('.')}." for item in items))
