import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.augment import Augmentation, Augmenter
from experiments.data import ImageSet
from experiments.images import TensorImages
from experiments.models import build_model
from experiments.split import make_split
from masks import MaskContext, build_mask, cross_entropy
from masks.errors import InputError
from sam import SAM

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.5, 0.25, 0.4]), torch.tensor([0.2, 0.3, 0.25])


def standardised(raw: Tensor) -> Tensor:
    """As a split does it to 8-bit images."""
    return raw.float().div(255).sub(MEAN[:, None, None]).div(STD[:, None, None])


def marked(n: int = 1, height: int = 9, width: int = 8) -> Tensor:
    """Every pixel of an image has a colour of its own, none of them black; all images are the same."""
    value = torch.arange(height * width, dtype=torch.uint8).view(height, width) + 1
    return torch.stack((value, value.flip(0), 255 - value)).repeat(n, 1, 1, 1)


def augmenter(text: str, images: Tensor, seed: int = 0) -> Augmenter:
    c = images.shape[1]
    return Augmenter(Augmentation.parse(text), TensorImages(images), MEAN[:c], STD[:c], images.device, seed)


# -- the text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "canonical"),
    [
        ("none", Augmentation(), "none"),
        ("crop+flip", Augmentation(4, True), "crop+flip"),
        ("flip+crop=2", Augmentation(2, True), "crop=2+flip"),
        ("crop + flip + cutout", Augmentation(4, True, "", 16), "crop+flip+cutout=16"),
        ("cutout=8", Augmentation(cutout=8), "cutout=8"),
        ("autoaugment", Augmentation(autoaugment="cifar10"), "autoaugment"),
        ("autoaugment=svhn+crop", Augmentation(4, False, "svhn"), "crop+autoaugment=svhn"),
    ],
)
def test_text_and_back(text: str, expected: Augmentation, canonical: str) -> None:
    assert Augmentation.parse(text) == expected
    assert str(expected) == canonical
    assert Augmentation.parse(canonical) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crp", "augmentation 'crp': unknown part 'crp'; did you mean crop"),
        ("", "augmentation '': unknown part ''; known: autoaugment, crop, cutout, flip, none"),
        ("crop+none", "unknown part 'none'"),
        ("crop+crop=2", "has crop twice"),
        ("flip=1", "flip takes no value, found '1'"),
        ("crop=0", "crop must be a number of pixels from 1 on, found '0'"),
        ("cutout=-8", "cutout must be a number of pixels from 1 on, found '-8'"),
        ("cutout=", "cutout must be a number of pixels from 1 on, found ''"),
        ("autoaugment=cifar", "unknown AutoAugment policy 'cifar'; did you mean cifar10"),
        ("autoaugment=", "lacks its policy: cifar10, imagenet, svhn"),
    ],
)
def test_texts_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Augmentation.parse(text)
    assert "\n" not in str(error.value)


def test_values_that_cannot_be() -> None:
    with pytest.raises(InputError, match="crop must be at least 0, got -1"):
        Augmentation(crop=-1)
    images = standardised(marked())
    for text in ("crop=8", "cutout=16"):
        with pytest.raises(
            InputError, match=rf"{text} does not fit images of 9x8: crop must be below 8 and cutout below"
        ):
            augmenter(text, images)
    for bad, found in ((images + 9, "3 channels and values from 1.8"), (images[:, :2], "2 channels and values from 0")):
        with pytest.raises(InputError, match=f"AutoAugment needs images .* found {found}"):
            augmenter("autoaugment", bad)


# -- crop and flip ------------------------------------------------------------------------------------------


def candidates(image: Tensor, pad: int, flip: bool) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of one raw image after padding with black, by numpy's slices; the value says which."""
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
    _, height, width = image.shape
    out = {}
    for down, right, mirrored in itertools.product(range(2 * pad + 1), range(2 * pad + 1), (False, True)[: 1 + flip]):
        crop = padded[:, down : down + height, right : right + width]
        crop = crop[:, :, ::-1] if mirrored else crop
        out[standardised(torch.from_numpy(crop.copy())).numpy().tobytes()] = (down, right, mirrored)
    return out


