"""What the commands of ``sam-masks`` do with their options, and what they print."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.measure import listed
from masks.errors import InputError

if TYPE_CHECKING:
    from experiments.executors.base import Executor

EXIT_OK, EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143


@dataclass(frozen=True)
class CompareOptions:
    """How a comparison is carried out; what it is stands in its configuration.

    Args:
        out: folder for the results; by default results/compare-ID.
        executor: where runs execute: local (processes of this machine), ray (extra [ray]) or slurm (extra [slurm]).
        processes: runs at once on this machine, each with one thread (default: one per core, or one per GPU).
        address: of a Ray cluster (default: Ray of this machine).
        gpus: GPUs per run on a cluster; with Ray a fraction puts several runs on one.
        partition: of the Slurm cluster (default: its own).
        minutes: time limit of a Slurm job; a run that reaches it is saved, queued again and goes on.
        retries: how often a run that failed is tried again.
        checkpoint_minutes: minutes after which a run is saved each time, to go on from there.
        device: auto, cpu, cuda or cuda:N.
        plugin: modules to import for their masks, separated by commas.
        sweep: train every arm at every radius of its grid on the report's seeds, too, for `sam-masks verdict`.
        quiet: no progress bars.
        json: print the table as JSON.
    """

    out: str | None = None
    sweep: bool = False
    executor: Literal["local", "ray", "slurm"] = "local"
    processes: int | None = None
    address: str | None = None
    gpus: float = 0.0
    partition: str | None = None
    minutes: int = 240
    retries: int = 0
    checkpoint_minutes: float = 10.0
    device: str = "auto"
    plugin: str | None = None
    quiet: bool = False
    json: bool = False


@dataclass(frozen=True)
class TrainOptions:
    """How a run is carried out.

    Args:
        out: folder for the record and the checkpoint; by default results/train-ID.
        init: checkpoint to start from instead of the seed's weights (a state dict, or one that train wrote).
        checkpoint_minutes: minutes after which the run is saved each time, to go on from there.
        device: auto, cpu, cuda or cuda:N.
        plugin: modules to import for their masks, separated by commas.
        json: print the record as JSON.
    """

    out: str | None = None
    init: str | None = None
    checkpoint_minutes: float = 10.0
    device: str = "auto"
    plugin: str | None = None
    json: bool = False


@dataclass(frozen=True)
class MethodsOptions:
    """What to list.

    Args:
        plugin: modules to import for their methods, separated by commas.
        json: print a list of objects.
    """

    plugin: str | None = None
    json: bool = False


@dataclass(frozen=True)
class PresetsOptions:
    """Which published settings to print.

    Args:
        name: the preset (default: list all).
        scale: share of its epochs and images, to try it out.
    """

    name: str | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class MasksOptions:
    """What to list, and on which model to build it.

    Args:
        model: build every mask on this model: torchvision:NAME, module:function or a built-in one.
        num_classes: number of classes (default: those of the data, else 10).
        width: width of a built-in model.
        init: checkpoint to load into the model first.
        match: budgeted masks keep as many coordinates as this mask.
        density: budgeted masks keep this fraction instead.
        data: images that masks which need data are scored on; without, they are named as skipped.
        score_images: how many of them.
        masks: only these, as name[:option=value...], separated by commas.
        seed: seed of initial weights and random masks.
        save: folder to write each mask to, as NAME.npz.
        plugin: modules to import for their masks, separated by commas.
        json: print a list of objects.
    """

    model: str | None = None
    num_classes: int | None = None
    width: int | None = None
    init: str | None = None
    match: str = "norm"
    density: float | None = None
    data: str | None = None
    score_images: int = 256
    masks: str | None = None
    seed: int = 0
    save: str | None = None
    plugin: str | None = None
    json: bool = False


def _pick(cls: type, values: dict[str, Any]) -> Any:
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def run_compare(values: dict[str, Any]) -> int:
    from experiments.by_method import methods_frame, methods_notes, methods_shown
    from experiments.compare import compare
    from experiments.config import CompareConfig
    from experiments.measure import MeasureConfig
    from experiments.report import write_report
    from experiments.runner import Policy
    from experiments.table import build_table, frame, shown

    options: CompareOptions = _pick(CompareOptions, values)
    comparison = compare(
        _pick(CompareConfig, values),
        None if options.out is None else Path(options.out),
        measure=_pick(MeasureConfig, values),
        sweep=options.sweep,
        executor=_executor(options),
        policy=Policy(
            device=options.device,
            plugins=listed(options.plugin),
            retries=options.retries,
            checkpoint_minutes=options.checkpoint_minutes,
            quiet=options.quiet,
        ),
    )
    table = build_table(comparison)
    page = write_report(comparison, table)
    if options.json:
        arms = json.loads(frame(table).to_json(orient="records", double_precision=15))
        found = {"arms": arms, "notes": table.notes, "folder": str(comparison.folder)}
        if any(arm.method for arm in comparison.config.arms):
            lines = methods_frame(table).to_json(orient="records", double_precision=15)
            found["methods_by_masks"] = {"cells": json.loads(lines), "notes": methods_notes(comparison, table)}
        print(json.dumps(found, indent=1))
        return EXIT_OK
    print(shown(table).to_string())
    by_method = methods_shown(table)
    if by_method is not None:
        print(f"\nmethods by masks\n{by_method.to_string()}")
        for note in methods_notes(comparison, table):
            print(f"- {note}")
    print()
    for note in table.notes:
        print(f"- {note}")
    print(f"\npage: {page}\ntables and records: {comparison.folder}")
    return EXIT_OK


def _executor(options: CompareOptions) -> Executor:
    """The executor asked for; an option of another one is refused."""
    own = {"local": ("processes",), "ray": ("address", "gpus"), "slurm": ("gpus", "partition", "minutes")}
    for name in dict.fromkeys(name for names in own.values() for name in names):
        if name not in own[options.executor] and getattr(options, name) != getattr(CompareOptions, name):
            raise InputError(f"{name} has no effect with executor {options.executor}")
    if options.executor == "ray":
        from experiments.executors.ray import RayExecutor

        return RayExecutor(options.address, gpus=options.gpus)
    if options.executor == "slurm":
        from experiments.executors.slurm import SlurmExecutor

        return SlurmExecutor(gpus=options.gpus, partition=options.partition, minutes=options.minutes)
    from experiments.build import pick_device
    from experiments.config import default_processes
    from experiments.executors import local

    device, processes = pick_device(options.device), options.processes
    if processes is None:
        processes = default_processes() if device.type == "cpu" else local.num_gpus(options.device)
    return local.LocalExecutor(processes)


def run_train(values: dict[str, Any]) -> int:
    from experiments.analyze import as_text
    from experiments.config import RunConfig
    from experiments.runner import Policy
    from experiments.single import train_one

    options: TrainOptions = _pick(TrainOptions, values)
    out = None if options.out is None else Path(options.out)
    init = None if options.init is None else Path(options.init)
    policy = Policy(options.device, listed(options.plugin), checkpoint_minutes=options.checkpoint_minutes)
    record, folder, notes = train_one(_pick(RunConfig, values), out, init=init, policy=policy)
    for note in notes:
        print(f"sam-masks: warning: {note}", file=sys.stderr)
    result = record.result
    if options.json:
        print(json.dumps(asdict(record), indent=1))
        return EXIT_OK
    build = result["mask_builds"][-1]
    print(f"mask {record.config['mask']}: {build['num_kept']:,} of {build['numel']:,} coordinates")
    last = result["history"][-1]
    loss, ascent, radius = (_number(last[key]) for key in ("loss", "ascent", "radius"))
    print(f"last epoch: loss {loss}, ascent {ascent}, ||eps|| {radius}")
    print(
        f"validation accuracy {_number(result['val_accuracy'])} of {result['val_images']} images, "
        f"test accuracy {_number(result['test_accuracy'])} of {result['test_images']} images"
    )
    for name, metric in result["metrics"].items():
        print(as_text({"metric": name, **metric}))
    if result["diverged"]:
        print(f"DIVERGED: {result['diverged']}")
    print(f"record and checkpoint: {folder}")
    return EXIT_OK


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def run_methods(values: dict[str, Any]) -> int:
    from experiments.methods import describe_methods

    print(describe_methods(as_json=_pick(MethodsOptions, values).json))
    return EXIT_OK


def run_presets(values: dict[str, Any]) -> int:
    import yaml

    from experiments.presets import get_preset, list_presets

    options: PresetsOptions = _pick(PresetsOptions, values)
    if options.name is None:
        if options.scale != 1:
            raise InputError("scale has no effect without --name")
        print("\n".join(f"{name}\n  {summary}" for name, summary in list_presets().items()))
        return EXIT_OK
    preset = get_preset(options.name, options.scale)
    print("".join(f"# {note}\n" for note in preset.notes()) + yaml.safe_dump(preset.config(), sort_keys=False), end="")
    return EXIT_OK


def run_masks(values: dict[str, Any]) -> int:
    from experiments.anatomy import Target, build_all, describe_all

    options: MasksOptions = _pick(MasksOptions, values)
    if options.model is None:
        unused = [f.name for f in fields(options) if getattr(options, f.name) != f.default]
        unused = [name for name in unused if name not in ("plugin", "json")]
        if unused:
            raise InputError(f"{' and '.join(unused)} {'have' if unused[1:] else 'has'} no effect without --model")
        print(describe_all(as_json=options.json))
        return EXIT_OK
    target = Target(
        model=options.model,
        num_classes=options.num_classes,
        width=options.width,
        init=None if options.init is None else Path(options.init),
        data=options.data,
        score_images=options.score_images,
        seed=options.seed,
    )
    save = None if options.save is None else Path(options.save)
    report = build_all(
        target, match=options.match, density=options.density, only=listed(options.masks) or None, save=save
    )
    print(report.as_json() if options.json else report.as_text())
    return EXIT_OK


def run_analyze(values: dict[str, Any]) -> int:
    from tqdm import tqdm

    from experiments.analyze import LIST, AnalyzeOptions, analyze, as_text, describe_metrics
    from experiments.worker import Terminated

    options: AnalyzeOptions = _pick(AnalyzeOptions, values)
    if options.metrics == LIST:
        print(describe_metrics(as_json=options.json))
        return EXIT_OK
    found: list[dict[str, Any]] = []

    def arrived(result: dict[str, Any]) -> None:
        found.append(result)
        if not options.json:
            tqdm.write(as_text(result))
            sys.stdout.flush()

    def noted(text: str) -> None:
        print(f"sam-masks: {text}", file=sys.stderr)

    code = EXIT_OK
    try:
        analyze(options, on_result=arrived, on_note=noted, quiet=options.quiet)
    except KeyboardInterrupt as request:
        kept = f"the same command goes on from {options.out}" if options.out else "--out FILE would have kept it"
        print(f"sam-masks: interrupted; what was measured is printed; {kept}", file=sys.stderr)
        code = EXIT_TERMINATED if isinstance(request, Terminated) else EXIT_INTERRUPTED
    if options.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    return code


def run_bench(values: dict[str, Any]) -> int:
    from experiments.bench import BenchOptions, bench

    options: BenchOptions = _pick(BenchOptions, values)
    report = bench(options)
    print(report.as_json() if options.json else report.as_text())
    return EXIT_OK


def run_verdict(values: dict[str, Any]) -> int:
    from experiments.verdict import VerdictOptions, as_json, as_text, judge

    options: VerdictOptions = _pick(VerdictOptions, values)
    judgement = judge(
        options.folder,
        contrasts=listed(options.contrasts),
        primary=options.primary,
        secondary=None if options.secondary is None else listed(options.secondary),
        margin=options.margin,
        alpha=options.alpha,
        at=options.at,
    )
    print(json.dumps(as_json(judgement), indent=1, allow_nan=False) if options.json else as_text(judgement))
    return EXIT_OK


def run_runs(values: dict[str, Any]) -> int:
    from experiments.runs import RunsOptions, as_json, show

    options: RunsOptions = _pick(RunsOptions, values)
    text, rows = show(options)
    print(as_json(rows) if options.json else text)
    return EXIT_OK
