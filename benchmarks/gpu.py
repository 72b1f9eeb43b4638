"""Everything that awaits a GPU, in one command: recorded steps, throughput, several runs at once, each beside limits.

    python -m benchmarks.gpu [--json FILE] [--rounds 9] [--seconds 1]

Limits are measured on the same card: the rates of a large bfloat16 and float32 (TF32 off) matrix product and of a large
copy. The operations of a step are counted as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import copy
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import Row, arguments, finish, start
from experiments.models import build_model
from experiments.timing import Step, measure, quartiles, ratios
from masks import MaskContext, build_mask
from sam import SAM
from sam.captured import CapturedStep

MASKS = ("none", "norm", "all")


@dataclass(frozen=True)
class Workload:
    """A network and how it is trained.

    Attributes:
        model: a built-in model; its images are 3x32x32.
        batch_size: images per step.
        bf16: under bfloat16 autocast, float32 weights.
        steps: per timing.
    """

    model: str
    batch_size: int
    bf16: bool
    steps: int

    @property
    def name(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {'bf16' if self.bf16 else 'float32'}"


WORKLOADS = (
    Workload("resnet20", 128, False, 50),
    Workload("resnet18", 512, False, 10),
    Workload("resnet18", 512, True, 20),
    Workload("vit_t", 512, True, 20),
)


@dataclass
class Run:
    """One run in progress: ``step()`` is a step of training on the same batch."""

    step: Step
    optimizer: SAM
    model: nn.Module

    @classmethod
    def of(cls, work: Workload, mask: str, device: torch.device, *, captured: bool) -> Run:
        torch.manual_seed(0)
        layout = torch.channels_last
        model = build_model(work.model, in_channels=3, image_size=(32, 32), num_classes=10)
        model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        x = torch.randn(work.batch_size, 3, 32, 32, device=device).to(memory_format=layout)
        batch = x, torch.randint(10, (work.batch_size,), device=device)
        base = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, fused=True)
        optimizer = SAM(base, model, mask=build_mask(mask, MaskContext(model)), rho=0.1)

        def losses(of: tuple[Tensor, Tensor]) -> Tensor:
            context: AbstractContextManager[Any] = (
                torch.autocast(device.type, torch.bfloat16) if work.bf16 else nullcontext()
            )
            with context:
                return F.cross_entropy(model(of[0]), of[1], reduction="none")

        if captured:
            recorded = CapturedStep(optimizer, losses)
            return cls(lambda: recorded(batch), optimizer, model)
        return cls(lambda: optimizer.step_on(losses, batch), optimizer, model)


def repeated(step: Step, times: int) -> Step:
    """A function that does so many steps."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


