"""The mask as a set of coordinates, against numpy and Python sets; and its file."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from masks import Mask, MaskError, MaskFileError, ParamTable, Provenance, build_mask
from masks.context import MaskContext


class Odd(nn.Module):
    """Layers, a scalar, and a tensor without entries: 15 + 3 + 3 + 3 + 1 + 0 coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.empty(0, 2))


@pytest.fixture
def table() -> ParamTable:
    return ParamTable.from_model(Odd())


def mask_of(table: ParamTable, flat: np.ndarray[Any, Any], **extra: Any) -> Mask:
    parts = torch.split(torch.from_numpy(flat.astype(bool)), [row.numel for row in table])
    return Mask(table, tuple(p.reshape(row.shape) for row, p in zip(table, parts, strict=True)), **extra)


def flat_of(mask: Mask) -> np.ndarray[Any, Any]:
    return np.concatenate([part.numpy().reshape(-1) for part in mask.dense()])


def random_flats(table: ParamTable, seed: int, n: int = 2) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.random(table.numel) < rng.random() for _ in range(n)]


# -- a set of coordinates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_algebra_is_that_of_boolean_arrays(table: ParamTable, seed: int) -> None:
    a, b = random_flats(table, seed)
    if seed % 2:
        b[: table.offsets[table.index("fc.bias")]] = seed % 4 == 1  # whole tensors against partial ones
    x, y = mask_of(table, a), mask_of(table, b)
    for mask, expected in ((x & y, a & b), (x | y, a | b), (~x, ~a), (~(x & ~y) | y, ~(a & ~b) | b)):
        assert (flat_of(mask) == expected).all()
        assert mask.num_kept == int(expected.sum())
        assert mask.numel == 25
        assert mask.density == int(expected.sum()) / 25
        assert mask.sparsity == (25 - int(expected.sum())) / 25
        assert mask == mask_of(table, expected)
    s, t = set(np.flatnonzero(a)), set(np.flatnonzero(b))
    assert x.jaccard(y) == y.jaccard(x) == len(s & t) / len(s | t)
    assert x.jaccard(x) == 1.0
    assert x.jaccard(~x) == 0.0
    assert (x & ~x).num_kept == 0
    assert (x | ~x).num_kept == 25


def test_algebra_of_whole_tensors_stays_whole(table: ParamTable) -> None:
    norm = Mask(table, tuple(row.is_norm for row in table), Provenance("norm"))
    bias = Mask(table, tuple(row.is_bias for row in table), Provenance("bias"))
    both = norm & bias
    assert both.parts == (False, False, False, False, False, True)
    assert (norm | ~norm).parts == (True, False, True, True, True, True)
    assert (norm | bias).num_kept == 9
    assert both.provenance == Provenance("(norm & bias)")
    assert (~both).provenance.builder == "~(norm & bias)"
    assert norm.jaccard(bias) == 3 / 9


def test_jaccard_of_empty_masks(table: ParamTable) -> None:
    none = Mask(table, (False,) * 6)
    assert none.jaccard(none) == 1.0
    assert none.jaccard(~none) == 0.0


def test_masks_of_different_models_do_not_mix(table: ParamTable) -> None:
    mask = Mask(table, (True,) * 6)
    other = ParamTable.from_model(nn.Linear(5, 3))
    stranger = Mask(other, (True, True))
    for symbol, op in (("&", mask.__and__), ("|", mask.__or__), ("&", mask.jaccard)):
        with pytest.raises(MaskError, match=f"cannot be combined with {symbol if symbol == '&' else '.'}"):
            op(stranger)  # type: ignore[operator]
    assert mask != stranger
    assert mask != "mask"


def test_canonical_form(table: ParamTable) -> None:
    def dense(row: Any, value: bool) -> Tensor:
        return torch.full(row.shape, value)

    for value in (True, False):
        mask = Mask(table, tuple(dense(row, value) for row in table))
        assert mask.parts == (value, False, *(value,) * 4)
        assert mask == Mask(table, (value,) * 6)
    # Of a tensor without entries there is one thing to say, whichever way it is said.
    ways: tuple[bool | Tensor, ...] = (True, False, torch.ones(0, 2, dtype=torch.bool))
    masks = [Mask(table, (True, way, *(True,) * 4)) for way in ways]
    assert len({mask.digest() for mask in masks}) == 1
    assert {mask.counts for mask in masks} == {(1, 0, 15, 3, 3, 3)}
    assert (~masks[0]).num_tensors == 0
    assert ~~masks[0] == masks[0]


