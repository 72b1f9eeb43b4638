"""The command ``sam-masks``."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import jsonargparse

from experiments import commands
from experiments.commands import (
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    CompareOptions,
    MasksOptions,
    MethodsOptions,
    PresetsOptions,
    TrainOptions,
)
from experiments.distributed import Place, together
from experiments.measure import listed
from experiments.runner import RunFailed
from experiments.worker import Terminated, ended_by_sigterm
from masks.errors import InputError, unknown_name

DESCRIPTION = "Sharpness-aware minimization under parameter masks, compared at exactly matched counts."
FLAGS = {
    "json": "print JSON instead of text",
    "failed": "only runs that failed, diverged, are unfinished or damaged, each with its reason",
    "quick": "end within about a minute: fewer rounds, and smaller batches where that is not enough",
    "quiet": "no progress bars",
    "dry_run": "say what would run, how much of it is done, and about how long the rest takes; run and write nothing",
    "show": "print the ablation's file instead, as a start for one of your own",
    "smoke": "only see whether it runs: as many training images as a batch holds, two seeds, one radius per arm; its "
    "numbers mean nothing",
    "sweep": "train every arm at every radius on the report's seeds, too: what sam-masks verdict compares at equal "
    "sharpness",
}
PLACES = ("folder", "mask_name", "ablation")
"""Options that are given by their place, without a name."""
EXIT_CODES = (
    "exit codes: 0 done; 1 a run failed, or doctor found something broken; 2 bad input; 130 interrupted by Ctrl-C, 143 "
    "ended by SIGTERM (the same command goes on; what was finished is kept or printed)"
)


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
    if unknown and unknown[1] and not unknown[1].startswith("-"):
        return f"nothing takes the word {unknown[1]!r}; a list has commas and no spaces, such as --masks all,norm"
    if unknown:
        name = next(group for group in unknown.groups() if group).lstrip("-").partition("=")[0]
        if name in known:
            return f"option --{name} belongs after the command: sam-masks COMMAND --{name}"
        line = unknown_name("option", name, known)
        return line if "did you mean" in line else f"unknown option {name!r}; --help lists the options"
    choice = re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", text)
    if choice:
        return unknown_name("command", choice[1], re.findall(r"[\w-]+", choice[2]))
    missing = re.search(r'expected "\w+" to be one of \{([^}]*)\}, but it was not provided', text)
    if missing:
        return f"no command given; choose one of {missing[1]} (sam-masks --help)"
    needed = re.search(r"the following arguments are required: (.*)", text)
    if needed:
        names = [name.rpartition(".")[2] for name in needed[1].split(", ")]
        return f"missing: {', '.join(name.upper() if name in PLACES else f'--{name}' for name in names)}"
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


def _explanations(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each field, for ``--help``."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(base) or "", flags=re.MULTILINE):
            out[name] = " ".join(text.split())
    return out


@dataclass(frozen=True)
class _Command:
    """One command: what ``--help`` says of it, and the classes whose fields are its options."""

    summary: str
    example: str
    options: tuple[type, ...]


def _commands() -> dict[str, _Command]:
    from experiments.ablate import AblateOptions
    from experiments.analyze import AnalyzeOptions
    from experiments.bench import BenchOptions
    from experiments.config import CompareConfig, RunConfig
    from experiments.doctor import DoctorOptions
    from experiments.measure import MeasureConfig
    from experiments.new_mask import NewMaskOptions
    from experiments.report import ReportOptions
    from experiments.runs import RunsOptions
    from experiments.verdict import VerdictOptions

    return {
        "compare": _Command(
            "compare arms, paired over seeds, with rho chosen per mask on validation data",
            "--masks all,norm,random --seeds 8",
            (CompareConfig, MeasureConfig, CompareOptions),
        ),
        "ablate": _Command(
            "run an ablation, one comparison or several with a joint table; ablate list names them",
            "norm_parts --data folder:DIR --model module:function",
            (AblateOptions, CompareConfig, MeasureConfig, CompareOptions),
        ),
        "train": _Command("train one model", "--mask norm --rho 1", (RunConfig, TrainOptions)),
        "masks": _Command(
            "list the registered masks; with --model, build them and print their anatomy",
            "--model torchvision:resnet18",
            (MasksOptions,),
        ),
        "methods": _Command(
            "list the methods of the SAM family: paper, passes, state, options, limits", "--json", (MethodsOptions,)
        ),
        "presets": _Command(
            "list published settings; with --name, print one as a configuration file for compare",
            "--name sam_on_cifar100_wrn28_10 --scale 0.1 > study.yaml",
            (PresetsOptions,),
        ),
        "analyze": _Command(
            "measure sharpness and curvature of a checkpoint, of any model and data set",
            "--model vit_small --checkpoint FILE --data digits",
            (AnalyzeOptions,),
        ),
        "bench": _Command(
            "measure what a step under each mask costs on this machine, on any model",
            "--quick --model module:function --shape 3x32x32",
            (BenchOptions,),
        ),
        "runs": _Command(
            "list the runs in a folder, filter them, compare their settings, say why some failed",
            "results --where arm=norm,rho=1",
            (RunsOptions,),
        ),
        "report": _Command(
            "write the report of a comparison from its folder, without training: HTML, Markdown, CSV, SVG, LaTeX",
            "results/compare-ID --out report",
            (ReportOptions,),
        ),
        "verdict": _Command(
            "say whether a gain comes from flatness, from the folder of a comparison",
            "results/compare-ID",
            (VerdictOptions,),
        ),
        "new-mask": _Command(
            "write a plugin project for a mask of one's own: module, test, pyproject, README",
            "my_idea",
            (NewMaskOptions,),
        ),
        "doctor": _Command(
            "say what is broken: versions, torch with torchvision, devices, plugins, locks, a model's norm layers",
            "--model module:function",
            (DoctorOptions,),
        ),
    }


def _command_parser(name: str, command: _Command) -> jsonargparse.ArgumentParser:
    """The parser of one command."""
    from experiments.config import DECIDED, CompareConfig, RunConfig

    hidden: dict[type, set[str]] = {CompareConfig: {*DECIDED}, RunConfig: {"tuning"}}
    parser = _Parser(
        description=f"{command.summary}\n\nexample: sam-masks {name} {command.example}",
        exit_on_error=False,
        allow_abbrev=False,
    )
    if any(RunConfig in cls.__mro__ for cls in command.options):
        parser.add_argument("--config", action="config", help="YAML file with any of these options")
    for cls in command.options:
        flags = [f.name for f in fields(cls) if f.name in FLAGS]
        places = [f.name for f in fields(cls) if f.name in PLACES]
        explained = _explanations(cls)
        for place in places:
            parser.add_argument(place, metavar=place.upper())
        parser.add_class_arguments(cls, as_group=True, skip={*flags, *places, *hidden.get(cls, ())})
        parser._action_groups[-1].title = (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")
        for action in parser._actions:
            action.help = action.help or explained.get(action.dest)
        for flag in flags:
            parser.add_argument(f"--{flag}", action="store_true", help=FLAGS[flag])
    return parser


def build_parser() -> _Parser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="sam-masks", description=DESCRIPTION, epilog=EXIT_CODES, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"sam-masks {_version()}")
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, command in _commands().items():
        subcommands.add_subcommand(name, _command_parser(name, command), help=command.summary)
    return parser


def _version() -> str:
    try:
        return version("sam-masks")
    except PackageNotFoundError:
        return "(not installed)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    place = None
    try:
        with ended_by_sigterm():
            place = _place(arguments)
            if place is None:
                return _printed(arguments)
            if {"-h", "--help", "--version"} & {*arguments}:
                return _printed(arguments) if place.rank == 0 else EXIT_OK
            if arguments[:1] != ["train"]:
                raise InputError(f"{' '.join(arguments[:1])} runs in one process, not in {place.size}; only train does")
            return together(place, lambda: _printed(arguments), _ending)
    except (Exception, KeyboardInterrupt) as error:
        line, code = _ending(error)
        if place is None or place.local_rank == 0:
            print(line, file=sys.stderr)
        return code


def _place(arguments: list[str]) -> Place | None:
    """Who this process is. What a launcher of something else left in the environment is no matter of commands that run
    in one process.

    Raises:
        InputError: see :meth:`experiments.distributed.Place.of`.
    """
    try:
        return Place.of(os.environ)
    except InputError:
        if arguments[:1] == ["train"]:
            raise
        return None


def _printed(arguments: list[str]) -> int:
    """Run the command line until all is printed, or nobody reads it."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _ending(error: BaseException) -> tuple[str, int]:
    """What the user is told of an error, and the exit code.

    Raises:
        BaseException: the error itself, where it is unknown and the user wants to see where it comes from.
    """
    if isinstance(error, KeyboardInterrupt):
        ended = isinstance(error, Terminated)
        what = "ended by SIGTERM" if ended else "interrupted"
        line = f"sam-masks: {what}; finished runs are kept, and the same command goes on from there"
        return line, EXIT_TERMINATED if ended else EXIT_INTERRUPTED
    if isinstance(error, (InputError, RunFailed)):
        return _line(str(error)), EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED
    if os.environ.get("SAM_MASKS_TRACEBACK"):
        raise error
    where = "set SAM_MASKS_TRACEBACK=1 to see where it comes from"
    return _line(f"{type(error).__name__}: {error}; {where}"), EXIT_FAILED


