"""An environment of its own with this project as a wheel would install it; libraries come from the one that tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.documents import ROOT

_NOT_SOURCE = shutil.ignore_patterns(".*", "results", "local", "build", "dist", "site", "*.egg-info", "__pycache__")


def fresh_environment(folder: Path) -> dict[str, str]:
    """Make it in the folder, with the project in it; returns the variables under which a shell's python, pip and
    sam-masks are its own."""
    variables, source = bare_environment(folder), copied_source(folder)
    install(source, folder, variables)
    return variables


def install(what: Path, folder: Path, variables: dict[str, str]) -> None:
    """Install a source tree or a wheel."""
    run(f"pip install --quiet --no-deps --ignore-installed {what}", folder, variables)


def copied_source(folder: Path) -> Path:
    """A copy of what the project is made from."""
    return Path(shutil.copytree(ROOT, folder / "source", ignore=_NOT_SOURCE))


def bare_environment(folder: Path) -> dict[str, str]:
    """The same without the project.

    pip finds nothing outside the machine, and builds with the setuptools that is there.
    """
    home = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for name in ("pip", "pytest"):
        command = home / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {home}/bin/python -P -m {name} "$@"\n')
        command.chmod(0o755)
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))} | {
        "PATH": f"{home}/bin{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of yes
    }


def run(command: str, folder: Path, variables: dict[str, str], *, code: int = 0) -> str:
    """What a shell's command prints; it must end with this exit code."""
    done = subprocess.run(command, shell=True, cwd=folder, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
