from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data import load_data
from masks.errors import InputError

RNG = np.random.default_rng(1)


def put(path: Path, mode: str = "RGB", size: tuple[int, int] = (5, 4)) -> np.ndarray:
    """Write a random image (height x width) and return it as H x W x 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    if mode in ("L", "LA", "1"):
        pixels[:] = 255 * (pixels[..., :1] > 127) if mode == "1" else pixels[..., :1]
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def as_pixels(x: torch.Tensor) -> np.ndarray:
    return (x * 255).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_train_and_test_folders(tmp_path: Path, test_name: str) -> None:
    cat = [put(tmp_path / "train/cat" / name) for name in ("1.png", "2.bmp", "sub/3.PNG")]
    dog = [put(tmp_path / "train/dog/1.png")]
    test = [put(tmp_path / test_name / "dog/7.png", "RGBA")]
    (tmp_path / "train/dog/notes.txt").write_text("not an image")
    put(tmp_path / "train/dog/.hidden.png")
    put(tmp_path / "train/.thumbnails/1.png")
    data = load_data(f"folder:{tmp_path}")
    np.testing.assert_array_equal(as_pixels(data.x), np.stack(cat + dog + test))
    assert data.y.tolist() == [0, 0, 0, 1, 1]
    assert (data.num_own_test, data.class_names, data.image_shape) == (1, ("cat", "dog"), (3, 5, 4))


def test_without_own_test_split_and_a_class_called_train(tmp_path: Path) -> None:
    images = [put(tmp_path / "boat/1.png"), put(tmp_path / "train/1.png"), put(tmp_path / "train/2.png")]
    data = load_data(f"folder:{tmp_path}")
    np.testing.assert_array_equal(as_pixels(data.x), np.stack(images))
    assert (data.y.tolist(), data.num_own_test, data.class_names) == ([0, 1, 1], 0, ("boat", "train"))


def test_val_is_not_read_beside_test(tmp_path: Path) -> None:
    for part, count in (("train", 2), ("test", 3), ("val", 4)):
        for i in range(count):
            put(tmp_path / part / "a" / f"{i}.png")
    data = load_data(f"folder:{tmp_path}")
    assert (data.num_train, data.num_own_test) == (2, 3)


def test_grey_stays_grey_only_if_all_images_are(tmp_path: Path) -> None:
    grey = [put(tmp_path / "a" / f"{mode}.png", mode) for mode in ("1", "L", "LA")]
    data = load_data(f"folder:{tmp_path}")
    assert data.image_shape == (1, 5, 4)
    np.testing.assert_array_equal(as_pixels(data.x)[..., 0], np.stack(grey)[..., 0])
    colour = put(tmp_path / "a" / "z.png")
    data = load_data(f"folder:{tmp_path}")
    np.testing.assert_array_equal(as_pixels(data.x), np.stack([*grey, colour]))


def test_two_sizes_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a/1.png")
    put(tmp_path / "b/2.png", size=(5, 6))
    with pytest.raises(InputError, match=r"one size, but .*a/1\.png is 4x5 and .*b/2\.png is 6x5 \(width x height\)"):
        load_data(f"folder:{tmp_path}")


def test_missing_folders_and_images(tmp_path: Path) -> None:
    spec = f"folder:{tmp_path}"
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_data(f"{spec}/nowhere")
    with pytest.raises(InputError, match="has no folders; it must have one per class"):
        load_data(spec)
    put(tmp_path / "train/a/1.png")
    with pytest.raises(InputError, match=r"train/ but neither test/ nor val/; to go without, give folder:.*train"):
        load_data(spec)
    with pytest.raises(InputError, match=r"1\.png is not a folder"):
        load_data(f"{spec}/train/a/1.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match=r"test has no images"):
        load_data(spec)
    put(tmp_path / "test/b/1.png")
    with pytest.raises(InputError, match=r"test has class 'b', which .*train lacks"):
        load_data(spec)
    (tmp_path / "train/b").mkdir()
    with pytest.raises(InputError, match=r"class folder .*train/b has no images"):
        load_data(spec)


def test_files_that_are_not_8_bit_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a/1.png", size=(50, 50))
    path = tmp_path / "a/2.png"
    for content in (b"", b"plain text", (tmp_path / "a/1.png").read_bytes()[:2000]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"2\.png is not a readable image"):
            load_data(f"folder:{tmp_path}")
    Image.fromarray(np.full((50, 50), 1000, np.uint16)).save(path)
    with pytest.raises(InputError, match=r"2\.png has mode I;16, more than 8 bits"):
        load_data(f"folder:{tmp_path}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"1\.png is not a readable image .*2500 pixels"):
        load_data(f"folder:{tmp_path}")
