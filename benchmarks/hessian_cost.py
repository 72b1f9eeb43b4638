"""What one product with the Hessian costs, in gradients of the same loss on the same batch.

    python -m benchmarks.hessian_cost [--nets resnet14 vit] [--rounds 15] [--json FILE]

Two digit-sized networks in evaluation mode, 8x8 inputs: ResNet-14 of width 16 with BatchNorm (256 examples) and a
LayerNorm transformer of width 64 (64 examples). All variants run in one process, once a round, in an order shuffled
anew; on one thread, in process CPU time; a cost is the median over rounds of the ratio to that round's gradient, which
runs the model plainly, with whatever kernels torch takes. The limits count matrix products alone, a forward pass as 1
and a gradient as 3: from a retained record a product takes 6 for all parameters and 2 for normalization layers. The
record is made before the clock starts; "rebuilt" makes it anew in every product (limit 9).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from analysis.operator import HessianOperator
from benchmarks.models import ResNet
from benchmarks.profiles import explained
from benchmarks.rows import Row, arguments, finish, start
from experiments.timing import measure, quartiles, ratios
from experiments.zoo.vit import ViTSmall
from masks import MaskContext, build_mask, cross_entropy

NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet14": (lambda: ResNet(16, (2, 2, 2)), 256),
    "vit": (lambda: ViTSmall(3, (8, 8), 10, 64), 64),
}
LIMITS = {"all": 2.0, "norm": 0.67, "rebuilt": 3.0}
AT_MOST = {("resnet14", "all"): 2.15, ("resnet14", "norm"): 1.2, ("vit", "all"): 2.3, ("vit", "norm"): 1.25}


def run(name: str, rounds: int, seed: int = 0) -> tuple[list[Row], list[dict[str, Any]]]:
    torch.manual_seed(seed)
    make, n = NETS[name]
    model = make().eval()
    x, y = torch.randn(n, 3, 8, 8), torch.randint(10, (n,))
    norm, params = build_mask("norm", MaskContext(model)), list(model.parameters())
    operators = {
        "all": HessianOperator(model, [(x, y)], retain=True),
        "norm": HessianOperator(model, [(x, y)], mask=norm, retain=True),
        "rebuilt": HessianOperator(model, [(x, y)], retain=False),
    }
    steps: dict[str, Callable[[], object]] = {
        "gradient": lambda: torch.autograd.grad(cross_entropy(model(x), y).mean(), params)
    }
    for what, operator in operators.items():
        vector = torch.randn(operator.dimension)
        steps[what] = lambda operator=operator, vector=vector: operator.matvec(vector)  # type: ignore[misc]
    found = measure(steps, rounds, seed, torch.device("cpu"))
    gradient = quartiles([r["seconds"]["gradient"] for r in found])["median"]
    rows = [
        explained(
            Row(
                f"{name}, Hessian product, {what}",
                ratios(found, what, "gradient"),
                "a gradient",
                LIMITS[what],
                AT_MOST.get((name, what)),
                f"{operator.dimension:,} coordinates; a gradient takes {gradient * 1e3:.1f} ms",
            ),
            steps, what, "gradient",
        )
        for what, operator in operators.items()
    ]  # fmt: skip
    return rows, found


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments("hessian_cost", "Cost of a Hessian product.", rounds=15)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    options, result = start(parser, given)
    found = {name: run(name, options.rounds) for name in options.nets}
    rows = [row for part, _ in found.values() for row in part]
    return finish(result, rows, {name: rounds for name, (_, rounds) in found.items()}, options.json)


if __name__ == "__main__":
    main()
