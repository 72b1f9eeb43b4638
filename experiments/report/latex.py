"""The table of a comparison for a paper: LaTeX with the package booktabs."""

from __future__ import annotations

import re

from experiments.config import BASELINE
from experiments.table import Table, shown

COLUMNS = {
    "kept": "kept",
    "rho": r"$\rho$",
    "accuracy %": r"accuracy, \%",
    "gain": "gain, points",
    "p Holm": "$p$ (Holm)",
    "lambda_max": r"$\lambda_{\max}$",
    "m-sharpness": r"$m$-sharpness",
    "cost (predicted)": "cost (predicted)",
}
_SPECIAL = {
    "\\": r"\textbackslash{}",
    **{c: rf"\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


def latex(table: Table) -> str:
    """A table environment with a line per arm and the columns of :data:`COLUMNS`.

    It needs ``\\usepackage{booktabs}`` and, for names with a double quote, ``\\usepackage[T1]{fontenc}``.
    """
    text = shown(table)[list(COLUMNS)]
    cells = text.map(_cell)
    cells.index = text.index.map(escape)
    cells.index.name = None
    n = table.rows[0].n
    return cells.rename(columns=COLUMNS).to_latex(
        escape=False,
        caption=(
            f"SAM under masks, $n = {n}$ seeds per arm. Brackets: 95\\,\\% intervals, of the accuracy over seeds and "
            f"test images, of the rest over seeds. Gain: paired difference to {escape(BASELINE)}; $p$: sign-flip test, "
            "adjusted by Holm. (!): runs diverged; *: the radius lies at the edge of its grid."
        ),
        label="tab:sam-masks",
        column_format="l" + "r" * len(COLUMNS),
        position="t",
    )


def escape(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def _cell(text: str) -> str:
    """A number with a minus sign instead of a hyphen; a lone hyphen stays one."""
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", escape(text))
