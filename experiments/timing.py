"""Fair timing: the clock, rounds in shuffled order, quartiles of ratios within a round, and the environment."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from experiments import record

WARM_UP = 2

Step = Callable[[], object]


def clock(step: Step, device: torch.device) -> float:
    """Seconds of one step: CPU time of this process, or device time between two events."""
    if device.type != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def measure(
    steps: Mapping[str, Step], rounds: int, seed: int, device: torch.device, warm_up: int = WARM_UP
) -> list[dict[str, Any]]:
    """Every round: the order it ran in, and seconds per variant."""
    shuffle = random.Random(seed)
    out = []
    for i in range(warm_up + rounds):
        order = list(steps)
        shuffle.shuffle(order)
        seconds = {name: clock(steps[name], device) for name in order}
        if i >= warm_up:
            out.append({"order": order, "seconds": seconds})
    return out


def quartiles(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "q1": low, "q3": high}


def ratios(rounds: list[dict[str, Any]], over: str, under: str) -> dict[str, float]:
    """Quartiles over the rounds of the ratio of two variants' seconds in the same round."""
    return quartiles([r["seconds"][over] / r["seconds"][under] for r in rounds])


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, and how busy the machine was."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return record.environment(device) | {
        "cpu": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "load_average": list(os.getloadavg()),
    }
