"""What masks cost to build: the exact selection of k of n scores, and Fisher scores.

    python -m benchmarks.mask_cost selection [--sizes 10000 ... 100000000] [--rounds 9] [--json FILE]
    python -m benchmarks.mask_cost fisher [--nets resnet18_w16 vit_d128 resnet14 vit] [--rounds 9] [--json FILE]

Variants run in one process, once a round, in an order shuffled anew; on one thread, in process CPU time; a cost is the
median over rounds of the ratio in the same round.

``selection``: ``masks.top_k`` (a boolean mask, equal scores by index) in units of ``torch.topk`` (values and
positions, equal scores in any order) with its defaults, by number of scores and density. Scores are the sizes of
normal numbers; those of the last kind are 0 with probability 0.4, as gradients behind ReLUs are. The limit, reading
the scores once, is measured as ``scores.max()``. Masks rank the scores of many tensors together: rows "in 60 tensors"
are of the same scores, divided, beside ``torch.topk`` of the undivided ones. The peak of memory beyond the scores is
that of a process of its own, in bytes per score, of which the mask takes one (a copy of the scores would take four).

``fisher``: scores of 1,024 examples in batches of 128, in units of the gradients of the same batches. "all" is
``masks.scoring.mean_squared_gradients`` with everything that a mask builder pays (a copy of the model, running
statistics from the data); "norm" are squared per-example gradients of normalization parameters alone, and "norm, trace"
``analysis.fisher_trace`` of that mask with its two passes that must agree. Limits count passes: a gradient is 1; the
gradients of normalization parameters alone take 2/3 of one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from analysis.gradients import fisher_trace
from benchmarks.hessian_cost import NETS as DIGIT_NETS
from benchmarks.models import MODELS
from benchmarks.profiles import explained
from benchmarks.rows import Row, arguments, finish, start
from experiments.timing import Step, measure, quartiles, ratios
from masks import MaskContext, build_mask, cross_entropy, top_k
from masks.per_example import per_example_gradients
from masks.ranking import Ranking
from masks.scoring import mean_squared_gradients

SIZES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
DENSITIES = (0.0005, 0.01, 0.1, 0.5, 0.99)
NUM_PARTS = 60
PARTS = f"in {NUM_PARTS} tensors"
SELECTION_AT_MOST, ALL_AT_MOST, NORM_AT_MOST = 1.5, 4.0, 1.5
NUM_EXAMPLES, BATCH_SIZE, EPOCH = 1024, 128, 50_000
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (make, 32) for name, make in MODELS.items()},
    **{name: (make, 8) for name, (make, _) in DIGIT_NETS.items()},
}

_PEAK = """
import re, torch
from pathlib import Path
from masks import top_k

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
scores = torch.randn({n}, generator=torch.Generator().manual_seed(0))
top_k(scores[:200_000], 10)  # on the way that as many scores take
before = peak()
assert torch.count_nonzero(top_k(scores, {k})) == {k}
print(peak() - before)
"""


def extra_bytes(n: int, k: int) -> int:
    """The peak of memory beyond the scores, in a process of its own; Linux only.

    From /proc: ``ru_maxrss`` starts at the peak of the parent process.
    """
    command = [sys.executable, "-c", _PEAK.format(n=n, k=k)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def selection(n: int, rounds: int, seed: int = 0) -> tuple[list[Row], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator).abs_()
    parts = scores.split(-(-n // NUM_PARTS))
    rows, raw = [], {}
    for kind in ("normal", "zeros"):
        if kind == "zeros":
            scores[torch.rand(n, generator=generator) < 0.4] = 0
        for density in DENSITIES:
            k = max(1, round(density * n))
            variants: dict[str, Step] = {
                "top_k": lambda k=k: top_k(scores, k),  # type: ignore[misc]
                "torch.topk": lambda k=k: torch.topk(scores, k),  # type: ignore[misc]
                "reading": lambda: scores.max(),
                PARTS: lambda k=k: Ranking(parts, largest=True).best(k),  # type: ignore[misc]
            }
            found = measure(variants, rounds, seed, torch.device("cpu"), warm_up=1)
            name = f"{n:.0e} scores, {kind}, density {density:g}"
            raw[name] = found
            own = quartiles([r["seconds"]["top_k"] for r in found])["median"] / n * 1e9
            limit = ratios(found, "reading", "torch.topk")["median"]
            cost = ratios(found, "top_k", "torch.topk")
            row = Row(name, cost, "torch.topk", limit, SELECTION_AT_MOST, f"{own:.1f} ns per score")
            rows.append(explained(row, variants, "top_k", "torch.topk"))
            if kind == "normal":
                cost = ratios(found, PARTS, "torch.topk")
                row = Row(f"{name}, {PARTS}", cost, "torch.topk", limit, SELECTION_AT_MOST)
                rows.append(explained(row, variants, PARTS, "torch.topk"))
    if n >= 1_000_000:
        extra = [extra_bytes(n, k) / n for k in (n // 2000, n // 2)]
        rows.append(Row(f"{n:.0e} scores, peak memory", quartiles(extra), "n bytes", 1.0, 2.0))
    return rows, raw


def fisher(name: str, rounds: int, num_examples: int, seed: int = 0) -> tuple[list[Row], list[dict[str, Any]]]:
    torch.manual_seed(seed)
    make, side = NETS[name]
    model = make().eval()
    x, y = torch.randn(num_examples, 3, side, side), torch.randint(10, (num_examples,))
    batches = list(zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True))
    norm, params = build_mask("norm", MaskContext(model)), list(model.parameters())
    named = {row.name: p for row, p in zip(norm.table, norm.table.tensors(model), strict=True) if row.is_norm}

    def gradients() -> None:
        for xs, ys in batches:
            torch.autograd.grad(cross_entropy(model(xs), ys).sum(), params)

    def restricted() -> None:
        for xs, ys in batches:
            for found in per_example_gradients(model, named, cross_entropy, xs, ys):
                for gradient in found:
                    gradient.square().sum(0)

    variants = {
        "gradients": gradients,
        "all": lambda: mean_squared_gradients(MaskContext(model, batches=batches), "data"),
        "norm": restricted,
        "norm, trace": lambda: fisher_trace(model, batches, mask=norm),
    }
    found = measure(variants, rounds, seed, torch.device("cpu"), warm_up=1)
    wanted = {"all": (1.0, ALL_AT_MOST), "norm": (2 / 3, NORM_AT_MOST), "norm, trace": (2 / 3, None)}
    rows = []
    for what, (limit, at_most) in wanted.items():
        cost = ratios(found, what, "gradients")
        # SAM takes two gradients for each example of an epoch.
        share = cost["median"] * NUM_EXAMPLES / (2 * EPOCH)
        note = f"{share:.1%} of a SAM epoch of {EPOCH:,} examples" if what == "all" else ""
        row = Row(f"{name}, Fisher, {what}", cost, "the gradients", limit, at_most, note)
        rows.append(explained(row, variants, what, "gradients"))
    return rows, found


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments("mask_cost", "Cost of building masks.")
    parser.add_argument("what", choices=["selection", "fisher"])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES[:-1]))
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["resnet14", "vit"])
    parser.add_argument("--num-examples", type=int, default=NUM_EXAMPLES)
    options, result = start(parser, given)
    rows, raw = [], {}
    for item in options.sizes if options.what == "selection" else options.nets:
        if options.what == "selection":
            part, raw[str(item)] = selection(item, options.rounds)
        else:
            part, raw[item] = fisher(item, options.rounds, options.num_examples)
        rows += part
    return finish(result, rows, raw, options.json)


if __name__ == "__main__":
    main()
