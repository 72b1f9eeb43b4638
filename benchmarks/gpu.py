"""Everything that awaits a GPU, in one command: recorded steps, throughput, several runs at once, each beside limits.

    python -m benchmarks.gpu [--json FILE] [--rounds 9] [--seconds 1]

Limits are measured on the same card: the rates of a large bfloat16 and float32 (TF32 off) matrix product, for steps,
whose operations are counted as in ``torch.utils.flop_counter``; and that of a large copy, for moving the weights to
w + eps and back. The unit SGD is a plain loop without this package, recorded where the row beside it is.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.perturb_cost import ours
from benchmarks.rows import Row, arguments, finish, start
from experiments.models import build_model
from experiments.timing import Step, measure, quartiles, ratios
from masks import MaskContext, build_mask
from sam import SAM
from sam.captured import CapturedStep, CudaRecorder, Recorder

SGD = "SGD"
MASKS = ("norm", "all")
VARIANTS = (SGD, *MASKS)
EAGER_STEPS = 3
"""Steps before one is recorded."""
MOVED_BYTES = 7 * 4
"""That w + eps and back must read or write per coordinate: the gradient for its norm; gradient, weight, moved weight
and copy; copy and weight."""


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
    """One run in progress: ``step()`` is a step of training on the same batch, and returns its loss."""

    step: Step
    model: nn.Module

    @classmethod
    def of(cls, work: Workload, variant: str, device: torch.device, recorder: Recorder | None = None) -> Run:
        """A step of SGD, or of SAM under a mask; recorded if there is something to record with."""
        torch.manual_seed(0)
        layout = torch.channels_last
        model = build_model(work.model, in_channels=3, image_size=(32, 32), num_classes=10)
        model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        x = torch.randn(work.batch_size, 3, 32, 32, device=device).to(memory_format=layout)
        batch = x, torch.randint(10, (work.batch_size,), device=device)
        base = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, fused=True)

        def losses(of: tuple[Tensor, Tensor]) -> Tensor:
            context: AbstractContextManager[Any] = (
                torch.autocast(device.type, torch.bfloat16) if work.bf16 else nullcontext()
            )
            with context:
                return F.cross_entropy(model(of[0]), of[1], reduction="none")

        if variant == SGD:
            return cls(_plain(base, losses, batch, recorder), model)
        optimizer = SAM(base, model, mask=build_mask(variant, MaskContext(model)), rho=0.1)
        if recorder is None:
            return cls(lambda: optimizer.step_on(losses, batch), model)
        captured = CapturedStep(optimizer, losses, eager_steps=EAGER_STEPS, recorder=recorder)
        return cls(lambda: captured(batch), model)


def _plain(
    base: torch.optim.Optimizer,
    losses: Callable[[tuple[Tensor, Tensor]], Tensor],
    batch: tuple[Tensor, Tensor],
    recorder: Recorder | None,
) -> Step:
    """A step of the base optimizer alone. Recorded, it copies the batch to where the recording reads it."""

    def train(of: tuple[Tensor, Tensor]) -> Tensor:
        base.zero_grad()
        loss = losses(of).mean()
        loss.backward()
        base.step()
        return loss.detach()

    if recorder is None:
        return lambda: train(batch)
    static = batch[0].clone(), batch[1].clone()
    done, replay = 0, None

    def body() -> Any:
        return train(static), None  # no statistics

    def step() -> Tensor:
        nonlocal done, replay
        for there, new in zip(static, batch, strict=True):
            there.copy_(new)
        done += 1
        if done <= EAGER_STEPS:
            return recorder.eager(body)[0]
        if replay is None:
            replay = recorder.record(body)
        return replay()[0].clone()

    return step


def repeated(step: Step, times: int) -> Step:
    """A function that does so many steps."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


