"""What the commands of ``sam-masks`` do with their options, and what they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.measure import listed
from masks.errors import InputError

if TYPE_CHECKING:
    from experiments.compare import Comparison
    from experiments.config import CompareConfig
    from experiments.executors.base import Executor
    from experiments.measure import MeasureConfig
    from experiments.plan import StudyPlan
    from experiments.runner import Policy
    from experiments.table import Table

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
        workers: processes per run that decode images of stream:DIR@SIZE ahead; no number depends on it.
        tensorboard: folder where each run writes its curves for TensorBoard (extra [tensorboard]).
        reuse: folders of other comparisons, separated by commas; runs that they have, too, are copied, not made again.
        device: auto, cpu, cuda or cuda:N.
        plugin: modules to import for their masks, separated by commas.
        sweep: train every arm at every radius of its grid on the report's seeds, too, for `sam-masks verdict`.
        quiet: no progress bars.
        dry_run: say what would run, how much of it is done, and about how long the rest takes; run and write nothing.
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
    workers: int = 0
    tensorboard: str | None = None
    reuse: str | None = None
    device: str = "auto"
    plugin: str | None = None
    quiet: bool = False
    dry_run: bool = False
    json: bool = False


@dataclass(frozen=True)
class TrainOptions:
    """How a run is carried out.

    Args:
        out: folder for the record and the checkpoint; by default results/train-ID.
        init: checkpoint to start from instead of the seed's weights (a state dict, or one that train wrote).
        checkpoint_minutes: minutes after which the run is saved each time, to go on from there.
        workers: processes per run that decode images of stream:DIR@SIZE ahead; no number depends on it.
        tensorboard: folder where each run writes its curves for TensorBoard (extra [tensorboard]).
        device: auto, cpu, cuda or cuda:N.
        plugin: modules to import for their masks, separated by commas.
        quiet: no progress bar.
        dry_run: say what would run and about how long it takes; run and write nothing.
        json: print the record as JSON.
    """

    out: str | None = None
    init: str | None = None
    checkpoint_minutes: float = 10.0
    workers: int = 0
    tensorboard: str | None = None
    device: str = "auto"
    plugin: str | None = None
    quiet: bool = False
    dry_run: bool = False
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
    from experiments.by_method import methods_notes, methods_shown
    from experiments.config import CompareConfig
    from experiments.measure import MeasureConfig
    from experiments.table import shown

    options: CompareOptions = _pick(CompareOptions, values)
    config, measure = _pick(CompareConfig, values), _pick(MeasureConfig, values)
    if options.dry_run:
        plan = _planned(config, measure, options)
        print(plan.as_json() if options.json else plan.as_text())
        return EXIT_OK
    comparison, table, page = _compared(config, measure, options)
    if options.json:
        print(json.dumps(_comparison_json(comparison, table), indent=1))
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


def _compared(
    config: CompareConfig, measure: MeasureConfig, options: CompareOptions, folder: Path | None = None
) -> tuple[Comparison, Table, Path]:
    """Make a comparison and its report, in this folder or that of the options; the path is the page's."""
    from experiments.compare import compare
    from experiments.report import write_report
    from experiments.table import build_table

    comparison = compare(
        config,
        folder or (None if options.out is None else Path(options.out)),
        measure=measure,
        sweep=options.sweep,
        executor=_executor(options),
        policy=_policy(options),
    )
    table = build_table(comparison)
    return comparison, table, write_report(comparison, table)


def _planned(
    config: CompareConfig, measure: MeasureConfig, options: CompareOptions, folder: Path | None = None
) -> StudyPlan:
    """What :func:`_compared` would run; options that it would refuse are refused."""
    from experiments.plan import plan_comparison

    _executor(options)
    return plan_comparison(
        config,
        folder or (None if options.out is None else Path(options.out)),
        measure=measure,
        sweep=options.sweep,
        processes=_processes(options) if options.executor == "local" else None,
        policy=_policy(options),
    )


def _policy(options: CompareOptions) -> Policy:
    from experiments.runner import Policy

    return Policy(
        device=options.device,
        plugins=listed(options.plugin),
        retries=options.retries,
        checkpoint_minutes=options.checkpoint_minutes,
        workers=options.workers,
        tensorboard=_tensorboard(options),
        quiet=options.quiet,
        reuse=tuple(map(Path, listed(options.reuse))),
    )


def _comparison_json(comparison: Comparison, table: Table) -> dict[str, Any]:
    from experiments.by_method import methods_frame, methods_notes
    from experiments.table import frame

    arms = json.loads(frame(table).to_json(orient="records", double_precision=15))
    found = {"arms": arms, "notes": table.notes, "folder": str(comparison.folder)}
    if any(arm.method for arm in comparison.config.arms):
        lines = methods_frame(table).to_json(orient="records", double_precision=15)
        found["methods_by_masks"] = {"cells": json.loads(lines), "notes": methods_notes(comparison, table)}
    return found