def _line(message: str) -> str:
    return f"sam-masks: error: {' '.join(message.split())}"


def _run(arguments: list[str]) -> int:
    import torch

    torch.set_num_threads(1)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return EXIT_INPUT
    parser.command = arguments[0]
    try:
        # An ablation's own settings come between those that were given and the defaults.
        words = _config_first([_underscored(argument) for argument in arguments])
        parsed = parser.parse_args(words, defaults=parser.command != "ablate")
        if parsed.command == "ablate":
            return commands.run_ablate(vars(parsed["ablate"]), lambda settings: _compare_values(parser, settings))
        values = _values(parser, parsed)
    except jsonargparse.ArgumentError as error:
        raise UsageError(_one_line(str(error), parser)) from None
    except UnicodeDecodeError:
        raise UsageError("the configuration file is not text") from None
    run: Callable[[dict[str, Any]], int] = getattr(commands, f"run_{parsed.command.replace('-', '_')}")
    return run(values)


def _values(parser: _Parser, parsed: jsonargparse.Namespace) -> dict[str, Any]:
    """The options of the command, checked, once its plugins are loaded."""
    # A verdict imports nothing of the user's, and the doctor says itself what cannot be imported.
    if "plugin" in parsed[parsed.command] and parsed.command != "doctor":
        _load_plugins(parsed[parsed.command].plugin)
    _refuse_untyped(parser, vars(parsed[parsed.command]))
    values: dict[str, Any] = vars(parser.instantiate(parsed)[parsed.command])
    return values


