import hashlib
import struct
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments.data import NPZ_KEYS, TORCHVISION, ImageSet, load_data
from experiments.images import TensorImages
from masks.errors import InputError

RNG = np.random.default_rng(0)


def arrays(shape: tuple[int, ...] = (5, 4), dtype: type = np.uint8) -> dict[str, np.ndarray]:
    """12 training and 6 test images of 3 classes."""
    x = RNG.integers(0, 256, (18, *shape)).astype(dtype)
    y = np.arange(18) % 3
    return {"x_train": x[:12], "y_train": y[:12], "x_test": x[12:], "y_test": y[12:]}


def save(path: Path, content: dict[str, np.ndarray]) -> str:
    np.savez(path, **content)  # type: ignore[arg-type]
    return f"npz:{path}"


# -- digits -------------------------------------------------------------------------------------------------


def test_digits_are_those_of_sklearn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = load_data("digits")
    assert data.image_shape == (1, 8, 8)
    assert (data.num_train, data.num_own_test, data.num_classes) == (1797, 0, 10)
    assert data.class_names == tuple("0123456789")
    assert torch.equal(data.x[:, 0].double(), torch.tensor(bunch.images) / 16)
    assert data.y.tolist() == bunch.target.tolist()
    content = (bunch.data / 16).astype("<f4").tobytes() + bunch.target.astype("<i8").tobytes()
    assert data.digest == hashlib.sha256(b"0 (1797, 1, 8, 8)" + content).hexdigest()


