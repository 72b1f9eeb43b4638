"""How masks look in a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masks.mask import Mask

MOST_LAYERS = 20


def mask_html(mask: Mask) -> str:
    """The mask in one line, and the tensors that it keeps something of, at most 20 of them."""
    touched = [layer for layer in mask.per_layer() if layer.kept]
    rows = "".join(
        f"<tr><td style='text-align:left'>{escape(layer.row.name)}</td><td>{layer.row.role}</td>"
        f"<td>{layer.kept:,}</td><td>{layer.row.numel:,}</td><td>{layer.density:.2%}</td></tr>"
        for layer in touched[:MOST_LAYERS]
    )
    left = len(touched) - MOST_LAYERS
    norm = f", {mask.norm_share:.1%} of them in normalization layers" if touched else ""
    return (
        f"<b>Mask {escape(mask.provenance.builder)}</b>, built at {escape(mask.provenance.built_at)}: "
        f"{mask.num_kept:,} of {mask.numel:,} coordinates ({mask.density:.4%}) in {mask.num_tensors} of "
        f"{len(mask.table)} tensors{norm}"
        "<table><thead><tr><th>tensor</th><th>role</th><th>kept</th><th>of</th><th>density</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>" + (f"and {left} more tensors" if left > 0 else "")
    )
