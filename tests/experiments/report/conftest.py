"""One report of the tiny comparison, written once; leave it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.compare import Comparison
from experiments.report.content import Document
from experiments.report.findings import Findings, gather
from experiments.report.sections import document
from experiments.report.write import write
from experiments.table import Table, build_table


@pytest.fixture(scope="session")
def table(comparison: Comparison) -> Table:
    return build_table(comparison)


@pytest.fixture(scope="session")
def findings(comparison: Comparison, table: Table) -> Findings:
    return gather(comparison, table)


@pytest.fixture(scope="session")
def content(findings: Findings) -> Document:
    return document(findings)


@pytest.fixture(scope="session")
def written(findings: Findings, content: Document, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the report, apart from the comparison's; its figures are not drawn a second time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.report.write.document", lambda _: content)
        return write(findings, tmp_path_factory.mktemp("report")).parent
