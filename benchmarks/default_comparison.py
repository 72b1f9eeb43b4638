"""How long `sam-masks compare` takes with its defaults, from the shell to the report.

python -m benchmarks.default_comparison [--rounds 1] [--json FILE]
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, arguments, finish, start
from experiments.config import default_processes
from experiments.store import read_all
from experiments.timing import quartiles

SECONDS_AT_MOST = 90.0


def seconds_of_runs(folder: Path) -> dict[str, float]:
    """Processor seconds of what the runs of a comparison did."""
    runs = [(record.config["tuning"], record.telemetry) for record in read_all(folder / "runs")]
    masks = sum(told["mask_seconds"] for _, told in runs)
    training = {tuning: sum(t["train_seconds"] - t["mask_seconds"] for own, t in runs if own == tuning)
                for tuning in (True, False)}  # fmt: skip
    return {
        "training to choose the radii": training[True],
        "training the report's runs": training[False],
        "building masks": masks,
        "measuring": sum(told["measure_seconds"] for _, told in runs),
    }


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments("default_comparison", (__doc__ or "").partition("\n")[0], rounds=1)
    parser.add_argument("options", nargs="*", help="further options of compare, after --")
    options, result = start(parser, given)
    rounds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "out")
            command = [sys.executable, "-m", "experiments.cli", "compare", "--quiet", "--out", out]
            before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([*command, *options.options], check=True, stdout=subprocess.DEVNULL)
            wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
            parts = seconds_of_runs(Path(out))
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        parts["start of processes, data, report"] = used - sum(parts.values())
        rounds.append({"seconds": {"wall": wall, "processor": used} | parts})
    note = f"{default_processes()} cores"
    at_most = None if options.options else SECONDS_AT_MOST
    rows = [
        Row(
            "sam-masks compare, wall", quartiles([r["seconds"]["wall"] for r in rounds]), "second", None, at_most, note
        ),
        Row("sam-masks compare, processor", quartiles([r["seconds"]["processor"] for r in rounds]), "second"),
        *(Row(f"of which {part}", quartiles([r["seconds"][part] for r in rounds]), "second") for part in parts),
    ]
    return finish(result, rows, {"compare": rounds}, options.json)


if __name__ == "__main__":
    main()
