"""List the registered methods of the SAM family: what each is, costs, keeps, and does not support."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from masks.options import option_text
from sam import MethodInfo, MethodSpec, list_methods


def describe(info: MethodInfo) -> dict[str, Any]:
    """What is known of a method, in plain values."""
    spec = MethodSpec(info.name)
    return {
        "method": info.name,
        "summary": info.summary,
        "paper": info.source,
        "passes": info.passes,
        "passes_at_defaults": info.num_passes(**spec.options),
        "state_per_masked_coordinate": info.state_per_masked,
        "state_per_parameter": info.state_per_parameter,
        "rho": info.rho,
        "tuned_on": info.tuned_on,
        "options": {
            option.name: {"type": option.type_name, "default": option_text(option.default)} for option in info.options
        },
        "fixes": spec.preset,
        "does_not_support": list(info.limits),
    }


def describe_methods(*, as_json: bool = False, width: int = 110) -> str:
    """All methods by name, as text or as a JSON list.

    Args:
        as_json: a list of objects instead of text.
        width: of the text, characters.
    """
    found = [describe(info) for info in list_methods()]
    if as_json:
        return json.dumps(found, indent=1)
    return "\n\n".join(_text(method, width) for method in found)


def _text(method: dict[str, Any], width: int) -> str:
    options = "  ".join(f"{name}={value['default']} ({value['type']})" for name, value in method["options"].items())
    kept = [
        f"{method[key]} x {what}"
        for key, what in (
            ("state_per_masked_coordinate", "the masked coordinates"),
            ("state_per_parameter", "all parameters"),
        )
        if method[key]
    ]
    rows = [
        ("", method["summary"]),
        ("paper", method["paper"]),
        ("passes", f"{method['passes']} per step" + _at_defaults(method)),
        ("keeps", " and ".join(kept) or "nothing from step to step"),
        ("options", options or "none"),
        ("rho", f"{method['rho']:g} by default; tuned on: {method['tuned_on']}"),
        ("fixes", ", ".join(f"{name}={value}" for name, value in method["fixes"].items())),
        *(("limit", limit) for limit in method["does_not_support"]),
    ]
    lines = [method["method"]]
    for name, text in rows:
        if text:
            start = f"  {name:9}"
            lines += textwrap.wrap(
                text, width, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
            )
    return "\n".join(lines)


def _at_defaults(method: dict[str, Any]) -> str:
    number = f"{method['passes_at_defaults']:.4g}"
    return "" if number == method["passes"] else f" ({number} at the defaults)"
