"""One run from the command line: what it leaves behind belongs together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.checkpoint import read_weights
from experiments.config import RunConfig
from experiments.data import load_data
from experiments.record import RunRecord
from experiments.seeds import derive_seed
from experiments.single import train_one
from experiments.train import initial_model, load_weights, split_of, train_run
from masks import Mask
from masks.errors import InputError
from sam import SAM

Tiny = Callable[..., RunConfig]
CPU = torch.device("cpu")


def test_record_mask_and_checkpoint_are_of_one_run(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(mask="random", rho=0.3)
    record, folder = train_one(config, tmp_path / "out", device="cpu")
    assert folder == tmp_path / "out"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", f"{record.run_id}.json", "mask.npz"]
    assert RunRecord.load(folder / f"{record.run_id}.json") == record
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
    assert record.result["init_digest"] is None


def test_the_run_is_train_runs(tiny: Tiny, tmp_path: Path) -> None:
    record, _ = train_one(tiny(), tmp_path / "a", device="cpu")
    assert record.result["history"][-1]["loss"] == train_run(tiny(), CPU).history[-1].loss
    again, _ = train_one(tiny(), tmp_path / "a", device="cpu")  # the same run may go there again
    assert (again.run_id, again.result) == (record.run_id, record.result)


def test_the_default_folder_is_named_after_the_run(tiny: Tiny, in_folder: Path) -> None:
    record, folder = train_one(tiny(epochs=1), device="cpu")
    assert folder == Path("results") / f"train-{record.run_id[:8]}"


def test_a_run_can_start_from_a_checkpoint_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    first, folder = train_one(tiny(mask="none", seed=1, epochs=1), tmp_path / "first", device="cpu")
    config = tiny(mask="none", lr=0.0, epochs=1, seed=2)
    second, other = train_one(config, tmp_path / "second", init=folder / "checkpoint.pt", device="cpu")
    fresh, _ = train_one(config, tmp_path / "fresh", device="cpu")
    old, new = read_weights(folder / "checkpoint.pt"), read_weights(other / "checkpoint.pt")
    assert all(torch.equal(old[name], new[name]) for name in old if "running" not in name and "num_b" not in name)
    assert second.result["init_digest"]
    assert len({first.run_id, second.run_id, fresh.run_id}) == 3


@pytest.mark.parametrize("name", ["thesis.txt", "study.json"])
def test_a_folder_of_other_things_is_refused_before_training(
    tiny: Tiny, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.single.train_run", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="holds something else than run"):
        train_one(tiny(), tmp_path, device="cpu")
    assert (tmp_path / name).read_text() == "mine"
    for folder in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(InputError, match=r"cannot use .* for results: "):
            train_one(tiny(), folder, device="cpu")


def test_another_runs_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    record, folder = train_one(tiny(epochs=1), tmp_path / "out", device="cpu")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match="holds something else"):
        train_one(tiny(epochs=1, seed=1), folder, device="cpu")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert json.loads(before[f"{record.run_id}.json"])["run_id"] == record.run_id


def test_bad_input_leaves_no_folder(tiny: Tiny, in_folder: Path) -> None:
    for config in (tiny(model="mlp"), tiny(mask="fisher:exclude_norm=true", density=0.99), tiny(n_train=5000)):
        with pytest.raises(InputError):
            train_one(config, Path("out"), device="cpu")
        assert not Path("out").exists()


def test_the_weights_of_a_seed(tiny: Tiny) -> None:
    data = load_data("digits")
    torch.manual_seed(derive_seed(4, "init"))
    wanted = type(initial_model(tiny(), data))(1, (8, 8), 10, 4)
    found = initial_model(tiny(seed=4), data)
    torch.manual_seed(derive_seed(4, "init"))
    wanted = type(found)(1, (8, 8), 10, 4)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))
