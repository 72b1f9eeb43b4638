"""Whether an installation works: libraries, devices, plugins, locks, and what a model's normalization layers are."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from torch import nn

from experiments.anatomy import Target
from experiments.config import default_processes
from experiments.data import reason
from experiments.measure import listed
from experiments.store import Busy, Store
from masks import MaskError, broken_plugins, installed_plugins, list_masks, load_plugin
from masks.errors import InputError
from masks.params import norm_modules, norm_types

OWN = "sam-masks"
PAIR = "torch and torchvision must be of one release and one build: install both at once, from one package index"


@dataclass(frozen=True)
class DoctorOptions:
    """What to look at.

    Args:
        model: list the normalization layers of this model, too, and what may be one: torchvision:NAME, timm:NAME,
            module:function or a built-in one.
        num_classes: number of classes of the model (default: 10).
        width: width of a built-in model.
        out: folder where results would be written: whether runs can be locked there is tried.
        plugin: modules to import for their masks, separated by commas.
        json: print a list of objects.
    """

    model: str | None = None
    num_classes: int | None = None
    width: int | None = None
    out: str = "."
    plugin: str | None = None
    json: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what.
        state: ok, note (works, but should be known) or broken.
        text: what was found.
        advice: what to do, None for nothing.
    """

    subject: str
    state: Literal["ok", "note", "broken"]
    text: str
    advice: str | None = None


def examine(options: DoctorOptions) -> list[Finding]:
    """Look at everything; what is broken is a finding, never an error."""
    findings = [Finding("python", "ok", f"{platform.python_version()}, {sys.executable}, on {platform.platform()}")]
    findings += _libraries()
    findings.append(_torchvision())
    findings += _devices()
    findings += _plugins(listed(options.plugin))
    findings.append(_locks(Path(options.out)))
    if options.model is not None:
        findings += _model(options.model, options)
    return findings


def as_json(findings: Iterable[Finding]) -> str:
    """A list of objects."""
    return json.dumps([asdict(finding) for finding in findings], indent=1)


def as_text(findings: list[Finding]) -> str:
    """A line for each finding, one below it for what to do, and a summary."""
    lines = []
    for one in findings:
        lines.append(f"{one.state:7} {one.subject}: {one.text}")
        lines += [f"        -> {one.advice}"] if one.advice else []
    broken = [one.subject for one in findings if one.state == "broken"]
    return "\n".join([*lines, "", f"broken: {', '.join(broken)}" if broken else "nothing is broken"])


# -- libraries --------------------------------------------------------------------------------------------------


def _libraries() -> Iterator[Finding]:
    """The project's own version, what it requires, and its extras, as its metadata declares them."""
    try:
        own = distribution(OWN)
    except PackageNotFoundError:
        yield Finding(OWN, "note", "not installed, but run from its source; what it requires is not known")
        return
    yield Finding(OWN, "ok", own.version)
    required = [Requirement(text) for text in own.requires or ()]
    extras: dict[str, list[Requirement]] = {name: [] for name in own.metadata.get_all("Provides-Extra") or ()}
    for one in required:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            found, fits = _installed(one)
            advice = None if fits else f"pip install '{one.name}{one.specifier}'"
            yield Finding(one.name, "ok" if fits else "broken", found, advice)
            continue
        for extra, members in extras.items():
            if one.name != OWN and one.marker.evaluate({"extra": extra}):
                members.append(one)
    for extra, members in extras.items():
        states = [_installed(one) for one in members]
        complete = all(fits for _, fits in states)
        text = ", ".join(f"{one.name} {found}" for one, (found, _) in zip(members, states, strict=True))
        advice = None if complete else f"only if you want it: pip install '{OWN}[{extra}]'"
        yield Finding(f"extra {extra}", "ok" if complete else "note", text, advice)


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """The version that is installed beside the one required, and whether it will do."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return "not installed", False
    fits = requirement.specifier.contains(found, prereleases=True)
    return found if fits else f"{found} is installed, {requirement.specifier} is required", fits


def _torchvision() -> Finding:
    """Whether torchvision can be imported, tried in a process of its own: it may end the process."""
    subject = "torchvision with torch"
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    try:
        pair = f"torchvision {version('torchvision')}, torch {torch.__version__}"
        needed = [Requirement(text) for text in distribution("torchvision").requires or ()]
    except PackageNotFoundError:
        return Finding(subject, "broken", "torchvision is not installed", PAIR)
    wanted = [str(one) for one in needed if one.name == "torch" and not _installed(one)[1]]
    declared = f"; this torchvision requires {wanted[0]}" if wanted else ""
    if done.returncode == 0:
        return Finding(subject, "note" if wanted else "ok", pair + declared, PAIR if wanted else None)
    lines = done.stderr.strip().splitlines()
    said = lines[-1] if lines else f"the process ended with code {done.returncode}"
    if re.search(r"torchvision::|undefined symbol|_C\.so", done.stderr):
        declared += "; its compiled operators were built for another torch and could not be registered"
    return Finding(subject, "broken", f"{pair}: cannot be imported ({said}){declared}", PAIR)


# -- devices ------------------------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    yield Finding(
        "processor",
        "ok",
        f"{default_processes()} of {os.cpu_count()} cores for this process; a run takes one thread, and a comparison "
        "makes as many runs at once (--processes)",
    )
    built = torch.version.cuda
    if not torch.cuda.is_available():
        text = f"none; torch is built for CUDA {built} and finds no device" if built else "none; torch is built without"
        yield Finding("CUDA", "ok", text)
    for i in range(torch.cuda.device_count()):
        try:
            found = torch.cuda.get_device_properties(i)
            if int(torch.ones(3, device=f"cuda:{i}").sum()) != 3:
                raise RuntimeError("1 + 1 + 1 is not 3 there")
        except Exception as error:  # a driver that is too old, a device that torch has no kernels for or that is taken
            yield Finding(
                f"cuda:{i}", "broken", reason(error), f"install a torch for this driver; this one: CUDA {built}"
            )
            continue
        yield Finding(f"cuda:{i}", "ok", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {built}")


# -- plugins and locks ----------------------------------------------------------------------------------------------


def _plugins(modules: Iterable[str]) -> Iterator[Finding]:
    """The installed plugins, then modules of one's own."""
    broken = broken_plugins()
    installed = installed_plugins()
    if not installed:
        yield Finding("installed plugins", "ok", "none")
    for origin in installed:
        yield _plugin(origin, broken.get(origin))
    sys.path.insert(0, os.getcwd())  # modules of the user's own, as for the other commands
    for module in modules:
        try:
            load_plugin(module)
        except MaskError as error:
            yield _plugin(module, str(error).removeprefix(f"plugin {module}").lstrip(": "))
        else:
            yield _plugin(module, None)


