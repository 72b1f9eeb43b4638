"""The command ``sam-masks``."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from masks.errors import InputError, unknown_name

EXIT_OK, EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130

DESCRIPTION = "Sharpness-aware minimization under parameter masks, compared at exactly matched counts."
FLAGS = {"json": "print JSON instead of text", "quiet": "no progress bars"}
EXIT_CODES = "exit codes: 0 done; 1 a run failed; 2 bad input; 130 interrupted (finished runs are kept)"


class UsageError(InputError):
    """The command line or a configuration file cannot be understood."""


class _Parser(jsonargparse.ArgumentParser):
    """Errors as one line, with the nearest names."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(_one_line(message, self))


def _one_line(message: str, parser: jsonargparse.ArgumentParser) -> str:
    text = " ".join(str(message).split())
    known = _options_of(parser)
    unknown = re.search(r"unrecognized arguments: (\S+)|does not accept option '([^']+)'|[Kk]ey '([^']+)' is not", text)
    if unknown:
        name = next(group for group in unknown.groups() if group).lstrip("-").partition("=")[0]
        return unknown_name("option", name, known)
    choice = re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", text)
    if choice:
        return unknown_name("command", choice[1], re.findall(r"[\w-]+", choice[2]))
    missing = re.search(r'expected "\w+" to be one of \{([^}]*)\}, but it was not provided', text)
    if missing:
        return f"no command given; choose one of {missing[1]} (sam-masks --help)"
    value = re.fullmatch(r'Parser key "([^"]+)": Expected an? (.+?)\. Got value: (.*)', text)
    if value:
        return f"option {value[1]} must be {_type_text(value[2])}, got {value[3]}"
    return text


def _options_of(parser: jsonargparse.ArgumentParser) -> set[str]:
    """Names of the options of a parser and of its commands."""
    names: set[str] = set()
    for action in parser._actions:
        names |= {option[2:] for option in action.option_strings if option.startswith("--")}
        for sub in action.choices.values() if isinstance(action.choices, dict) else ():
            names |= _options_of(sub)
    return names


def _underscored(argument: str) -> str:
    """``--num-classes=10`` as ``--num_classes=10``: both spellings are the same option."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _type_text(text: str) -> str:
    literal = re.search(r"Literal\[(.*)\]", text)
    if literal:
        return "one of " + literal[1].replace("'", "")
    plain = re.search(r"<class '(\w+)'>", text)
    names = {"float": "a finite number", "int": "a whole number", "str": "text", "bool": "true or false"}
    return names.get(plain[1], plain[1]) if plain else text


@dataclass(frozen=True)
class CompareOptions:
    """How a comparison is carried out; what it is stands in its configuration.

    Args:
        out: folder for the results; by default results/compare-ID.
        processes: runs at once, each with one thread (default: one per core; 1 on a GPU).
        device: auto, cpu, cuda or cuda:N.
        plugin: modules to import for their masks, separated by commas.
        quiet: no progress bars.
        json: print the table as JSON.
    """

    out: str | None = None
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


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of the whole command line."""
    from experiments.config import CompareConfig, RunConfig
    from experiments.measure import MeasureConfig

    def sub(summary: str, example: str, *classes: type, config: bool) -> jsonargparse.ArgumentParser:
        parser = _Parser(description=f"{summary}\n\nexample: {example}", exit_on_error=False)
        if config:
            parser.add_argument("--config", action="config", help="YAML file with any of these options")
        for cls in classes:
            parser.add_class_arguments(cls, as_group=True, skip={"tuning", *FLAGS} & {f.name for f in fields(cls)})
            for name in [f.name for f in fields(cls) if f.name in FLAGS]:
                parser.add_argument(f"--{name}", action="store_true", help=FLAGS[name])
        return parser

    parser = _Parser(prog="sam-masks", description=DESCRIPTION, epilog=EXIT_CODES, exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"sam-masks {_version()}")
    commands = parser.add_subcommands(required=True, dest="command")
    compare = "compare arms, paired over seeds, with rho chosen per mask on validation data"
    train = "train one model"
    masks = "list the registered masks; with --model, build them and print their anatomy"
    commands.add_subcommand(
        "compare",
        sub(
            compare,
            "sam-masks compare --masks all,norm,random --seeds 8",
            CompareConfig,
            MeasureConfig,
            CompareOptions,
            config=True,
        ),
        help=compare,
    )
    commands.add_subcommand(
        "train", sub(train, "sam-masks train --mask norm --rho 1", RunConfig, TrainOptions, config=True), help=train
    )
    commands.add_subcommand(
        "masks", sub(masks, "sam-masks masks --model torchvision:resnet18", MasksOptions, config=False), help=masks
    )
    return parser


