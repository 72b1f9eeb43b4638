"""One run from the command line: what it leaves behind belongs together."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.checkpoint import read_weights
from experiments.config import RunConfig
from experiments.data import load_data
from experiments.runner import Policy, RunFailed
from experiments.seeds import derive_seed
from experiments.single import train_one
from experiments.store import Store, read_failure, read_run
from experiments.train import Training, initial_model, load_weights, split_of, train_run
from experiments.worker import Terminated
from masks import Mask
from masks.errors import InputError
from sam import SAM
from tests.experiments.conftest import QUIET

Tiny = Callable[..., RunConfig]
CPU = torch.device("cpu")


def test_record_mask_and_checkpoint_are_of_one_run(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(mask="random", rho=0.3)
    record, folder, _ = train_one(config, tmp_path / "out", policy=QUIET)
    assert folder == tmp_path / "out"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "mask.npz", "result.json", "telemetry.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert read_run(folder) == record
    data = load_data("digits")
    model = initial_model(config, data)
    load_weights(model, read_weights(folder / "checkpoint.pt"))
    split = split_of(config.resolved(), data)
    with torch.no_grad():
        right = (model.eval()(split.test_x).argmax(1) == split.test_y).double().mean().item()
    assert record.result["test_accuracy"] == right
    mask = Mask.load(folder / "mask.npz")
    assert mask.digest() == record.result["mask_builds"][-1]["digest"]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, mask=mask, rho=0.3)
    optimizer.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["sam"])
    assert "init_digest" not in record.result


def test_the_run_is_train_runs(tiny: Tiny, tmp_path: Path) -> None:
    record, folder, _ = train_one(tiny(), tmp_path / "a", policy=QUIET)
    assert record.result["history"][-1]["loss"] == train_run(tiny(), CPU).history[-1].loss
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert train_one(tiny(), folder, policy=QUIET) == (record, folder, ())  # the same run is read, not made again
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_progress_is_shown_in_a_terminal(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
    quiet: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    config = tiny(epochs=3)
    record, _, _ = train_one(config, tmp_path / "out", policy=Policy(quiet=quiet))
    out, err = capsys.readouterr()
    steps = 3 * -(-record.result["train_images"] // config.batch_size)
    assert out == ""
    assert ("training: 100%|" in err and f"| {steps}/{steps} [" in err) is (terminal and not quiet)
    assert bool(err) is (terminal and not quiet)


def test_a_damaged_record_is_set_aside_and_made_again(tiny: Tiny, tmp_path: Path) -> None:
    record, folder, _ = train_one(tiny(epochs=1), tmp_path / "a", policy=QUIET)
    text = (folder / "result.json").read_text()
    (folder / "result.json").write_text(text[:100])
    again, _, (note,) = train_one(tiny(epochs=1), folder, policy=QUIET)
    assert again.result == record.result
    assert note.endswith("it is set aside as a.damaged-1 and made again")
    assert (folder / "result.json").read_text() == text
    assert (tmp_path / "a.damaged-1" / "checkpoint.pt").exists()


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(mask="random", epochs=3)
    step, calls, asked = Training._step, [], list[signal.Signals]()

    def asked_to_stop(self: Training, *batch: torch.Tensor) -> None:
        calls.append(None)
        if len(calls) == 4 and asked:
            signal.raise_signal(asked.pop())
        step(self, *batch)

    monkeypatch.setattr(Training, "_step", asked_to_stop)
    train_one(config, tmp_path / "whole", policy=QUIET)
    assert len(calls) == 12
    for number, error in ((signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)):
        calls.clear()
        asked.append(number)
        with pytest.raises(KeyboardInterrupt) as caught:
            train_one(config, tmp_path / "parts", policy=QUIET)
        assert caught.type is error
        assert not (tmp_path / "parts").exists()
        assert (tmp_path / "parts.work" / "checkpoint.pt").exists()
    with pytest.raises(InputError, match=r"parts\.work/checkpoint\.pt is the checkpoint of another run"):
        train_one(tiny(seed=9), tmp_path / "parts", policy=QUIET)
    calls.clear()
    assert train_one(config, tmp_path / "parts", policy=QUIET)[2] == ()
    assert len(calls) == 4  # it went on, and did not begin again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
    for name in ("result.json", "mask.npz"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "parts" / "telemetry.json").read_text())["attempts"] == 4
    weights = [read_weights(tmp_path / name / "checkpoint.pt") for name in ("parts", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_run_that_fails_says_why_and_keeps_its_reason(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a\nbug")

    monkeypatch.setattr("experiments.worker.execute", fail)
    with pytest.raises(RunFailed, match=r"^ZeroDivisionError: a bug$"):
        train_one(tiny(), tmp_path / "a", policy=QUIET)
    failure = read_failure(tmp_path, "a")
    assert failure is not None
    assert (failure.error, failure.attempts) == ("ZeroDivisionError: a bug", 1)


def test_a_run_that_another_process_does_is_left_to_it(tiny: Tiny, tmp_path: Path) -> None:
    with Store(tmp_path).working_on("a"), pytest.raises(InputError, match=r"another process is working on .*a$"):
        train_one(tiny(), tmp_path / "a", policy=QUIET)


def test_the_default_folder_is_named_after_the_run(tiny: Tiny, in_folder: Path) -> None:
    record, folder, _ = train_one(tiny(epochs=1), policy=QUIET)
    assert folder == Path("results") / f"train-{record.run_id[:8]}"


def test_a_run_can_start_from_a_checkpoint_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    first, folder, _ = train_one(tiny(mask="none", seed=1, epochs=1), tmp_path / "first", policy=QUIET)
    config = tiny(mask="none", lr=0.0, epochs=1, seed=2)
    second, other, _ = train_one(config, tmp_path / "second", init=folder / "checkpoint.pt", policy=QUIET)
    fresh, _, _ = train_one(config, tmp_path / "fresh", policy=QUIET)
    old, new = read_weights(folder / "checkpoint.pt"), read_weights(other / "checkpoint.pt")
    assert all(torch.equal(old[name], new[name]) for name in old if "running" not in name and "num_b" not in name)
    assert second.result["init_digest"]
    assert len({first.run_id, second.run_id, fresh.run_id}) == 3


@pytest.mark.parametrize("name", ["thesis.txt", "study.json"])
def test_a_folder_of_other_things_is_refused_before_training(
    tiny: Tiny, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.single.work", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="holds something else than run"):
        train_one(tiny(), tmp_path, policy=QUIET)
    assert (tmp_path / name).read_text() == "mine"
    for folder in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(InputError, match=r"cannot use .* for results: "):
            train_one(tiny(), folder, policy=QUIET)


def test_another_runs_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    record, folder, _ = train_one(tiny(epochs=1), tmp_path / "out", policy=QUIET)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match="holds something else"):
        train_one(tiny(epochs=1, seed=1), folder, policy=QUIET)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert json.loads(before["result.json"])["run_id"] == record.run_id


def test_bad_input_leaves_no_folder(tiny: Tiny, in_folder: Path) -> None:
    for config in (tiny(model="mlp"), tiny(mask="fisher:exclude_norm=true", density=0.99), tiny(n_train=5000)):
        with pytest.raises(InputError):
            train_one(config, Path("out"), policy=QUIET)
        assert not Path("out").exists()


def test_the_weights_of_a_seed(tiny: Tiny) -> None:
    data = load_data("digits")
    torch.manual_seed(derive_seed(4, "init"))
    wanted = type(initial_model(tiny(), data))(1, (8, 8), 10, 4)
    found = initial_model(tiny(seed=4), data)
    torch.manual_seed(derive_seed(4, "init"))
    wanted = type(found)(1, (8, 8), 10, 4)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))
