"""The command ``sam-masks``."""

from __future__ import annotations

import inspect
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
    """Errors as one line, with the nearest names.

    Attributes:
        command: the command asked for, whose options are offered.
    """

    command = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(_one_line(message, self))


def _one_line(message: str, parser: _Parser) -> str:
    text = " ".join(str(message).split())
    known = _options_of(parser)
    unknown = re.search(r"unrecognized arguments: (\S+)|accept option '([^']+)'|Option '([^']+)' is not acc", text)
    if unknown:
        name = next(group for group in unknown.groups() if group).lstrip("-").partition("=")[0]
        line = unknown_name("option", name, known)
        return line if "did you mean" in line else f"unknown option {name!r}; --help lists the options"
    choice = re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", text)
    if choice:
        return unknown_name("command", choice[1], re.findall(r"[\w-]+", choice[2]))
    missing = re.search(r'expected "\w+" to be one of \{([^}]*)\}, but it was not provided', text)
    if missing:
        return f"no command given; choose one of {missing[1]} (sam-masks --help)"
    value = re.fullmatch(r'Parser key "([^"]+)": Expected an? (.+?)\. Got value: (.*)', text)
    if value:
        return f"option {value[1]} must be {_type_text(value[2])}, got {value[3]}"
    value = re.fullmatch(
        r'Parser key "([^"]+)": Does not validate .*Subtypes: \[(.+?)\] Errors.*Given value: (.*)', text
    )
    if value:
        return f"option {value[1]} must be {_type_text(value[2])}, got {value[3]}"
    return text.replace("Parser key", "option", 1)


def _options_of(parser: _Parser) -> set[str]:
    """Names of the options of a parser and of its commands."""
    names: set[str] = set()
    for action in parser._actions:
        names |= {option[2:] for option in action.option_strings if option.startswith("--")}
        if isinstance(action.choices, dict):
            subs = [action.choices[parser.command]] if parser.command in action.choices else action.choices.values()
            names |= set().union(*map(_options_of, subs))
    return names


def _underscored(argument: str) -> str:
    """``--num-classes=10`` as ``--num_classes=10``: both spellings are the same option."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _config_first(arguments: list[str]) -> list[str]:
    """Configuration files right after the command, so that options override them wherever they stand."""
    files: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            files += [word, *(value for value in [next(words, None)] if value is not None)]
        elif word.startswith("--config="):
            files.append(word)
        else:
            rest.append(word)
    return rest[:1] + files + rest[1:]


def _type_text(text: str) -> str:
    literal = re.search(r"Literal\[(.*)\]", text)
    if literal:
        return "one of " + literal[1].replace("'", "")
    plain = re.search(r"<class '(\w+)'>", text)
    names = {"float": "a finite number", "int": "a whole number", "str": "text", "tuple": "a list"}
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


def _explanations(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each field, for ``--help``."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(base) or "", flags=re.MULTILINE):
            out[name] = " ".join(text.replace("%", "%%").split())
    return out


def build_parser() -> _Parser:
    """The parser of the whole command line."""
    from experiments.config import DECIDED, CompareConfig, RunConfig
    from experiments.measure import MeasureConfig

    hidden: dict[type, set[str]] = {CompareConfig: {*DECIDED}, RunConfig: {"tuning"}}

    def sub(summary: str, example: str, *classes: type, config: bool) -> jsonargparse.ArgumentParser:
        parser = _Parser(description=f"{summary}\n\nexample: {example}", exit_on_error=False, allow_abbrev=False)
        if config:
            parser.add_argument("--config", action="config", help="YAML file with any of these options")
        for cls in classes:
            flags = [f.name for f in fields(cls) if f.name in FLAGS]
            parser.add_class_arguments(cls, as_group=True, skip={*flags, *hidden.get(cls, ())})
            parser._action_groups[-1].title = (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")
            explained = _explanations(cls)
            for action in parser._actions:
                action.help = action.help or explained.get(action.dest)
            for name in flags:
                parser.add_argument(f"--{name}", action="store_true", help=FLAGS[name])
        return parser

    parser = _Parser(
        prog="sam-masks", description=DESCRIPTION, epilog=EXIT_CODES, exit_on_error=False, allow_abbrev=False
    )
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
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        _say(str(error))
        return EXIT_INPUT
    except KeyboardInterrupt:
        print(
            "sam-masks: interrupted; finished runs are kept, and the same command goes on from there", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        if os.environ.get("SAM_MASKS_TRACEBACK"):
            raise
        _say(f"{type(error).__name__}: {error}; set SAM_MASKS_TRACEBACK=1 to see where it comes from")
        return EXIT_FAILED


def _say(message: str) -> None:
    print(f"sam-masks: error: {' '.join(message.split())}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    import torch

    torch.set_num_threads(1)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return EXIT_INPUT
    parser.command = arguments[0]
    try:
        parsed = parser.parse_args(_config_first([_underscored(argument) for argument in arguments]))
        _load_plugins(parsed[parsed.command].plugin)
        values = vars(parser.instantiate(parsed)[parsed.command])
    except jsonargparse.ArgumentError as error:
        raise UsageError(_one_line(str(error), parser)) from None
    except UnicodeDecodeError:
        raise UsageError("the configuration file is not text") from None
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
    from experiments.config import CompareConfig, default_processes
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
            processes=(1 if on_gpu else default_processes()) if options.processes is None else options.processes,
            device=options.device,
            plugins=_listed(options.plugin),
            quiet=options.quiet,
        )
    except RunFailed as error:
        _say(str(error))
        return EXIT_FAILED
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
    loss, ascent, radius = (_number(last[key]) for key in ("loss", "ascent", "radius"))
    print(f"last epoch: loss {loss}, ascent {ascent}, ||eps|| {radius}")
    print(
        f"validation accuracy {_number(result['val_accuracy'])} of {result['val_images']} images, "
        f"test accuracy {_number(result['test_accuracy'])} of {result['test_images']} images"
    )
    for key in ("lambda_max", "m_sharpness"):
        metric = result[key]
        print(f"{metric['name']}: {metric['value']:.5g}" if "value" in metric else f"{key}: {metric['error']}")
    if result["diverged"]:
        print(f"DIVERGED: {result['diverged']}")
    print(f"record and checkpoint: {folder}")
    return EXIT_OK


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _masks(values: dict[str, Any]) -> int:
    from experiments.anatomy import Target, build_all, describe_all

    options: MasksOptions = _pick(MasksOptions, values)
    if options.model is None:
        unused = [f.name for f in fields(options) if getattr(options, f.name) != f.default]
        unused = [name for name in unused if name not in ("plugin", "json")]
        if unused:
            raise UsageError(f"{' and '.join(unused)} {'have' if unused[1:] else 'has'} no effect without --model")
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
