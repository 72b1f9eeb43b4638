from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from experiments.data import ImageSet, load_data
from experiments.images import TensorImages
from experiments.split import Split, make_split
from masks.errors import InputError

SEEDS = range(20)


@pytest.fixture(scope="module")
def own_test() -> ImageSet:
    """900 training images of three uneven classes (one in six, a third, half) and 300 of an own test split."""
    labels = torch.tensor([0, 1, 1, 2, 2, 2]).repeat(200)
    return ImageSet(
        "own", TensorImages(torch.rand(1200, 2, 3, 4, generator=torch.Generator().manual_seed(0))), labels, 300
    )


def ids(split: Split, part: str) -> set[int]:
    return set(getattr(split, f"{part}_index").tolist())


def same(a: Split, b: Split, *prefixes: str) -> bool:
    """Bit for bit, in the fields with these prefixes."""
    names = [f.name.replace("_images", "_x") for f in fields(Split) if f.name.startswith(prefixes)]
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return all(torch.equal(u, v) if isinstance(u, torch.Tensor) else u == v for u, v in pairs)


# -- which images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "own_test"])
@pytest.mark.parametrize("tuning", [False, True])
def test_parts_do_not_overlap_and_carry_the_images_of_their_ids(
    name: str, tuning: bool, request: pytest.FixtureRequest
) -> None:
    data = request.getfixturevalue(name)
    split = make_split(data, seed=3, n_train=300, n_val=150, n_test=None if tuning else 90, tuning=tuning)
    sizes = {"train": 300, "val": 150, "test": 0 if tuning else 90}
    assert {part: len(ids(split, part)) for part in sizes} == sizes
    assert len(ids(split, "train") | ids(split, "val") | ids(split, "test")) == sum(sizes.values())
    mean = data.x[split.train_index].double().mean((0, 2, 3), keepdim=True)
    std = data.x[split.train_index].double().std((0, 2, 3), keepdim=True, correction=0)
    for part in sizes:
        index, x = getattr(split, f"{part}_index"), getattr(split, f"{part}_x")
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, ((data.x[index] - mean) / std).float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(getattr(split, f"{part}_y"), data.y[index])
        assert torch.equal(index, index.sort().values)
    assert (split.num_classes, split.digest) == (data.num_classes, data.digest)


def test_no_image_that_tuning_sees_is_ever_tested(digits: ImageSet) -> None:
    seen, tested, trained = set(), set(), set()
    for seed in SEEDS:
        tuning = make_split(digits, seed=seed, tuning=True)
        assert (len(tuning.test_x), len(tuning.test_y), len(tuning.test_index)) == (0, 0, 0)
        seen |= ids(tuning, "train") | ids(tuning, "val")
        report = make_split(digits, seed=seed, n_train=900, n_val=200)
        tested |= ids(report, "test")
        trained |= ids(report, "train") | ids(report, "val")
    assert len(seen) == 719  # 40 % of 1797: the whole development pool, and the same for every seed
    assert len(tested) == 1078
    assert not seen & tested
    assert len(trained) == 1797


def test_the_own_test_split_is_all_that_is_tested(own_test: ImageSet) -> None:
    for seed in range(5):
        report, tuning = make_split(own_test, seed=seed), make_split(own_test, seed=seed, tuning=True)
        assert ids(report, "test") == set(range(900, 1200))
        assert not len(tuning.test_index)
        for split in (report, tuning):
            assert ids(split, "train") | ids(split, "val") == set(range(900))
    part = [make_split(own_test, seed=seed, n_test=60) for seed in range(5)]
    assert all(same(part[0], other, "test_index", "test_y") for other in part)
    assert ids(part[0], "test") < set(range(900, 1200))
    assert ids(part[0], "test") != set(range(900, 960))
    assert [split.test_is_shared for split in part] == [True] * 5


def test_every_seed_draws_anew(digits: ImageSet, own_test: ImageSet) -> None:
    for data in (digits, own_test):
        splits = [make_split(data, seed=s, n_train=100, n_val=50, n_test=50, tuning=t) for s in SEEDS for t in (0, 1)]
        for part in ("train", "val"):
            assert len({frozenset(ids(split, part)) for split in splits}) == len(splits)
    reports = [make_split(digits, seed=seed) for seed in SEEDS]
    assert len({frozenset(ids(split, "test")) for split in reports}) == len(reports)
    assert not any(split.test_is_shared for split in reports)


def test_draws_are_even_over_the_pool(digits: ImageSet) -> None:
    counts = torch.zeros(1797)
    for seed in range(200):
        counts[make_split(digits, seed=seed).test_index] += 1
    pool = counts[counts > 0]
    assert len(pool) == 1078
    assert pool.mean() == pytest.approx(200 * 600 / 1078)
    # binomial with p = 0.557: a deviation of 5 standard deviations somewhere has probability below 0.001
    assert (pool - pool.mean()).abs().max() < 5 * (200 * 0.557 * 0.443) ** 0.5


