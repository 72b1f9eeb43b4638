"""What bfloat16 and the memory layout cost in accuracy, and gain in time: one comparison under each setting.

    python -m benchmarks.precision [--seeds 8] [--rounds 1] [--json FILE] [-- OPTIONS OF COMPARE]

Every setting trains the same arms from the same seeds, each arm at the radius that it chose itself. A difference of
accuracies is paired over the seeds: its mean in points, with the 95 % t interval. A ratio of training seconds is that
of two runs of a seed: median and quartiles over seeds and rounds. Rounds repeat the same numbers, in an order of the
settings that is shuffled every round, for the seconds alone.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.stats import mean_interval
from benchmarks.rows import Row, arguments, finish, start
from experiments.record import RunRecord
from experiments.store import read_all
from experiments.timing import quartiles

MASKS = ("none", "all", "norm")
REFERENCE = "float32, channels last"
SETTINGS = {
    REFERENCE: ("--precision", "float32", "--channels_last", "true"),
    "float32, contiguous": ("--precision", "float32", "--channels_last", "false"),
    "bf16, channels last": ("--precision", "bf16", "--channels_last", "true"),
    "bf16, contiguous": ("--precision", "bf16", "--channels_last", "false"),
}

Runs = dict[str, dict[int, dict[str, float]]]
"""Per arm and seed: test accuracy, radius, and processor seconds of training without building masks."""


def runs_of(records: Sequence[RunRecord]) -> Runs:
    """Those of the report, by arm and seed."""
    found: Runs = {}
    for record in records:
        if not record.config["tuning"]:
            told = record.telemetry
            found.setdefault(record.arm, {})[record.config["seed"]] = {
                "test_accuracy": record.result["test_accuracy"],
                "rho": record.config["rho"],
                "seconds": told["train_seconds"] - told["mask_seconds"],
            }
    return found


def compared(setting: str, seeds: int, options: Sequence[str]) -> Runs:
    """The arms trained under this setting, by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "experiments.cli", "compare", "--quiet", "--out", str(out)]
        command += ["--masks", ",".join(MASKS), "--seeds", str(seeds), *SETTINGS[setting], *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return runs_of(read_all(out / "runs"))


def rows(rounds: Sequence[dict[str, Runs]]) -> list[Row]:
    """Accuracies, and then seconds, of every other setting relative to the reference."""
    out, seconds = [], []
    for setting in list(SETTINGS)[1:]:
        for arm in MASKS:
            here, there = (rounds[0][name][arm] for name in (setting, REFERENCE))
            points = [100 * (here[seed]["test_accuracy"] - there[seed]["test_accuracy"]) for seed in sorted(there)]
            mean = mean_interval(points)
            found = {"median": mean.value, "q1": mean.low, "q3": mean.high}
            note = f"mean of {mean.n} seeds, 95 % interval; {_told(here)}, where {REFERENCE} has {_told(there)}"
            out.append(Row(f"{setting}, {arm}, test accuracy", found, "point", note=note))
            ratio = [
                r[setting][arm][seed]["seconds"] / r[REFERENCE][arm][seed]["seconds"] for r in rounds for seed in there
            ]
            seconds.append(Row(f"{setting}, {arm}, training", quartiles(ratio), REFERENCE))
    return out + seconds


def _told(runs: dict[int, dict[str, float]]) -> str:
    """Mean accuracy and radius."""
    accuracy = 100 * sum(run["test_accuracy"] for run in runs.values()) / len(runs)
    rho = next(iter(runs.values()))["rho"]
    return f"{accuracy:.1f} %" + (f" at rho {rho:g}" if rho else "")


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments("precision", (__doc__ or "").partition("\n")[0], rounds=1)
    parser.add_argument("--seeds", type=int, default=8, help="of the report, at least 2")
    parser.add_argument("options", nargs="*", help="further options of compare, after --")
    options, result = start(parser, given)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: the interval is over them")
    shuffle, rounds = random.Random(0), []
    for _ in range(options.rounds):
        order = list(SETTINGS)
        shuffle.shuffle(order)
        rounds.append({setting: compared(setting, options.seeds, options.options) for setting in order})
    result["columns"] = ("difference", "95 % interval")  # of accuracies; seconds are in quartiles
    return finish(result, rows(rounds), {"compare": rounds}, options.json)


if __name__ == "__main__":
    main()
