"""Images that stay in their files, against the same images in memory and against Pillow."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from scipy import stats

from experiments import build, stream
from experiments.analyze import AnalyzeOptions, analyze
from experiments.cli import main
from experiments.config import RunConfig
from experiments.data import load_data
from experiments.images import Images, TensorImages
from experiments.measure import MeasureConfig
from experiments.resume import Checkpointing, Interrupted
from experiments.single import train_one
from experiments.split import make_split
from experiments.store import read_failure
from experiments.train import Training, train_run
from experiments.worker import Job, Task, execute, work
from masks.errors import InputError

Tiny = Callable[..., RunConfig]
CPU = torch.device("cpu")
MEASURE = MeasureConfig(images=32, sharpness_m=16, repeats=1, metrics="gradient_norm")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "sam-masks" / "stream"


def fill(root: Path, *, own_test: bool = True, mode: str = "RGB", side: int = 8, n: int = 24) -> Path:
    """n training images in each of 5 classes, and 10 test images in each; no two are the same."""
    rng = np.random.default_rng(0)
    for part, count in (("train", n), ("test", 10)) if own_test else (("", n),):
        for name in "abcde":
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / part / name / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("square"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many sizes, none of them square: 28 in each of 5 classes."""
    root = tmp_path_factory.mktemp("wide")
    rng = np.random.default_rng(1)
    for name in "abcde":
        (root / name).mkdir()
        for i in range(28):
            pixels = rng.integers(0, 256, (9 + i % 5, 15 + i % 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def on_files(tiny: Tiny) -> Tiny:
    """Makes a run on a folder with 60 training, 20 validation and 20 test images."""
    return lambda data, **changes: tiny(
        **{"data": data, "n_train": 60, "n_val": 20, "n_test": 20, "batch_size": 16, **changes}
    ).resolved()


# -- the same as in memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("own_test", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_square_images_are_those_in_memory_bit_for_bit(tmp_path: Path, own_test: bool, mode: str) -> None:
    fill(tmp_path, own_test=own_test, mode=mode)
    streamed, held = load_data(f"stream:{tmp_path}@8"), load_data(f"folder:{tmp_path}")
    assert torch.equal(streamed.x, held.x)
    for name in ("y", "num_own_test", "class_names", "num_classes", "num_train", "image_shape"):
        assert str(getattr(streamed, name)) == str(getattr(held, name))
    assert streamed.digest != held.digest
    a, b = (make_split(data, seed=3, n_train=40, n_val=15, label_noise=0.5) for data in (streamed, held))
    for name in ("mean", "std", "train_x", "val_x", "test_x", "train_y", "train_index", "val_index", "test_index"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.num_moments, b.num_moments) == (40, 40)


def test_one_coloured_image_makes_all_of_three_channels(tmp_path: Path) -> None:
    fill(tmp_path, mode="L")
    Image.new("RGB", (8, 8), (9, 50, 200)).save(tmp_path / "train" / "c" / "x.png")
    streamed, held = load_data(f"stream:{tmp_path}@8"), load_data(f"folder:{tmp_path}")
    assert held.image_shape == (3, 8, 8)
    assert torch.equal(streamed.x, held.x)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_in_files_and_in_memory_are_read_alike(square: Path, workers: int) -> None:
    parts: list[Images] = []
    for spec in (f"stream:{square}@8", f"folder:{square}"):
        data = load_data(spec).images.using(workers)
        parts.append(
            data.part(torch.tensor([5, 9, 150, 2]), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0, 1, 0.5]))
        )
    files, memory = parts
    assert isinstance(memory, TensorImages)
    assert (len(files), files.shape) == (len(memory), memory.shape) == (4, (4, 3, 8, 8))
    assert torch.equal(files.read(torch.arange(4)), memory.x)
    for order in ([torch.tensor([3, 0, 3]), torch.tensor([1])], [torch.tensor([2])], []):
        got = list(files.batches(order))
        assert [x.shape for x in got] == [(len(positions), 3, 8, 8) for positions in order]
        assert all(torch.equal(x, y) for x, y in zip(got, memory.batches(order), strict=True))
    nothing = files.part(torch.tensor([], dtype=torch.int64), torch.zeros(3), torch.ones(3))
    assert nothing.read(torch.arange(0)).shape == (0, 3, 8, 8)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, y = (next(iter(part.to(CPU, layout).batches([torch.arange(4)]))) for part in parts)
        assert x.stride() == y.stride()
    low, high = files.ranges()
    assert bool((low <= memory.ranges()[0]).all() & (high >= memory.ranges()[1]).all())
    raw = (torch.stack((low, high)) * torch.tensor([2.0, 1, 0.5])) + torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(raw, torch.tensor([0.0, 1.0])[:, None, None].expand(2, 4, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_that_in_memory_byte_for_byte(square: Path, on_files: Tiny, workers: int) -> None:
    settings = {"augment": "crop=1+flip+cutout=2", "mask": "fisher", "label_noise": 0.2, "measure_every": 1}
    results = []
    for spec, count in ((f"stream:{square}@8", workers), (f"folder:{square}", 0)):
        record, _ = execute(Job("run", "arm", on_files(spec, **settings), MEASURE), CPU, None, count)
        assert record.result.pop("data_digest")
        results.append(json.dumps(record.result, sort_keys=True))
    assert results[0] == results[1]


# -- evaluation and standardisation -------------------------------------------------------------------------


def test_evaluation_scales_the_shorter_side_and_cuts_the_centre(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, size in {"a": (100, 150), "b": (90, 60), "c": (56, 56), "d": (64, 64)}.items():
        (tmp_path / name).mkdir()
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name / "1.png")
    x = load_data(f"stream:{tmp_path}@56").x  # 56 * 256 / 224 = 64
    found = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    wide, high, exact, larger = (Image.open(tmp_path / name / "1.png") for name in "abcd")
    bilinear = Image.Resampling.BILINEAR
    np.testing.assert_array_equal(found[0], wide.resize((96, 64), bilinear).crop((20, 4, 76, 60)))
    np.testing.assert_array_equal(found[1], high.resize((64, 96), bilinear).crop((4, 20, 60, 76)))
    np.testing.assert_array_equal(found[2], exact)
    np.testing.assert_array_equal(found[3], larger.crop((4, 4, 60, 60)))


def test_moments_are_of_a_drawn_part_of_many_images(
    square: Path, on_files: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MOMENT_IMAGES", 7)
    data = load_data(f"stream:{square}@8")
    ids = torch.arange(30, 80)
    mean, std, n = data.images.moments(ids, seed=5)
    drawn = torch.randperm(50, generator=torch.Generator().manual_seed(5))[:7]
    x = data.x[ids][drawn].double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(mean, x.mean(1), rtol=1e-6)
    np.testing.assert_allclose(std, x.std(1), rtol=1e-6)
    assert n == 7
    assert not torch.equal(data.images.moments(ids, seed=6)[0], mean)
    config = on_files(f"stream:{square}@8", epochs=1, mask="all")
    split = train_run(config, CPU).split
    result = execute(Job("run", "arm", config, None), CPU)[0].result
    assert result["standardised_by"] == {"images": 7, "mean": split.mean.tolist(), "std": split.std.tolist()}


def test_a_constant_channel_becomes_zero(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new("RGB", (8, 8), (100, i, 200)).save(tmp_path / name / f"{i}.png")
    split = make_split(load_data(f"stream:{tmp_path}@8"), seed=0)
    assert split.std[[0, 2]].tolist() == [1, 1]
    assert torch.equal(split.train_x[:, [0, 2]], torch.zeros_like(split.train_x[:, :2]))


# -- random crops -------------------------------------------------------------------------------------------


def crops(root: Path, seed: int = 1) -> Images:
    return load_data(f"stream:{root}@8").images.cropped(seed)


def test_a_crop_depends_on_seed_epoch_and_image_alone(wide: Path) -> None:
    images = crops(wide)
    order = [torch.tensor([3, 40, 7]), torch.tensor([100, 5])]
    state = torch.get_rng_state()
    first = torch.cat(list(images.batches(order, 4)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    for workers in (1, 2):
        again = images.using(workers).batches([torch.tensor([100]), torch.tensor([5, 7, 40, 3])], 4)
        assert torch.equal(torch.cat(list(again)), first[[3, 4, 2, 1, 0]])
    assert not torch.equal(torch.cat(list(images.batches(order, 5))), first)
    assert not torch.equal(torch.cat(list(crops(wide, 2).batches(order, 4))), first)
    part = images.part(torch.tensor([40, 5]), torch.zeros(3), torch.ones(3))  # ids, and not positions
    assert torch.equal(next(part.batches([torch.arange(2)], 4)), first[[1, 4]])


def windows(monkeypatch: pytest.MonkeyPatch, image: Image.Image, n: int) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of n crops."""
    seen: list[tuple[int, int, int, int]] = []
    monkeypatch.setattr(stream.F, "resized_crop", lambda _, *window: seen.append(window[:4]))
    for seed in range(n):
        stream._random_crop(image, 8, seed)
    return seen


def test_windows_are_distributed_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    # Szegedy et al. (2015): area 8 % to 100 %, aspect ratio 3/4 to 4/3; the latter's logarithm uniform.
    width, height, n = 1200, 1000, 3000
    top, left, h, w = np.array(windows(monkeypatch, Image.new("L", (width, height)), n), dtype=float).T
    rng = np.random.default_rng(0)
    area = rng.uniform(0.08, 1, 40 * n) * width * height
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 40 * n))
    fits = (np.sqrt(area * ratio) <= width) & (np.sqrt(area / ratio) <= height)
    for ours, defined in ((h * w, area[fits]), (w / h, ratio[fits])):
        assert stats.ks_2samp(ours, defined).pvalue > 0.01
    inside = (h < height - 50) & (w < width - 50)
    down, right = ((top / (height - h + 1))[inside], (left / (width - w + 1))[inside])
    assert min(stats.kstest(place, "uniform").pvalue for place in (down, right)) > 0.01
    assert abs(stats.spearmanr(down, right).statistic) < 0.06
    assert min(h * w) / (width * height) == pytest.approx(0.08, rel=0.02)


def test_a_window_is_cut_out_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    found = np.asarray(stream._random_crop(Image.fromarray(pixels), 8, 3))
    top, left, h, w = windows(monkeypatch, Image.fromarray(pixels), 4)[3]
    cut = Image.fromarray(np.ascontiguousarray(pixels[top : top + h, left : left + w]))
    np.testing.assert_array_equal(found, cut.resize((8, 8), Image.Resampling.BILINEAR))


def test_an_image_that_no_window_fits_gives_its_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    found = windows(monkeypatch, Image.new("L", (3000, 10)), 200)
    assert found.count((0, 1493, 10, 13)) > 150  # 10 windows of 8 % of the area and 4 : 3 are higher than the image


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_crops_goes_on_bitwise_in_the_middle_of_an_epoch(
    wide: Path, on_files: Tiny, tmp_path: Path, workers: int
) -> None:
    config = on_files(f"stream:{wide}@8", augment="resized_crop+flip+cutout=2", mask="norm")
    whole = train_run(config, CPU, workers=1)
    asked: list[int] = []

    def sixth() -> bool:
        asked.append(1)
        return len(asked) == 6  # of 4 + 4 steps

    checkpoints = Checkpointing(tmp_path / "checkpoint.pt", stop=sixth)
    with pytest.raises(Interrupted):
        train_run(config, CPU, workers=workers, checkpoints=checkpoints)
    resumed = train_run(config, CPU, workers=2 - workers, checkpoints=replace(checkpoints, stop=lambda: False))
    assert resumed.history == whole.history
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    assert train_run(replace(config, augment="flip+cutout=2"), CPU).history != whole.history


def test_images_are_decoded_ahead_but_every_one_once_per_epoch(
    square: Path, on_files: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(on_files(f"stream:{square}@8", mask="all", epochs=3), CPU, None, None)
    read: list[int] = []
    decoded = stream._Decoder._decoded
    monkeypatch.setattr(stream._Decoder, "_decoded", lambda self, i, e: read.append(i) or decoded(self, i, e))
    training.run(None)
    assert sorted(read) == sorted(training.split.train_index.tolist() * 3)


# -- errors -------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    if how == "vanished":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:120])  # the header is whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["vanished", "truncated"])
def test_an_image_that_cannot_be_read_any_more_is_named(tmp_path: Path, how: str, workers: int) -> None:
    fill(tmp_path, n=4)
    images = load_data(f"stream:{tmp_path}@8").images.using(workers)
    damage(tmp_path / "train" / "b" / "001.png", how)
    batches = images.batches(torch.arange(12).split(4))
    next(batches)
    with pytest.raises(InputError, match=r"^stream:.*@8: .*train/b/001\.png is not a readable image \(.*\)$"):
        list(batches)


def test_the_command_ends_with_one_line_and_the_study_keeps_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "images")
    spec = f"stream:{tmp_path / 'images'}@8"
    load_data(spec)
    for path in (tmp_path / "images" / "train").glob("*/*.png"):
        os.utime(path)  # the first look reads headers only, and is content with these
        damage(path, "truncated")
    options = ["train", "--data", spec, "--width", "4", "--epochs", "1", "--device", "cpu", "--workers", "1"]
    assert main([*options, "--n_train", "60", "--n_val", "20"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "png is not a readable image" in error
    assert main(["train", "--data", spec, "--workers", "-1"]) == 2
    assert "workers must be at least 0, got -1" in capsys.readouterr().err


def failing(monkeypatch: pytest.MonkeyPatch, name: str, times: Path, number: int) -> None:
    """Reading an image whose path ends so fails once for each line in the file ``times``, in whatever process."""
    load = ImageFile.ImageFile.load

    def read(self: ImageFile.ImageFile) -> Any:
        if str(self.filename).endswith(name) and (left := times.read_text()):
            times.write_text(left[1:])
            raise OSError(number, os.strerror(number))
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", read)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_read_that_may_succeed_another_time_is_a_failed_run(
    square: Path, on_files: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, number: int
) -> None:
    times = tmp_path / "times"
    times.write_text("x")
    failing(monkeypatch, "013.png", times, number)
    job = Job("run", "arm", on_files(f"stream:{square}@8"), None)
    outcome = work(Task(job, tmp_path, "cpu", workers=workers))
    assert outcome.kind == "failed"
    assert "013.png: " + os.strerror(number) in outcome.text
    assert "Traceback" not in outcome.text
    failure = read_failure(tmp_path, "run")
    assert failure is not None
    assert failure.error == outcome.text
    assert work(Task(job, tmp_path, "cpu", workers=workers)).kind == "done"


@pytest.mark.slow
def test_a_study_goes_on_after_a_read_that_failed_and_stops_at_a_damaged_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], serial: None, no_figures: None
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in fill(tmp_path / "images").glob("*/*/*.png"):
        with Image.open(path) as image:
            image.resize((64, 64)).save(path.with_suffix(".jpg"))
        path.unlink()
    spec = f"stream:{tmp_path / 'images'}@8"
    load_data(spec)  # of whole images
    options = ["compare", "--data", spec, "--width", "4", "--epochs", "1", "--device", "cpu", "--quiet", "--masks=norm"]
    options += ["--n_train=60", "--n_val=20", "--rho_grid=0.5", "--seeds=2", "--metrics=gradient_norm", "--images=40"]
    options += ["--sharpness_m=20"]
    times = tmp_path / "times"
    times.write_text("xxx")
    with monkeypatch.context() as patch:
        failing(patch, "test/c/003.jpg", times, errno.EIO)
        assert main([*options, "--out=a"]) == 1
        first = capsys.readouterr().err
        assert first.count("\n") == 1
        assert first.startswith("sam-masks: error: 3 of 4 runs failed, the others are kept; first: ")
        assert "test/c/003.jpg: Input/output error" in first
        assert main(["runs", "a", "--failed"]) == 0
        assert "Input/output error" in capsys.readouterr().out
        times.write_text("x")
        assert main([*options, "--out=a", "--retries=1"]) == 0
    capsys.readouterr()
    for path in (tmp_path / "images" / "train").glob("*/*.jpg"):
        path.write_bytes(path.read_bytes()[:-200])  # the header is whole, and all that the first look reads
    build.load_cached.cache_clear()
    assert main([*options, "--out=b"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ".jpg is not a readable image (image file is truncated" in error
    build.load_cached.cache_clear()


def test_workers_for_images_in_memory_are_refused(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "compare"):
        assert main([command, "--data=digits", "--workers=2", "--out=out"]) == 2
        assert capsys.readouterr().err == (
            "sam-masks: error: workers has no effect with data digits, whose images are in memory; leave it out, or "
            "give stream:DIR@SIZE\n"
        )
    assert list(in_folder.iterdir()) == []


def test_a_killed_worker_is_a_failed_run(
    square: Path, on_files: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, opened = os.getpid(), stream.opened

    def deadly(spec: str, path: Path) -> Any:
        if os.getpid() != own and path.name == "013.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(spec, path)

    monkeypatch.setattr(stream, "opened", deadly)
    job = Job("run", "arm", on_files(f"stream:{square}@8"), None)
    outcome = work(Task(job, tmp_path, "cpu", workers=1))
    assert (outcome.kind, "worker" in outcome.text, outcome.text.count("\n")) == ("failed", True, 0)
    failure = read_failure(tmp_path, "run")
    assert failure is not None
    assert failure.error == outcome.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stream:", "lacks the path: stream:DIR@SIZE"),
        ("stream:{}", r"lacks the side of the images in pixels: stream:.*@224"),
        ("stream:{}@0", "the side after @ must be from 1 to 4096 pixels, found 0"),
        ("stream:{}/nowhere@8", "nowhere does not exist"),
    ],
)
def test_specs_that_are_refused(square: Path, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(spec.format(square))


def test_what_is_not_an_image_of_8_bits_is_found_at_the_first_look(tmp_path: Path) -> None:
    fill(tmp_path, n=2)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "test" / "c" / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png has mode I;16, more than 8 bits"):
        load_data(f"stream:{tmp_path}@8")
    (tmp_path / "test" / "c" / "deep.png").write_text("no image")
    with pytest.raises(InputError, match=r"deep\.png is not a readable image"):
        load_data(f"stream:{tmp_path}@8")


def test_crops_need_files(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="resized_crop needs images that are read from files: data stream:DIR@SIZE"):
        train_run(tiny(augment="resized_crop+flip"), CPU)


# -- the first look -----------------------------------------------------------------------------------------


def test_contents_are_read_once_and_changes_are_noticed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "a", n=3)
    spec, path = f"stream:{tmp_path / 'a'}@8", tmp_path / "a" / "train" / "b" / "001.png"
    first = load_data(spec).digest
    before, content = path.stat(), path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(stream, "opened", lambda *args: pytest.fail("read again"))
        assert load_data(spec).digest == first
    assert len(list(cache.iterdir())) == 1
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time of modification as they were
    assert load_data(spec).digest != first
    path.write_bytes(content)
    assert load_data(spec).digest == first  # of the contents, and not of the times
    for damaged in cache.iterdir():
        damaged.write_text("[]")
    assert load_data(spec).digest == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # not a folder
    assert load_data(spec).digest == first


def test_the_digest_tells_contents_sides_and_labels_apart(tmp_path: Path) -> None:
    fill(tmp_path / "a", n=3)
    fill(tmp_path / "b", n=3)
    assert load_data(f"stream:{tmp_path}/a@8").digest == load_data(f"stream:{tmp_path}/b@8").digest
    digests = {load_data(f"stream:{tmp_path}/b@{size}").digest for size in (8, 9)}
    (tmp_path / "b/train/a/002.png").rename(tmp_path / "b/train/b/000a.png")
    digests.add(load_data(f"stream:{tmp_path}/b@8").digest)
    (tmp_path / "b/test/a/000.png").unlink()
    digests.add(load_data(f"stream:{tmp_path}/b@8").digest)
    assert len(digests) == 4


# -- whole commands -----------------------------------------------------------------------------------------


def test_analyze_measures_the_same_on_streamed_images(square: Path, on_files: Tiny, tmp_path: Path) -> None:
    train_one(on_files(f"folder:{square}", epochs=1), tmp_path / "run")
    common = AnalyzeOptions(
        model="resnet_small", checkpoint=str(tmp_path / "run" / "checkpoint.pt"), images=40, m=20, device="cpu",
        metrics="gradient_norm",
    )  # fmt: skip
    for standardise in (None, "none", "0.5,0.25"):
        values = [
            analyze(replace(common, data=spec, standardise=standardise))[0]["value"]
            for spec in (f"folder:{square}", f"stream:{square}@8")
        ]
        assert values[0] == values[1]


def run_cli(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "experiments.cli", *arguments, "--out", str(folder), "--device", "cpu"]


@pytest.mark.slow
def test_compare_gives_the_same_tables_on_streamed_images(square: Path, tmp_path: Path) -> None:
    common = ["--width", "4", "--epochs", "1", "--n_train", "60", "--n_val", "20", "--seeds", "2", "--quiet"]
    common += ["--masks", "all", "--rho_grid", "0.05,0.1", "--metrics", "gradient_norm", "--images", "40"]
    out = []
    for spec, options in ((f"stream:{square}@8", ["--workers", "2"]), (f"folder:{square}", [])):
        folder = tmp_path / spec[:6]
        command = run_cli(folder, "compare", "--data", spec, "--sharpness_m", "20", *common, *options)
        subprocess.run(command, check=True, capture_output=True, text=True)
        results = [json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")]
        for result in results:
            del result["run_id"], result["config"]["data"], result["result"]["data_digest"]
        out.append(sorted(json.dumps(result, sort_keys=True) for result in results))
    assert out[0] == out[1]
    assert len(out[0]) > 4


@pytest.mark.slow
def test_ctrl_c_reaches_the_workers_too_and_nothing_is_lost(wide: Path, tmp_path: Path) -> None:
    common = ["train", "--data", f"stream:{wide}@8", "--augment", "resized_crop+flip", "--epochs", "60"]
    common += ["--n_train", "60", "--n_val", "20", "--workers", "2", "--batch_size", "16", "--width", "4"]
    subprocess.run(run_cli(tmp_path / "whole", *common), check=True, capture_output=True)
    command = run_cli(tmp_path / "cut", *common)
    ends = []
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        attempts = tmp_path / "cut.work" / "attempts.json"
        while not attempts.exists() or int(attempts.read_text()) <= len(ends):
            time.sleep(0.1)
        time.sleep(2)
        os.killpg(process.pid, number)
        error = process.communicate()[1]
        ends.append((process.returncode, error.count("\n")))
    assert ends == [(130, 1), (143, 1)]
    subprocess.run(command, check=True, capture_output=True)
    results = [(tmp_path / name / "result.json").read_bytes() for name in ("whole", "cut")]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_more_images_than_memory_may_hold(tmp_path: Path, workers: int) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "all" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((256, 256)).save(tmp_path / "all" / name / f"{i:04}.jpg")
        for i in range(10, 1000):
            (tmp_path / "all" / name / f"{i:04}.jpg").symlink_to(f"{i % 10:04}.jpg")
    code = f"""
import resource, torch
torch.set_num_threads(1)
from experiments.data import load_data
images = load_data("stream:{tmp_path / "all"}@256").images.using({workers}).cropped(0)
def kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
total = sum(x.nbytes for x in images.batches(torch.arange(100).split(20)))
before = kib()
total = sum(x.nbytes for x in images.batches(torch.arange(2000).split(20)))
print(total // 2**20, (kib() - before) // 2**10)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    streamed, grown = map(int, found.split())
    assert streamed == 1500
    assert grown < 150  # MiB, of 1500 in float32 and 375 as pixels
