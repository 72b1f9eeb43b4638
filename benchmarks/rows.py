"""Costs beside their limits and targets: the tables and files of the benchmarks of single operations."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from experiments.timing import environment


@dataclass(frozen=True)
class Row:
    """One cost.

    Attributes:
        what: of what.
        found: quartiles over the rounds.
        unit: of what it is a multiple.
        limit: what the arithmetic alone would cost; None where it is not counted.
        at_most: the target; None for a row that is there to compare with.
        note: what else there is to say.
        at_least: the target of what should be large.
        profile: what of it, and of the unit, goes to which kind of operator; see :mod:`benchmarks.profiles`.
    """

    what: str
    found: dict[str, float]
    unit: str
    limit: float | None = None
    at_most: float | None = None
    note: str = ""
    at_least: float | None = None
    profile: dict[str, tuple[float, float]] | None = None

    @property
    def met(self) -> bool | None:
        if self.at_least is not None:
            return self.found["median"] >= self.at_least
        return None if self.at_most is None else self.found["median"] <= self.at_most


def arguments(prog: str, description: str, rounds: int = 9) -> argparse.ArgumentParser:
    """A parser with the options that all have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{prog}", description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, help="write every round, the rows and the environment to this file")
    return parser


def start(
    parser: argparse.ArgumentParser, given: list[str] | None, device: torch.device | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options, and the head of the result: one thread from here on."""
    options = parser.parse_args(given)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(1)
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    head = {
        "schema": f"sam-masks/{parser.prog.removeprefix('python -m ').replace('.', '/')}/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device or torch.device("cpu")),
        "settings": settings,
        "clock": "process CPU" if device is None or device.type == "cpu" else "device",
    }
    return options, head


def finish(result: dict[str, Any], rows: list[Row], rounds: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Print the table; complete the result, and write it if there is a file."""
    result |= {"rows": [{**asdict(row), "met": row.met} for row in rows], "rounds": rounds}
    print(table(rows))
    for row in rows:
        if row.profile:
            print(f"\n{row.what}: where it goes, in units of {row.unit}, and where that goes")
            for label, (ours, unit) in row.profile.items():
                print(f"  {label:50}  {ours:6.3f}  {unit:6.3f}")
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(rows: list[Row]) -> str:
    width = max(len(row.what) for row in rows)
    lines = [f"{'':{width}}  {'cost':>7}  {'quartiles':>15}  {'limit':>6}  {'target':>7}"]
    for row in rows:
        limit = "-" if row.limit is None else f"{row.limit:.2f}"
        target = (
            f">= {row.at_least:g}" if row.at_least is not None else "-" if row.at_most is None else f"{row.at_most:.2f}"
        )
        verdict = {None: "", True: "met", False: "MISSED"}[row.met]
        spread = f"{row.found['q1']:.3f}-{row.found['q3']:.3f}"
        line = f"{row.what:{width}}  {row.found['median']:7.3f}  {spread:>15}  {limit:>6}  {target:>7}  {verdict:6}"
        lines.append(f"{line}  x {row.unit}{'; ' if row.note else ''}{row.note}".rstrip())
    return "\n".join(lines)
