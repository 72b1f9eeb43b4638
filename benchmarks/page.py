"""The tables of docs/performance.md, from the committed results.

    python -m benchmarks.page [--check]

A line ``<!-- results: FILE.json -->`` in the page is followed by that file's table, up to ``<!-- end -->``. Under it
stand the profiles of the rows that miss their target.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = Path(__file__).resolve().parent / "results"
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(result: dict[str, Any]) -> str:
    """Rows with limit and target, and the machine that they were measured on, as Markdown."""
    env = result["environment"]
    cost, spread = result.get("columns", ("cost", "quartiles"))
    lines = [f"| what | {cost} | {spread} | limit | target | |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        found = row["found"]
        limit = "-" if row["limit"] is None else f"{row['limit']:,.2f}"
        target = "-" if row["at_most"] is None else f"at most {row['at_most']:.2f}"
        if row["at_least"] is not None:
            target = f"at least {row['at_least']:,g}"
        verdict = {None: "", True: "met", False: "**missed**"}[row["met"]]
        note = f"; {row['note']}" if row["note"] else ""
        lines.append(
            f"| {row['what']}{note} | {found['median']:,.3f} x {row['unit']} "
            f"| {found['q1']:,.3f} to {found['q3']:,.3f} | {limit} | {target} | {verdict} |"
        )
    lines += [""] + [_profile(row) for row in result["rows"] if row.get("profile")]
    machine = env["cpu"] if env["device"].startswith("cpu") else env["device"]
    load = ", ".join(f"{value:.1f}" for value in env["load_average"])
    lines.append(
        f"\n{machine}, {env['threads']} thread, torch {env['torch']}, {result['clock']} time, load average {load} at "
        f"the start, {result['created'][:10]}."
    )
    return "\n".join(lines)


def _profile(row: dict[str, Any]) -> str:
    """What takes a row that misses its target longer than its unit, as one point of a list."""
    parts = {label: pair for label, pair in row["profile"].items() if label != "together"}
    order = sorted(parts.items(), key=lambda item: item[1][1] - item[1][0])
    shown = "; ".join(f"{label} {ours:.2f} ({unit:.2f})" for label, (ours, unit) in order)
    return f"- {row['what']}, {row['found']['median']:.2f} x {row['unit']}: {shown}"


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        result = json.loads((results / match[2]).read_text(encoding="utf-8"))
        return f"{match[1]}\n{table(result)}\n\n{match[3]}"

    return _BLOCK.sub(fill, page)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page is not current")
    options = parser.parse_args(arguments)
    old = PAGE.read_text(encoding="utf-8")
    new = filled(old)
    if options.check:
        return int(old != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
