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
from typing import Any

from benchmarks.rows import Row, arguments, finish, start
from experiments.config import default_processes
from experiments.timing import quartiles

SECONDS_AT_MOST = 90.0


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
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        rounds.append({"seconds": {"wall": wall, "processor": used}})
    note = f"{default_processes()} cores"
    at_most = None if options.options else SECONDS_AT_MOST
    rows = [
        Row(
            "sam-masks compare, wall", quartiles([r["seconds"]["wall"] for r in rounds]), "second", None, at_most, note
        ),
        Row("sam-masks compare, processor", quartiles([r["seconds"]["processor"] for r in rounds]), "second"),
    ]
    return finish(result, rows, {"compare": rounds}, options.json)


if __name__ == "__main__":
    main()