def test_a_mask_does_not_change_with_the_tensor_it_was_made_of(table: ParamTable) -> None:
    part = torch.eye(3, 5, dtype=torch.bool)
    mask = Mask(table, (False, False, part, *(False,) * 3))
    digest = mask.digest()
    part[:] = True
    assert mask.num_kept == 3
    assert int(mask.dense()[2].sum()) == 3
    assert mask.digest() == digest


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((True,) * 5, "5 parts for 6 tensors"),
        (
            (torch.ones(3), *(True,) * 5),
            r"scale must be a bool tensor of shape \(\), got torch.float32 of shape \(3,\)",
        ),
        ((torch.tensor(1.0), *(True,) * 5), r"scale must be a bool tensor of shape \(\), got torch.float32"),
        ((torch.tensor([True]), *(True,) * 5), r"scale must be a bool tensor of shape \(\), got torch.bool"),
        ((1, *(True,) * 5), r"scale must be a bool or a bool tensor, got int"),
        ((None, *(True,) * 5), r"got NoneType"),
    ],
)
def test_parts_that_do_not_fit(table: ParamTable, parts: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        Mask(table, parts)


def test_counts_by_layer(table: ParamTable) -> None:
    flat = np.zeros(25, dtype=bool)
    flat[[0, 4, 14, 15, 18, 19, 24]] = True
    mask = mask_of(table, flat, provenance=Provenance("mine"))
    # Coordinates as named_parameters lists them: scale, empty, fc.weight, fc.bias, norm.weight, norm.bias.
    assert [(layer.row.name, layer.kept) for layer in mask.per_layer()] == [
        ("scale", 1),
        ("empty", 0),
        ("fc.weight", 3),
        ("fc.bias", 1),
        ("norm.weight", 1),
        ("norm.bias", 1),
    ]
    assert [layer.density for layer in mask.per_layer()] == [1.0, 0.0, 3 / 15, 1 / 3, 1 / 3, 1 / 3]
    assert mask.num_tensors == 5
    assert mask.norm_share == 2 / 7
    assert repr(mask) == "Mask(mine: 7 of 25 coordinates, density 28.0000%, 5 of 6 tensors)"
    assert math.isnan(Mask(table, (False,) * 6).norm_share)


def test_of_rows(table: ParamTable) -> None:
    mask = Mask.of_rows(table, [0, 4], Provenance("mine", seed=3))
    assert mask.parts == (True, False, False, False, True, False)
    assert mask.provenance == Provenance("mine", seed=3)


# -- digest ---------------------------------------------------------------------------------------------------


def test_digests_are_equal_iff_the_coordinates_are() -> None:
    table = ParamTable.from_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False)))
    digests = {
        mask_of(table, np.array(bits)).digest(): bits for bits in itertools.product([False, True], repeat=table.numel)
    }
    assert len(digests) == 2**8
    for digest, bits in digests.items():
        again = mask_of(table, np.array(bits), provenance=Provenance("another"))
        assert again.digest() == digest
        assert hash(again) == hash(mask_of(table, np.array(bits)))


def test_digest_does_not_depend_on_the_layout_of_a_part() -> None:
    table = ParamTable.from_model(nn.Conv2d(2, 3, 2, bias=False))
    part = torch.rand(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    layouts = [
        part,
        part.to(memory_format=torch.channels_last),
        part.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ]
    assert len({p.stride() for p in layouts}) == 3
    assert len({Mask(table, (p,)).digest() for p in layouts}) == 1


def test_digest_names_the_model() -> None:
    a = ParamTable.from_model(nn.ModuleDict({"a": nn.Linear(2, 2)}))
    b = ParamTable.from_model(nn.ModuleDict({"b": nn.Linear(2, 2)}))
    assert Mask(a, (True, False)) != Mask(b, (True, False))


def test_digest_by_hand(table: ParamTable) -> None:
    """What a mask's digest is made of may not change: files and records of runs state it."""
    flat = np.zeros(25, dtype=bool)
    flat[[0, 3, 14, 15, 16, 24]] = True
    mask = mask_of(table, flat)
    rows = json.dumps([[row.name, list(row.shape)] for row in table])
    states = bytes([1, 0, 2, 2, 0, 2])
    partial = [*flat[1:16], *flat[16:19], *flat[22:25]]
    packed = int("".join(str(int(bit)) for bit in partial).ljust(24, "0"), 2).to_bytes(3, "big")
    table_digest = hashlib.sha256(rows.encode()).hexdigest()
    assert mask.digest() == hashlib.sha256(table_digest.encode() + states + packed).hexdigest()


# -- files and checkpoints --------------------------------------------------------------------------------------

PROVENANCE = Provenance(
    "parameters",
    {"role": ("weight", "bias"), "empty": (), "x": 0.1, "n": 3, "on": True, "none": None, "text": "größer"},
    seed=5,
    model_digest="ab" * 32,
    built_at="epoch 3",
    kind="natural",
)


@pytest.fixture
def mask(table: ParamTable) -> Mask:
    return mask_of(table, random_flats(table, 3)[0], provenance=PROVENANCE)


def assert_same(loaded: Mask, mask: Mask) -> None:
    assert loaded == mask
    assert (flat_of(loaded) == flat_of(mask)).all()
    assert loaded.provenance == mask.provenance
    assert loaded.table == mask.table
    assert loaded.counts == mask.counts


@pytest.mark.parametrize("seed", range(4))
def test_save_and_load(table: ParamTable, tmp_path: Path, seed: int) -> None:
    frozen = ParamTable(table.rows, frozen_numel=77)
    mask = mask_of(frozen, random_flats(table, seed)[0], provenance=PROVENANCE)
    mask.save(tmp_path / "m.npz")
    assert_same(Mask.load(tmp_path / "m.npz"), mask)
    assert_same(Mask.load(str(tmp_path / "m.npz"), table), mask)
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]


