"""Labelled images, from sklearn, torchvision, a folder or an ``.npz`` file.

Nothing here is random; :mod:`experiments.split` draws training, validation and test images.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.image_folder import read_folder
from experiments.images import Images, TensorImages
from masks.errors import InputError, unknown_name

Array = np.ndarray[Any, np.dtype[Any]]

_FORMS = {"folder": "DIR", "stream": "DIR@SIZE", "npz": "FILE"}
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

_BY_FLAG = ({"train": True}, {"train": False})
_BY_NAME = ({"split": "train"}, {"split": "test"})
_WHOLE: tuple[dict[str, Any], ...] = ({},)
# Our name: torchvision's class, the arguments of its parts (training, test), whether channels come first.
TORCHVISION: dict[str, tuple[str, tuple[dict[str, Any], ...], bool]] = {
    "cifar10": ("CIFAR10", _BY_FLAG, False),
    "cifar100": ("CIFAR100", _BY_FLAG, False),
    "fashion_mnist": ("FashionMNIST", _BY_FLAG, False),
    "kmnist": ("KMNIST", _BY_FLAG, False),
    "mnist": ("MNIST", _BY_FLAG, False),
    "semeion": ("SEMEION", _WHOLE, False),
    "svhn": ("SVHN", _BY_NAME, True),
    "usps": ("USPS", _BY_FLAG, False),
}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images before any draw, noise or standardisation.

    The position of an image in ``images`` is its id. Images of the data set's own test split, where it has one,
    come last. Error messages call the two parts x_train, y_train and x_test, y_test, as an ``.npz`` does.

    Attributes:
        name: the spec that it was loaded from.
        images: N x C x H x W, C from 1 to 4; uint8 sources are scaled to [0, 1].
        y: int64, N; classes are 0 to ``num_classes - 1`` and each has an image before the own test split.
        num_own_test: how many of the last images are the own test split; 0 for none.
        class_names: in label order, or empty.
        num_classes: number of classes.
        digest: hex SHA-256 of ``num_own_test``, the shape and the contents of ``images``, and ``y``.

    Raises:
        InputError: images and labels do not fit each other, a value is not finite, a class lacks images, ...
    """

    name: str
    images: Images
    y: Tensor
    num_own_test: int = 0
    class_names: tuple[str, ...] = ()
    num_classes: int = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        shape, y = self.images.shape, self.y
        if y.dtype != torch.int64 or y.shape != shape[:1]:
            raise InputError(
                f"{self.name}: labels must be int64, one for each of the {shape[0]} images, "
                f"found {y.dtype} of shape {tuple(y.shape)}"
            )
        if not all(shape) or not 0 <= self.num_own_test < shape[0]:
            raise InputError(
                f"{self.name}: no training images ({shape[0]} images of shape {shape[1:]}, "
                f"{self.num_own_test} of them in the test split)"
            )
        self._check_values()
        object.__setattr__(self, "num_classes", int(y.max()) + 1)
        if self.class_names and len(self.class_names) != self.num_classes:
            raise InputError(f"{self.name}: {len(self.class_names)} class names for {self.num_classes} classes")
        digest = hashlib.sha256(f"{self.num_own_test} {shape}".encode())
        digest.update(self.images.content())
        digest.update(y.numpy().data)
        object.__setattr__(self, "digest", digest.hexdigest())

    @property
    def num_train(self) -> int:
        """Number of images before the own test split: all of them where there is none."""
        return len(self.y) - self.num_own_test

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.images.shape[1:]

    @property
    def x(self) -> Tensor:
        """All images, N x C x H x W, in memory."""
        return self.images.read(torch.arange(len(self.y)))

    def first(self, n: int) -> Tensor:
        """The first n images, or all."""
        return self.images.read(torch.arange(min(n, len(self.y))))

    def _check_values(self) -> None:
        low, high = self.images.ranges()
        bad = (~(low.isfinite() & high.isfinite()).all(1)).nonzero().flatten().tolist()
        if bad:
            part, i = ("x_train", bad[0]) if bad[0] < self.num_train else ("x_test", bad[0] - self.num_train)
            raise InputError(
                f"{self.name}: {len(bad)} of {len(self.y)} images hold NaN or infinite float32 values, "
                f"the first is image {i} of {part}; repair or drop them"
            )
        train, test = self.y[: self.num_train], self.y[self.num_train :]
        if int(self.y.min()) < 0:
            part = "y_train" if int(train.min()) < 0 else "y_test"
            raise InputError(f"{self.name}: {part} holds label {int(self.y.min())}; classes are numbered from 0")
        top = int(train.max())
        if top >= len(train):  # more classes than images; also keeps bincount small
            raise InputError(
                f"{self.name}: y_train holds label {top}, but has only {len(train)} images; "
                "number the classes 0, 1, 2, ... without gaps"
            )
        missing = (torch.bincount(train) == 0).nonzero().flatten().tolist()
        if missing:
            raise InputError(
                f"{self.name}: y_train holds labels up to {top}, but none of its {len(train)} images has label "
                f"{missing[0]} ({len(missing)} such classes); number the classes 0, 1, 2, ... without gaps"
            )
        if len(test) and int(test.max()) > top:
            raise InputError(
                f"{self.name}: y_test holds label {int(test.max())}, but the classes of y_train are 0 to {top}"
            )

    @classmethod
    def from_arrays(cls, name: str, parts: Sequence[tuple[Array, Array]], class_names: Sequence[str] = ()) -> ImageSet:
        """Make a data set from numpy arrays.

        Args:
            name: the spec, for messages and records.
            parts: ``(x_train, y_train)`` and, if there is an own test split, ``(x_test, y_test)``. Images are
                N x H x W or N x H x W x C; uint8 is divided by 255, floats are taken as they are. Labels are
                integers, N.
            class_names: in label order, or empty.

        Raises:
            InputError: wrong types, shapes or values; the line names the array and what was found.
        """
        images, labels = [], []
        for (x_key, y_key), (x, y) in zip((NPZ_KEYS[:2], NPZ_KEYS[2:]), parts, strict=False):
            images.append(_as_images(f"{name}: {x_key}", x))
            labels.append(_as_labels(f"{name}: {y_key}", y))
            if len(x) != len(y):
                raise InputError(f"{name}: {x_key} has {len(x)} images, but {y_key} has {len(y)} labels")
            if images[-1].shape[1:] != images[0].shape[1:] or images[-1].dtype != images[0].dtype:
                raise InputError(
                    f"{name}: x_train and x_test differ: {parts[0][0].dtype} of shape {parts[0][0].shape} "
                    f"and {x.dtype} of shape {x.shape}; they must agree in type and in all but the first number"
                )
        counts = [len(x) for x in images]
        pixels = torch.empty((sum(counts), *images[0].shape[1:]), dtype=torch.float32)
        for out, source in zip(torch.split(pixels, counts), images, strict=True):
            out.copy_(source)
            if source.dtype == torch.uint8:
                out.div_(255)
        return cls(name, TensorImages(pixels), torch.cat(labels), sum(counts[1:]), tuple(class_names))


