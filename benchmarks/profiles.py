"""Where the time of a row that misses its target goes: operators by kind, beside those of what it is measured in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.rows import Row
from experiments.timing import Step, clock

REPEATS = 5
SHOWN = 0.01
"""Kinds that make up less of either variant are counted together."""

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


def milliseconds(step: Step) -> dict[str, float]:
    """Milliseconds of one step by kind of operator, the mean of :data:`REPEATS`, on a CPU.

    What operators take is scaled to the time of the step without the profiler, which itself takes some.
    """
    device = torch.device("cpu")
    step()
    plain = sum(clock(step, device) for _ in range(REPEATS)) * 1e3 / REPEATS

    def repeated() -> None:
        for _ in range(REPEATS):
            step()

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = clock(repeated, device)
    scale = plain / (seconds * 1e3)
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        label = kind(event.key)
        if label is not None:
            found[label] = found.get(label, 0.0) + event.self_cpu_time_total / 1e3 * scale
    return found | {_REST: max(0.0, plain - sum(found.values()))}


def explained(row: Row, steps: Mapping[str, Step], over: str, under: str, times: float = 1.0) -> Row:
    """The row, with a profile if it misses its target.

    Args:
        row: the ratio of two steps.
        steps: by name.
        over, under: the names of the two.
        times: how many of the second one the unit is.
    """
    if row.met is not False:
        return row
    ours, unit = milliseconds(steps[over]), milliseconds(steps[under])
    total, whole = sum(ours.values()), sum(unit.values())
    parts = {}
    for label in sorted(ours | unit, key=lambda label: -ours.get(label, 0.0)):
        pair = ours.get(label, 0.0), unit.get(label, 0.0) * times
        if pair[0] > SHOWN * total or pair[1] > SHOWN * whole * times:
            parts[label] = pair
    rest = total - sum(a for a, _ in parts.values()), whole * times - sum(b for _, b in parts.values())
    return replace(row, profile=parts | {"all else": rest, "together": (total, whole * times)})