def test_save_and_load_keeps_aliases_and_whole_masks(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    table = ParamTable.from_model(model)
    for keep in (True, False):
        mask = Mask(table, (keep,) * 3)
        mask.save(tmp_path / "m.npz")
        assert_same(Mask.load(tmp_path / "m.npz"), mask)
        assert Mask.load(tmp_path / "m.npz").table.rows[0].aliases == ("1.weight",)


def test_a_built_mask_survives_with_all_its_provenance(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    mask = build_mask("parameters", MaskContext(model, seed=4), options={"role": ("bias", "norm_bias")})
    mask.save(tmp_path / "m.npz")
    assert_same(Mask.load(tmp_path / "m.npz"), mask)


def test_the_file_is_packed_and_has_no_pickle(mask: Mask, tmp_path: Path) -> None:
    mask.save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["bits", "meta", "states"]
        assert all(file[key].dtype == np.uint8 for key in file.files)
        some = sum(row.numel for row, part in zip(mask.table, mask.parts, strict=True) if isinstance(part, Tensor))
        assert file["bits"].size == -(-some // 8)


def test_a_failed_save_leaves_the_old_file(mask: Mask, tmp_path: Path) -> None:
    mask.save(tmp_path / "m.npz")
    with pytest.raises(TypeError):
        Mask(mask.table, mask.parts, Provenance("x", {"a": object()})).save(tmp_path / "m.npz")
    assert_same(Mask.load(tmp_path / "m.npz"), mask)


def refused(path: Path, table: ParamTable | None = None) -> str:
    """The one line that loading this file is refused with."""
    with pytest.raises(MaskFileError) as info:
        Mask.load(path, table)
    message = str(info.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_truncated_files(mask: Mask, tmp_path: Path) -> None:
    mask.save(tmp_path / "m.npz")
    data = (tmp_path / "m.npz").read_bytes()
    lengths = [*range(0, len(data) - 1, 37), 1, 2, 3, 4, 5, len(data) - 22, len(data) - 2, len(data) - 1]
    for length in lengths:
        (tmp_path / "t.npz").write_bytes(data[:length])
        refused(tmp_path / "t.npz")


def test_a_flipped_byte_never_gives_another_mask(mask: Mask, tmp_path: Path) -> None:
    mask.save(tmp_path / "m.npz")
    data = bytearray((tmp_path / "m.npz").read_bytes())
    path = tmp_path / "f.npz"
    refusals: list[str] = []
    for i in range(len(data)):
        flip = 0xFF if i % 2 else 0x01
        data[i] ^= flip
        path.write_bytes(data)
        data[i] ^= flip
        try:
            loaded = Mask.load(path)
        except MaskFileError as error:
            refusals.append(str(error))
        else:  # times and attributes of the archive's entries carry nothing
            assert_same(loaded, mask)
    assert len(refusals) > 0.7 * len(data)
    assert not any("\n" in message for message in refusals)


def test_foreign_files(mask: Mask, tmp_path: Path) -> None:
    path = tmp_path / "foreign"

    def written(content: bytes) -> str:
        path.write_bytes(content)
        return refused(path)

    def npz(**arrays: Any) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    state = {key: value.numpy() for key, value in mask.state_dict().items()}
    assert "not a mask file" in written(b"")
    assert "not a mask file" in written(b"no mask\n" * 50)
    assert "not a mask file" in written(pickle.dumps({"meta": 1}))
    assert "not a mask file" in written(npz(a=np.arange(3)))
    assert "not a mask file" in written(npz(**{**state, "meta": np.array(["text"])}))
    assert "not a mask file" in written(npz(**{**state, "meta": np.array([{}], dtype=object)}))
    assert "not the state of a mask" in written(npz(**{**state, "meta": np.zeros(3)}))
    assert "not the state of a mask" in written(npz(**{**state, "meta": np.frombuffer(b"[1]", np.uint8)}))
    assert "not the state of a mask" in written(npz(**{**state, "bits": np.zeros(3)}))
    buffer = io.BytesIO()
    np.save(buffer, state["bits"])
    assert "not a mask file" in written(buffer.getvalue())
    torch.save(mask.state_dict(), path)
    assert "not a mask file" in refused(path)
    assert "No such file" in refused(tmp_path / "missing.npz")
    assert "directory" in refused(tmp_path)


class Executes:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "executed")


def test_loading_executes_nothing(mask: Mask, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / "a").write_bytes(pickle.dumps(Executes(target)))
    state: dict[str, Any] = {key: value.numpy() for key, value in mask.state_dict().items()}
    np.savez(tmp_path / "b.npz", **{**state, "meta": np.array([Executes(target)], dtype=object)})
    refused(tmp_path / "a")
    refused(tmp_path / "b.npz")
    assert not target.exists()
    np.load(tmp_path / "b.npz", allow_pickle=True)["meta"]
    assert target.exists()  # it would have


def test_messages_of_several_lines_become_one(mask: Mask, tmp_path: Path) -> None:
    state: dict[str, Any] = {key: value.numpy() for key, value in mask.state_dict().items()}
    wide = np.zeros(1, dtype=[(f"a_long_name_of_a_field_{i}", "u1") for i in range(500)])
    np.savez(tmp_path / "m.npz", **{**state, "meta": wide})
    with np.load(tmp_path / "m.npz") as file, pytest.raises(ValueError, match="\n"):
        file["meta"]
    assert "Header info length" in refused(tmp_path / "m.npz")


def test_a_mask_of_another_model(mask: Mask, tmp_path: Path) -> None:
    mask.save(tmp_path / "m.npz")
    with pytest.raises(MaskError, match=r"m\.npz holds a mask of another model: parameter weight") as info:
        Mask.load(tmp_path / "m.npz", ParamTable.from_model(nn.Linear(5, 3)))
    assert "\n" not in str(info.value)


def test_state_dict_survives_a_weights_only_checkpoint(mask: Mask, tmp_path: Path) -> None:
    torch.save({"mask": mask.state_dict()}, tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert_same(Mask.from_state_dict(state["mask"]), mask)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_state_dict_from_a_gpu_and_to(mask: Mask) -> None:
    assert_same(Mask.from_state_dict({k: v.cuda() for k, v in mask.state_dict().items()}), mask)
    moved = mask.to("cuda")
    assert all(part.is_cuda for part in moved.parts if isinstance(part, Tensor))
    assert moved == mask
    assert (moved & mask) == (mask & moved) == mask
    assert moved.jaccard(mask) == 1.0
    assert all(part.is_cuda for part in mask.dense("cuda"))


def test_to_keeps_everything(mask: Mask) -> None:
    assert_same(mask.to("cpu"), mask)
    assert mask.to("cpu").table is mask.table


def changed_meta(state: dict[str, Tensor], change: Any) -> dict[str, Tensor]:
    meta = json.loads(state["meta"].numpy().tobytes())
    change(meta)
    return {**state, "meta": torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)}


def test_a_damaged_state_is_refused(mask: Mask) -> None:
    state = mask.state_dict()

    def wrong(state: Any, message: str) -> None:
        with pytest.raises(MaskFileError, match=message) as info:
            Mask.from_state_dict(state)
        assert "\n" not in str(info.value)

    for i in range(state["bits"].numel()):
        flipped = state["bits"].clone()
        flipped[i] ^= 0x80
        wrong({**state, "bits": flipped}, "damaged: its content has digest [0-9a-f]{12}, it states [0-9a-f]{12}")
    states = state["states"].clone()
    states[0] = 1 - states[0]
    wrong({**state, "states": states}, "damaged")
    wrong({**state, "states": states[:-1]}, "not the state of a mask")
    wrong({**state, "bits": state["bits"][:-1]}, "damaged|not the state")
    wrong({"meta": state["meta"]}, "not the state of a mask .KeyError")
    wrong({key: value.numpy() for key, value in state.items()}, "not the state of a mask")
    wrong(changed_meta(state, lambda m: m.update(format="sam-masks/mask/2")), "this version reads 'sam-masks/mask/1'")
    wrong(changed_meta(state, lambda m: m.pop("provenance")), "not the state")
    wrong(changed_meta(state, lambda m: m["provenance"].update(x=1)), "not the state")
    wrong(changed_meta(state, lambda m: m["rows"][2].update(shape=[5, 3])), "damaged")
    wrong(changed_meta(state, lambda m: m["rows"][2].update(shape=[10**9, 10**9])), "not the state")
    wrong(changed_meta(state, lambda m: m["rows"][2].update(name="fc.w")), "damaged")
    wrong(changed_meta(state, lambda m: m.update(digest=None)), "damaged")
    wrong(changed_meta(state, lambda m: m.update(rows=None)), "not the state")