def _version() -> str:
    try:
        return version("sam-masks")
    except PackageNotFoundError:
        return "(not installed)"


def _pick(cls: type, values: dict[str, Any]) -> Any:
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except InputError as error:
        print(f"sam-masks: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print(
            "sam-masks: interrupted; finished runs are kept, and the same command goes on from there", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _run(arguments: list[str]) -> int:
    import torch

    torch.set_num_threads(1)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return EXIT_INPUT
    try:
        parsed = parser.parse_args([_underscored(argument) for argument in arguments])
        _load_plugins(parsed[parsed.command].plugin)
        values = vars(parser.instantiate(parsed)[parsed.command])
    except jsonargparse.ArgumentError as error:
        raise UsageError(_one_line(str(error), parser)) from None
    commands: dict[str, Callable[[dict[str, Any]], int]] = {"compare": _compare, "train": _train, "masks": _masks}
    return commands[parsed.command](values)


def _load_plugins(names: str | None) -> None:
    """Import the plugins named; say on stderr which installed ones are broken."""
    from masks import broken_plugins, load_plugin

    for origin, reason in broken_plugins().items():
        print(f"sam-masks: warning: plugin {origin} is not available: {reason}", file=sys.stderr)
    sys.path.insert(0, os.getcwd())  # modules of the user's own, as python -m would find them
    for name in _listed(names):
        load_plugin(name)


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def _compare(values: dict[str, Any]) -> int:
    from experiments.compare import compare
    from experiments.config import CompareConfig, physical_workers
    from experiments.measure import MeasureConfig
    from experiments.report import write_report
    from experiments.runner import RunFailed
    from experiments.table import build_table, frame, shown
    from experiments.train import pick_device

    options: CompareOptions = _pick(CompareOptions, values)
    on_gpu = pick_device(options.device).type == "cuda"
    try:
        comparison = compare(
            _pick(CompareConfig, values),
            None if options.out is None else Path(options.out),
            measure=_pick(MeasureConfig, values),
            processes=options.processes or (1 if on_gpu else physical_workers()),
            device=options.device,
            plugins=_listed(options.plugin),
            quiet=options.quiet,
        )
    except RunFailed as error:
        print(f"sam-masks: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    table = build_table(comparison)
    page = write_report(comparison, table)
    if options.json:
        print(json.dumps({"arms": json.loads(frame(table).to_json(orient="records")), "notes": table.notes}, indent=1))
        return EXIT_OK
    print(shown(table).to_string())
    print()
    for note in table.notes:
        print(f"- {note}")
    print(f"\npage: {page}\ntables and records: {comparison.folder}")
    return EXIT_OK


def _train(values: dict[str, Any]) -> int:
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
    print(f"last epoch: loss {last['loss']:.4f}, ascent {last['ascent']:.4f}, ||eps|| {last['radius']:.4f}")
    print(f"validation accuracy {result['val_accuracy']:.4f}, test accuracy {result['test_accuracy']:.4f}")
    for key in ("lambda_max", "m_sharpness"):
        metric = result[key]
        print(f"{metric['name']}: {metric['value']:.5g}" if "value" in metric else f"{key}: {metric['error']}")
    if result["diverged"]:
        print(f"DIVERGED: {result['diverged']}")
    print(f"record and checkpoint: {folder}")
    return EXIT_OK


def _masks(values: dict[str, Any]) -> int:
    from experiments.anatomy import Target, build_all, describe_all

    options: MasksOptions = _pick(MasksOptions, values)
    if options.model is None:
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
        target, match=options.match, density=options.density, only=_listed(options.masks) or None, save=save
    )
    print(report.as_json() if options.json else report.as_text())
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
