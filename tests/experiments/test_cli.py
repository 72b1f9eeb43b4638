"""The command line as a whole: its help, its exit codes, and what it does when it is stopped."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import cli, commands
from experiments.cli import main
from tests.experiments.command_line import COMMAND, Output

COMMANDS = (
    *("compare", "ablate", "train", "masks", "methods", "presets"),
    *("analyze", "report", "verdict", "new-mask", "doctor"),
)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_lists_and_explains_every_option(command: str | None, capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*([command] if command else []), "--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    if command is None:
        assert all(name in out for name in (*COMMANDS, "--version", "exit codes: 0 done"))
        return
    assert f"example: sam-masks {command}" in out
    assert "<class" not in out
    assert "%%" not in out
    parser = next(a.choices for a in cli.build_parser()._actions if isinstance(a.choices, dict))[command]
    for action in parser._actions:
        for option in action.option_strings:
            assert option in out
        if action.help != "==SUPPRESS==" and not any(o.endswith(".help") for o in action.option_strings):
            assert action.help, action.option_strings


def test_no_command_shows_what_there_is(capsys: Output) -> None:
    assert main([]) == 2
    assert "compare" in capsys.readouterr().out


def test_version(capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"sam-masks \S+\n", capsys.readouterr().out)


def test_an_unforeseen_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def broken(values: Any) -> int:
        raise ZeroDivisionError("a\nbug")

    monkeypatch.setattr(commands, "run_masks", broken)
    assert main(["masks"]) == 1
    err = capsys.readouterr().err
    assert err == "sam-masks: error: ZeroDivisionError: a bug; set SAM_MASKS_TRACEBACK=1 to see where it comes from\n"
    monkeypatch.setenv("SAM_MASKS_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["masks"])


def test_an_interruption_is_one_line_and_code_130(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def interrupted(values: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == (
        "sam-masks: interrupted; finished runs are kept, and the same command goes on from there\n"
    )


def test_the_installed_command(in_folder: Path) -> None:
    done = subprocess.run([COMMAND, "train", "--model=mlp"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("sam-masks: error: mask norm: none of the model's 6 trainable tensors")
    assert list(in_folder.iterdir()) == []


class Closed(io.StringIO):
    """A standard output whose reader has gone."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = path.open("w")

    def flush(self) -> None:
        raise BrokenPipeError

    def fileno(self) -> int:
        return self.file.fileno()


def test_a_reader_who_stops_reading_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(sys, "stdout", Closed(tmp_path / "out"))
    assert main(["masks"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(in_folder: Path) -> None:
    command = f"{sys.executable} -m experiments.cli masks | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
