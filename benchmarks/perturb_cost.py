"""What moving the weights to w + eps and back costs, without the passes, beside others' ways to do it.

    python -m benchmarks.perturb_cost [--model resnet18_w32] [--rounds 25] [--batch-size 128] [--json FILE]

The peers for all parameters are a naive SAM and, if it is installed (``pip install sam-masks[bench]``), the SAM of
pytorch-optimizer with a base optimizer that does nothing; the target is of the faster one. The masked methods are naive
references: :mod:`benchmarks.naive`.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from benchmarks import naive
from benchmarks.models import MODELS
from benchmarks.rows import Row, arguments, finish, start
from benchmarks.step_cost import losses
from experiments.timing import Step, measure, ratios
from masks import Budget, Mask, MaskContext, Region, build_mask
from sam import Rule, perturb

DENSITIES = (0.001, 0.01, 0.1, 0.5)
OF_PEER, OF_NAIVE_NORM, OF_STEP = 0.6, 0.3, 0.01


def ours(mask: Mask, model: torch.nn.Module) -> Step:
    """As :class:`sam.SAM` does it."""
    region = Region(mask, model)

    def move_and_back() -> None:
        found = perturb(Rule(), region, [p.grad for p in region.params], naive.RHO)
        with region.moved(found.directions, found.multiplier):
            pass

    return move_and_back


def peers(params: list[torch.Tensor]) -> dict[str, Step]:
    """The naive reference, and the other package if it is there."""
    found: dict[str, Step] = {"all, naive": naive.sam(params)}
    try:
        from pytorch_optimizer import SAM
    except ImportError:
        return found

    class Nothing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            return None

    optimizer = SAM(params, Nothing, rho=naive.RHO, lr=0.0)

    def move_and_back() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return found | {"all, pytorch-optimizer": move_and_back}


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

    def sgd() -> None:
        model.zero_grad()
        losses(model, batch).mean().backward()

    passes = measure({"sgd": sgd}, 5, 0, torch.device("cpu"))
    norm = build_mask("norm", context)
    random = {f"random {d:.1%}": build_mask("random", context, Budget.from_density(d, norm.numel)) for d in DENSITIES}
    others = peers(params)
    steps: dict[str, Step] = {
        "all": ours(build_mask("all", context), model),
        **others,
        "norm": ours(norm, model),
        "norm, naive SAM-ON": naive.sam_on(params, [bool(part.all()) for part in norm.dense()]),
    }
    for label, mask in random.items():
        steps |= {label: ours(mask, model), f"{label}, naive SSAM": naive.ssam(params, mask.dense())}
    found = measure(steps, options.rounds, 0, torch.device("cpu"))
    best = min(others, key=lambda name: median(r["seconds"][name] for r in found))
    step_seconds = sorted(r["seconds"]["sgd"] for r in passes)[len(passes) // 2]

    def of_step(what: str) -> dict[str, float]:
        # In the unit of one time: the passes leave no cache warm for what comes after them.
        rounds = [{"seconds": {what: r["seconds"][what], "sgd": step_seconds}} for r in found]
        return ratios(rounds, what, "sgd")

    rows = [
        *(Row("all", ratios(found, "all", name), name, at_most=OF_PEER if name == best else None) for name in others),
        Row("norm", ratios(found, "norm", "norm, naive SAM-ON"), "naive SAM-ON", at_most=OF_NAIVE_NORM),
        *(Row(label, ratios(found, label, f"{label}, naive SSAM"), "naive SSAM") for label in random),
        *(Row(what, of_step(what), "an SGD step", at_most=OF_STEP if what in list(random)[:2] else None)
          for what in steps),
    ]  # fmt: skip
    return finish(result, rows, {"sgd": passes, "moves": found}, options.json)


if __name__ == "__main__":
    main()
