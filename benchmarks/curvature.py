"""Products, time and error of eigenvalues, trace and spectral moments, side by side with other libraries.

    python -m benchmarks.curvature [--rounds 9] [--nets mlp conv_bn vit] [--json FILE]

Three networks below 3,000 parameters, float32, 150 examples in three batches of 50 (of equal size, since
hessian-eigenthings weighs batches equally), evaluation mode; the truth is the dense float64 Hessian at the same
weights. Every round runs every method once, its operator included, with that round's seed and in an order shuffled
anew, on one thread; seconds are the process's CPU time. Every library with its defaults, unless a row says otherwise.

Products: median over the rounds (largest), all that the method took. Error, relative to the truth: of eigenvalues the
worst of all rounds and of all that were asked for, of the trace and of each moment the root mean square over the
rounds. Time: median CPU milliseconds, and the median ratio to the first row in the same round. "Krylov limit" is no
method but a bound: from the same start vectors, the fewest products after which the Rayleigh-Ritz values of the Krylov
space, the best that products with one start vector give, are within 1e-5; it knows the truth to tell when to stop.

The other libraries come with ``pip install sam-masks[oracle]``; a missing one is left out.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from benchmarks.curvature_methods import (
    BATCH_SIZE,
    NUM_STEPS,
    NUM_VECTORS,
    POWERS,
    TRACE_PRODUCTS,
    Floats,
    Method,
    Net,
    tasks,
)
from benchmarks.peers import versions
from benchmarks.small_nets import SMALL_NETS
from experiments.timing import environment, measure, quartiles, ratios

SCHEMA = "sam-masks/benchmarks/curvature/1"
ACCURACY = 1e-5
PRODUCTS_AT_MOST = {"lambda_max": 8, "top five": 15}


def krylov_limit(matrix: Tensor, exact: Floats, seed: int, accuracy: float = ACCURACY) -> int:
    """Fewest products after which the Rayleigh-Ritz values of a Krylov space are the top eigenvalues.

    As in exact arithmetic: an orthonormal basis is made anew in float64 at every step.

    Args:
        matrix: symmetric, float64.
        exact: its largest eigenvalues, descending.
        seed: of the start vector, which is that of :func:`analysis.eigen.eigenpairs`.
        accuracy: the largest relative error allowed.
    """
    vector = torch.randn(len(matrix), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns: list[Tensor] = []
    while True:
        columns.append(vector / vector.norm())
        q = torch.linalg.qr(torch.stack(columns, dim=1)).Q
        values = torch.linalg.eigvalsh(q.T @ matrix @ q).flip(0).numpy()[: len(exact)]
        if len(values) == len(exact) and np.abs(values / exact - 1).max() < accuracy:
            return len(columns)
        vector = matrix @ q[:, -1]
        vector = vector - q @ (q.T @ vector)


class _Rounds:
    """A method run with the seed of the round."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self.values: list[list[float]] = []
        self.products: list[int] = []

    def __call__(self) -> None:
        values, products = self._method(len(self.values))
        self.values.append([float(v) for v in values])
        self.products.append(products)


