"""Settings of a run beside its mask and method: each against a loop or a formula written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import train
from experiments.build import initial_model
from experiments.config import RunConfig
from experiments.data import ImageSet
from experiments.measure import MeasureConfig, measure, observe
from experiments.models import ResNetSmall
from experiments.train import train_run
from masks import Mask, MaskContext, ParamTable
from masks.errors import InputError
from sam import SAM
from tests.experiments.by_hand import Watch, fresh, is_norm, plain_loop, same_weights

CPU = torch.device("cpu")
Tiny = Callable[..., RunConfig]
STEPS = 4
"""Per epoch: 100 images in batches of 32."""


# -- learning rate and radius -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_the_learning_rate_of_every_step(tiny: Tiny, watched: Watch, schedule: str, warmup: int) -> None:
    _, steps = watched(tiny(mask="all", rho=0.1, epochs=6, schedule=schedule, warmup=warmup))
    total, before = 6 * STEPS, warmup * STEPS
    wanted = []
    for t in range(total):
        share = {
            "cosine": (1 + math.cos(math.pi * (t - before) / (total - before))) / 2,
            "step": 1.0 if t < 12 else 0.1 if t < 18 else 0.01,
            "constant": 1.0,
        }[schedule]
        wanted.append(0.1 * ((t + 1) / (before + 1) if t < before else share))
    assert steps.lr == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("mask", ["all", "norm", "random"])
def test_the_radius_follows_the_learning_rate(tiny: Tiny, watched: Watch, mask: str) -> None:
    _, steps = watched(tiny(mask=mask, rho=0.3, rho_min=0.1, epochs=3, warmup=1))
    assert steps.radius == pytest.approx([0.1 + 0.2 * lr / 0.1 for lr in steps.lr], rel=1e-4)
    assert min(steps.radius) < 0.15
    assert max(steps.radius) > 0.29
    _, constant = watched(tiny(mask=mask, rho=0.3, epochs=3, warmup=1))
    assert constant.radius == pytest.approx([0.3] * 12, rel=1e-4)
    assert constant.lr == steps.lr


# -- the window ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "inside"), [("1..3", (1, 2)), ("2..", (2, 3)), ("..1", (0,))])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_outside_the_window_the_base_optimizer_steps_and_inside_sam(
    tiny: Tiny, digits: ImageSet, window: str, inside: tuple[int, ...], optimizer: str
) -> None:
    config = tiny(mask="all", rho=0.2, epochs=4, sam_epochs=window, optimizer=optimizer, lr=0.01)
    with torch.random.fork_rng(devices=[]):
        model, split, batches = fresh(config, digits)
    table = ParamTable.from_model(model)
    base: torch.optim.Optimizer
    if optimizer == "sgd":
        base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    else:
        base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=5e-4)
    sam = SAM(base, model, mask=Mask(table, (True,) * len(table)), rho=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=len(batches))
    x = split.train_x.to(memory_format=torch.channels_last)
    model.train()
    radii = []
    for t, index in enumerate(batches):
        xs, ys = x[index], split.train_y[index]
        if t // STEPS in inside:
            sam.step_on(lambda b: F.cross_entropy(model(b[0]), b[1], reduction="none"), (xs, ys))
            assert sam.stats is not None
            radii.append(float(sam.stats.radius))
        else:
            base.zero_grad()
            F.cross_entropy(model(xs), ys, reduction="none").mean().backward()
            base.step()
            radii.append(0.0)
        schedule.step()
    trained = train_run(config, CPU)
    assert same_weights(trained.model, model)
    assert [e.radius for e in trained.history] == pytest.approx(np.array(radii).reshape(4, STEPS).mean(1), rel=1e-9)
    assert [e.radius > 0 for e in trained.history] == [epoch in inside for epoch in range(4)]
    assert [e.ascent == 0 for e in trained.history] == [epoch not in inside for epoch in range(4)]
    everywhere = train_run(replace(config, sam_epochs=""), CPU)
    assert not same_weights(trained.model, everywhere.model)


# -- the gradient and the loss ------------------------------------------------------------------------------


def test_the_gradient_is_clipped_before_the_base_optimizer_steps(tiny: Tiny, digits: ImageSet) -> None:
    config = tiny(mask="none", clip_grad_norm=0.3)
    with torch.random.fork_rng(devices=[]):
        model, _, _ = plain_loop(config, digits)
        free, _, _ = plain_loop(replace(config, clip_grad_norm=None), digits)
    trained = train_run(config, CPU).model
    for p, q, other in zip(trained.parameters(), model.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert (p - other).abs().max() > 1e-4


def test_clipping_bounds_the_step_and_leaves_the_perturbation_alone(tiny: Tiny, digits: ImageSet) -> None:
    changes = {"mask": "all", "rho": 0.4, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    config = tiny(clip_grad_norm=0.01, n_train=32, epochs=1, **changes)
    before, trained = initial_model(config, digits), train_run(config, CPU)
    moved = torch.cat([(p - q).flatten() for p, q in zip(before.parameters(), trained.model.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # one step
    assert trained.history[0].radius == pytest.approx(0.4, rel=1e-5)


def test_label_smoothing_is_of_the_training_loss_only(tiny: Tiny, digits: ImageSet) -> None:
    config = tiny(mask="all", rho=0.1, label_smoothing=0.4, epochs=6)
    smooth, plain = train_run(config, CPU), train_run(replace(config, label_smoothing=0.0), CPU)
    assert not same_weights(smooth.model, plain.model)
    split = smooth.split
    with torch.no_grad():
        logits = smooth.model(split.train_x).double()
    logp = logits.log_softmax(1)
    own = -logp.gather(1, split.train_y[:, None]).mean().item()
    found = measure(smooth, MeasureConfig(images=64, sharpness_m=16, metrics=""), CPU)
    assert found["fit"]["train_loss"] == pytest.approx(own, rel=1e-5)
    # Training saw 0.6 of that and 0.4 of the mean over classes, at the weights of each step.
    with torch.random.fork_rng(devices=[]):
        _, losses, _ = plain_loop(replace(config, mask="none"), digits)
    assert train_run(replace(config, mask="none"), CPU).history[0].loss == pytest.approx(losses[0], rel=1e-12)
    still = train_run(replace(config, mask="none", lr=0.0, weight_decay=0.0, epochs=1, batch_size=100), CPU)
    model = initial_model(config, digits).train()
    with torch.no_grad():
        logp = model(split.train_x).log_softmax(1)
    own, all_classes = -logp.gather(1, split.train_y[:, None]).mean(), -logp.mean()
    assert still.history[0].loss == pytest.approx(float(0.6 * own + 0.4 * all_classes), rel=1e-5)


def test_scores_are_of_the_plain_loss(tiny: Tiny) -> None:
    one, other = (train_run(tiny(mask="gradient@init", label_smoothing=s), CPU) for s in (0.0, 0.4))
    assert one.builds == other.builds  # the mask of the initial weights knows nothing of smoothing


# -- what is trained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [{"model": "resnet_small"}, {"model": "vit_small", "width": 16}])
@pytest.mark.parametrize(
    ("trainable", "mask"), [("norm", "all"), ("norm", "norm"), ("no_norm", "all"), ("no_norm", "random")]
)
def test_frozen_parameters_keep_their_bits_and_no_mask_has_them(
    tiny: Tiny, digits: ImageSet, net: dict[str, Any], trainable: str, mask: str
) -> None:
    config = tiny(trainable=trainable, mask=mask, rho=0.3, density=0.2, weight_decay=0.1, **net)
    before, trained = initial_model(config, digits), train_run(config, CPU)
    moved = {name for name, p in trained.model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    wanted = {name for name, _ in before.named_parameters() if is_norm(name, before) == (trainable == "norm")}
    assert moved == wanted
    assert {row.name for row in trained.mask.table} == wanted
    assert set(trained.builds[-1].kept_per_tensor) <= wanted
    assert trained.builds[-1].numel == sum(before.get_parameter(name).numel() for name in wanted)
    assert trained.history[-1].radius == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "no_norm", "mask": "norm"}, "none of the model's .* trainable tensors belongs to a normaliz"),
        ({"trainable": "no_norm", "mask": "random"}, "mask norm: none of the model's .* trainable tensors"),
        ({"trainable": "norm", "mask": "no_norm"}, "mask no_norm keeps none of the 72 trainable coordinates"),
        ({"trainable": "norm", "model": "mlp", "mask": "all"}, "leaves nothing to train"),
        ({"trainable": "norm", "mask": "random:exclude_norm=true"}, "eligible"),
    ],
)
def test_a_mask_of_frozen_parameters_is_refused_before_training(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(SAM, "step_on", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(InputError, match=message) as caught:
        train_run(tiny(**changes), CPU)
    assert "\n" not in str(caught.value)


# -- augmentation -------------------------------------------------------------------------------------------


AUGMENT = "crop=2+flip+cutout=4"


def test_every_arm_of_a_seed_sees_the_same_augmented_images(tiny: Tiny, watched: Watch) -> None:
    _, base = watched(tiny(mask="none", augment=AUGMENT))
    _, plain = watched(tiny(mask="none"))
    for (x, y), (raw, labels) in zip(base.batches, plain.batches, strict=True):
        assert torch.equal(y, labels)
        assert x.shape == raw.shape
        assert not torch.equal(x, raw)
    for arm in (
        {"mask": "all"},
        {"mask": "random"},
        {"mask": "fisher"},
        {"method": "ssam_d"},
        {"method": "esam", "mask": "all"},
        {"method": "universal_sam", "mask": "norm", "rho": 0.01},
    ):
        _, steps = watched(tiny(augment=AUGMENT, **arm))
        assert len(steps.batches) == len(base.batches)
        for (x, y), (x_base, y_base) in zip(steps.batches, base.batches, strict=True):
            assert torch.equal(x, x_base), arm
            assert torch.equal(y, y_base), arm
    _, other = watched(tiny(mask="none", augment=AUGMENT, seed=1))
    assert not torch.equal(other.batches[0][0], base.batches[0][0])


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, Tensor]]:
    """Everything that a net is shown, and whether it is in training mode."""
    seen: list[tuple[bool, Tensor]] = []
    original = ResNetSmall.forward

    def forward(net: ResNetSmall, x: Tensor) -> Tensor:
        seen.append((net.training, x.detach().clone()))
        return original(net, x)

    monkeypatch.setattr(ResNetSmall, "forward", forward)
    return seen


def test_both_passes_see_one_batch_and_nothing_else_is_augmented(tiny: Tiny, inputs: list[tuple[bool, Tensor]]) -> None:
    config = tiny(mask="gradient@every=1", rho=0.1, augment=AUGMENT, measure_every=1)
    measured = MeasureConfig(images=64, sharpness_m=16)
    trained = train_run(config, CPU, observer=lambda model, split: observe(model, split, config.seed, measured, CPU))
    measure(trained, measured, CPU)
    split = trained.split
    known = {image.numpy().tobytes() for part in (split.train_x, split.val_x, split.test_x) for image in part}

    def raw(x: Tensor) -> list[bool]:
        return [image.contiguous().numpy().tobytes() in known for image in x]

    # The model is shown two images twice, to see that it takes them; then every batch is seen twice.
    passes = [x for mode, x in inputs[2:] if mode]
    assert len(passes) == 2 * 2 * STEPS
    for first, second in zip(passes[::2], passes[1::2], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(passes[0], passes[2 * STEPS])  # anew in every epoch
    others = [x for mode, x in inputs[2:] if not mode]
    assert sum(len(x) for x in others) > 500  # scores, twice; validation; metrics, along the way and at the end; test
    assert all(all(raw(x)) for x in others)


def test_scores_are_taken_on_the_same_images_with_and_without_augmentation(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def context(*args: Any, **kwargs: Any) -> MaskContext:
        seen.append(torch.cat([x for x, _ in kwargs["batches"]]))
        return MaskContext(*args, **kwargs)

    monkeypatch.setattr(train, "MaskContext", context)
    for augment in ("none", AUGMENT):
        train_run(tiny(mask="fisher@init", augment=augment), CPU)
    assert torch.equal(*seen)


def test_augmentation_that_does_not_fit_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="does not fit images of 8x8: crop must be below 8"):
        train_run(tiny(augment="crop=8"), CPU)


def test_recorded_steps_need_a_cuda_device(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="cuda_graph records steps of a CUDA device, and this run is on cpu"):
        train_run(tiny(cuda_graph=True), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask", ["norm", "magnitude"])
def test_recorded_steps_train_as_others_do(tiny: Tiny, mask: str) -> None:
    found = [train_run(tiny(cuda_graph=on, mask=mask, epochs=3), torch.device("cuda")) for on in (False, True)]
    eager, recorded = ([epoch.loss for epoch in trained.history] for trained in found)
    np.testing.assert_allclose(recorded, eager, rtol=1e-3)


# -- precision ----------------------------------------------------------------------------------------------


def test_bf16_is_autocast_around_the_model_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16; loss, weights, gradients, momentum, perturbation and backup in float32."""
    seen: list[torch.dtype] = []
    linear, cross_entropy = F.linear, F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda x, *rest, **kw: (seen.append(x.dtype), cross_entropy(x, *rest, **kw))[1]
    )
    products: list[torch.dtype] = []

    def noted(*args: Any) -> Tensor:
        products.append(linear(*args).dtype)
        return linear(*args)

    monkeypatch.setattr(F, "linear", noted)
    trained = train_run(tiny(mask="norm", precision="bf16"), CPU)
    assert seen == [torch.float32] * (2 * 2 * STEPS)  # two passes in each step of two epochs
    assert products.count(torch.bfloat16) == len(seen)
    assert products[-1] == torch.float32  # of the validation images
    state = trained.sam.state
    held = [t for p in trained.model.parameters() for t in (p, p.grad, state[p]["momentum_buffer"])]
    assert {t.dtype for t in [*held, *trained.sam._region.save()]} == {torch.float32}


