"""Interrupted and resumed is uninterrupted, bit for bit, wherever the interruption falls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments import train
from experiments.config import RunConfig
from experiments.resume import Checkpointing, Interrupted
from experiments.train import Trained, Training, result_of, train_run
from masks.errors import InputError

CPU = torch.device("cpu")
Tiny = Callable[..., RunConfig]
STEPS = 8  # 100 images in batches of 32, two epochs


class DropNet(nn.Module):
    """BatchNorm, whose statistics are state, and dropout, which draws random numbers in every pass."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(nn.functional.dropout(x.mean((2, 3)), 0.3, self.training))


@pytest.fixture
def dropnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of every run is DropNet."""

    def build(config: RunConfig, data: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return DropNet(data.num_classes)

    monkeypatch.setattr(train, "initial_model", build)


def stop_after(steps: int) -> Callable[[], bool]:
    """Asks to stop when it is asked for the so-many-th time."""
    asked = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) == steps

    return stop


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested values; nan equals itself."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def everything(trained: Trained) -> dict[str, Any]:
    return {
        "weights": trained.model.state_dict(),
        "sam": trained.sam.state_dict(),
        "record": result_of(trained),
        "history": [asdict(epoch) for epoch in trained.history],
        "builds": [asdict(build) for build in trained.builds],
    }


def observed(model: nn.Module, split: Any) -> dict[str, Any]:
    """A measurement that draws random numbers and a batch's statistics; training must not notice."""
    torch.randn(3)
    return {"norm": float(sum(p.detach().double().square().sum() for p in model.parameters()))}


CASES: dict[str, dict[str, Any]] = {
    "momentum": {"mask": "norm"},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "mask": "random"},
    "rebuilt mask": {"mask": "fisher@every=1"},
    "dynamic mask": {"mask": "dynamic", "density": 0.3},
    "friendly_sam": {"method": "friendly_sam", "mask": "all"},
    "vasso": {"method": "vasso", "mask": "all"},
    "looksam": {"method": "looksam:k=3", "mask": "all"},
    "measured along the way": {"mask": "all", "measure_every": 1},
    "warm-up and clipping": {"warmup": 1, "clip_grad_norm": 0.5, "rho_min": 0.1, "mask": "all"},
    "augmented": {"augment": "crop+flip+cutout=2", "mask": "all"},
    "perturbed in the second epoch": {"sam_epochs": "1..2", "mask": "all"},
    "bf16": {"precision": "bf16", "mask": "norm"},
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_after_any_step_and_resumed_is_bitwise_uninterrupted(
    tiny: Tiny, tmp_path: Path, case: str, dropnet: None
) -> None:
    config = tiny(**{"width": None, **CASES[case]})
    whole = everything(train_run(config, CPU, observer=observed))
    assert len(whole["history"]) == 2
    for steps in range(1, STEPS + 1):
        checkpoints = Checkpointing(tmp_path / f"{steps}.pt", stop=stop_after(steps))
        with torch.random.fork_rng(devices=[]), pytest.raises(Interrupted):
            train_run(config, CPU, observer=observed, checkpoints=checkpoints)
        torch.manual_seed(steps)  # another process has another state
        checkpoints.stop = lambda: False
        assert same(everything(train_run(config, CPU, observer=observed, checkpoints=checkpoints)), whole), steps
        assert checkpoints.notes == []


def test_a_run_interrupted_after_every_step_ends_like_the_others(tiny: Tiny, tmp_path: Path, dropnet: None) -> None:
    config = tiny(width=None, mask="fisher@every=1", method="friendly_sam")
    whole = everything(train_run(config, CPU))
    checkpoints = Checkpointing(tmp_path / "c.pt")
    interruptions = 0
    while True:
        checkpoints.stop = stop_after(1)
        try:
            trained = train_run(config, CPU, checkpoints=checkpoints)
            break
        except Interrupted:
            interruptions += 1
    assert interruptions == STEPS
    assert same(everything(trained), whole)


