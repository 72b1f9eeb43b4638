"""A report as Markdown; figures are the files beside it."""

from __future__ import annotations

import re

from experiments.report.content import Absent, Block, Details, Document, Grid, Notes, Picture, Text

FIGURES = "figures"


def markdown(document: Document) -> str:
    """The report as CommonMark with tables (GitHub's extension); text cannot be read as markup."""
    parts = [f"# {escape(document.title)}"]
    for section in document.sections:
        parts.append(f"## {escape(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that is shown as it is, also in a cell of a table."""
    text = re.sub(r"([\\`*_{}\[\]|~#$])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^(\d*)([-+.)])(?=\s)", r"\1\\\2", text).replace("\n", " ")


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"**{escape(block.text)}**" if block.warning else escape(block.text)
    if isinstance(block, Notes):
        return "\n".join(f"- {escape(item)}" for item in block.items)
    if isinstance(block, Grid):
        rows = [block.columns, ("---",) * len(block.columns), *block.rows]
        return "\n".join(
            "| " + " | ".join(c if i == 1 else escape(c) for c in row) + " |" for i, row in enumerate(rows)
        )
    if isinstance(block, Picture):
        return f"![{escape(block.title)}]({FIGURES}/{block.name}.svg)\n\n*{escape(block.caption)}*"
    if isinstance(block, Absent):
        return escape(block.text)
    return _details(block)


def _details(block: Details) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
    return f"{escape(block.summary)}\n\n{fence}text\n{block.text}\n{fence}"
