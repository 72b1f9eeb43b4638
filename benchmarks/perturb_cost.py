"""What moving the weights to w + eps and back costs, without the passes, beside others' ways to do it.

    python -m benchmarks.perturb_cost [--model resnet18_w32] [--rounds 25] [--batch-size 128] [--json FILE]

Every move, and every way back, is timed after a pass (on few images), as in training: caches and the allocator are
then as a pass leaves them. Moved back and forth without, copies that are freed and made again stay in the cache.

The peers for all parameters are a naive SAM and, if it is installed (``pip install sam-masks[bench]``), the SAM of
pytorch-optimizer with a base optimizer that does nothing; the target is of the faster one. The masked methods are naive
references: :mod:`benchmarks.naive`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

import torch

from benchmarks import naive
from benchmarks.models import MODELS
from benchmarks.profiles import explained
from benchmarks.rows import Row, arguments, finish, start
from benchmarks.step_cost import losses, peers
from experiments.timing import WARM_UP, Step, clock, measure, ratios
from masks import Budget, Mask, MaskContext, Region, build_mask
from sam import Rule, perturb

DENSITIES = (0.001, 0.01, 0.1, 0.5)
OF_PEER, OF_NAIVE_NORM, OF_STEP = 0.6, 0.3, 0.01
BETWEEN = 8
"""Images of the passes that are not timed."""


def ours(mask: Mask, model: torch.nn.Module) -> naive.Moves:
    """As :class:`sam.SAM` does it."""
    region = Region(mask, model)

    moves: list[AbstractContextManager[None]] = []

    def move() -> None:
        found = perturb(Rule(), region, [p.grad for p in region.params], naive.RHO)
        moves.append(region.moved(found.directions, found.multiplier))
        moves[-1].__enter__()

    def back() -> None:
        moves.pop().__exit__(None, None, None)

    return move, back


def measure_moves(
    moves: Mapping[str, naive.Moves], one_pass: Step, rounds: int, settle: Callable[[], None]
) -> list[dict[str, Any]]:
    """As :func:`experiments.timing.measure`: the seconds there and back, each right after a pass.

    ``settle`` is called after each way there and back, not timed.
    """
    shuffle, device, out = random.Random(0), torch.device("cpu"), []
    for i in range(WARM_UP + rounds):
        order = list(moves)
        shuffle.shuffle(order)
        seconds = dict.fromkeys(order, 0.0)
        for name in order:
            for way in moves[name]:
                one_pass()
                seconds[name] += clock(way, device)
            settle()
        if i >= WARM_UP:
            out.append({"order": order, "seconds": seconds})
    return out


def _both(there: Step, back: Step) -> Step:
    return lambda: (there(), back())


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments("perturb_cost", "Cost of perturbing and restoring.", rounds=25)
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet18_w32")
    parser.add_argument("--batch-size", type=int, default=128)
    options, result = start(parser, given)
    torch.manual_seed(0)
    model = MODELS[options.model]().to(memory_format=torch.channels_last)
    x = torch.randn(options.batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    batch = (x, torch.randint(0, 10, (options.batch_size,)))
    params = list(model.parameters())
    context = MaskContext(model)

    def sgd(images: int = options.batch_size) -> None:
        model.zero_grad()
        losses(model, (batch[0][:images], batch[1][:images])).mean().backward()

    passes = measure({"sgd": sgd}, 5, 0, torch.device("cpu"))
    norm = build_mask("norm", context)
    masks = {f"random {d:.1%}": build_mask("random", context, Budget.from_density(d, norm.numel)) for d in DENSITIES}
    others = peers(params)
    moves: dict[str, naive.Moves] = {
        "all": ours(build_mask("all", context), model),
        **others,
        "norm": ours(norm, model),
        "norm, naive SAM-ON": naive.sam_on(params, [bool(part.all()) for part in norm.dense()]),
    }
    for label, mask in masks.items():
        moves |= {label: ours(mask, model), f"{label}, naive SSAM": naive.ssam(params, mask.dense())}
    settle = naive.settling(params)
    found = measure_moves(moves, lambda: sgd(BETWEEN), options.rounds, settle)
    best = min(others, key=lambda name: median(r["seconds"][name] for r in found))
    step_seconds = sorted(r["seconds"]["sgd"] for r in passes)[len(passes) // 2]

    def of_step(what: str) -> dict[str, float]:
        # In the unit of one time, that of a whole batch.
        rounds = [{"seconds": {what: r["seconds"][what], "sgd": step_seconds}} for r in found]
        return ratios(rounds, what, "sgd")

    of_naive_norm = Row("norm", ratios(found, "norm", "norm, naive SAM-ON"), "naive SAM-ON", at_most=OF_NAIVE_NORM)
    both = {name: _both(there, back) for name, (there, back) in moves.items()}
    of_peers = [
        Row("all", ratios(found, "all", name), name, at_most=OF_PEER if name == best else None) for name in others
    ]

    def before() -> None:
        settle()
        sgd(BETWEEN)

    rows = [
        *(explained(row, both, "all", row.unit, before) for row in of_peers),
        explained(of_naive_norm, both, "norm", "norm, naive SAM-ON", before),
        *(Row(label, ratios(found, label, f"{label}, naive SSAM"), "naive SSAM") for label in masks),
        *(Row(what, of_step(what), "an SGD step", at_most=OF_STEP if what in list(masks)[:2] else None)
          for what in moves),
    ]  # fmt: skip
    return finish(result, rows, {"sgd": passes, "moves": found}, options.json)


if __name__ == "__main__":
    main()
