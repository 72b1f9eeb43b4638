"""What worst-case sharpness by K steps of ascent costs, in units of K gradients of the same data.

    python -m benchmarks.sharpness_cost [--nets resnet14 vit resnet18_w16] [--steps 20] [--rounds 9] [--json FILE]

Two micro-batches of 128 examples, networks of two sizes (8x8 and 32x32 inputs), timed as in
:mod:`benchmarks.hessian_cost`. Auto-PGD takes K gradients, one loss for the last point, and one for the check that the
model is a fixed function of its weights; a loss is a third of a gradient. The limit counts K gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from analysis.sharpness import m_sharpness
from benchmarks.mask_cost import NETS
from benchmarks.profiles import explained
from benchmarks.rows import Row, arguments, finish, start
from experiments.timing import measure, ratios
from masks import cross_entropy
from sam.perturbation import Rule

NUM_EXAMPLES, M = 256, 128
AT_MOST = 1.05


def run(name: str, steps: int, rounds: int, seed: int = 0) -> tuple[list[Row], list[dict[str, Any]]]:
    torch.manual_seed(seed)
    make, side = NETS[name]
    model = make().eval()
    x, y = torch.randn(NUM_EXAMPLES, 3, side, side), torch.randint(10, (NUM_EXAMPLES,))
    params = list(model.parameters())

    def gradients() -> None:
        for _ in range(steps):
            for xs, ys in zip(x.split(M), y.split(M), strict=True):
                torch.autograd.grad(cross_entropy(model(xs), ys).mean(), params)

    def sharpness() -> None:
        m_sharpness(model, [(x, y)], m=M, rho=0.1, rule=Rule(), method="apgd", steps=steps)

    variants = {"gradients": gradients, "apgd": sharpness}
    found = measure(variants, rounds, seed, torch.device("cpu"), warm_up=1)
    cost = ratios(found, "apgd", "gradients")
    row = Row(f"{name}, {steps} steps of Auto-PGD", cost, f"{steps} gradients", 1.0, AT_MOST)
    return [explained(row, variants, "apgd", "gradients")], found


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments("sharpness_cost", "Cost of worst-case sharpness.")
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["resnet14", "vit"])
    parser.add_argument("--steps", type=int, default=20)
    options, result = start(parser, given)
    found = {name: run(name, options.steps, options.rounds) for name in options.nets}
    rows = [row for part, _ in found.values() for row in part]
    return finish(result, rows, {name: rounds for name, (_, rounds) in found.items()}, options.json)


if __name__ == "__main__":
    main()
