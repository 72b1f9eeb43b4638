"""Checkpoints: written whole, and read without executing anything."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.checkpoint import read_weights, save_checkpoint
from masks.errors import InputError

STATE = {"a": torch.arange(3.0), "b.weight": torch.ones(2, 2)}


def equal(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize(
    "content", [STATE, {"model": STATE}, {"state_dict": STATE, "epoch": 3}, {"model": STATE, "sam": {"x": 1}}]
)
def test_weights_are_found_where_they_usually_are(tmp_path: Path, content: dict[str, Any]) -> None:
    save_checkpoint(tmp_path / "c.pt", content)
    assert equal(read_weights(tmp_path / "c.pt"))
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_checkpoint_is_complete_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"model": STATE})

    write = Path.write_bytes

    def half(aside: Path, content: Any) -> int:
        write(aside, bytes(content)[:20])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises(type(error)):
            save_checkpoint(path, {"model": {}})
        assert equal(read_weights(path))
    assert list(tmp_path.iterdir()) == [path]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("exploded").write_text, ("boom",))


@pytest.mark.parametrize("case", ["truncated", "empty", "text", "pickle", "list", "numbers", "nothing", "folder"])
def test_what_is_no_checkpoint_is_refused_in_one_line(
    in_folder: Path, case: str, recwarn: pytest.WarningsRecorder
) -> None:
    path = in_folder / "c.pt"
    if case == "truncated":
        torch.save({"model": STATE}, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "text":
        path.write_text("weights: none\n")
    elif case == "pickle":
        path.write_bytes(pickle.dumps({"model": Bomb()}))
    elif case == "folder":
        path.mkdir()
    else:
        torch.save({"list": [1, 2], "numbers": {"a": 1.0}, "nothing": {}}[case], path)
    with pytest.raises(InputError) as caught:
        read_weights(path)
    assert not recwarn.list
    message = str(caught.value)
    assert "c.pt" in message
    assert "\n" not in message
    assert "weights_only" not in message  # torch's advice to execute the file
    assert not (in_folder / "exploded").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read checkpoint .*none\.pt: No such file[^;]*$"):
        read_weights(tmp_path / "none.pt")
    save_checkpoint(tmp_path / "checkpoint.pt", STATE)
    with pytest.raises(InputError, match=r"Is a directory; did you mean .*checkpoint\.pt\?$"):
        read_weights(tmp_path)


def test_a_whole_model_is_told_how_it_is_saved(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(InputError, match=r"not a checkpoint of plain tensors.*torch\.save\(model\.state_dict"):
        read_weights(tmp_path / "whole.pt")
