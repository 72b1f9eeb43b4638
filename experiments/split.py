"""Training, validation and test images of one seed, with label noise and standardisation.

The rules that keep a comparison honest:

- Everything is drawn anew for each seed, from streams of its own (:func:`experiments.seeds.derive_seed`), so
  that runs of the same seed are paired whatever else differs. The test images depend on the seed and on
  ``n_test`` only, the validation images in addition on ``n_val``.
- No image that helped to choose a hyperparameter is a test image. *Tuning* seeds have no test images. Where
  the data set has an own test split, only that is tested. Where it has none, 40 % of the images, the same for
  every seed, are the *development pool*: never tested, and all that tuning seeds see. *Report* seeds draw
  their test images from the other 60 %, and train and validate on any images but those.
- All draws are stratified: each class gets its share of the pool drawn from, rounded by largest remainder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.data import ImageSet
from experiments.images import Images
from experiments.seeds import derive_seed
from masks.errors import InputError

Ids = np.ndarray[Any, np.dtype[np.int64]]

DEVELOPMENT_SHARE = 0.4


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one seed, standardised by the training images.

    Attributes:
        train_images: n_train x C x H x W.
        train_y: int64, n_train; with label noise.
        train_y_clean: the labels before noise.
        val_images: n_val x C x H x W; may be empty.
        val_y: int64, n_val; without noise.
        test_images: n_test x C x H x W; empty in a tuning split.
        test_y: int64, n_test; without noise.
        train_index: ids of the training images: positions in ``ImageSet.images``, ascending.
        val_index: ids of the validation images, ascending.
        test_index: ids of the test images, ascending; to pair results by image over seeds.
        test_is_shared: all report seeds have the same test images.
        num_classes: number of classes of the data set.
        digest: ``ImageSet.digest`` of the data set.
        mean: float32, C; what was subtracted from the images of each channel.
        std: float32, C; what they were then divided by.
        num_moments: number of training images that ``mean`` and ``std`` are of.

    Raises:
        ValueError: lengths that do not agree, or an image in two parts.
    """

    train_images: Images
    train_y: Tensor
    train_y_clean: Tensor
    val_images: Images
    val_y: Tensor
    test_images: Images
    test_y: Tensor
    train_index: Tensor
    val_index: Tensor
    test_index: Tensor
    test_is_shared: bool
    num_classes: int
    digest: str
    mean: Tensor
    std: Tensor
    num_moments: int

    def __post_init__(self) -> None:
        for part in ("train", "val", "test"):
            sizes = {len(t) for key, t in vars(self).items() if key.startswith(part + "_") and hasattr(t, "__len__")}
            if len(sizes) > 1:
                raise ValueError(f"the {part} images and labels have different lengths: {sorted(sizes)}")
        ids = torch.cat((self.train_index, self.val_index, self.test_index))
        repeated = len(ids) - len(np.unique(ids.numpy()))
        if repeated:
            raise ValueError(f"{repeated} images are in two parts of the split, or twice in one")

    @property
    def train_x(self) -> Tensor:
        """All training images, in memory."""
        return self.train_images.read(torch.arange(len(self.train_y)))

    @property
    def val_x(self) -> Tensor:
        """All validation images, in memory."""
        return self.val_images.read(torch.arange(len(self.val_y)))

    @property
    def test_x(self) -> Tensor:
        """All test images, in memory."""
        return self.test_images.read(torch.arange(len(self.test_y)))