def _as_images(where: str, x: Array) -> Tensor:
    """N x C x H x W, uint8 or float32."""
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise InputError(f"{where} is {x.dtype}; images must be uint8 (0 to 255) or float")
    if x.ndim not in (3, 4):
        raise InputError(f"{where} has shape {x.shape}; images must be N x H x W or N x H x W x C")
    if x.size == 0:
        raise InputError(f"{where} is empty, shape {x.shape}")
    if x.ndim == 3:
        x = x[..., None]
    if not 1 <= x.shape[3] <= 4:
        raise InputError(
            f"{where} has shape {x.shape}, that is {x.shape[3]} channels; 1 to 4 are possible, and channels come "
            "last (N x H x W x C)"
        )
    if x.dtype != np.uint8:
        with np.errstate(over="ignore"):  # too large becomes infinite, which ImageSet refuses
            x = x.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)


def _as_labels(where: str, y: Array) -> Tensor:
    if y.dtype.kind not in "iu":
        raise InputError(f"{where} is {y.dtype}; labels must be integers")
    if y.ndim != 1:
        raise InputError(f"{where} has shape {y.shape}; labels must be N, one class number per image")
    return torch.from_numpy(y.astype(np.int64))


def reason(error: BaseException) -> str:
    """The type and the message of another library's error, on one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def load_data(spec: str, *, cache_dir: str | os.PathLike[str] | None = None, download: bool = True) -> ImageSet:
    """Load a data set.

    Args:
        spec: one of

            - ``digits``: the 1797 grey 8x8 images inside scikit-learn, divided by 16; no own test split;
            - a key of :data:`TORCHVISION`, such as ``cifar10``; ``CIFAR10`` and ``FashionMNIST`` also work;
            - ``folder:DIR`` with ``DIR/train/CLASS/*`` and ``DIR/test/CLASS/*`` (or ``val``), or ``DIR/CLASS/*``, or
              the files of Tiny ImageNet, see :func:`experiments.image_folder.read_folder`; ``folder:DIR@64`` cuts the
              images square and scales them to 64x64 pixels;
            - ``stream:DIR@224`` with the same layouts, for data sets larger than memory: images stay in their files,
              are decoded when they are needed and become 224x224 pixels, see :class:`experiments.stream.FileImages`.
              The first time, all files are read once, for the digest of their contents, which is kept in ``cache_dir``
              (:func:`experiments.stream.scan`); an image that cannot be decoded is an error when it is needed;
            - ``npz:FILE`` with ``x_train``, ``y_train``, ``x_test``, ``y_test``, see
              :meth:`ImageSet.from_arrays`. Never unpickles.
        cache_dir: where torchvision keeps its files, a folder per data set, and digests are kept; by default
            ``$XDG_CACHE_HOME/sam-masks`` or ``~/.cache/sam-masks``.
        download: let torchvision fetch files that are missing.

    Raises:
        InputError: an unknown name, missing or damaged files, no network, or content that is not usable.
    """
    kind, colon, path = spec.partition(":")
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sam-masks"
    if colon and kind in _FORMS:
        if not path:
            raise InputError(f"data {spec!r} lacks the path: {kind}:{_FORMS[kind]}")
        if kind == "npz":
            return _load_npz(spec, Path(path).expanduser())
        folder, size = _folder_and_size(spec, path)
        if kind == "folder":
            return ImageSet.from_arrays(spec, *read_folder(spec, folder, size))
        if size is None:
            raise InputError(f"data {spec!r} lacks the side of the images in pixels: {spec}@224")
        from experiments.stream import stream_folder  # imports torchvision, which takes a second

        images, labels, num_own_test, classes = stream_folder(spec, folder, size, Path(cache_dir) / "stream")
        return ImageSet(spec, images, labels, num_own_test, tuple(classes))
    if spec == "digits":
        return _load_digits()
    names = {name.replace("_", ""): name for name in TORCHVISION}
    name = names.get(spec.lower().replace("_", "").replace("-", ""))
    if name is None and spec and Path(spec).expanduser().is_dir():
        raise InputError(f"data {spec!r} is a folder; give folder:{spec}")
    if name is None:
        raise InputError(unknown_name("data set", spec, ["digits", *TORCHVISION, *map(":".join, _FORMS.items())]))
    return _load_torchvision(name, Path(cache_dir) / name, download)


def _folder_and_size(spec: str, path: str) -> tuple[Path, int | None]:
    """A folder, and the side behind its last @, unless that belongs to the name of a folder that exists."""
    folder, at, size = path.rpartition("@")
    if not at or not (size.isascii() and size.isdigit()) or Path(path).expanduser().exists():
        return Path(path).expanduser(), None
    if not 1 <= int(size) <= 4096:
        raise InputError(f"{spec}: the side after @ must be from 1 to 4096 pixels, found {size}")
    return Path(folder).expanduser(), int(size)


def _load_digits() -> ImageSet:
    from sklearn.datasets import load_digits  # takes most of a second, and only this data set needs it

    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)
    return ImageSet.from_arrays("digits", [(images, bunch.target)], [str(t) for t in bunch.target_names])


def _load_torchvision(name: str, root: Path, download: bool) -> ImageSet:
    from torchvision import datasets  # takes a second, and most runs do not need it

    class_name, splits, channels_first = TORCHVISION[name]
    try:
        sets = [getattr(datasets, class_name)(root, download=download, **split) for split in splits]
    except Exception as error:  # URLError, RuntimeError, TarError, EOFError, ...: whatever a download breaks with
        raise InputError(
            f"cannot load data set {name!r}: torchvision.datasets.{class_name} found no complete files in {root} "
            f"and {'the download failed' if download else 'downloading is off'} ({reason(error)}); put the files "
            f"there as torchvision stores them, or use digits (always there), npz:FILE or folder:DIR"
        ) from error
    parts = []
    for part in sets:
        x = np.asarray(part.data)
        y = np.asarray(part.targets if hasattr(part, "targets") else part.labels)
        parts.append((x.transpose(0, 2, 3, 1) if channels_first else x, y))
    return ImageSet.from_arrays(name, parts, getattr(sets[0], "classes", ()))


def _load_npz(spec: str, path: Path) -> ImageSet:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise InputError(f"{spec} holds a single array; it must be an .npz with {', '.join(NPZ_KEYS)}")
        with file:
            missing = [key for key in NPZ_KEYS if key not in file.files]
            if missing:
                raise InputError(
                    f"{spec} lacks {', '.join(missing)}; it holds {', '.join(file.files) or 'nothing'} and needs "
                    f"{', '.join(NPZ_KEYS)}"
                )
            x_train, y_train, x_test, y_test = (file[key] for key in NPZ_KEYS)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {spec}: {error.strerror or error}") from None
    except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{spec} is not an .npz of plain arrays, or is truncated ({reason(error)})") from None
    return ImageSet.from_arrays(spec, [(x_train, y_train), (x_test, y_test)])
