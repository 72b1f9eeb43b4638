"""Share of a study's processor time that is spent in training, rather than in start-up, imports and the store.

    python -m benchmarks.study_overhead [--runs 300] [--processes 2] [--epochs 20]

Runs are tuning runs of the default comparison (digits, resnet_small, mask norm), in a temporary store. Processor time
is that of the command and of all its processes, from their start to their end.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.config import RunConfig
from experiments.executors.local import LocalExecutor
from experiments.runner import Policy, Runner
from experiments.worker import Job


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=300, help="number of runs")
    parser.add_argument("--processes", type=int, default=2, help="runs at once")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each run")
    options = parser.parse_args(arguments)
    jobs = [
        Job(f"run{seed}", "norm", RunConfig(seed=seed, epochs=options.epochs).resolved(), None)
        for seed in range(options.runs)
    ]
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        Runner(Path(folder), LocalExecutor(options.processes), Policy("cpu", quiet=True)) as runner,
    ):
        records = runner.run(jobs, "running").values()
    wall = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(usage.ru_utime + usage.ru_stime for usage in used)
    training = sum(record.telemetry["train_seconds"] for record in records)
    print(
        f"{options.runs} runs, {options.processes} processes: {training:.1f} s of {total:.1f} s of processor time in "
        f"training ({100 * training / total:.1f} %); {3600 * options.runs / wall:.0f} runs per hour"
    )


if __name__ == "__main__":
    main()
