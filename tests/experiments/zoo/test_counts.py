"""Parameter counts of the built-in architectures: published ones as literals, and from formulas."""

import pytest
import torch

from experiments.models import build_model
from masks.params import ParamTable


def table(spec: str, num_classes: int = 10, *, image_size: tuple[int, int] = (32, 32), channels: int = 3) -> ParamTable:
    with torch.device("meta"):
        model = build_model(spec, in_channels=channels, image_size=image_size, num_classes=num_classes)
    return ParamTable.from_model(model)


PUBLISHED = {  # name, classes: millions as printed
    ("resnet20", 10): "0.27",  # He et al. 2016, table 6
    ("resnet56", 10): "0.85",  # He et al. 2016, table 6
    ("wrn28_10", 10): "36.5",  # Zagoruyko and Komodakis 2016, table 4
    ("wrn16_4", 10): "2.7",  # Zagoruyko and Komodakis 2016, table 6
    ("wrn28_10", 100): "36.5",
    ("resnext29_8x64d", 10): "34.4",  # Xie et al. 2017, table 7
    ("resnet18", 10): "11.17",  # commonly quoted for the CIFAR variant
    ("vgg16_bn", 10): "14.7",  # commonly quoted for the CIFAR variant
}


@pytest.mark.parametrize(("name", "num_classes"), PUBLISHED)
def test_published_counts(name: str, num_classes: int) -> None:
    text = PUBLISHED[name, num_classes]
    last_digit = 10 ** -len(text.partition(".")[2])
    # Papers round some numbers and cut others off.
    assert abs(table(name, num_classes).numel / 1e6 - float(text)) < last_digit


def test_the_count_that_the_paper_rests_on() -> None:
    wide = table("wrn28_10", 100)
    norms = sum(row.numel for row in wide if row.is_norm)
    assert norms == 17_952
    assert wide.numel == 36_536_884
    assert round(100 * (1 - norms / wide.numel), 2) == 99.95


def conv(inputs: int, outputs: int, size: int, groups: int = 1) -> int:
    return size * size * inputs * outputs // groups


def norm(*channels: int) -> int:
    return 2 * sum(channels)


def basic_resnet(width: int, blocks: tuple[int, ...], num_classes: int, option_b: bool) -> int:
    total, inputs = conv(3, width, 3) + norm(width), width
    for stage, count in enumerate(blocks):
        outputs = width * 2**stage
        for _ in range(count):
            total += conv(inputs, outputs, 3) + conv(outputs, outputs, 3) + norm(outputs, outputs)
            if inputs != outputs and option_b:
                total += conv(inputs, outputs, 1) + norm(outputs)
            inputs = outputs
    return total + (inputs + 1) * num_classes


def wide_resnet(depth: int, k: int, num_classes: int) -> int:
    total, inputs = conv(3, 16, 3), 16
    for outputs in (16 * k, 32 * k, 64 * k):
        for _ in range((depth - 4) // 6):
            total += norm(inputs, outputs) + conv(inputs, outputs, 3) + conv(outputs, outputs, 3)
            total += conv(inputs, outputs, 1) if inputs != outputs else 0
            inputs = outputs
    return total + norm(inputs) + (inputs + 1) * num_classes


def resnext(cardinality: int, d: int, num_classes: int) -> int:
    total, inputs = conv(3, 64, 3) + norm(64), 64
    for stage in range(3):
        inner, outputs = cardinality * d * 2**stage, 256 * 2**stage
        for _ in range(3):
            total += conv(inputs, inner, 1) + conv(inner, inner, 3, cardinality) + conv(inner, outputs, 1)
            total += norm(inner, inner, outputs)
            total += conv(inputs, outputs, 1) + norm(outputs) if inputs != outputs else 0
            inputs = outputs
    return total + (inputs + 1) * num_classes


def vgg16(num_classes: int) -> int:
    total, inputs = 0, 3
    for outputs in (64, 64, 128, 128, *[256] * 3, *[512] * 6):
        total += conv(inputs, outputs, 3) + norm(outputs)
        inputs = outputs
    return total + (inputs + 1) * num_classes


def vit(d: int, patch: int, tokens: int, num_classes: int) -> int:
    block = norm(d, d) + 3 * d * (d + 1) + d * (d + 1) + 4 * d * (d + 1) + d * (4 * d + 1)
    return (3 * patch**2 + 1) * d + d + (tokens + 1) * d + 12 * block + norm(d) + (d + 1) * num_classes


@pytest.mark.parametrize("num_classes", [10, 100])
def test_counts_from_formulas(num_classes: int) -> None:
    expected = {
        "resnet18": basic_resnet(64, (2, 2, 2, 2), num_classes, True),
        "resnet20": basic_resnet(16, (3, 3, 3), num_classes, False),
        "resnet56": basic_resnet(16, (9, 9, 9), num_classes, False),
        "wrn16_4": wide_resnet(16, 4, num_classes),
        "wrn28_10": wide_resnet(28, 10, num_classes),
        "resnext29_32x4d": resnext(32, 4, num_classes),
        "resnext29_8x64d": resnext(8, 64, num_classes),
        "vgg16_bn": vgg16(num_classes),
        "vit_t": vit(192, 4, 64, num_classes),
        "vit_s": vit(384, 4, 64, num_classes),
    }
    assert {name: table(name, num_classes).numel for name in expected} == expected
    assert expected["resnet18"] == 11_173_962 + 513 * (num_classes - 10)
    assert expected["resnet20"] == 269_722 + 65 * (num_classes - 10)


def test_patches_and_images_of_another_size() -> None:
    assert table("vit_t:patch=8", image_size=(64, 64)).numel == vit(192, 8, 64, 10)
    assert table("vit_s", image_size=(64, 48)).numel == vit(384, 4, 192, 10)
    for name, millions in (("vit_t", 5.7), ("vit_s", 22.1)):  # DeiT-Ti and DeiT-S, Touvron et al. 2021, table 1
        numel = table(f"{name}:patch=16", 1000, image_size=(224, 224)).numel
        assert round(numel / 1e6, 1) == pytest.approx(millions, abs=0.051)


def test_counts_without_normalization() -> None:
    """A bias for each shift, no scales, and one gain per block."""
    for name, blocks in (("resnet18", 8), ("resnet56", 27)):
        batch, none = table(name), table(f"{name}:norm=none")
        shifts = sum(row.numel for row in batch if row.role == "norm_bias")
        assert none.numel == batch.numel - shifts + blocks
        assert sum(row.numel for row in none if row.is_bias) == shifts + 10
    wide = table("wrn16_4:norm=none")
    assert sum(row.module_type == "Gain" and row.role == "weight" for row in wide) == 6
    assert not any(row.is_norm for row in wide)


def test_a_larger_image_changes_no_count_of_a_convolutional_net() -> None:
    for name in ("resnet18", "wrn16_4", "vgg16_bn", "resnext29_32x4d"):
        assert table(name).numel == table(name, image_size=(64, 64)).numel