# -- sizes and classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [False, True])
def test_default_sizes(digits: ImageSet, own_test: ImageSet, tuning: bool) -> None:
    def sizes(data: ImageSet, **options: Any) -> tuple[int, int, int]:
        split = make_split(data, seed=0, tuning=tuning, **options)
        return len(split.train_x), len(split.val_x), len(split.test_x)

    tested = 0 if tuning else 600
    assert sizes(digits) == (719 - 143, 143, tested)
    assert sizes(digits, n_train=400) == (400, 143, tested)
    assert sizes(digits, n_train=700) == (700, 19 if tuning else 143, tested)
    assert sizes(digits, n_val=19) == (700, 19, tested)
    assert sizes(own_test) == (720, 180, 0 if tuning else 300)
    assert sizes(own_test, n_val=60) == (840, 60, 0 if tuning else 300)


def test_each_class_gets_its_share(own_test: ImageSet, digits: ImageSet) -> None:
    split = make_split(own_test, seed=1, n_train=300, n_val=60, n_test=30)
    for part, expected in (("train", [50, 100, 150]), ("val", [10, 20, 30]), ("test", [5, 10, 15])):
        assert torch.bincount(getattr(split, f"{part}_y")).tolist() == expected
    split = make_split(own_test, seed=1, n_train=100, n_val=0)  # the shares are 16.67, 33.33 and 50
    assert torch.bincount(split.train_y).tolist() == [17, 33, 50]
    for seed in range(5):
        for tuning in (False, True):
            split = make_split(digits, seed=seed, n_train=401, n_val=97, tuning=tuning)
            for part, n in (("train", 401), ("val", 97), ("test", 0 if tuning else 600)):
                counts = torch.bincount(getattr(split, f"{part}_y"), minlength=10)
                assert counts.sum() == n
                assert (counts - n * torch.bincount(digits.y) / 1797).abs().max() < 2


def test_an_image_left_over_by_the_shares_goes_to_no_class_in_particular() -> None:
    data = ImageSet("ties", TensorImages(torch.rand(80, 1, 2, 2)), torch.arange(80) % 4, 40)
    labels = {int(make_split(data, seed=seed, n_train=1, n_val=4).train_y) for seed in range(40)}
    assert labels == {0, 1, 2, 3}  # one class is missed by chance with probability 4 * 0.75**40 < 1e-4


SIZE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"n_train": 1000, "n_val": 198}, "n_train = 1000 and n_val = 198, but a report split of digits has 1197 images"),
    ({"n_train": 600, "n_val": 120, "tuning": True}, "n_train = 600 and n_val = 120, but a tuning split .* has 719"),
    ({"n_train": 1198}, "n_train = 1198 and n_val = 0, but a report split of digits has 1197"),
    ({"n_train": 0}, "n_train = 0 and n_val = 143, .* at least 1 to train on"),
    ({"n_train": -5}, "n_train = -5"),
    ({"n_val": -1}, "n_train = 720 and n_val = -1"),
    ({"n_val": 800}, "n_train = -81 and n_val = 800"),
    ({"n_test": 1079}, "n_test = 1079, but digits has 1 to 1078 images to test, .* development pool of 719"),
    ({"n_test": 0}, "n_test = 0"),
    ({"n_test": 1079, "tuning": True}, "n_test = 1079"),
    ({"n_train": 719, "tuning": True}, "needs validation images, but n_train = 719 takes all 719"),
    ({"n_val": 0, "tuning": True}, "needs validation images.*n_val = 0"),
    ({"label_noise": 1.01}, "label_noise must be from 0 to 1, found 1.01"),
    ({"label_noise": -0.1}, "label_noise must be from 0 to 1, found -0.1"),
    ({"label_noise": float("nan")}, "label_noise must be from 0 to 1, found nan"),
]


