"""What the commands of ``sam-masks`` do with their options, and what they print."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from experiments.measure import listed
from masks.errors import InputError

EXIT_OK, EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class CompareOptions:
    """How a comparison is carried out; what it is stands in its configuration.

    Args:
        out: folder for the results; by default results/compare-ID.
        processes: runs at once, each with one thread (default: one per core; 1 on a GPU).
        device: auto, cpu, cuda or cuda:N.
        plugin: modules to import for their masks, separated by commas.
        sweep: train every arm at every radius of its grid on the report's seeds, too, for `sam-masks verdict`.
        quiet: no progress bars.
        json: print the table as JSON.
    """

    out: str | None = None
    sweep: bool = False
    processes: int | None = None
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
        device: auto, cpu, cuda or cuda:N.
        plugin: modules to import for their masks, separated by commas.
        json: print the record as JSON.
    """

    out: str | None = None
    init: str | None = None
    device: str = "auto"
    plugin: str | None = None
    json: bool = False


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
    from experiments.build import pick_device
    from experiments.compare import compare
    from experiments.config import CompareConfig, default_processes
    from experiments.executors.local import LocalExecutor
    from experiments.measure import MeasureConfig
    from experiments.report import write_report
    from experiments.runner import Policy
    from experiments.table import build_table, frame, shown

    options: CompareOptions = _pick(CompareOptions, values)
    on_gpu = pick_device(options.device).type == "cuda"
    processes = (1 if on_gpu else default_processes()) if options.processes is None else options.processes
    comparison = compare(
        _pick(CompareConfig, values),
        None if options.out is None else Path(options.out),
        measure=_pick(MeasureConfig, values),
        sweep=options.sweep,
        executor=LocalExecutor(processes),
        policy=Policy(device=options.device, plugins=listed(options.plugin), quiet=options.quiet),
    )
    table = build_table(comparison)
    page = write_report(comparison, table)
    if options.json:
        arms = json.loads(frame(table).to_json(orient="records", double_precision=15))
        print(json.dumps({"arms": arms, "notes": table.notes, "folder": str(comparison.folder)}, indent=1))
        return EXIT_OK
    print(shown(table).to_string())
    print()
    for note in table.notes:
        print(f"- {note}")
    print(f"\npage: {page}\ntables and records: {comparison.folder}")
    return EXIT_OK


def run_train(values: dict[str, Any]) -> int:
    from experiments.analyze import as_text
    from experiments.config import RunConfig
    from experiments.single import train_one

    options: TrainOptions = _pick(TrainOptions, values)
    out = None if options.out is None else Path(options.out)
    init = None if options.init is None else Path(options.init)
    record, folder = train_one(_pick(RunConfig, values), out, init=init, device=options.device)
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

    from experiments.analyze import AnalyzeOptions, analyze, as_text

    options: AnalyzeOptions = _pick(AnalyzeOptions, values)
    found: list[dict[str, Any]] = []

    def arrived(result: dict[str, Any]) -> None:
        found.append(result)
        if not options.json:
            tqdm.write(as_text(result))
            sys.stdout.flush()

    code = EXIT_OK
    try:
        analyze(options, on_result=arrived, quiet=options.quiet)
    except KeyboardInterrupt:
        kept = f"the same command goes on from {options.out}" if options.out else "--out FILE would have kept it"
        print(f"sam-masks: interrupted; what was measured is printed; {kept}", file=sys.stderr)
        code = EXIT_INTERRUPTED
    if options.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    return code


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
