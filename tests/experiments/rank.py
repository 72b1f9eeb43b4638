"""``sam-masks`` as a process of its own, to which something happens on the way; not a test.

The environment variable HAPPENS says what: RANK:STEP:WHAT. Before that step of the training, that rank gets the signal
called WHAT, or raises ``ZeroDivisionError`` if that is ``raise`` and ``InputError`` if it is ``refuse``. If HAPPENED
names a file, it is made then, and nothing happens once it is there.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from experiments.cli import main
from experiments.train import Training
from masks.errors import InputError

step = Training._step


def happening(self: Training, *arguments: Any) -> None:
    rank, at, what = os.environ["HAPPENS"].split(":")
    happened = os.environ.get("HAPPENED")
    if os.environ.get("RANK", "0") == rank and self.step == int(at) and not (happened and Path(happened).exists()):
        if happened:
            Path(happened).touch()
        if what == "raise":
            raise ZeroDivisionError("by hand")
        if what == "refuse":
            raise InputError("refused by hand")
        signal.raise_signal(signal.Signals[what])
    step(self, *arguments)


if __name__ == "__main__":
    if "HAPPENS" in os.environ:
        Training._step = happening  # type: ignore[method-assign]
    torch.set_num_threads(1)
    sys.exit(main())