def compare(
    task: str, exact: Floats, methods: dict[str, tuple[str, Method]], rounds: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Every method's products, errors and seconds; of those that fail, the reason."""
    out: dict[str, dict[str, Any]] = {}
    runs: dict[str, _Rounds] = {}
    for name, (module, method) in methods.items():
        if module and versions()[module] is None:
            out[name] = {"failed": "not installed"}
            continue
        try:
            method(0)  # also warms up
        except Exception as error:  # another library's, whatever it is
            if not module:
                raise
            out[name] = {"failed": f"{type(error).__name__}: {str(error).strip().split('. ')[0]}"}
            continue
        runs[name] = _Rounds(method)
    timed = measure(runs, rounds, seed, torch.device("cpu"), warm_up=0)
    first = next(iter(runs))
    for name, run in runs.items():
        errors = np.abs(np.array(run.values) / exact - 1)
        worst = task in PRODUCTS_AT_MOST
        out[name] = {
            "products": run.products,
            "error": [float(errors.max())] if worst else [float(e) for e in np.sqrt((errors**2).mean(0))],
            "values": run.values,
            "seconds": quartiles([r["seconds"][name] for r in timed]),
            "time_relative_to_first": ratios(timed, name, first),
        }
    return {name: out[name] for name in methods}


def run_net(name: str, rounds: int, seed: int = 0) -> dict[str, Any]:
    """All tasks on one network."""
    net = Net(name)
    found: dict[str, Any] = {"num_parameters": len(net.hessian), "largest_eigenvalues": net.eigenvalues[:8].tolist()}
    for task, (exact, methods) in tasks(net).items():
        found[task] = {"exact": exact.tolist(), "methods": compare(task, exact, methods, rounds, seed)}
        if task in PRODUCTS_AT_MOST:
            found[task]["krylov_limit"] = [krylov_limit(net.hessian, exact, s) for s in range(rounds)]
    return found


def targets(nets: dict[str, Any]) -> list[dict[str, Any]]:
    """Error and median products of our eigenvalues; beside the products, what any Krylov method would need."""
    out = []
    for net, found in nets.items():
        for task, limit in PRODUCTS_AT_MOST.items():
            ours, bound = found[task]["methods"]["ours"], float(np.median(found[task]["krylov_limit"]))
            error, products = ours["error"][0], float(np.median(ours["products"]))
            out.append({"target": f"{net}, {task}, error", "found": error, "at_most": ACCURACY})
            out.append({"target": f"{net}, {task}, products", "found": products, "at_most": limit, "bound": bound})
    return [{**item, "met": item["found"] <= item["at_most"]} for item in out]


def _products(counts: list[int]) -> str:
    return f"{np.median(counts):g} ({max(counts)})"


def table(result: dict[str, Any]) -> str:
    """The comparison as text."""
    lines = []
    for net, found in result["nets"].items():
        lines.append(f"{net}, {found['num_parameters']} parameters")
        for task in ("lambda_max", "top five", "trace", "moments"):
            lines.append(f"  {task:44} {'products':>10}  {'ms':>7}  {'x':>6}  error")
            for name, row in found[task]["methods"].items():
                if "failed" in row:
                    lines.append(f"    {name:42} {row['failed']}")
                    continue
                seconds, ratio = row["seconds"]["median"], row["time_relative_to_first"]["median"]
                errors = "  ".join(f"{e:.1e}" for e in row["error"])
                lines.append(
                    f"    {name:42} {_products(row['products']):>10}  {seconds * 1e3:7.1f}  {ratio:6.2f}  {errors}"
                )
            if "krylov_limit" in found[task]:
                lines.append(f"    {'(Krylov limit)':42} {_products(found[task]['krylov_limit']):>10}")
        lines.append("")
    lines.append("Targets, of ours; products are medians")
    for item in result["targets"]:
        bound = f", Krylov limit {item['bound']:g}" if "bound" in item else ""
        verdict = "met" if item["met"] else "MISSED"
        lines.append(f"{item['target']:32} {item['found']:8.2g}  at most {item['at_most']:g}{bound}  {verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curvature", description="Curvature beside others.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--nets", nargs="+", choices=list(SMALL_NETS), default=list(SMALL_NETS))
    parser.add_argument("--json", type=Path, help="write all values, the summary and the environment to this file")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(1)
    before = environment(torch.device("cpu")) | {"scipy": scipy.__version__, "libraries": versions()}
    nets = {name: run_net(name, options.rounds) for name in options.nets}
    result = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": before,
        "settings": {
            "rounds": options.rounds,
            "batch_size": BATCH_SIZE,
            "trace_products": TRACE_PRODUCTS,
            "quadrature": {"vectors": NUM_VECTORS, "steps": NUM_STEPS, "powers": list(POWERS)},
            "accuracy": ACCURACY,
        },
        "clock": "process CPU",
        "nets": nets,
        "targets": targets(nets),
    }
    print(table(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
