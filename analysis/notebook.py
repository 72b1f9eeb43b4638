"""How eigenvalues look in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.estimate import EigenResult


def eigen_html(results: Sequence[EigenResult], summary: str = "") -> str:
    """A line per eigenvalue: value, bound of the residual, products with the operator, whether it converged."""
    rows = "".join(
        f"<tr><td style='text-align:left'>{escape(one.name)}</td><td>{one.value:.6g}</td><td>{one.residual:.2g}</td>"
        f"<td>{one.num_products}</td><td>{'yes' if one.converged else 'NO'} (tol {one.tol:g})</td></tr>"
        for one in results
    )
    return (
        "<table><thead><tr><th>eigenvalue</th><th>value</th><th>residual at most</th><th>products</th>"
        f"<th>converged</th></tr></thead><tbody>{rows}</tbody></table>{escape(summary)}"
    )
