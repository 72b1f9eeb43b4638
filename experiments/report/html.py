"""A report as one HTML page that needs nothing else."""

from __future__ import annotations

import jinja2

from experiments.report.content import Document

TEMPLATE = "report.html"


def html(document: Document) -> str:
    """The page; every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("experiments"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["a"] = lambda block, kind: type(block).__name__ == kind
    return environment.get_template(TEMPLATE).render(document=document)
