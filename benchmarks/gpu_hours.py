"""GPU-hours of the published grids, from counted operations; the table of docs/scaling.md.

    python -m benchmarks.gpu_hours [--tflops 35] [--seeds 8] [--tuning-seeds 2]
    python -m benchmarks.gpu_hours --configs FILE ... [--tflops 35]

    hours = sum over runs of (epochs x images x passes x 3 F) / throughput

F: operations of a forward pass of one image (a multiply-add counts two); a backward pass costs two forward passes. A
run passes once over each image of an epoch, twice with a perturbation: an upper bound for sparse masks, whose second
pass needs fewer weight gradients. Building masks, validation and measurements are not in it. Throughput: what the model
reaches, not the peak of the data sheet.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer, resnet50

from experiments.config import DEFAULT_ARMS, Arm
from experiments.models import build_model
from experiments.presets import get_preset

IMAGENET = 1_281_167 - 50_000
"""Training images of ImageNet-1k without those that radii are chosen on: ``--n-val 50000``."""


@dataclass(frozen=True)
class Grid:
    """A study: ``images`` per epoch, arms with their radii."""

    name: str
    flops: int
    images: int
    epochs: int
    arms: tuple[Arm, ...]

    def passes(self, seeds: int, tuning_seeds: int) -> tuple[int, int]:
        """Runs of the study, and passes over its images per epoch, summed over them."""
        runs = passes = 0
        for arm in self.arms:
            number = seeds + (len(arm.rho) * tuning_seeds if len(arm.rho) > 1 else 0)
            runs += number
            passes += number * arm.epochs_factor * (2 if arm.rho else 1)
        return runs, passes

    def hours(self, passes: int, tflops: float) -> float:
        """GPU-hours of so many passes per epoch."""
        return self.epochs * self.images * passes * 3 * self.flops / (tflops * 1e12) / 3600


def forward_flops(model: nn.Module, size: int) -> int:
    """Operations of one image through a model on the meta device: nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return int(counter.get_total_flops())


def grids() -> tuple[Grid, ...]:
    """The three studies of docs/scaling.md."""
    preset = get_preset("sam_on_cifar100_wrn28_10")
    arms = tuple(Arm(**arm) for arm in preset.arms)
    wrn = build_model("wrn28_10", in_channels=3, image_size=(32, 32), num_classes=100).to("meta")
    with torch.device("meta"):
        vit = VisionTransformer(224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)
        resnet = resnet50()
    images, epochs = preset.settings["n_train"], preset.settings["epochs"]
    return (
        Grid("WRN-28-10, CIFAR-100", forward_flops(wrn, 32), images, epochs, arms),
        Grid("ResNet-50, ImageNet", forward_flops(resnet, 224), IMAGENET, 90, DEFAULT_ARMS),
        Grid("ViT-S/16, ImageNet", forward_flops(vit, 224), IMAGENET, 300, DEFAULT_ARMS),
    )


def table(tflops: float, seeds: int, tuning_seeds: int) -> str:
    """The table in Markdown."""
    lines = [
        "| grid | GFLOP per forward pass | epochs | runs | one SGD run | one SAM run | whole grid |",
        "|---|---|---|---|---|---|---|",
    ]
    for grid in grids():
        runs, passes = grid.passes(seeds, tuning_seeds)
        one, two, whole = (grid.hours(number, tflops) for number in (1, 2, passes))
        lines.append(
            f"| {grid.name} | {grid.flops / 1e9:.1f} | {grid.epochs} | {runs} | {one:.1f} h | {two:.1f} h | "
            f"{whole:,.0f} h |"
        )
    return "\n".join(lines)


def of_config(file: Path, tflops: float) -> str:
    """What a comparison on 10 classes of 32x32 images takes, as its file says and with every grid extended."""
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    model = build_model(config["model"], in_channels=3, image_size=(32, 32), num_classes=10).to("meta")
    said = []
    for more in dict.fromkeys((0, config.get("extend", 0))):
        arms = [
            Arm(arm["name"], arm["mask"], (*rho, *(max(rho) + 1 + i for i in range(more))) if rho else (),
                arm.get("epochs_factor", 1))
            for arm in config["arms"]
            for rho in [tuple(arm.get("rho", ()))]
        ]  # fmt: skip
        grid = Grid(file.stem, forward_flops(model, 32), config["n_train"], config["epochs"], tuple(arms))
        runs, passes = grid.passes(config["seeds"], config["tuning_seeds"])
        said.append(f"{runs} runs, {grid.hours(passes, tflops):.1f} h")
    return f"{file}: {'; extended to the end: '.join(said)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tflops", type=float, default=35.0, help="sustained throughput of one GPU, 1e12/s")
    parser.add_argument("--seeds", type=int, default=8, help="seeds of the report")
    parser.add_argument("--tuning-seeds", type=int, default=2, help="seeds on which every radius is tried")
    parser.add_argument("--configs", nargs="+", type=Path, help="configurations of comparisons instead of the table")
    options = parser.parse_args(arguments)
    if options.configs:
        print("\n".join(of_config(file, options.tflops) for file in options.configs))
        return
    print(table(options.tflops, options.seeds, options.tuning_seeds))


if __name__ == "__main__":
    main()
