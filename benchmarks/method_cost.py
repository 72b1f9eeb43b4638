"""What one step of every method of the SAM family costs, relative to one step of SGD, beside its stated passes.

    python -m benchmarks.method_cost [--model resnet20] [--rounds 9] [--batch-size 128] [--mask all] [--json FILE]

As in :mod:`benchmarks.step_cost`: one process, one model, one batch, order shuffled every round, medians of the ratio
to the same round's SGD step. A method that does not do the same in every step (LookSAM) is timed over a whole period.
A pass is one forward and backward pass as SGD does it; "stated" is what ``sam-masks methods`` says of the method under
a mask that does not restrict the first pass. For exact_sam that counts matrix products; what its step takes beyond them
is measured, not stated, and marked as explained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import MODELS
from benchmarks.step_cost import losses
from experiments.timing import Step, environment, measure, quartiles, ratios
from masks import Mask, MaskContext, build_mask
from sam import SAM, MethodInfo, MethodSpec, list_methods

SCHEMA = "sam-masks/benchmarks/method_cost/1"
TOLERANCE = 0.10
EXPLAINED = {
    "exact_sam": "stated: matrix products; second derivatives of convolutions and BatchNorm take more",
}


def methods() -> list[MethodInfo]:
    """Those that options alone make and that are not settings of others."""
    return [info for info in list_methods() if not info.needs_model and not MethodSpec(info.name).preset]


def period(info: MethodInfo) -> int:
    """Steps after which the method does the same again."""
    return int(MethodSpec(info.name).options.get("k", 1))


def make_step(model: nn.Module, batch: tuple[Tensor, Tensor], mask: Mask, info: MethodInfo) -> Step:
    base = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
    optimizer = SAM(base, model, mask=mask, rho=info.rho, method=MethodSpec(info.name).build())

    def step() -> None:
        for _ in range(period(info)):
            optimizer.step_on(lambda b: losses(model, b), batch)

    return step


def make_sgd(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Step:
    base = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        base.zero_grad()
        losses(model, batch).mean().backward()
        base.step()

    return step


def run(model_name: str, mask_name: str, rounds: int, batch_size: int, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = MODELS[model_name]()
    batch = (torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,)))
    mask = build_mask(mask_name, MaskContext(model))
    infos = methods()
    steps: dict[str, Callable[[], object]] = {"sgd": make_sgd(model, batch)}
    steps |= {info.name: make_step(model, batch, mask, info) for info in infos}
    before = environment(torch.device("cpu"))
    found = measure(steps, rounds, seed, torch.device("cpu"))
    rows = []
    for info in infos:
        cost = {key: value / period(info) for key, value in ratios(found, info.name, "sgd").items()}
        stated = info.num_passes(**MethodSpec(info.name).options)
        rows.append(
            {
                "method": info.name,
                "cost_relative_to_sgd": cost,
                "stated_passes": stated,
                "passes": info.passes,
                "off": cost["median"] / stated - 1,
                "met": abs(cost["median"] / stated - 1) <= TOLERANCE,
                "explained": EXPLAINED.get(info.name),
            }
        )
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": before,
        "settings": {
            "model": model_name, "mask": mask_name, "rounds": rounds, "batch_size": batch_size, "seed": seed,
        },
        "clock": "process CPU",
        "sgd_seconds": quartiles([r["seconds"]["sgd"] for r in found]),
        "methods": rows,
        "rounds": found,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    settings = result["settings"]
    lines = [
        f"{settings['model']}, mask {settings['mask']}, batch {settings['batch_size']}, {settings['rounds']} rounds, "
        f"1 thread, {result['environment']['device']}; SGD {result['sgd_seconds']['median'] * 1e3:.1f} ms",
        "",
        f"{'method':18} {'x SGD':>6}  {'quartiles':>13}  {'stated':>6}  {'off':>6}",
    ]
    for row in result["methods"]:
        cost = row["cost_relative_to_sgd"]
        mark = "" if row["met"] else f"  ({row['explained']})" if row["explained"] else "  MISSED"
        lines.append(
            f"{row['method']:18} {cost['median']:6.2f}  {cost['q1']:6.2f}-{cost['q3']:6.2f}  "
            f"{row['stated_passes']:6.2f}  {row['off']:+6.1%}{mark}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.method_cost", description="Cost of every method.")
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet20")
    parser.add_argument("--mask", default="all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write every round, the summary and the environment to this file")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.batch_size < 1:
        parser.error("--rounds and --batch-size must be at least 1")
    torch.set_num_threads(1)
    result = run(options.model, options.mask, options.rounds, options.batch_size)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
