"""Eigenvalues in a notebook: every number, nothing as markup."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from analysis import EigenPairs, EigenResult


def cells(html: str) -> list[list[str]]:
    root = ET.fromstring(f"<div>{html}</div>")
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


def test_eigenvalues_in_a_notebook() -> None:
    good = EigenResult("largest <H>", 12.3456789, 0.00123, 17, True, 1e-3)
    bad = EigenResult("2nd", -1.0, 0.5, 17, False, 1e-3)
    assert cells(good._repr_html_())[1] == ["largest <H>", "12.3457", "0.0012", "17", "yes (tol 0.001)"]
    html = EigenPairs((good,), (bad,), 40, 3, False, None)._repr_html_()
    assert cells(html)[1:] == [cells(one._repr_html_())[1] for one in (good, bad)]
    assert html.endswith("40 products in all; NOT CHECKED TO THE END")
