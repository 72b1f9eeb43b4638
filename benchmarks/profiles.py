"""Where the time of a row that misses its target goes: operators by kind, beside those of what it is measured in.

The cost that was timed, in its unit, is divided by the shares that the profiler sees, medians over rounds in a shuffled
order: the parts add up to the row's own number.
"""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.rows import Row
from experiments.timing import Step, clock

ROUNDS = 7
SHOWN = 0.01
"""Kinds of which both steps have less, in the row's unit, are counted together."""

_KINDS = {
    "products and convolutions, backward": r".*conv.*backward",
    "products and convolutions": r".*conv(olution|\dd).*|mm|bmm|addmm|baddbmm|linear|matmul",
    "attention": r"_?scaled_dot_product.*",
    "normalization": r".*(batch|layer|group)_norm.*",
    "softmax and loss": r".*softmax.*|nll_loss.*|cross_entropy.*",
    "selection and sorting": r"topk|kthvalue|sort|nonzero|where|gather|(index|masked|scatter).*",
    "norms and sums": r"sum|mean|.*norm|max|min|aminmax|count_nonzero",
    "copies and fresh memory": r"(_foreach_)?(copy|zero)_|_to_copy|to|clone|contiguous|cat|stack|fill_"
    r"|(empty|zeros|ones|new|full|resize).*",
}
_ELEMENTWISE = "other operators, mostly elementwise"
_REST = "outside operators: Python, autograd, the allocator"


def kind(operator: str) -> str | None:
    """The kind of an operator of torch; None for what is not one."""
    if not operator.startswith("aten::"):
        return None
    name = operator.removeprefix("aten::")
    return next((label for label, names in _KINDS.items() if re.fullmatch(names, name)), _ELEMENTWISE)


def shares(step: Step) -> dict[str, float]:
    """What part of one step's time on a CPU goes where, by kind of operator; the profiler itself takes some."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = clock(step, torch.device("cpu"))
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        label = kind(event.key)
        if label is not None:
            found[label] = found.get(label, 0.0) + event.self_cpu_time_total / 1e6
    found[_REST] = max(0.0, seconds - sum(found.values()))
    total = sum(found.values())
    return {label: value / total for label, value in found.items()}


def explained(row: Row, steps: Mapping[str, Step], over: str, under: str, before: Step | None = None) -> Row:
    """The row, with a profile if it misses its target: the row's cost, and its unit, divided by kinds of operators.

    Args:
        row: the ratio of two steps, as it was timed without a profiler.
        steps: by name.
        over, under: the names of the two.
        before: what runs before each, unseen.
    """
    if row.met is not False:
        return row
    shuffle = random.Random(0)
    taken: dict[str, list[dict[str, float]]] = {over: [], under: []}
    for _ in range(ROUNDS):
        for name in shuffle.sample([over, under], 2):
            if before is not None:
                before()
            taken[name].append(shares(steps[name]))
    ours, unit = _median(taken[over], row.found["median"]), _median(taken[under], 1.0)
    parts: dict[str, tuple[float, float]] = {}
    for label in sorted(ours | unit, key=lambda label: -ours.get(label, 0.0)):
        pair = ours.get(label, 0.0), unit.get(label, 0.0)
        if max(pair) > SHOWN:
            parts[label] = pair
    rest = row.found["median"] - sum(a for a, _ in parts.values()), 1 - sum(b for _, b in parts.values())
    return replace(row, profile=parts | {"all else": rest, "together": (row.found["median"], 1.0)})


def _median(taken: list[dict[str, float]], total: float) -> dict[str, float]:
    """Median over the rounds, scaled to a sum."""
    labels = dict.fromkeys(label for one in taken for label in one)
    found = {label: statistics.median(one.get(label, 0.0) for one in taken) for label in labels}
    whole = sum(found.values())
    return {label: value * total / whole for label, value in found.items()}