def _plugin(origin: str, problem: str | None) -> Finding:
    subject = f"plugin {origin}"
    if problem is not None:
        return Finding(subject, "broken", problem)
    names = [info.name for info in list_masks() if info.origin == origin]
    if names:
        return Finding(subject, "ok", f"masks {', '.join(names)}")
    advice = "if it should: name the module that calls register_score or register_mask when it is imported"
    return Finding(subject, "note", "loads, but registers no mask", advice)


def _locks(folder: Path) -> Finding:
    """Whether a lock in the folder keeps a second one out, as runs need it."""
    subject = f"locks in {folder.absolute()}"
    advice = "choose a folder that you may write to, on a file system with locks (NFS 4, Lustre with flock)"
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
            store = Store(Path(scratch))
            with store.working_on("run"):
                try:
                    with store.working_on("run"):
                        return Finding(subject, "broken", "two can hold one lock at once", advice)
                except Busy:
                    return Finding(subject, "ok", "work between processes of this machine")
    except (OSError, InputError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Finding(subject, "broken", said, advice)


# -- normalization layers -------------------------------------------------------------------------------------------


def _model(name: str, options: DoctorOptions) -> Iterator[Finding]:
    subject = f"model {name}"
    try:
        model, _, _ = Target(name, options.num_classes, options.width).build()
    except Exception as error:  # a torchvision that does not fit, for one, fails in many ways
        said = str(error).removeprefix(f"{subject}: ") if isinstance(error, InputError) else reason(error)
        yield Finding(subject, "broken", said)
        return
    yield from norm_layers(model, subject)


def norm_layers(model: nn.Module, subject: str = "model") -> Iterator[Finding]:
    """What counts as a normalization layer in a model, by its type, and what may be one that nobody declared.

    May be one: a module outside torch.nn with parameters of its own whose class or name in the model says so, or
    that has no children and a parameter other than a bias with one dimension only (sizes of 1 not counted).
    """
    known = list(norm_modules(model))
    counts = Counter(type(module).__name__ for _, module in known)
    total = sum(p.numel() for _, module in known for p in module.parameters(recurse=False) if p.requires_grad)
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    if known:
        yield Finding(subject, "ok", f"{text}: {total:,} trainable coordinates belong to normalization layers")
    else:
        yield Finding(subject, "note", "no normalization layer by type: norm, no_norm and random_depth refuse it")
    suspects: dict[type[nn.Module], list[str]] = {}
    why: dict[type[nn.Module], str] = {}
    for name, module in model.named_modules():
        cls = type(module)
        found = _suspicion(name.rpartition(".")[2], module)
        if found and not isinstance(module, norm_types()) and not cls.__module__.startswith("torch.nn."):
            suspects.setdefault(cls, []).append(name)
            why.setdefault(cls, found)
    for cls, names in suspects.items():
        yield Finding(
            subject,
            "note",
            f"{len(names)} {cls.__name__} (first: {names[0] or 'the model itself'}) may normalize: {why[cls]}",
            f"if so, where the class is defined or in a --plugin: masks.register_norm_type({cls.__qualname__}), "
            f"of module {cls.__module__}",
        )


def _suspicion(local_name: str, module: nn.Module) -> str | None:
    """Why a module may normalize: its class, its name, or the shape of a weight; None if nothing says so."""
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return None
    if "norm" in type(module).__name__.lower():
        return "its class says so"
    if re.search(r"norm|^(bn|ln|gn)(\d|_|$)", local_name.lower()):
        return f"it is called {local_name}"
    if not any(True for _ in module.children()):
        for name, p in own.items():
            if p.numel() > 1 and p.numel() == max(p.shape) and not name.endswith("bias"):
                return f"its weight {name} has shape {tuple(p.shape)}"
    return None
