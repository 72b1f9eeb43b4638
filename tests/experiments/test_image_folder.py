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


def tiny_imagenet(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Its layout: boxes beside the training images, an unlabelled test folder, validation images in one folder."""
    train = [put(root / f"train/{c}/images/{c}_{i}.JPEG.png") for c in ("n01", "n02", "n03") for i in range(2)]
    (root / "train/n01/n01_boxes.txt").write_text("n01_0.JPEG\t0\t0\t3\t3\n")
    put(root / "test/images/test_0.png")
    val = {f"val_{i}.png": put(root / f"val/images/val_{i}.png") for i in range(4)}
    classes = {"val_0.png": "n03", "val_1.png": "n01", "val_2.png": "n03", "val_3.png": "n02"}
    lines = [f"{name}\t{c}\t0\t32\t44\t62\n" for name, c in classes.items()]
    (root / "val/val_annotations.txt").write_text("".join(lines))
    return np.stack(train), np.stack([val[f"val_{i}.png"] for i in (1, 3, 0, 2)])


def test_tiny_imagenet(tmp_path: Path) -> None:
    train, val = tiny_imagenet(tmp_path)
    data = load_data(f"folder:{tmp_path}")
    np.testing.assert_array_equal(as_pixels(data.x), np.concatenate((train, val)))
    assert data.y.tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2, 2]
    assert (data.num_own_test, data.class_names) == (4, ("n01", "n02", "n03"))


@pytest.mark.parametrize("line", ["val_9.png\tn01\t0\t0\t1\t1", "val_0.png\tn09", "val_0.png", ""])
def test_bad_annotations_are_named(tmp_path: Path, line: str) -> None:
    tiny_imagenet(tmp_path)
    path = tmp_path / "val/val_annotations.txt"
    path.write_text(f"val_1.png\tn01\t0\t0\t1\t1\n{line}\n")
    with pytest.raises(
        InputError, match=r"line 2 of .*val_annotations.txt must name a file in images/ and one of the 3"
    ):
        load_data(f"folder:{tmp_path}")
    path.write_text("")
    with pytest.raises(InputError, match=r"val_annotations.txt names no images"):
        load_data(f"folder:{tmp_path}")


def test_images_of_all_sizes_are_cut_square_and_scaled(tmp_path: Path) -> None:
    exact = put(tmp_path / "a/1.png", size=(4, 4))
    wide = put(tmp_path / "a/2.png", size=(4, 8))
    blocks = put(tmp_path / "b/3.png", size=(4, 4)).repeat(2, 0).repeat(2, 1)
    Image.fromarray(np.pad(blocks, ((3, 3), (0, 0), (0, 0)))).save(tmp_path / "b/3.png")
    grey = put(tmp_path / "b/4.png", "L", size=(40, 30))
    data = load_data(f"folder:{tmp_path}@4")
    pixels = as_pixels(data.x)
    assert pixels.shape == (4, 4, 4, 3)
    np.testing.assert_array_equal(pixels[0], exact)
    np.testing.assert_array_equal(pixels[1], wide[:, 2:6])
    # Pillow halves an image with a triangle of four pixels: 1/8, 3/8, 3/8, 1/8 (in the middle of the image).
    weights = np.array([1, 3, 3, 1]) / 8
    middle = np.einsum("i,j,ijc->c", weights, weights, blocks[1:5, 1:5].astype(float))
    np.testing.assert_allclose(pixels[2][1, 1], middle, atol=1)
    assert abs(float(pixels[3].mean()) - float(grey.mean())) < 20
    with pytest.raises(InputError, match=r"resize them, or add @SIZE to the folder, such as folder:.*@64"):
        load_data(f"folder:{tmp_path}")
    with pytest.raises(InputError, match="the side after @ must be from 1 to 4096 pixels, found 0"):
        load_data(f"folder:{tmp_path}@0")


def test_a_folder_may_have_an_at_sign_in_its_name(tmp_path: Path) -> None:
    image = put(tmp_path / "set@8/a/1.png")
    np.testing.assert_array_equal(as_pixels(load_data(f"folder:{tmp_path}/set@8").x)[0], image)
    assert load_data(f"folder:{tmp_path}/set@8@3").image_shape == (3, 3, 3)
    with pytest.raises(InputError, match=r"set@x does not exist"):
        load_data(f"folder:{tmp_path}/set@x")


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