@pytest.mark.parametrize(("options", "message"), SIZE_ERRORS)
def test_what_the_data_set_does_not_have_is_refused_with_numbers(
    digits: ImageSet, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_split(digits, seed=0, **options)


def test_the_largest_sizes_work(digits: ImageSet, own_test: ImageSet) -> None:
    assert len(make_split(digits, seed=0, n_train=1197).val_x) == 0
    assert len(make_split(digits, seed=0, n_train=718, tuning=True).val_x) == 1
    assert len(make_split(digits, seed=0, n_train=10, n_test=1078).test_x) == 1078
    with pytest.raises(InputError, match="n_test = 301, but own has 1 to 300 images to test, those of its own test"):
        make_split(own_test, seed=0, n_test=301)


# -- pairing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [False, True])
def test_a_seed_gives_the_same_split_bit_for_bit(digits: ImageSet, tuning: bool) -> None:
    first = make_split(digits, seed=5, n_train=300, n_val=100, label_noise=0.2, tuning=tuning)
    torch.manual_seed(123)
    np.random.seed(9)
    again = make_split(load_data("digits"), seed=5, n_train=300, n_val=100, label_noise=0.2, tuning=tuning)
    assert same(first, again, "")


def test_options_change_only_what_they_name(digits: ImageSet) -> None:
    base = {"seed": 5, "n_train": 300, "n_val": 100, "n_test": 500, "label_noise": 0.2}
    first = make_split(digits, **base)  # type: ignore[arg-type]
    train = make_split(digits, **base | {"n_train": 200})  # type: ignore[arg-type]
    assert same(first, train, "test_index", "test_y", "val_index", "val_y")
    assert same(first, make_split(digits, **base | {"n_val": 50}), "test_index", "test_y")  # type: ignore[arg-type]
    noise = make_split(digits, **base | {"label_noise": 0.4})  # type: ignore[arg-type]
    assert same(first, noise, "train_images", "train_y_clean", "val", "test", "train_index")
    assert not same(first, noise, "train_y")
    before, after = (split.train_y != split.train_y_clean for split in (first, noise))
    assert bool((after | ~before).all())  # what is wrong at 20 % is wrong at 40 %
    assert torch.equal(first.train_y[before], noise.train_y[before])


# -- label noise --------------------------------------------------------------------------------------------


def test_exactly_the_stated_number_of_labels_is_redrawn() -> None:
    """With 500 classes a redrawn label is the true one once in 500 times: nearly all redraws show."""
    data = ImageSet("many", TensorImages(torch.rand(4000, 1, 1, 1)), torch.arange(4000) % 500, 1000)
    changed, where = [], []
    for seed in range(30):
        split = make_split(data, seed=seed, n_train=1001, n_val=300, label_noise=0.3)
        changed.append(int((split.train_y != split.train_y_clean).sum()))
        where += (split.train_y != split.train_y_clean).nonzero().flatten().tolist()
        assert torch.equal(split.val_y, data.y[split.val_index])
        assert torch.equal(split.test_y, data.y[split.test_index])
    assert max(changed) == 300  # round(300.3)
    assert min(changed) > 294
    counts = np.bincount(where, minlength=1001)  # about 30 draws with p = 0.3 for each position
    assert counts.mean() == pytest.approx(9, abs=0.1)
    assert counts.var() == pytest.approx(30 * 0.3 * 0.7, rel=0.2)


@pytest.mark.parametrize(("noise", "count"), [(0.0, 0), (0.0012, 0), (0.0013, 1), (1.0, 400)])
def test_noise_count_at_the_ends(digits: ImageSet, noise: float, count: int) -> None:
    changed = []
    for seed in range(10):
        split = make_split(digits, seed=seed, n_train=400, label_noise=noise)
        changed.append(int((split.train_y != split.train_y_clean).sum()))
    assert max(changed) <= count
    assert sum(changed) == pytest.approx(10 * count * 0.9, abs=0.02 * 10 * count + 2 * (count == 1) * 1.5)


def test_redrawn_labels_are_uniform_over_all_classes(digits: ImageSet) -> None:
    counts = torch.zeros(10, 10)
    for seed in range(50):
        split = make_split(digits, seed=seed, n_train=500, label_noise=1.0)
        counts.index_put_((split.train_y_clean, split.train_y), torch.ones(()), accumulate=True)
    assert counts.sum() == 25_000
    expected = counts.sum(1, keepdim=True) / 10
    chi2 = ((counts - expected) ** 2 / expected).sum()  # 90 degrees of freedom: mean 90, deviation 13.4
    assert 40 < chi2 < 150


# -- standardisation ----------------------------------------------------------------------------------------


def test_a_constant_channel_is_centred_and_not_scaled() -> None:
    x = torch.rand(100, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0.7  # 72 * 16 of these, summed in float32, do not have the mean 0.7
    x[90:, 1] = 1.2
    split = make_split(ImageSet("constant", TensorImages(x), torch.arange(100) % 2, 10), seed=0)
    assert torch.equal(split.train_x[:, 1], torch.zeros(72, 4, 4))
    torch.testing.assert_close(split.test_x[:, 1], torch.full((10, 4, 4), 0.5))
    assert split.train_x[:, 0].std() == pytest.approx(1, abs=1e-3)


def test_standardisation_is_exact_for_many_images() -> None:
    x = torch.rand(7501, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    split = make_split(ImageSet("many", TensorImages(x), torch.arange(7501) % 2, 1), seed=0)
    assert float(split.train_x.double().mean()) == pytest.approx(0, abs=1e-6)
    assert float(split.train_x.double().std()) == pytest.approx(1, abs=1e-5)


def test_the_images_of_the_data_set_are_left_alone(digits: ImageSet) -> None:
    before = digits.x.clone(), digits.y.clone()
    make_split(digits, seed=0, label_noise=1.0)
    assert torch.equal(digits.x, before[0])
    assert torch.equal(digits.y, before[1])


# -- the type -----------------------------------------------------------------------------------------------


def test_a_split_cannot_be_inconsistent(digits: ImageSet) -> None:
    split = make_split(digits, seed=0, n_train=100, n_val=100)
    with pytest.raises(ValueError, match=r"train images and labels have different lengths: \[99, 100\]"):
        replace(split, train_y=split.train_y[1:])
    with pytest.raises(ValueError, match="100 images are in two parts"):
        replace(split, val_index=split.train_index)