def test_bf16_is_another_run_that_ends_near_the_first(tiny: Tiny) -> None:
    plain, half, again = (train_run(tiny(mask="all", rho=0.1, precision=p), CPU) for p in ("float32", "bf16", "bf16"))
    assert same_weights(half.model, again.model)
    assert half.history == again.history
    assert not same_weights(plain.model, half.model)
    # Eight bits of mantissa: a relative error of 2^-9 per rounding.
    assert half.history[0].loss == pytest.approx(plain.history[0].loss, rel=0.02)
    assert half.history[0].loss != plain.history[0].loss
    results = [train.result_of(trained) for trained in (plain, half)]
    assert ["measured_in" in result for result in results] == [False, True]
    assert results[1]["measured_in"] == "float32"


# -- memory layout ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 3], ids=["gray", "colour"])
def images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of 8x8 images with so many channels."""
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (200, 8, 8, request.param), dtype=np.uint8), np.arange(200) % 10
    file = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(file, x_train=x[:140], y_train=y[:140], x_test=x[140:], y_test=y[140:])
    return f"npz:{file}"


@pytest.mark.parametrize("augment", ["none", "crop=1+flip", "flip+autoaugment+cutout=2"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_training_runs_in_the_layout_that_was_asked_for(
    tiny: Tiny, images: str, channels_last: bool, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    conv2d = F.conv2d

    def noted(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
        out = conv2d(x, weight, *rest, **named)
        if torch.is_grad_enabled() and weight.requires_grad:  # neither in validation nor in augmentation
            seen.extend(t for t in (x, weight, out) if min(t.shape[1:]) > 1)  # others are of both layouts
        return out

    monkeypatch.setattr(F, "conv2d", noted)
    train_run(tiny(data=images, mask="norm", channels_last=channels_last, augment=augment, epochs=1), CPU)
    assert len(seen) > 50
    layouts = {(t.is_contiguous(), t.is_contiguous(memory_format=torch.channels_last)) for t in seen}
    assert layouts == {(not channels_last, channels_last)}


@pytest.mark.parametrize("model", ["resnet_small", "vit_small"])
def test_the_layout_changes_nothing_but_roundings(tiny: Tiny, images: str, model: str) -> None:
    config = tiny(
        data=images, model=model, width=16, n_train=64, batch_size=64, mask="all", rho=0.1, augment="crop=1+flip"
    )
    last, first, again = (train_run(replace(config, channels_last=on), CPU) for on in (True, False, False))
    assert same_weights(first.model, again.model)
    assert first.history[0].loss == pytest.approx(last.history[0].loss, rel=1e-6)  # of one step
    assert first.history[0].ascent == pytest.approx(last.history[0].ascent, rel=1e-3)
    for p, q in zip(first.model.parameters(), last.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