def test_saving_changes_nothing(tiny: Tiny, tmp_path: Path, dropnet: None) -> None:
    config = tiny(width=None)
    checkpoints = Checkpointing(tmp_path / "c.pt", every=1, minutes=0.0)
    assert same(everything(train_run(config, CPU, checkpoints=checkpoints)), everything(train_run(config, CPU)))
    assert checkpoints.path.exists()


def test_a_resumed_run_does_only_what_is_left(
    tiny: Tiny, tmp_path: Path, dropnet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, done = tiny(width=None), []
    step = Training._step
    monkeypatch.setattr(Training, "_step", lambda self, *batch: (done.append(self.step), step(self, *batch)))
    checkpoints = Checkpointing(tmp_path / "c.pt", stop=stop_after(6))
    with pytest.raises(Interrupted):
        train_run(config, CPU, checkpoints=checkpoints)
    checkpoints.stop = lambda: False
    train_run(config, CPU, checkpoints=checkpoints)
    assert done == list(range(STEPS))


@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 0.2}, {"epochs": 3}, {"mask": "all"}, {"n_train": 90}])
def test_the_checkpoint_of_another_run_is_refused(tiny: Tiny, tmp_path: Path, change: dict[str, Any]) -> None:
    checkpoints = Checkpointing(tmp_path / "c.pt", stop=stop_after(2))
    with pytest.raises(Interrupted):
        train_run(tiny(), CPU, checkpoints=checkpoints)
    with pytest.raises(InputError, match="checkpoint is of another run"):
        train_run(tiny(**change), CPU, checkpoints=Checkpointing(tmp_path / "c.pt"))
    with pytest.raises(InputError, match=r"c\.pt is the checkpoint of another run \(\); move it away to start anew"):
        train_run(tiny(), CPU, checkpoints=Checkpointing(tmp_path / "c.pt", run="other"))


def test_the_checkpoint_of_other_code_is_not_used_and_that_is_said(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny()
    whole = everything(train_run(config, CPU))
    old = Checkpointing(tmp_path / "c.pt", stop=stop_after(2), made_by={"code": "1"})
    with pytest.raises(Interrupted):
        train_run(config, CPU, checkpoints=old)
    new = Checkpointing(tmp_path / "c.pt", made_by={"code": "2"})
    assert same(everything(train_run(config, CPU, checkpoints=new)), whole)
    assert new.notes == [
        f"the checkpoint {new.path} was made by another version of the code or on another kind of device; "
        "the run starts anew"
    ]


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "list", "evil"])
def test_a_damaged_checkpoint_is_not_used_and_that_is_said(
    tiny: Tiny, in_folder: Path, damage: str, recwarn: pytest.WarningsRecorder
) -> None:
    config, path = tiny(), in_folder / "c.pt"
    whole = everything(train_run(config, CPU))
    with pytest.raises(Interrupted):
        train_run(config, CPU, checkpoints=Checkpointing(path, stop=stop_after(2)))
    (in_folder / "evil.py").write_text("raise SystemExit('executed')")
    content = {
        "empty": b"",
        "truncated": path.read_bytes()[:-200],
        "text": b"not a checkpoint",
        "evil": b"\x80\x04cevil\nx\n.",
    }
    if damage == "list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(content[damage])
    checkpoints = Checkpointing(path)
    assert same(everything(train_run(config, CPU, checkpoints=checkpoints)), whole)
    (note,) = checkpoints.notes
    assert note.startswith(f"the checkpoint {path} is damaged (")
    assert note.endswith("); the run starts anew")


def test_checkpoints_are_due_by_epochs_and_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    every = Checkpointing(tmp_path / "c.pt", every=2, _saved=now[0])
    assert [every.due(n, epoch_end=True) for n in (1, 2, 3, 4)] == [False, True, False, True]
    assert not every.due(2, epoch_end=False)
    timed = Checkpointing(tmp_path / "c.pt", minutes=5, _saved=now[0])
    now[0] += 299
    assert not timed.due(1, epoch_end=False)
    now[0] += 2
    assert timed.due(1, epoch_end=False)
    timed.save({})
    assert not timed.due(1, epoch_end=True)
    assert not Checkpointing(tmp_path / "c.pt", _saved=0.0).due(1, epoch_end=True)
