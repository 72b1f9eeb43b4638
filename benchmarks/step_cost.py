"""What one SAM step costs, relative to one step of SGD.

    python -m benchmarks.step_cost [--model resnet18_w16|all] [--rounds 9] [--batch-size 128] [--json FILE]

All variants run in one process on one model and one batch, one step each per round, in an order that is shuffled anew
every round (a fixed order makes a variant up to 4 % slower by what runs before it). A cost is the median over rounds
of the ratio to the same round's SGD step, with quartiles. The clock is the process's own CPU time on one thread, so
that other jobs disturb little. The peers, a naive SAM and, if it is installed, that of pytorch-optimizer, take the
same passes and the same base optimizer, and move the weights their own way. The limit is the ratio of the steps'
matrix products and convolutions, which is what it would cost if they were all. For GPUs: :mod:`benchmarks.gpu`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import naive
from benchmarks.models import CLASSIFIER, LAST_STAGE, MODELS
from benchmarks.profiles import explained
from benchmarks.rows import Row, arguments, finish, start
from experiments.timing import Step, measure, quartiles, ratios
from masks import Budget, Mask, MaskContext, Region, build_mask
from sam import SAM

COST_AT_MOST = {"all": 2.10, "norm": 1.85, "last_stage": 1.25, "classifier": 1.05}
RESNET18_NORM_AT_MOST, NORM_OF_ALL_AT_MOST, OF_PEER_AT_MOST = 1.78, 0.87, 1.02
HELD_PER_ENTRY_AT_MOST = {"norm": 4.0, "random": 16.0}


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_masks(model: nn.Module, last_stage: tuple[str, ...]) -> dict[str, Mask]:
    context = MaskContext(model)
    norm = build_mask("norm", context)

    def late(prefixes: tuple[str, ...]) -> Mask:
        return Mask(context.table, tuple(row.name.startswith(prefixes) for row in context.table))

    return {
        "all": build_mask("all", context),
        "norm": norm,
        "random": build_mask("random", context, Budget.matching(norm)),
        "last_stage": late(last_stage),
        "classifier": late(CLASSIFIER),
    }


def peers(params: list[Tensor]) -> dict[str, naive.Moves]:
    """Other ways to move all parameters and back: the naive one, and that of the other package if it is there."""
    found: dict[str, naive.Moves] = {"all, naive": naive.sam(params)}
    try:
        from pytorch_optimizer import SAM as Peer
    except ImportError:
        return found

    class Nothing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            return None

    optimizer = Peer(params, Nothing, rho=naive.RHO, lr=0.0)

    return found | {"all, pytorch-optimizer": (optimizer.first_step, optimizer.second_step)}


def make_steps(model: nn.Module, batch: tuple[Tensor, Tensor], masks: dict[str, Mask]) -> dict[str, Step]:
    """One function per variant; each has a base optimizer of its own over the same parameters."""

    def base() -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)

    def closure(optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = losses(model, batch).mean()
        loss.backward()
        return loss

    def plain(optimizer: torch.optim.Optimizer) -> Step:
        return lambda: (closure(optimizer), optimizer.step())

    def step_on(mask: Mask) -> Step:
        optimizer = SAM(base(), model, mask=mask)
        return lambda: optimizer.step_on(lambda b: losses(model, b), batch)

    def step(mask: Mask) -> Step:
        optimizer = SAM(base(), model, mask=mask)
        return lambda: optimizer.step(lambda: closure(optimizer))

    def peer(moves: naive.Moves, optimizer: torch.optim.Optimizer) -> Step:
        there, back = moves
        return lambda: (closure(optimizer), there(), closure(optimizer), back(), optimizer.step())

    params = list(model.parameters())
    return {
        **{name: peer(moves, base()) for name, moves in peers(params).items()},
        "sgd": plain(base()),
        "all": step_on(masks["all"]),
        "norm": step_on(masks["norm"]),
        "norm_closure": step(masks["norm"]),
        "random": step_on(masks["random"]),
        "last_stage": step_on(masks["last_stage"]),
        "classifier": step_on(masks["classifier"]),
    }


def flop_limits(steps: dict[str, Step]) -> dict[str, float]:
    """Floating-point operations that one step of each variant really does, in units of SGD's.

    Only matrix products and convolutions count, as in ``torch.utils.flop_counter``.
    """

    def flops(step: Step) -> int:
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops()

    return {name: flops(step) / flops(steps["sgd"]) for name, step in steps.items()}


def bytes_per_entry(mask: Mask, model: nn.Module) -> float:
    """What is held for each coordinate of the mask: the backup between the two passes, and indices all the time."""
    region = Region(mask, model)
    backup = sum(t.untyped_storage().nbytes() for t in region.save())
    return (backup + region.index_nbytes) / mask.num_kept


def run(model_name: str, rounds: int, batch_size: int, seed: int = 0) -> tuple[list[Row], Any]:
    """The rows of one model, and every round."""
    torch.manual_seed(seed)
    model = MODELS[model_name]()
    x, y = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    masks = make_masks(model, LAST_STAGE[model_name])
    steps = make_steps(model, (x, y), masks)
    found = measure(steps, rounds, seed, torch.device("cpu"))
    limits = flop_limits(steps)
    at_most = dict(COST_AT_MOST)
    if model_name.startswith("resnet18"):
        at_most["norm"] = RESNET18_NORM_AT_MOST
    over = limits["last_stage"] > at_most["last_stage"]
    if over:  # that of ResNet-20 has a third of its operations
        del at_most["last_stage"]
    milliseconds = 1e3 * quartiles([r["seconds"]["sgd"] for r in found])["median"]
    rows = [
        explained(
            Row(f"{model_name}, {LABELS[name]}", ratios(found, name, "sgd"), "SGD", limits[name], at_most.get(name)),
            steps, name, "sgd",
        )
        for name in LABELS
    ]  # fmt: skip
    rows[0] = replace(rows[0], note=f"SGD takes {milliseconds:.1f} ms")
    if over:
        last = list(LABELS).index("last_stage")
        rows[last] = replace(rows[last], note=f"without the target of {COST_AT_MOST['last_stage']}, below its limit")
    of_all = Row(f"{model_name}, norm", ratios(found, "norm", "all"), "all", at_most=NORM_OF_ALL_AT_MOST)
    rows.append(explained(of_all, steps, "norm", "all"))
    of_peers = {name: ratios(found, "all", name) for name in steps if name.startswith("all, ")}
    best = max(of_peers, key=lambda name: of_peers[name]["median"])
    for name, cost in of_peers.items():
        at_most_peer = OF_PEER_AT_MOST if name == best else None
        row = Row(f"{model_name}, SAM, all", cost, name, at_most=at_most_peer)
        rows.append(explained(row, steps, "all", name))
    for name, most in HELD_PER_ENTRY_AT_MOST.items():
        held = quartiles([bytes_per_entry(masks[name], model)])
        rows.append(Row(f"{model_name}, held by {name}", held, "byte per coordinate", 4.0, most))
    return rows, found


LABELS = {
    "all": "SAM, all",
    "norm": "SAM, norm",
    "norm_closure": "SAM, norm, by a closure",
    "random": "SAM, random at the norm count",
    "last_stage": "SAM, last stage",
    "classifier": "SAM, classifier",
}


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments("step_cost", "Cost of one SAM step.")
    parser.add_argument("--model", choices=[*sorted(MODELS), "all"], default="resnet18_w16")
    parser.add_argument("--batch-size", type=int, default=128)
    options, result = start(parser, given)
    names = sorted(MODELS) if options.model == "all" else [options.model]
    parts = {name: run(name, options.rounds, options.batch_size) for name in names}
    rows = [row for part, _ in parts.values() for row in part]
    return finish(result, rows, {name: rounds for name, (_, rounds) in parts.items()}, options.json)


if __name__ == "__main__":
    main()