def make_split(
    data: ImageSet,
    *,
    seed: int,
    n_train: int | None = None,
    n_val: int | None = None,
    n_test: int | None = None,
    label_noise: float = 0.0,
    tuning: bool = False,
    workers: int = 0,
) -> Split:
    """Draw the images of one seed; see the top of this file for the rules.

    Args:
        data: the data set.
        seed: the seed. A tuning and a report split of the same seed are different draws.
        n_train: training images. By default what ``n_val`` leaves of the images that a tuning split may use,
            in report splits too, so that both train on the same number.
        n_val: validation images. By default a fifth of the images that a tuning split may use, or what
            ``n_train`` leaves if that is less.
        n_test: test images of a report split. By default the whole own test split or, without one, a third
            of the data set, rounded to a multiple of the number of classes. Of an own test split, a part is
            drawn once for all seeds.
        label_noise: exactly ``round(label_noise * n_train)`` training labels are redrawn uniformly from all
            classes, so that about one in ``num_classes`` of them keeps its label. Labels noisy at a small
            value are noisy, in the same way, at a larger one. Validation and test labels are never changed.
        tuning: draw from the development pool only, without test images.
        workers: processes that decode images, where they are decoded when they are needed; changes no number.

    Returns:
        The split. Each channel has the mean of the training images subtracted and is divided by their
        standard deviation (by 1 where that is 0); for images that stay in files, those of as many of them, drawn with
        the seed, as :data:`experiments.stream.MOMENT_IMAGES` says.

    Raises:
        InputError: sizes that the data set does not have, or ``label_noise`` outside [0, 1].
    """
    if not 0 <= label_noise <= 1:
        raise InputError(f"label_noise must be from 0 to 1, found {label_noise}")
    y: Ids = data.y.numpy()
    has_own_test = data.num_own_test > 0
    usable = np.arange(data.num_train)
    if has_own_test:
        development = usable
    else:
        development = _draw(usable, y, round(DEVELOPMENT_SHARE * len(y)), _stream(0, "development pool"))
    test = _test_images(data, development, seed, n_test)
    if tuning:
        test = test[:0]
    pool = development if tuning else np.setdiff1d(usable, test)
    n_train, n_val = _sizes(data, n_train, n_val, len(development), len(pool), tuning)
    mode = "tuning" if tuning else "report"
    val = _draw(pool, y, n_val, _stream(seed, "split", mode, "val"))
    train = _draw(np.setdiff1d(pool, val), y, n_train, _stream(seed, "split", mode, "train"))

    noisy = _redrawn(y[train], label_noise, data.num_classes, _stream(seed, "label_noise", mode))
    images = data.images.using(workers)
    train_index, val_index, test_index = (torch.from_numpy(ids) for ids in (train, val, test))
    mean, std, num_moments = images.moments(train_index, derive_seed(seed, "moments", mode))
    return Split(
        train_images=images.part(train_index, mean, std),
        train_y=torch.from_numpy(noisy),
        train_y_clean=torch.from_numpy(y[train]),
        val_images=images.part(val_index, mean, std),
        val_y=torch.from_numpy(y[val]),
        test_images=images.part(test_index, mean, std),
        test_y=torch.from_numpy(y[test]),
        train_index=train_index,
        val_index=val_index,
        test_index=test_index,
        test_is_shared=has_own_test,
        num_classes=data.num_classes,
        digest=data.digest,
        mean=mean,
        std=std,
        num_moments=num_moments,
    )


def _test_images(data: ImageSet, development: Ids, seed: int, n_test: int | None) -> Ids:
    """The test images of a report split: of an own test split the same for all seeds, else from outside the development
    pool."""
    y: Ids = data.y.numpy()
    if data.num_own_test > 0:
        pool = np.arange(data.num_train, len(y))
        rng, default, share = _stream(0, "own test split"), len(pool), "of its own test split"
    else:
        pool = np.setdiff1d(np.arange(data.num_train), development)
        third = round(len(y) / 3 / data.num_classes) * data.num_classes
        rng, default = _stream(seed, "test"), max(1, min(third, len(pool)))
        share = f"outside its development pool of {len(development)}"
    n_test = default if n_test is None else n_test
    if not 1 <= n_test <= len(pool):
        raise InputError(f"n_test = {n_test}, but {data.name} has 1 to {len(pool)} images to test, those {share}")
    return _draw(pool, y, n_test, rng)


def _redrawn(y: Ids, share: float, num_classes: int, rng: np.random.Generator) -> Ids:
    """A copy of the labels in which exactly ``round(share * len(y))`` are redrawn uniformly from all classes."""
    noisy = y.copy()
    chosen = np.argsort(rng.random(len(y)), kind="stable")[: round(share * len(y))]
    noisy[chosen] = (rng.random(len(chosen)) * num_classes).astype(np.int64)
    return noisy


def _sizes(
    data: ImageSet, n_train: int | None, n_val: int | None, development: int, available: int, tuning: bool
) -> tuple[int, int]:
    """Resolve ``n_train`` and ``n_val``, and check them against the images available."""
    if n_val is None:
        n_val = development // 5 if n_train is None else max(0, min(development // 5, available - n_train))
    if n_train is None:
        n_train = development - n_val
    kind = "tuning" if tuning else "report"
    if n_train < 1 or n_val < 0 or n_train + n_val > available:
        raise InputError(
            f"n_train = {n_train} and n_val = {n_val}, but a {kind} split of {data.name} has {available} images for "
            "both, and needs at least 1 to train on"
        )
    if tuning and n_val == 0:
        raise InputError(
            f"a tuning split needs validation images, but n_train = {n_train} takes all {available} images of "
            f"{data.name} that it may use, or n_val = 0"
        )
    return n_train, n_val


def _stream(seed: int, *names: str) -> np.random.Generator:
    # PCG64's raw bits are the same in every version of numpy, and random() is a plain scaling of them.
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *names)))


def _draw(ids: Ids, y: Ids, n: int, rng: np.random.Generator) -> Ids:
    """``n`` of the ids, stratified by class with largest remainders (ties at random), ascending."""
    ids = ids[np.argsort(rng.random(len(ids)), kind="stable")]
    classes, counts = np.unique(y[ids], return_counts=True)
    quota, remainder = np.divmod(n * counts, max(1, len(ids)))
    by_remainder = np.lexsort((rng.random(len(classes)), -remainder))
    quota[by_remainder[: n - quota.sum()]] += 1
    drawn = [ids[y[ids] == label][:count] for label, count in zip(classes, quota, strict=True)]
    return np.sort(np.concatenate([ids[:0], *drawn]))
