"""What one SAM step costs, relative to one step of SGD.

    python -m benchmarks.step_cost [--model resnet18_w16] [--rounds 9] [--batch-size 128] [--json FILE]

All variants run in one process on one model and one batch, one step each per round, in an order that is
shuffled anew every round (a fixed order makes a variant up to 4 % slower by what runs before it). A cost is the
median over rounds of the ratio to the same round's SGD step, with quartiles. On a CPU the clock is the process's
own CPU time on one thread, so that other jobs disturb little; on CUDA it is the device's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import MODELS
from benchmarks.timing import Step, environment, measure, quartiles, ratios
from masks import Budget, Mask, MaskContext, Region, build_mask
from sam import SAM

SCHEMA = "sam-masks/benchmarks/step_cost/1"
ALL_AT_MOST, NORM_AT_MOST, NORM_OF_ALL_AT_MOST, HELD_AT_MOST = 2.10, 1.85, 0.90, 0.01


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_masks(model: nn.Module) -> dict[str, Mask]:
    context = MaskContext(model)
    norm = build_mask("norm", context)
    return {
        "all": build_mask("all", context),
        "norm": norm,
        "random": build_mask("random", context, Budget.matching(norm)),
    }


def make_steps(model: nn.Module, batch: tuple[Tensor, Tensor], masks: dict[str, Mask]) -> dict[str, Step]:
    """One function per variant; each has a base optimizer of its own over the same parameters."""
    fused = batch[0].device.type == "cuda"

    def base() -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4, fused=fused)

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

    return {
        "sgd": plain(base()),
        "all": step_on(masks["all"]),
        "norm": step_on(masks["norm"]),
        "norm_closure": step(masks["norm"]),
        "random": step_on(masks["random"]),
    }


def flop_limits(model: nn.Module, batch: tuple[Tensor, Tensor], masks: dict[str, Mask]) -> dict[str, float]:
    """Floating-point operations of a step with each mask, in units of one forward and backward pass.

    Only matrix products and convolutions count, as in ``torch.utils.flop_counter``.
    """

    def flops(run: Callable[[Tensor], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run(losses(model, batch).mean())
        return counter.get_total_flops()

    full = flops(lambda loss: loss.backward())
    model.zero_grad()
    out = {"sgd": 1.0}
    for name, mask in masks.items():
        touched = Region(mask, model).params
        out[name] = 1 + flops(lambda loss, touched=touched: torch.autograd.grad(loss, touched)) / full
    out["norm_closure"] = 2.0
    return out


def held_bytes(model: nn.Module, masks: dict[str, Mask]) -> dict[str, dict[str, float]]:
    """What each mask keeps: the backup between the two passes, and its index lists all the time."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    out = {}
    for name, mask in masks.items():
        region = Region(mask, model)
        backup = sum(t.untyped_storage().nbytes() for t in region.save())
        out[name] = {
            "backup_bytes": backup,
            "index_bytes": region.index_nbytes,
            "share_of_parameters": (backup + region.index_nbytes) / parameters,
        }
    return out


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    cost = result["cost_relative_to_sgd"]
    found = [
        ("step cost, all", cost["all"]["median"], ALL_AT_MOST),
        ("step cost, norm", cost["norm"]["median"], NORM_AT_MOST),
        ("norm relative to all", result["norm_relative_to_all"]["median"], NORM_OF_ALL_AT_MOST),
        ("held by norm / parameters", result["held"]["norm"]["share_of_parameters"], HELD_AT_MOST),
    ]
    return [{"target": what, "found": value, "at_most": limit, "met": value <= limit} for what, value, limit in found]


def run(model_name: str, rounds: int, batch_size: int, device: torch.device, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = MODELS[model_name]().to(device)
    x, y = torch.randn(batch_size, 3, 32, 32, device=device), torch.randint(0, 10, (batch_size,), device=device)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    batch = (x, y)
    masks = make_masks(model)
    before = environment(device)
    found = measure(make_steps(model, batch, masks), rounds, seed, device)
    names = list(LABELS)
    result = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": before,
        "settings": {"model": model_name, "rounds": rounds, "batch_size": batch_size, "seed": seed},
        "clock": "device" if device.type == "cuda" else "process CPU",
        "num_parameters": masks["all"].numel,
        "num_kept": {name: mask.num_kept for name, mask in masks.items()},
        "sgd_seconds": quartiles([r["seconds"]["sgd"] for r in found]),
        "cost_relative_to_sgd": {name: ratios(found, name, "sgd") for name in names},
        "norm_relative_to_all": ratios(found, "norm", "all"),
        "flop_limit": flop_limits(model, batch, masks),
        "held": held_bytes(model, masks),
        "rounds": found,
    }
    result["targets"] = targets(result)
    return result


LABELS = {
    "sgd": "SGD",
    "all": "SAM, all (step_on)",
    "norm": "SAM, norm (step_on)",
    "norm_closure": "SAM, norm (closure)",
    "random": "SAM, random at the norm count (step_on)",
}


def table(result: dict[str, Any]) -> str:
    settings, env = result["settings"], result["environment"]
    lines = [
        f"{settings['model']}, {result['num_parameters']:,} parameters, batch {settings['batch_size']}, "
        f"{settings['rounds']} rounds, {env['threads']} thread, {env['device']}; "
        f"SGD {result['sgd_seconds']['median'] * 1e3:.1f} ms ({result['clock']} time)",
        "",
        f"{'':40} {'x SGD':>6}  {'quartiles':>13}  {'FLOPs':>6}  {'held':>8}",
    ]
    for name, cost in result["cost_relative_to_sgd"].items():
        held = result["held"].get(name.removesuffix("_closure"))
        share = f"{held['share_of_parameters']:8.3%}" if held else f"{'-':>8}"
        lines.append(
            f"{LABELS[name]:40} {cost['median']:6.3f}  {cost['q1']:6.3f}-{cost['q3']:6.3f}  "
            f"{result['flop_limit'][name]:6.3f}  {share}"
        )
    lines.append("")
    for item in result["targets"]:
        verdict = "met" if item["met"] else "MISSED"
        lines.append(f"{item['target']:40} {item['found']:6.3f}  at most {item['at_most']:.2f}  {verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description="Cost of one SAM step.")
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet18_w16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write every round, the summary and the environment to this file")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.batch_size < 1:
        parser.error("--rounds and --batch-size must be at least 1")
    torch.set_num_threads(1)
    result = run(options.model, options.rounds, options.batch_size, torch.device(options.device))
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