def run_ablate(given: dict[str, Any], read: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Run an ablation.

    Args:
        given: the options that were given, without defaults.
        read: the values of all options of compare from some of them.
    """
    from experiments.ablate import (
        LIST,
        AblateOptions,
        default_folder,
        describe_ablations,
        joint_notes,
        joint_shown,
        load_ablation,
        point_name,
        shrunk,
        write_joint,
    )
    from experiments.compare import check_arms
    from experiments.config import CompareConfig
    from experiments.measure import MeasureConfig

    options: AblateOptions = _pick(AblateOptions, given)
    if options.ablation == LIST:
        print(describe_ablations())
        return EXIT_OK
    ablation = load_ablation(options.ablation)
    if options.show:
        print(ablation.source, end="")
        return EXIT_OK
    own = {f.name for f in fields(AblateOptions)}
    points = ablation.comparisons({name: value for name, value in given.items() if name not in own})
    values = [read(settings) for _, settings in points]
    asked = [(_pick(CompareConfig, each), _pick(MeasureConfig, each)) for each in values]
    if options.smoke:
        asked = [shrunk(config, measure) for config, measure in asked]
    for config, _ in asked:  # all of them, before the first is trained for minutes
        check_arms(config)
    folder = Path(values[0]["out"] or default_folder(ablation.name, asked))
    if values[0]["dry_run"]:
        plans = []
        for (varied, _), each, (config, measure) in zip(points, values, asked, strict=True):
            plans.append(_planned(config, measure, _pick(CompareOptions, each), folder / point_name(varied)))
        as_json = [plan.as_json() for plan in plans]
        print(f"[{', '.join(as_json)}]" if values[0]["json"] else "\n\n".join(plan.as_text() for plan in plans))
        return EXIT_OK
    made: list[tuple[dict[str, Any], Comparison, Table, Path]] = []
    for (varied, _), each, (config, measure) in zip(points, values, asked, strict=True):
        at = folder / point_name(varied)
        reuse = ",".join([*listed(each["reuse"]), *(str(one.folder) for _, one, _, _ in made)])
        made.append((varied, *_compared(config, measure, _pick(CompareOptions, each | {"reuse": reuse}), at)))
    tables = [(varied, table) for varied, _, table, _ in made]
    page = write_joint(ablation, tables, folder, smoke=options.smoke)
    if values[0]["json"]:
        found = [{"point": varied, **_comparison_json(one, table)} for varied, one, table, _ in made]
        print(json.dumps({"ablation": ablation.name, "points": found, "folder": str(folder)}, indent=1))
        return EXIT_OK
    print(joint_shown(tables).to_string(index=False))
    print()
    for note in joint_notes(tables, smoke=options.smoke):
        print(f"- {note}")
    print("\n" + "\n".join(f"page: {one}" for *_, one in made))
    print(f"joint table: {page} and ablation.csv")
    return EXIT_OK


def _tensorboard(options: CompareOptions | TrainOptions) -> Path | None:
    return None if options.tensorboard is None else Path(options.tensorboard)


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
    from experiments.executors import local

    return local.LocalExecutor(_processes(options))


def _processes(options: CompareOptions) -> int:
    """How many runs execute at once on this machine."""
    from experiments.build import pick_device
    from experiments.config import default_processes
    from experiments.executors import local

    device = pick_device(options.device)
    if options.processes is not None:
        return options.processes
    return default_processes() if device.type == "cpu" else local.num_gpus(options.device)


def run_train(values: dict[str, Any]) -> int:
    from experiments.analyze import as_text
    from experiments.config import RunConfig
    from experiments.distributed import current
    from experiments.runner import Policy
    from experiments.single import assist_one, train_one

    options: TrainOptions = _pick(TrainOptions, values)
    out = None if options.out is None else Path(options.out)
    init = None if options.init is None else Path(options.init)
    policy = Policy(
        options.device,
        listed(options.plugin),
        checkpoint_minutes=options.checkpoint_minutes,
        quiet=options.quiet,
        workers=options.workers,
        tensorboard=_tensorboard(options),
    )
    config, team = _pick(RunConfig, values), current()
    if options.dry_run:
        from experiments.plan import plan_run

        if team is not None:
            raise InputError(f"dry_run times one process, and this run has {team.size}; leave it out")
        plan = plan_run(config, out, init=init, policy=policy)
        print(plan.as_json() if options.json else plan.as_text())
        return EXIT_OK
    if team is not None and not team.leads:
        assist_one(config, init=init, policy=policy, team=team)
        return EXIT_OK
    record, folder, notes = train_one(config, out, init=init, policy=policy, team=team)
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
        collapsed=options.collapsed,
    )
    print(json.dumps(as_json(judgement), indent=1, allow_nan=False) if options.json else as_text(judgement))
    return EXIT_OK


def run_report(values: dict[str, Any]) -> int:
    from experiments.report import ReportOptions, report

    print(f"page: {report(_pick(ReportOptions, values))}")
    return EXIT_OK


def run_runs(values: dict[str, Any]) -> int:
    from experiments.runs import RunsOptions, as_json, show

    options: RunsOptions = _pick(RunsOptions, values)
    text, rows = show(options)
    print(as_json(rows) if options.json else text)
    return EXIT_OK


def run_new_mask(values: dict[str, Any]) -> int:
    from experiments.new_mask import NewMaskOptions, new_mask

    options: NewMaskOptions = _pick(NewMaskOptions, values)
    folder = new_mask(options)
    print("\n".join(str(path) for path in sorted(folder.rglob("*")) if path.is_file()))
    print(f"\ninstall and test it:  pip install -e '{folder}[test]' && pytest {folder}")
    print(f"compare it:           sam-masks compare --masks norm,random,{options.mask_name}")
    return EXIT_OK


def run_doctor(values: dict[str, Any]) -> int:
    from experiments.doctor import DoctorOptions, as_json, as_text, examine

    options: DoctorOptions = _pick(DoctorOptions, values)
    findings = examine(options)
    print(as_json(findings) if options.json else as_text(findings))
    return EXIT_FAILED if any(finding.state == "broken" for finding in findings) else EXIT_OK
