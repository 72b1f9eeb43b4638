"""Image files in one folder per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from masks.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, np.dtype[Any]]

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


GREY = frozenset(("1", "L", "LA"))
"""Modes of grey images, as Pillow calls them."""
_LASTING = FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError


def list_folder(spec: str, root: Path) -> tuple[list[str], list[Array], list[str]]:
    """Find ``root/train/CLASS/*`` and ``root/test/CLASS/*``, or ``root/CLASS/*`` without own test split.

    ``root/val`` is taken where there is no ``root/test``, as in ImageNet; where there are both, ``val`` is not read.
    In Tiny ImageNet, whose ``test`` has no labels, ``root/val/images/*`` with the classes that
    ``root/val/val_annotations.txt`` gives them are the own test split. Classes
    are numbered in the order of their sorted names; images are sorted by path within a class and may lie in
    folders of the class folder. Files without an image's suffix, hidden files and hidden folders are passed over.

    Args:
        spec: what messages start with.
        root: the folder.

    Returns:
        Paths of all images, training first; their labels, int64, in one piece per part (training, own test split); and
        the class names.

    Raises:
        InputError: a folder or images are missing, the test split has a class that the training part lacks, or an
            annotation is not of an image that is there.
    """
    if not root.is_dir():
        raise InputError(f"{spec}: {root} {'is not a folder' if root.exists() else 'does not exist'}")
    train = root / "train"
    folders = [root]
    annotations = root / "val" / "val_annotations.txt"
    if train.is_dir() and annotations.is_file():
        folders = [train]
    elif train.is_dir() and _subfolders(train):  # a class may be called "train", but then holds no folders
        tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
        if not tests:
            raise InputError(f"{spec} has train/ but neither test/ nor val/; to go without, give folder:{train}")
        folders = [train, tests[0]]
    names = _subfolders(folders[0])
    if not names:
        raise InputError(f"{spec}: {folders[0]} has no folders; it must have one per class")
    extra = sorted(set(_subfolders(folders[-1])) - set(names))
    if extra:
        raise InputError(f"{spec}: {folders[-1]} has class {extra[0]!r}, which {folders[0]} lacks")

    paths: list[str] = []
    labels: list[Array] = []
    for folder in folders:
        counts = []
        for name in names:
            found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
            if not found and folder == folders[0]:
                raise InputError(f"{spec}: class folder {folder / name} has no images")
            paths += map(str, found)
            counts.append(len(found))
        if not sum(counts):
            raise InputError(f"{spec}: {folder} has no images")
        labels.append(np.repeat(np.arange(len(names)), counts))
    if folders == [train]:
        found, classes = _annotated(spec, annotations, names)
        paths += map(str, found)
        labels.append(classes)
    return paths, labels, names


def read_folder(spec: str, root: Path, size: int | None = None) -> tuple[list[tuple[Array, Array]], list[str]]:
    """Read all images of a folder in a layout of :func:`list_folder`.

    Grey images keep one channel if all images are grey; else all become RGB. Transparency is dropped.

    Args:
        spec: what messages start with.
        root: the folder.
        size: the largest square around the centre of each image is cut out and scaled to this side, in pixels,
            bilinearly; None to take the images as they are.

    Returns:
        The parts ``(images, labels)``, training first: uint8, N x H x W or N x H x W x 3, and int64, N. And the
        class names.

    Raises:
        InputError: as in :func:`list_folder`; or an image cannot be read, has more than 8 bits per channel, or another
            size than the first.
    """
    paths, labels, names = list_folder(spec, root)
    images = np.split(_read_images(spec, paths, size), [len(labels[0])])
    return list(zip(images, labels, strict=False)), names  # without own test split, the last piece is empty


@contextmanager
def opened(spec: str, path: Path) -> Iterator[Image]:
    """An image file, of which only the header has been read.

    Raises:
        InputError: what is done inside finds that it is damaged, gone or not to be read by this user, or it has more
            than 8 bits per channel.
        OSError: reading failed otherwise (a file system's EIO or ESTALE), and may succeed another time.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{spec}: {path} has mode {image.mode}, more than 8 bits; convert it to 8 bits")
            yield image
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNG
        # Pillow's own errors have no number.
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _LASTING):
            raise OSError(error.errno, f"{spec}: cannot read {path}: {error.strerror}") from None
        raise InputError(f"{spec}: {path} is not a readable image ({error})") from None


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _annotated(spec: str, annotations: Path, names: list[str]) -> tuple[list[Path], Array]:
    """The images of Tiny ImageNet's ``val`` and their labels; a line is a file's name, its class and four numbers."""
    numbers = {name: i for i, name in enumerate(names)}
    found: list[tuple[int, Path]] = []
    for i, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split()
        path = annotations.parent / "images" / parts[0] if parts else annotations
        if len(parts) < 2 or parts[1] not in numbers or not path.is_file():
            raise InputError(
                f"{spec}: line {i} of {annotations} must name a file in images/ and one of the {len(names)} classes, "
                f"found {line[:80]!r}"
            )
        found.append((numbers[parts[1]], path))
    if not found:
        raise InputError(f"{spec}: {annotations} names no images")
    found.sort()
    return [path for _, path in found], np.array([label for label, _ in found])


def _read_images(spec: str, paths: Sequence[str], size: int | None) -> Array:
    from PIL import Image, ImageOps

    images: list[Array] = []
    for path in paths:
        with opened(spec, Path(path)) as image:
            plain = image.convert("L" if image.mode in GREY else "RGB")
            if size is not None:
                plain = ImageOps.fit(plain, (size, size), Image.Resampling.BILINEAR)
            images.append(np.asarray(plain))
        (height, width), (height_0, width_0) = images[-1].shape[:2], images[0].shape[:2]
        if (height, width) != (height_0, width_0):
            raise InputError(
                f"{spec}: all images must have one size, but {paths[0]} is {width_0}x{height_0} and {path} is "
                f"{width}x{height} (width x height); resize them, or add @SIZE to the folder, such as {spec}@64"
            )
    if all(image.ndim == 2 for image in images):
        return np.stack(images)
    return np.stack([image if image.ndim == 3 else np.stack([image] * 3, axis=-1) for image in images])