# -- npz ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3), (1, 1, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64, ">f4"])
def test_npz_round_trip(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    content = arrays(shape, dtype)
    data = load_data(save(tmp_path / "a.npz", content))
    assert data.x.dtype == torch.float32
    assert (data.num_train, data.num_own_test, data.num_classes) == (12, 6, 3)
    for key, x in (("x_train", data.x[:12]), ("x_test", data.x[12:])):
        found = x.permute(0, 2, 3, 1).reshape(content[key].shape).numpy()
        scale = np.float32(255 if dtype is np.uint8 else 1)
        np.testing.assert_array_equal(found, content[key].astype(np.float32) / scale)
    assert data.y.tolist() == [*content["y_train"], *content["y_test"]]


def test_the_digest_follows_content_and_not_its_form(tmp_path: Path) -> None:
    content = arrays()
    digest = load_data(save(tmp_path / "a.npz", content)).digest
    same = {key: value / np.float32(255) if key[0] == "x" else value.astype(np.uint8) for key, value in content.items()}
    same = {key: value[..., None] if key[0] == "x" else value for key, value in same.items()}
    assert load_data(save(tmp_path / "b.npz", same)).digest == digest
    pixel, label = content["x_test"].copy(), content["y_train"].copy()
    pixel[-1, -1, -1] ^= 1
    label[[0, 1]] = label[[1, 0]]
    moved = {key: np.concatenate([content[f"{key[:2]}train"], content[f"{key[:2]}test"]]) for key in NPZ_KEYS}
    moved = {key: value[:11] if "train" in key else value[11:] for key, value in moved.items()}
    others = [content | {"x_test": pixel}, content | {"y_train": label}, moved]
    digests = {load_data(save(tmp_path / "c.npz", other)).digest for other in others}
    assert len(digests | {digest}) == 4


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "images of integers": ({"x_train": np.zeros((12, 5, 4), int)}, "x_train is int64; images must be uint8"),
    "booleans": ({"x_test": np.zeros((6, 5, 4), bool)}, "x_test is bool"),
    "flat images": ({"x_train": np.zeros((12, 20))}, r"x_train has shape \(12, 20\); images must be N x H x W"),
    "channels first": ({"x_train": np.zeros((12, 3, 32, 32))}, r"\(12, 3, 32, 32\), that is 32 channels; 1 to 4"),
    "no channel": ({"x_train": np.zeros((12, 5, 4, 0))}, r"x_train is empty, shape \(12, 5, 4, 0\)"),
    "no images": ({"x_train": np.zeros((0, 5, 4)), "y_train": np.zeros(0, int)}, "x_train is empty"),
    "no test images": ({"x_test": np.zeros((0, 5, 4)), "y_test": np.zeros(0, int)}, "x_test is empty"),
    "too few labels": ({"y_train": np.arange(11) % 3}, "x_train has 12 images, but y_train has 11 labels"),
    "too many test labels": ({"y_test": np.arange(9) % 3}, "x_test has 6 images, but y_test has 9 labels"),
    "float labels": ({"y_train": np.arange(12) % 3.0}, "y_train is float64; labels must be integers"),
    "one-hot labels": ({"y_test": np.eye(6, 3, dtype=int)}, r"y_test has shape \(6, 3\); labels must be N"),
    "negative label": ({"y_train": np.arange(12) % 3 - 1}, "y_train holds label -1"),
    "negative test label": ({"y_test": np.arange(6) % 3 - 2}, "y_test holds label -2"),
    "unknown test label": ({"y_test": np.arange(6)}, "y_test holds label 5, but the classes of y_train are 0 to 2"),
    "missing class": ({"y_train": np.arange(12) % 3 * 2}, "labels up to 4, but none of its 12 images has label 1"),
    "labels from 1": ({"y_train": np.arange(12) % 3 + 1}, "labels up to 3, but none .* label 0"),
    "huge label": ({"y_train": np.arange(12) * 10**15}, "y_train holds label 11000000000000000, but has only 12"),
    "other size": ({"x_test": np.zeros((6, 5, 5), np.uint8)}, r"shape \(12, 5, 4\) and uint8 of shape \(6, 5, 5\)"),
    "other channels": ({"x_test": np.zeros((6, 5, 4, 3), np.uint8)}, r"and uint8 of shape \(6, 5, 4, 3\)"),
    "uint8 and float": ({"x_test": np.zeros((6, 5, 4))}, "x_train and x_test differ: uint8 .* float64"),
    "beyond float32": (
        {"x_train": np.full((12, 5, 4), 1e200), "x_test": np.zeros((6, 5, 4))},
        "12 of 18 images hold NaN or infinite float32 values, the first is image 0 of x_train",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_npz_content_is_one_line_with_file_and_numbers(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    spec = save(tmp_path / "bad.npz", arrays() | change)
    with pytest.raises(InputError, match=message) as error:
        load_data(spec)
    assert str(error.value).startswith(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_image_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    content = arrays(dtype=np.float32)
    content["x_test"][4, 2, 3] = value
    with pytest.raises(InputError, match=r"1 of 18 images hold .* the first is image 4 of x_test"):
        load_data(save(tmp_path / "a.npz", content))


def test_npz_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(InputError, match=r"cannot read npz:.*a\.npz: No such file or directory"):
        load_data(f"npz:{path}")
    with pytest.raises(InputError, match="Is a directory"):
        load_data(f"npz:{tmp_path}")
    spec = save(path, {"x_train": arrays()["x_train"], "labels": arrays()["y_train"]})
    with pytest.raises(InputError, match="lacks y_train, x_test, y_test; it holds x_train, labels and needs x_train"):
        load_data(spec)
    save(path, arrays())
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"a\.npz is not an \.npz of plain arrays, or is truncated"):
            load_data(spec)
    middle = len(whole) // 4  # inside the first array
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(InputError, match=r"is not an \.npz of plain arrays.*Bad CRC-32"):
        load_data(spec)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match="holds a single array"):
        load_data(f"npz:{tmp_path / 'one.npy'}")


def test_npz_never_unpickles(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    spec = save(tmp_path / "a.npz", arrays() | {"y_test": np.array([Bomb()] * 6)})
    with pytest.raises(InputError, match=r"not an \.npz of plain arrays.*allow_pickle"):
        load_data(spec)
    assert not (tmp_path / "exploded").exists()


# -- the type -----------------------------------------------------------------------------------------------


def test_an_image_set_cannot_be_made_of_parts_that_do_not_fit() -> None:
    x, y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    assert ImageSet("ok", TensorImages(x), y, 2, ("a", "b")).num_train == 2
    for message, args in {
        "float32 N x C": (x.double(), y),
        "C from 1 to 4": (x.repeat(1, 5, 1, 1), y),
        "int64, one for each of the 4 images": (x, y[:3]),
        "int64, one for each": (x, y.int()),
        "no training images": (x, y, 4),
        "no training images .4 images of .*, -1": (x, y, -1),
        "no training images .0 images": (x[:0], y[:0]),
        "1 class names for 2 classes": (x, y, 0, ("a",)),
    }.items():
        with pytest.raises(InputError, match=message):
            ImageSet("bad", TensorImages(args[0]), *args[1:])  # type: ignore[arg-type]


# -- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar11", r"unknown data set 'cifar11'; did you mean cifar10 or cifar100"),
        ("zip:file", "unknown data set 'zip:file'; known: cifar10, .*npz:FILE"),
        ("", "unknown data set ''; known: cifar10, .*digits, .*npz:FILE"),
        ("npz:", "lacks the path: npz:FILE"),
        ("folder:", "lacks the path: folder:DIR"),
        (".", r"data '\.' is a folder; give folder:\.$"),
    ],
)
def test_unknown_names(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(spec)


# -- torchvision --------------------------------------------------------------------------------------------


def test_every_row_of_the_table_is_a_data_set_of_torchvision() -> None:
    import inspect

    from torchvision import datasets

    for class_name, splits, _ in TORCHVISION.values():
        parameters = inspect.signature(getattr(datasets, class_name)).parameters
        assert {"root", "download", *(key for split in splits for key in split)} <= set(parameters)


def write_mnist(root: Path) -> dict[str, np.ndarray]:
    """The raw files of MNIST with 12 and 6 random images."""
    content = arrays((28, 28))
    root.mkdir(parents=True)
    for prefix, part in (("train", "train"), ("t10k", "test")):
        x, y = content[f"x_{part}"], content[f"y_{part}"]
        (root / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, *x.shape) + x.tobytes())
        labels = struct.pack(">2i", 0x801, len(y)) + y.astype(np.uint8).tobytes()
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return content


@pytest.mark.parametrize("spec", ["fashion_mnist", "FashionMNIST", "fashion-mnist"])
def test_files_of_torchvision_are_found_where_they_lie(tmp_path: Path, spec: str, monkeypatch: Any) -> None:
    from torchvision import datasets

    content = write_mnist(tmp_path / "fashion_mnist" / "FashionMNIST" / "raw")
    monkeypatch.setattr(datasets.FashionMNIST, "classes", ["a", "b", "c"])
    data = load_data(spec, cache_dir=tmp_path, download=False)
    assert data.name == "fashion_mnist"
    assert (data.num_train, data.num_own_test, data.image_shape) == (12, 6, (1, 28, 28))
    np.testing.assert_array_equal((data.x[12:, 0] * 255).round().numpy(), content["x_test"])
    assert data.y.tolist() == [*content["y_train"], *content["y_test"]]


def test_channels_first_and_sets_without_own_test_split(tmp_path: Path, monkeypatch: Any) -> None:
    from torchvision import datasets

    calls = []

    def fake(root: Path, **options: Any) -> Any:
        calls.append((root, options))
        x = np.zeros((6, 3, 8, 9), np.uint8)
        x[:, 1, 2, 5] = 51
        return SimpleNamespace(data=x, labels=np.arange(6) % 2)

    monkeypatch.setattr(datasets, "SVHN", fake)
    data = load_data("svhn", cache_dir=str(tmp_path))
    assert calls == [(tmp_path / "svhn", {"download": True, "split": split}) for split in ("train", "test")]
    assert data.x.nonzero().tolist() == [[i, 1, 2, 5] for i in range(12)]
    assert data.x.max() == np.float32(0.2)
    whole = SimpleNamespace(data=np.zeros((6, 8, 8)), labels=[0, 1] * 3)
    monkeypatch.setattr(datasets, "SEMEION", lambda *args, **options: whole)
    assert load_data("semeion", cache_dir=tmp_path).num_own_test == 0


def test_missing_files_without_network_are_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    calls = []

    def no_network(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for name in ("mnist", "cifar10", "svhn"):
        for download, why in ((True, "the download failed .*no route to host"), (False, "downloading is off")):
            calls.clear()
            with pytest.raises(InputError, match=why) as error:
                load_data(name, cache_dir=tmp_path, download=download)
            assert bool(calls) == download
            message = str(error.value)
            assert "\n" not in message
            assert str(tmp_path / name) in message
            assert "use digits (always there), npz:FILE or folder:DIR" in message


def test_the_cache_is_the_users_own(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with pytest.raises(InputError, match=str(tmp_path / "xdg" / "sam-masks" / "kmnist")):
        load_data("kmnist", download=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match=str(tmp_path / "home" / ".cache" / "sam-masks" / "kmnist")):
        load_data("kmnist", download=False)