def _compare_values(parser: _Parser, settings: dict[str, Any]) -> dict[str, Any]:
    """The options of compare from some of them, such as the settings of an ablation."""
    parser.command = "compare"
    return _values(parser, parser.parse_object({"command": "compare", "compare": settings}))


def _refuse_untyped(parser: _Parser, values: dict[str, Any]) -> None:
    """The parser takes a null in a configuration file for a value of any type, and any value for a flag."""
    (commands_of,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    for action in commands_of[parser.command]._actions:
        if action.default is not None and action.dest in values and values[action.dest] is None:
            raise UsageError(f"option {action.dest} needs a value, got null")
        if action.dest in FLAGS and not isinstance(values.get(action.dest, False), bool):
            raise UsageError(f"option {action.dest} is true or false, got {values[action.dest]!r}")


def _load_plugins(names: str | None) -> None:
    """Import the plugins named; say on stderr which installed ones are broken."""
    from masks import broken_plugins, load_plugin

    for origin, reason in broken_plugins().items():
        print(f"sam-masks: warning: plugin {origin} is not available: {reason}", file=sys.stderr)
    sys.path.insert(0, os.getcwd())  # modules of the user's own, as python -m would find them
    for name in listed(names):
        load_plugin(name)


if __name__ == "__main__":
    sys.exit(main())
