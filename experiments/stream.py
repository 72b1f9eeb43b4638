"""Images that stay in their files and are decoded when they are needed: data sets larger than memory.

What is read is a function of the file, the side and, for training crops, of the seed, the epoch and the image's id, so
the number of processes that decode, and where a run was interrupted, change nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from experiments.image_folder import GREY, list_folder, opened
from experiments.images import deviation
from experiments.seeds import derive_seed
from masks.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]

MOMENT_IMAGES = 1024
"""Mean and standard deviation are of at most so many training images: with N images of different brightness, which
varies by about half a deviation, the mean is off by about 1 / (2 sqrt N) = 1.6 % of a deviation."""
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Share of the area and aspect ratio of training crops (Szegedy et al., 2015, section 6)."""
_MARGIN = 256 / 224
_BATCH = 64
_PROGRESS_SECONDS = 5.0
_FORMAT = "1"
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images that are decoded whenever they are read.

    In evaluation, an image's shorter side is scaled to 256/224 of ``size``, bilinearly, and the central square is cut
    out, as in the published evaluations on ImageNet with 224 pixels (Krizhevsky et al., 2012; He et al., 2016);
    an image that is already ``size`` x ``size`` is taken as it is.

    Attributes:
        spec: what messages start with.
        paths: of all images of the data set, by id; bytes, so that a million of them are small and no process that
            reads one copies their memory.
        digest: of the contents of all files, see :func:`scan`.
        ids: of the images that are here, int64, N.
        channels: 1 or 3.
        size: side, in pixels.
        mean: float32, C; subtracted from values between 0 and 1.
        std: float32, C; what they are then divided by.
        workers: processes that decode whole batches ahead; 0 for this process, when they are asked for.
        device: where batches are put.
        memory_format: of batches.
        crop_seed: of the crops; None for evaluation.
    """

    spec: str
    paths: Array
    digest: bytes
    ids: Tensor
    channels: int
    size: int
    mean: Tensor
    std: Tensor
    workers: int = 0
    device: torch.device = _CPU
    memory_format: torch.memory_format = torch.contiguous_format
    crop_seed: int | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.ids), self.channels, self.size, self.size

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, positions: Tensor) -> Tensor:
        found = list(self.batches(torch.split(positions, _BATCH)))
        return torch.cat(found) if found else torch.zeros(0, *self.shape[1:], device=self.device)

    def batches(self, positions: Sequence[Tensor], epoch: int = 0) -> Iterator[Tensor]:
        loader = DataLoader(
            _Decoder(self),
            batch_size=None,  # an item is a whole batch: one message, and one list of pixels without a copy
            sampler=[(self.ids[batch.cpu()].numpy(), epoch) for batch in positions if len(batch)],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # else it would draw from the run's own
        )
        mean, std = (values[:, None, None].to(self.device) for values in (self.mean, self.std))
        for pixels, error in loader:
            if error is not None:
                raise error
            x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            x = x.to(torch.float32, memory_format=self.memory_format)
            yield x.div_(255).sub_(mean).div_(std)

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> FileImages:
        return replace(self, device=device, memory_format=memory_format)

    def using(self, workers: int) -> FileImages:
        return replace(self, workers=workers)

    def cropped(self, seed: int) -> FileImages:
        """The same images with a window of each, drawn anew in every epoch and scaled to ``size`` bilinearly.

        Its area is a share of the image's drawn uniformly from :data:`SCALE`, its aspect ratio is drawn log-uniformly
        from :data:`RATIO`, its place uniformly; after ten windows that do not fit, the largest central one. This is
        torchvision's RandomResizedCrop.
        """
        return replace(self, crop_seed=seed)

    def part(self, ids: Tensor, mean: Tensor, std: Tensor) -> FileImages:
        return replace(self, ids=self.ids[ids], mean=mean, std=std)

    def moments(self, ids: Tensor, seed: int) -> tuple[Tensor, Tensor, int]:
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        drawn = ids[order[:MOMENT_IMAGES].sort().values]
        counts = torch.zeros(self.channels, 256, dtype=torch.float64)
        for x in self.batches(torch.split(drawn, _BATCH)):
            pixels = x.mul_(255).round_().to(torch.int64).transpose(0, 1).flatten(1)
            counts += torch.stack([torch.bincount(channel, minlength=256) for channel in pixels])
        values = torch.arange(256, dtype=torch.float32).div_(255)
        mean = (counts @ values.double() / counts.sum(1)).float()
        # Rounded as the images will be, so that a constant channel comes out constant.
        squares = (values - mean[:, None]).double().square()
        return mean, deviation((counts * squares).sum(1).sqrt(), len(drawn) * self.size**2), len(drawn)

    def ranges(self) -> tuple[Tensor, Tensor]:
        low, high = ((value - self.mean) / self.std for value in (0, 1))
        return low.expand(len(self), -1), high.expand(len(self), -1)

    def content(self) -> bytes | memoryview:
        return self.digest


class _Decoder(Dataset[tuple[Tensor, Exception | None]]):
    """Batches of pixels, uint8, n x H x W x C, by ids and epoch; with an error that is returned and not raised, as it
    would lose its type and gain a stack trace on its way from another process."""

    def __init__(self, images: FileImages) -> None:
        self._images = images

    def __getitem__(self, index: tuple[Array, int]) -> tuple[Tensor, Exception | None]:
        ids, epoch = index
        pixels = torch.empty(len(ids), self._images.size, self._images.size, self._images.channels, dtype=torch.uint8)
        try:
            for row, i in zip(pixels.numpy(), ids.tolist(), strict=True):
                row[:] = self._decoded(i, epoch)
        except (InputError, OSError) as error:
            return torch.empty(0, dtype=torch.uint8), error
        return pixels, None

    def _decoded(self, i: int, epoch: int) -> Array:
        images = self._images
        with opened(images.spec, Path(os.fsdecode(images.paths[i]))) as image:
            plain = image.convert("L" if images.channels == 1 else "RGB")
            if images.crop_seed is not None:
                plain = _random_crop(plain, images.size, derive_seed(images.crop_seed, str(epoch), str(i)))
            elif plain.size != (images.size, images.size):
                plain = _central(plain, images.size)
            return np.asarray(plain).reshape(images.size, images.size, images.channels)


def _central(image: Image, size: int) -> Image:
    out: Image = F.center_crop(F.resize(image, [round(size * _MARGIN)]), [size, size])
    return out


def _random_crop(image: Image, size: int, seed: int) -> Image:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # and not torch.manual_seed, which seeds the GPUs, too
        window = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
    out: Image = F.resized_crop(image, *window, [size, size])
    return out


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach a run's processes, too, and it needs them until it has saved itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def stream_folder(spec: str, root: Path, size: int, cache_dir: Path) -> tuple[FileImages, Tensor, int, list[str]]:
    """The images of a folder in the layouts of :func:`experiments.image_folder.list_folder`, left where they are.

    Returns:
        The images, as they are; their labels; how many of them are the own test split; the class names.

    Raises:
        InputError: a folder or images are missing, or one is not an image of 8 bits per channel as far as its header
            says; the first damaged pixels are found when they are read.
    """
    found, labels, names = list_folder(spec, root)
    channels, digest = scan(spec, root, found, cache_dir)
    images = FileImages(
        spec,
        np.array([os.fsencode(path) for path in found]),
        digest,
        torch.arange(len(found)),
        channels,
        size,
        torch.zeros(channels),
        torch.ones(channels),
    )
    return images, torch.from_numpy(np.concatenate(labels)), sum(map(len, labels[1:])), names


def scan(spec: str, root: Path, paths: Sequence[str], cache_dir: Path) -> tuple[int, bytes]:
    """Look at every file once: its header and the digest of its contents.

    A large data set takes minutes to read, so what was found is kept in ``cache_dir`` under the names, sizes and times
    (of modification and of change) of all files. A file whose contents changed and none of these is taken for the old
    one; on the usual file systems, only a failing disk or a changed clock does that.

    Returns:
        Channels: 1 if all images are grey, else 3. And SHA-256 over the SHA-256 of each file, in the order given.

    Raises:
        InputError: a file cannot be read, or is not an image of 8 bits per channel.
    """
    known = hashlib.sha256(f"{_FORMAT} {root.resolve()}".encode(errors="surrogateescape"))
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise InputError(f"{spec}: cannot read {path}: {error.strerror or error}") from None
        known.update(f"\0{path}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}".encode(errors="surrogateescape"))
    kept = cache_dir / f"{known.hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        return int(found["channels"]), bytes.fromhex(found["digest"])
    digest, channels = hashlib.sha256(), 1
    for path in tqdm(paths, f"{spec}: first look", unit="image", delay=_PROGRESS_SECONDS, disable=None, leave=False):
        with opened(spec, Path(path)) as image:
            channels = channels if image.mode in GREY else 3
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    with suppress(OSError):  # without a cache, the next start looks again
        cache_dir.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(f"{kept.name}.{os.getpid()}")
        aside.write_text(json.dumps({"channels": channels, "digest": digest.hexdigest()}), encoding="utf-8")
        os.replace(aside, kept)
    return channels, digest.digest()