@pytest.mark.parametrize(("text", "pad", "flip"), [("crop=2+flip", 2, True), ("crop=3", 3, False), ("flip", 0, True)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_image_is_a_shifted_and_mirrored_copy_to_the_bit(
    text: str, pad: int, flip: bool, channels_last: bool
) -> None:
    """And all of them are equally frequent."""
    known = candidates(marked()[0], pad, flip)
    assert len(known) == (2 * pad + 1) ** 2 * (1 + flip)
    n = 200 * len(known)
    x = standardised(marked(n)).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    before = x.clone()
    out = augmenter(text, x)(x)
    assert torch.equal(x, before)
    assert (out.shape, out.dtype) == (x.shape, torch.float32)
    assert out.is_contiguous(memory_format=torch.channels_last)
    counts = Counter(known[image.numpy().tobytes()] for image in out.contiguous())
    chi_squared = sum((counts[k] - 200) ** 2 / 200 for k in known.values())
    freedom = len(known) - 1
    assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


def test_the_images_of_a_batch_stay_in_their_order() -> None:
    """Images of one colour each, above the mean: black from the padding and the cut-out square are below it."""
    x = standardised(torch.arange(130, 180, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 9, 8))
    for text in ("flip", "crop+flip+cutout=2"):
        assert torch.equal(augmenter(text, x)(x).amax((2, 3)), x[:, :, 0, 0])


# -- cutout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 4, 5, 11])
def test_cutout_is_a_square_around_a_uniform_centre(side: int) -> None:
    height, width = 9, 8
    n = 200 * height * width
    x = standardised(marked(1, height, width))
    out = augmenter(f"cutout={side}", x)(x.expand(n, -1, -1, -1))
    cut = out != x
    assert torch.equal(out.eq(0).all(1), cut.all(1))  # the marked images hold no 0 of their own
    assert torch.equal(cut.any(1), cut.all(1))
    known = {}
    for row, column in itertools.product(range(height), range(width)):
        square = np.zeros((height, width), bool)
        top, left = row - side // 2, column - side // 2
        square[max(0, top) : top + side, max(0, left) : left + side] = True
        known.setdefault(square.tobytes(), []).append((row, column))
    counts = Counter(square.numpy().tobytes() for square in cut[:, 0])
    assert set(counts) <= set(known)
    chi_squared = sum((counts[k] - 200 * len(v)) ** 2 / (200 * len(v)) for k, v in known.items())
    freedom = max(1, len(known) - 1)
    assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


# -- AutoAugment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["cifar10", "imagenet", "svhn"])
@pytest.mark.parametrize("channels", [3, 1])
def test_autoaugment_is_torchvisions_image_by_image(
    policy: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same draws, fed into torchvision's own transform of one image, give the same bits."""
    from torchvision.transforms import v2

    torch.manual_seed(0)
    n = 400
    smooth = torch.nn.functional.interpolate(torch.rand(n, channels, 5, 5), (32, 24), mode="bicubic")
    raw = (255 * smooth.clamp(0, 1)).round().byte()
    ours = augmenter(f"autoaugment={policy}", torch.zeros(1, channels, 32, 24))
    assert ours._policy is not None
    state = ours.generator.get_state()
    sub_policy, uniform, negative = ours._policy.draw(n, ours.generator)
    ours.generator.set_state(state)
    out = ours._policy(raw.clone(), ours.generator)

    theirs = v2.AutoAugment(v2.AutoAugmentPolicy(policy))
    signed = {name for name, (_, has_sign) in v2.AutoAugment._AUGMENTATION_SPACE.items() if has_sign}
    expected = []
    for i in range(n):
        numbers: list[float] = []
        for stage, (name, probability, _) in enumerate(theirs._policies[int(sub_policy[i])]):
            numbers.append(float(uniform[stage, i]))
            if name in signed and uniform[stage, i] <= probability:
                numbers.append(0.25 if negative[stage, i] else 0.75)
        stream = iter(numbers)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *args, i=i: sub_policy[i])
            patch.setattr(torch, "rand", lambda *args, stream=stream: torch.tensor(next(stream)))
            expected.append(theirs(raw[i]))
        assert next(stream, None) is None
    assert torch.equal(out, torch.stack(expected))
    assert 0.05 < float((out == raw).flatten(1).all(1).float().mean()) < 0.5


def test_autoaugment_draws_every_sub_policy_and_sign_equally_often() -> None:
    ours = augmenter("autoaugment", torch.zeros(1, 3, 8, 8))
    assert ours._policy is not None
    n = 25_000
    sub_policy, uniform, negative = ours._policy.draw(n, ours.generator)
    chi_squared = float((torch.bincount(sub_policy, minlength=25) - 1000).square().sum()) / 1000
    assert abs(chi_squared - 24) < 5 * math.sqrt(48)
    assert negative.float().mean(1).tolist() == pytest.approx([0.5] * 2, abs=0.02)
    assert uniform.mean(1).tolist() == pytest.approx([0.5] * 2, abs=0.01)


def test_images_that_no_operation_touched_keep_their_bits() -> None:
    """Standardised as a split does it, with every one of the 256 values."""
    raw = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    data = ImageSet.from_arrays("made", [(raw, np.arange(600) % 2)])
    split = make_split(data, seed=0, n_train=150, n_val=50, n_test=50)
    ours = Augmenter(Augmentation.parse("autoaugment"), split.train_images, split.mean, split.std, CPU, 0)
    ours._policy = lambda pixels, generator: pixels  # type: ignore[assignment]
    assert torch.equal(ours(split.train_x), split.train_x)


def test_the_order_is_crop_flip_autoaugment_cutout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inverted after the crop: black from the padding is white then; cut out last: the square is 0."""
    x = standardised(marked(64, 12, 12))
    ours = augmenter("crop=3+autoaugment+cutout=4", x)
    ours._policy = lambda pixels, generator: 255 - pixels  # type: ignore[assignment]
    out = ours(x)
    white = standardised(torch.full((3, 1, 1), 255))
    only_crop = augmenter("crop=3", x)(x)
    black = (only_crop == standardised(torch.zeros(3, 1, 1))).all(1, keepdim=True).expand_as(out)
    assert black.any()
    assert bool(((out == white) | (out == 0))[black].all())
    assert (out == 0).sum() > 64 * 3 * 4


# -- randomness ---------------------------------------------------------------------------------------------

FULL = "crop+flip+autoaugment+cutout=4"


def batches(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [standardised(torch.randint(256, (20, 3, 10, 10), generator=generator)) for _ in range(n)]


@pytest.mark.parametrize("text", ["crop+flip", "cutout=4", "autoaugment", FULL])
def test_the_seed_decides_and_the_global_generator_is_left_alone(text: str) -> None:
    xs, state = batches(), torch.get_rng_state()
    first, again, other = ([a(x) for x in xs] for a in (augmenter(text, xs[0], seed) for seed in (1, 1, 2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0] == xs[0], first[1] == xs[1])  # another draw for every batch


def test_the_generator_is_the_whole_state() -> None:
    xs = batches()
    ours = augmenter(FULL, xs[0])
    ours(xs[0])
    saved = ours.generator.get_state()
    expected = ours(xs[1])
    resumed = augmenter(FULL, xs[0], seed=99)
    resumed.generator.set_state(saved)
    assert torch.equal(resumed(xs[1]), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("text", ["crop+flip+cutout=4", FULL])
def test_the_device_changes_nothing(text: str) -> None:
    """Bitwise for copies; operations of AutoAugment may round a level differently."""
    xs = batches()
    cpu, cuda = augmenter(text, xs[0]), augmenter(text, xs[0].cuda())
    for x in xs:
        there, here = cuda(x.cuda()), cpu(x)
        assert there.is_cuda
        if "auto" in text:
            assert ((there.cpu() - here).abs() > 1e-5).float().mean() < 0.02
        else:
            assert torch.equal(there.cpu(), here)


# -- in training --------------------------------------------------------------------------------------------


def test_both_passes_of_a_step_see_the_same_images_and_arms_are_paired() -> None:
    seen: dict[float, list[Tensor]] = {}
    for rho in (0.05, 0.5):
        torch.manual_seed(0)
        model = build_model("resnet_small", in_channels=3, image_size=(10, 10), num_classes=5, width=4)
        optimizer = SAM(
            torch.optim.SGD(model.parameters(), lr=0.1), model, mask=build_mask("all", MaskContext(model)), rho=rho
        )
        ours = augmenter(FULL, batches()[0])
        seen[rho] = []

        def loss(batch: tuple[Tensor, Tensor], model: torch.nn.Module = model, rho: float = rho) -> Tensor:
            seen[rho].append(batch[0].clone())
            return cross_entropy(model(batch[0]), batch[1])

        for x in batches():
            optimizer.step_on(loss, (ours(x), torch.arange(20) % 5))
    assert [len(images) for images in seen.values()] == [6, 6]
    for images in seen.values():
        assert all(map(torch.equal, images[::2], images[1::2]))
    assert all(map(torch.equal, *seen.values()))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["crop+flip+cutout=16", "crop+flip+autoaugment+cutout=16"])
def test_cost_beside_a_training_step(text: str) -> None:
    """Processor time of 128 images of 32x32 beside a SAM step of ResNet-20, the smallest net of the paper's grid."""
    torch.manual_seed(0)
    model = build_model("resnet20", in_channels=3, image_size=(32, 32), num_classes=10)
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, mask=build_mask("all", MaskContext(model)), rho=0.05
    )
    x = standardised(torch.randint(256, (128, 3, 32, 32)))
    ours, y = augmenter(text, x), torch.arange(128) % 10
    seconds = [0.0, 0.0]
    for _ in range(4):
        start = time.process_time()
        for _ in range(10):
            out = ours(x)
        middle = time.process_time()
        optimizer.step_on(lambda batch: cross_entropy(model(batch[0]), batch[1]), (out, y))
        seconds[0] += (middle - start) / 10
        seconds[1] += time.process_time() - middle
    print(f"{text}: {1e3 * seconds[0] / 4:.2f} ms, {100 * seconds[0] / seconds[1]:.2f} % of a step")
    assert seconds[0] < 0.02 * seconds[1]
