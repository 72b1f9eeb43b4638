"""Write a report: one page, the same as Markdown, CSV files, SVG figures and a LaTeX table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.compare import Comparison
from experiments.measure import listed
from experiments.record import write_text
from experiments.report.files import csv_files
from experiments.report.findings import Findings, find, gather
from experiments.report.html import html
from experiments.report.latex import latex
from experiments.report.markdown import FIGURES, markdown
from experiments.report.sections import document
from experiments.table import Table
from masks.errors import InputError

PAGE = "report.html"


@dataclass(frozen=True)
class ReportOptions:
    """Which comparison is reported, and where.

    Args:
        folder: folder of a comparison, as sam-masks compare made it, finished or not.
        out: folder for the report (default: that of the comparison).
        contrasts: of the verdict, pairs ARM-REFERENCE separated by commas (default: norm-all and norm-none; without an
            arm norm, each main arm against none).
        primary: metric that the verdict rests on (default: the one named beforehand where it was measured, else the
            first beside the table's).
        plugin: modules to import for the masks and methods of the comparison, separated by commas.
    """

    folder: str
    out: str | None = None
    contrasts: str | None = None
    primary: str | None = None
    plugin: str | None = None


def report(options: ReportOptions) -> Path:
    """Report a comparison from its folder; nothing is trained. Returns the path of the page.

    Raises:
        InputError: see :func:`experiments.report.findings.find`; the folder cannot be written to.
    """
    folder = Path(options.folder)
    findings = find(folder, primary=options.primary, contrasts=listed(options.contrasts))
    return write(findings, folder if options.out is None else Path(options.out))


def write_report(comparison: Comparison, table: Table) -> Path:
    """Report a comparison that was just made, into its folder. Returns the path of the page.

    Raises:
        InputError: the folder cannot be written to.
    """
    return write(gather(comparison, table), comparison.folder)


def write(findings: Findings, folder: Path) -> Path:
    """Write ``report.html``, ``report.md``, ``table.tex``, the files of :func:`experiments.report.files.csv_files` and
    ``figures/NAME.svg``; returns the path of the page.

    Raises:
        InputError: the folder cannot be written to.
    """
    content = document(findings)
    files = {
        **csv_files(findings),
        **{f"{FIGURES}/{picture.name}.svg": f"{picture.svg}\n" for picture in content.pictures},
        "table.tex": latex(findings.table),
        "report.md": markdown(content),
        PAGE: html(content),
    }
    try:
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text(folder / name, text)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return folder / PAGE
