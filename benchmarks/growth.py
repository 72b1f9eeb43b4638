"""How the cost of a SAM step grows: with the number of parameters, the density of the mask and the size of the batch.

    python -m benchmarks.growth [--axes parameters density batch] [--most 100000000] [--rounds 9] [--json FILE]
    python -m benchmarks.growth --figures benchmarks/results/growth.json docs/figures

A perceptron of three layers with LayerNorm, wide enough for the number of parameters; inputs of 64 numbers. It has few
operations for its parameters (one multiplication each and example), so that what costs by the parameter, moving the
weights and the base optimizer, shows. Timed as :mod:`benchmarks.step_cost`; in units of the SGD step at the same point.

- parameters: 1e4 to 1e8, 16 examples, masks all, norm and random (1 %); and what building the masks takes.
- density: random masks of 0.01 % to 100 % of a million parameters, 16 examples.
- batch: 4 to 1,024 examples, a million parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.rows import Row, arguments, finish, start
from benchmarks.step_cost import losses
from experiments.plot.style import BLUE, BUILT_IN, ORANGE, Style, label, legend, new, svg
from experiments.timing import Step, clock, measure, quartiles, ratios
from masks import Budget, Mask, MaskContext, build_mask
from sam import SAM

INPUTS, CLASSES, EXAMPLES, MILLION = 64, 10, 16, 1_000_000
BUILDS = 3
SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)
DENSITIES = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
BATCHES = (4, 16, 64, 256, 1024)
AXES = {
    "parameters": "parameters of the model",
    "density": "density of a random mask",
    "batch": "examples of a batch",
}


def perceptron(parameters: int) -> nn.Module:
    """The widest one with at most so many parameters: ``d^2 + 79 d + 10`` of width d."""
    width = (math.isqrt(4 * (parameters - 10) + 79**2) - 79) // 2
    return nn.Sequential(
        nn.Linear(INPUTS, width, bias=False), nn.LayerNorm(width), nn.ReLU(),
        nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, CLASSES),
    )  # fmt: skip


def point(model: nn.Module, masks: dict[str, Mask], batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Every round's seconds of SGD's step and of SAM's under each mask."""
    batch = torch.randn(batch_size, INPUTS), torch.randint(0, CLASSES, (batch_size,))
    base = torch.optim.SGD(model.parameters(), 1e-6)

    def sgd() -> None:
        base.zero_grad()
        losses(model, batch).mean().backward()
        base.step()

    steps: dict[str, Step] = {"SGD": sgd}
    for name, mask in masks.items():
        optimizer = SAM(torch.optim.SGD(model.parameters(), 1e-6), model, mask=mask)
        steps[name] = lambda optimizer=optimizer: optimizer.step_on(lambda b: losses(model, b), batch)  # type: ignore[misc]
    return measure(steps, rounds, 0, torch.device("cpu"))


def build(context: MaskContext, name: str, density: float | None = None) -> tuple[Mask, list[float]]:
    """A mask, and the seconds that it took each time."""
    made: list[Mask] = []
    budget = None if density is None else Budget.from_density(density, context.table.numel)
    seconds = [
        clock(lambda: made.append(build_mask(name, context, budget)), torch.device("cpu")) for _ in range(BUILDS)
    ]
    return made[0], seconds


def points(axis: str, most: int) -> Iterator[tuple[float, nn.Module, dict[str, Mask], int, dict[str, list[float]]]]:
    """Where on the axis, the model, the masks, the size of the batch, and what masks took to build."""
    if axis == "parameters":
        for size in (n for n in SIZES if n <= most):
            context = MaskContext(perceptron(size))
            masks, seconds = {}, {}
            wanted = {"all": None, "norm": None, "random": 0.01, "magnitude": 0.01}
            for name, density in wanted.items():
                masks[name], seconds[name] = build(context, name, density)
            del masks["magnitude"]  # its step is that of any mask of that density
            yield float(size), context.model, masks, EXAMPLES, seconds
        return
    context = MaskContext(perceptron(min(MILLION, most)))
    if axis == "density":
        for density in DENSITIES:
            yield density, context.model, {"random": build(context, "random", density)[0]}, EXAMPLES, {}
        return
    masks = {name: build(context, name)[0] for name in ("all", "norm")}
    for batch_size in BATCHES:
        yield float(batch_size), context.model, masks, batch_size, {}


def rows_of(axis: str, at: float, found: list[dict[str, Any]], seconds: dict[str, list[float]]) -> Iterator[Row]:
    place = f"{AXES[axis]}: {at:g}"
    note = f"SGD takes {quartiles([r['seconds']['SGD'] for r in found])['median'] * 1e3:.3g} ms"
    for name in found[0]["seconds"]:
        if name != "SGD":
            yield Row(f"{place}, SAM, {name}", ratios(found, name, "SGD"), "SGD", note=note)
    for name, taken in seconds.items():
        yield Row(f"{place}, building {name}", quartiles([one / at * 1e9 for one in taken]), "ns per parameter")


def figures(result: dict[str, Any]) -> dict[str, str]:
    """One figure for each axis, as SVG text, by the name of its file."""
    out = {}
    for axis, label_of_axis in AXES.items():
        lines: dict[str, list[tuple[float, dict[str, float]]]] = {}
        for row in result["rows"]:
            place, _, what = row["what"].partition(", SAM, ")
            axis_label, _, at = place.partition(": ")
            if what and axis_label == label_of_axis:
                lines.setdefault(what, []).append((float(at), row["found"]))
        if not lines:
            continue
        figure, axes = new()
        for name, found in lines.items():
            style = Style(*BUILT_IN[name])
            x = [at for at, _ in found]
            band = [f["q1"] for _, f in found], [f["q3"] for _, f in found]
            axes.fill_between(x, *band, color=style.colour, alpha=0.2)
            axes.plot(x, [f["median"] for _, f in found], marker=style.marker, color=style.colour, label=label(name))
        axes.axhline(2, color=ORANGE, linestyle=":", linewidth=1)
        axes.axhline(5 / 3, color=BLUE, linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.set_ylim(bottom=1)
        axes.set_xlabel(label_of_axis)
        axes.set_ylabel("SAM's step / SGD's step")
        legend(axes)
        values = {name: ", ".join(f"{x:g} {f['median']:.2f}" for x, f in found) for name, found in lines.items()}
        words = "; ".join(f"{name}: {text}" for name, text in values.items())
        title = f"Cost of a step against the {label_of_axis}"
        out[f"growth-{axis}.svg"] = svg(figure, f"growth-{axis}", title, f"Medians. {words}.")
    return out


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = arguments("growth", "How the cost of a SAM step grows.")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--most", type=int, default=SIZES[-1], help="most parameters")
    parser.add_argument("--figures", nargs=2, type=Path, metavar=("FILE", "FOLDER"), help="draw FILE into FOLDER")
    drawn = parser.parse_args(given).figures
    if drawn:
        result: dict[str, Any] = json.loads(drawn[0].read_text(encoding="utf-8"))
        drawn[1].mkdir(parents=True, exist_ok=True)
        for name, text in figures(result).items():
            (drawn[1] / name).write_text(text, encoding="utf-8")
        return result
    options, result = start(parser, given)
    torch.manual_seed(0)
    rows, rounds = [], {}
    for axis in options.axes:
        for at, model, masks, batch_size, seconds in points(axis, options.most):
            found = point(model, masks, batch_size, options.rounds)
            rounds[f"{axis} {at:g}"] = found
            rows += rows_of(axis, at, found, seconds)
    return finish(result, rows, rounds, options.json)


if __name__ == "__main__":
    main()