def step_costs(work: Workload, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds per step of SGD and every mask, eager and recorded, interleaved in shuffled order."""
    graphs = (False, True) if device.type == "cuda" else (False,)
    runs = {
        f"{name} {'captured' if captured else 'eager'}": Run.of(
            work, name, device, CudaRecorder(device) if captured else None
        )
        for name in VARIANTS
        for captured in graphs
    }
    for run in runs.values():
        repeated(run.step, EAGER_STEPS + 2)()
    found = measure({name: repeated(run.step, work.steps) for name, run in runs.items()}, rounds, 0, device)
    seconds = {name: quartiles([r["seconds"][name] / work.steps for r in found]) for name in runs}
    out: dict[str, Any] = {
        "seconds_per_step": seconds,
        "samples_per_second": {name: work.batch_size / s["median"] for name, s in seconds.items()},
        "rounds": found,
    }
    for kind in ("eager", "captured") if len(graphs) == 2 else ("eager",):
        for mask in MASKS:
            out[f"{mask} relative to SGD, {kind}"] = ratios(found, f"{mask} {kind}", f"{SGD} {kind}")
    if len(graphs) == 2:
        for name in VARIANTS:
            out[f"speed-up by recording, {name}"] = ratios(found, f"{name} eager", f"{name} captured")
            out[f"losses differ by, {name}"] = trajectory_difference(work, name, device, CudaRecorder(device))
    return out


def trajectory_difference(
    work: Workload, variant: str, device: torch.device, recorder: Recorder, steps: int = 30
) -> float:
    """Largest difference of the losses of eager and recorded steps, relative to the eager ones."""
    losses = []
    for kind in (None, recorder):
        run = Run.of(work, variant, device, kind)
        losses.append(torch.stack([torch.as_tensor(run.step()) for _ in range(steps)]).double())
    return float(((losses[1] - losses[0]).abs() / losses[0].abs()).max())


def at_once(work: Workload, number: int, device: torch.device, seconds: float) -> dict[str, float]:
    """Samples per second of one recorded run, and of several on a stream each."""
    runs = [Run.of(work, "norm", device, CudaRecorder(device)) for _ in range(number)]
    streams = [torch.cuda.Stream(device) for _ in runs]  # type: ignore[no-untyped-call]
    for run in runs:
        repeated(run.step, EAGER_STEPS + 2)()

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


def move_costs(model_name: str, rounds: int, device: torch.device, times: int = 20) -> dict[str, Any]:
    """Seconds to w + eps and back under every mask, without passes, and how many coordinates it keeps."""
    torch.manual_seed(0)
    model = build_model(model_name, in_channels=3, image_size=(32, 32), num_classes=10)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    masks = {name: build_mask(name, MaskContext(model)) for name in MASKS}

    def both(there: Step, back: Step) -> Step:
        return lambda: (there(), back())

    moves = {name: repeated(both(*ours(mask, model)), times) for name, mask in masks.items()}
    found = measure(moves, rounds, 0, device)
    return {
        "rounds": found,
        "masks": {
            name: {"kept": mask.num_kept, "seconds": quartiles([r["seconds"][name] / times for r in found])}
            for name, mask in masks.items()
        },
    }


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
    """Counted operations of a step of SGD and under every mask, on the meta device."""
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
    for name in VARIANTS:
        if name == SGD:
            out[name] = float(full)
            continue
        touched = [named[c.row.name] for c in build_mask(name, context).per_layer() if c.kept]
        out[name] = float(full + count(touched))
    return out


def rows(result: dict[str, Any]) -> list[Row]:
    """What could be measured, beside what the counted operations allow at the measured rates."""
    work = result["workloads"]
    small, large, half = WORKLOADS[:3]
    out: list[Row] = []

    def limit(of: Workload, name: str) -> float:
        rate = result["limits"][f"{'bf16' if of.bf16 else 'float32'} flop/s"]
        return float(of.batch_size * rate / work[of.name]["flops_per_step"][name])

    def one(value: float) -> dict[str, float]:
        return {"median": value, "q1": value, "q3": value}

    for of in WORKLOADS:
        rates = work[of.name]["samples_per_second"]
        goals = dict(zip(VARIANTS, (50e3, 29e3, 25e3), strict=True)) if of is half else {}
        for what, rate in rates.items():
            name, kind = what.split()
            goal = goals.get(name) if kind == "captured" else None
            out.append(Row(f"{of.name}, {what}", one(rate), "sample/s", limit(of, name), at_least=goal))
        for kind in ("eager", "captured"):
            for mask, most in (("norm", 1.80), ("all", 2.05)):
                key = f"{mask} relative to SGD, {kind}"
                if key in work[of.name]:
                    flops = work[of.name]["flops_per_step"]
                    goal = most if (of, kind) == (half, "captured") else None
                    bound = flops[mask] / flops[SGD]
                    out.append(Row(f"{of.name}, {mask}, {kind}", work[of.name][key], "SGD", bound, goal))
        for name in VARIANTS:
            key = f"speed-up by recording, {name}"
            if key in work[of.name]:
                goal = None if name == SGD else {small: 2.0, large: 1.1}.get(of)
                apart = f"losses differ by {work[of.name][f'losses differ by, {name}']:.1e}"
                out.append(Row(f"{of.name}, {name}", work[of.name][key], "faster, recorded", None, None, apart, goal))
    for model, masks in result["moves"].items():
        for mask, cost in masks.items():
            bound = 1e6 * MOVED_BYTES * cost["kept"] / result["limits"]["copied bytes/s"]
            found = {name: 1e6 * value for name, value in cost["seconds"].items()}
            out.append(Row(f"{model}, {mask}, w + eps and back", found, "microsecond", bound))
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
    result |= {"workloads": {}, "moves": {}}
    rounds = {}
    for work in WORKLOADS:
        print(work.name, flush=True)
        found = step_costs(work, options.rounds, device)
        rounds[work.name] = found.pop("rounds")
        result["workloads"][work.name] = found | {"flops_per_step": flops_per_step(work)}
    for model in dict.fromkeys(work.model for work in WORKLOADS):
        moved = move_costs(model, options.rounds, device)
        rounds[f"{model}, moves"], result["moves"][model] = moved["rounds"], moved["masks"]
    result["at_once"] = at_once(WORKLOADS[0], 4, device, options.seconds) if device.type == "cuda" else {}
    return finish(result, rows(result), rounds, options.json)


if __name__ == "__main__":
    main()
