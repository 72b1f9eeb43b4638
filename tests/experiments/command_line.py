"""The command line called from tests: what it prints, and the one line of what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main

TINY = ["--n-train=100", "--n-val=30", "--n-test=50", "--width=4", "--epochs=1", "--batch-size=32"]
COMMAND = Path(sys.executable).with_name("sam-masks")
COMPARE = ["compare", *TINY, "--seeds=2", "--tuning-seeds=1", "--images=64", "--sharpness-m=16", "--processes=1"]
"""A comparison of seconds."""
PLUGIN = """from masks import register_score

@register_score("{name}", summary="|w| to a power", source="test")
def score(context, *, power: float = 1.0):
    return [w.abs() ** power for w in context.parameters()]
"""
ANALYSIS_NOTES = ("sam-masks: warning: no record of train", "sam-masks: mean loss ")
"""What stands on stderr before the numbers of an analysis."""
Output = pytest.CaptureFixture[str]


def refused(arguments: list[str], output: Output) -> str:
    """The one line on stderr of a command that must be refused."""
    try:
        code = main(arguments)
    except SystemExit as error:
        pytest.fail(f"SystemExit({error.code}): {output.readouterr().err}")
    out, err = output.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith("sam-masks: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert len(err) < 500, err
    return err.removeprefix("sam-masks: error: ").rstrip()


def printed(arguments: list[str], output: Output) -> Any:
    assert main(arguments) == 0
    out, err = output.readouterr()
    assert [line for line in err.splitlines() if not line.startswith(ANALYSIS_NOTES)] == []
    return json.loads(out) if "--json" in arguments else out