def step_costs(work: Workload, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds per step of every mask, eager and recorded, interleaved in shuffled order."""
    graphs = (False, True) if device.type == "cuda" else (False,)
    runs = {
        f"{mask} {'captured' if captured else 'eager'}": Run.of(work, mask, device, captured=captured)
        for mask in MASKS
        for captured in graphs
    }
    warm = 5
    for run in runs.values():  # recordings are made after three steps
        repeated(run.step, warm)()
    found = measure({name: repeated(run.step, work.steps) for name, run in runs.items()}, rounds, 0, device)
    seconds = {name: quartiles([r["seconds"][name] / work.steps for r in found]) for name in runs}
    out: dict[str, Any] = {
        "seconds_per_step": seconds,
        "samples_per_second": {name: work.batch_size / s["median"] for name, s in seconds.items()},
        "rounds": found,
    }
    for kind in ("eager", "captured") if len(graphs) == 2 else ("eager",):
        for mask in MASKS[1:]:
            out[f"{mask} relative to SGD, {kind}"] = ratios(found, f"{mask} {kind}", f"none {kind}")
    if len(graphs) == 2:
        for mask in MASKS:
            out[f"speed-up by recording, {mask}"] = ratios(found, f"{mask} eager", f"{mask} captured")
            out[f"losses differ by, {mask}"] = trajectory_difference(work, mask, device)
    return out


def trajectory_difference(work: Workload, mask: str, device: torch.device, steps: int = 30) -> float:
    """Largest difference of the losses of eager and recorded steps, relative to the eager ones."""
    losses = []
    for captured in (False, True):
        run = Run.of(work, mask, device, captured=captured)
        losses.append(torch.stack([torch.as_tensor(run.step()) for _ in range(steps)]).double())
    return float(((losses[1] - losses[0]).abs() / losses[0].abs()).max())


def at_once(work: Workload, number: int, device: torch.device, seconds: float) -> dict[str, float]:
    """Samples per second of one recorded run, and of several on a stream each."""
    runs = [Run.of(work, "norm", device, captured=True) for _ in range(number)]
    streams = [torch.cuda.Stream(device) for _ in runs]  # type: ignore[no-untyped-call]
    for run in runs:
        repeated(run.step, 5)()

    def rate(count: int) -> float:
        torch.cuda.synchronize(device)
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(work.steps):
                for run, stream in zip(runs[:count], streams[:count], strict=True):
                    with torch.cuda.stream(stream):
                        run.step()
            torch.cuda.synchronize(device)
            done += work.steps * count
        return done * work.batch_size / (time.perf_counter() - start)

    one, several = rate(1), rate(number)
    return {"one": one, f"{number} on streams": several, "ratio": several / one}


def limits(device: torch.device, side: int, seconds: float) -> dict[str, float]:
    """Operations and bytes per second that this device reaches on one large product and one large copy."""

    def per_second(step: Step) -> float:
        step()
        _wait(device)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            step()
            count += 1
            _wait(device)
        return count / (time.perf_counter() - start)

    out = {}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out[f"{name} flop/s"] = 2 * side**3 * per_second(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    source = torch.empty(4 * side * side, device=device)
    target = torch.empty_like(source)
    out["copied bytes/s"] = 2 * 4 * source.numel() * per_second(lambda: target.copy_(source))
    return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_per_step(work: Workload) -> dict[str, float]:
    """Counted operations of a step per mask, on the meta device."""
    model = build_model(work.model, in_channels=3, image_size=(32, 32), num_classes=10).to("meta")
    x = torch.empty(work.batch_size, 3, 32, 32, device="meta")
    context = MaskContext(copy.deepcopy(model).to_empty(device="cpu"))

    def count(params: list[nn.Parameter]) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(model(x).sum(), params)
        return int(counter.get_total_flops())

    named = dict(model.named_parameters())
    full = count(list(named.values()))
    out = {}
    for name in MASKS:
        touched = [named[c.row.name] for c in build_mask(name, context).per_layer() if c.kept]
        out[name] = float(full + (count(touched) if touched else 0))
    return out


def rows(result: dict[str, Any]) -> list[Row]:
    """What could be measured, beside what the counted operations allow at the measured rates."""
    work = result["workloads"]
    small, large, half = WORKLOADS[:3]
    out: list[Row] = []

    def limit(of: Workload, mask: str) -> float:
        rate = result["limits"][f"{'bf16' if of.bf16 else 'float32'} flop/s"]
        return float(of.batch_size * rate / work[of.name]["flops_per_step"][mask])

    def one(value: float) -> dict[str, float]:
        return {"median": value, "q1": value, "q3": value}

    for of in WORKLOADS:
        rates = work[of.name]["samples_per_second"]
        goals = dict(zip(MASKS, (50e3, 29e3, 25e3), strict=True)) if of is half else {}
        for name, rate in rates.items():
            mask, kind = name.split()
            goal = goals.get(mask) if kind == "captured" else None
            out.append(Row(f"{of.name}, {name}", one(rate), "sample/s", limit(of, mask), at_least=goal))
        for kind in ("eager", "captured"):
            for mask, most in (("norm", 1.80), ("all", 2.05)):
                key = f"{mask} relative to SGD, {kind}"
                if key in work[of.name]:
                    flops = work[of.name]["flops_per_step"]
                    goal = most if (of, kind) == (half, "captured") else None
                    bound = flops[mask] / flops["none"]
                    out.append(Row(f"{of.name}, {mask}, {kind}", work[of.name][key], "SGD", bound, goal))
        for mask in MASKS:
            key = f"speed-up by recording, {mask}"
            if key in work[of.name]:
                goal = None if mask == "none" else {small: 2.0, large: 1.1}.get(of)
                apart = f"losses differ by {work[of.name][f'losses differ by, {mask}']:.1e}"
                out.append(Row(f"{of.name}, {mask}", work[of.name][key], "faster, recorded", None, None, apart, goal))
    if result["at_once"]:
        out.append(Row("4 runs of resnet20 at once", one(result["at_once"]["ratio"]), "one run", 4.0, at_least=2.0))
    return out


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments("gpu", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of every measurement of a rate")
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(given).device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device; --device cpu tries the eager half")
    options, result = start(parser, given, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    result["limits"] = limits(device, 8192 if device.type == "cuda" else 256, options.seconds)
    result["workloads"] = {}
    rounds = {}
    for work in WORKLOADS:
        print(work.name, flush=True)
        found = step_costs(work, options.rounds, device)
        rounds[work.name] = found.pop("rounds")
        result["workloads"][work.name] = found | {"flops_per_step": flops_per_step(work)}
    result["at_once"] = at_once(WORKLOADS[0], 4, device, options.seconds) if device.type == "cuda" else {}
    return finish(result, rows(result), rounds, options.json)


if __name__ == "__main__":
    main()
