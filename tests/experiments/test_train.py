"""One run: against loops written here, paired across masks, and blind to the test images."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import build as parts
from experiments import train
from experiments.build import budget_of, initial_model, load_weights, pick_device, sample_of
from experiments.config import RunConfig
from experiments.data import ImageSet
from experiments.seeds import derive_seed
from experiments.split import Split, make_split
from experiments.train import number_of_steps, result_of, train_run
from masks import BuilderError, Mask, MaskContext, MaskSpec, mask_info, register_mask, registry
from masks.errors import InputError
from sam import SAM
from sam.perturbation import Rule
from tests.experiments.by_hand import Watch, plain_loop, same_weights

CPU = torch.device("cpu")
Tiny = Callable[..., RunConfig]
SCORED = ["magnitude:exclude_norm=true", "fisher:exclude_norm=true", "snip", "gradient"]
MASKS = ["none", "all", "no_norm", "norm", "random", "random_depth", *SCORED]


# -- deterministic, and paired ------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "norm", "random", "fisher"])
def test_the_same_configuration_gives_bitwise_the_same_run_whatever_happened_before(tiny: Tiny, mask: str) -> None:
    one = train_run(tiny(mask=mask), CPU)
    train_run(tiny(mask="random", seed=5), CPU)
    torch.manual_seed(99)
    np.random.seed(99)
    other = train_run(tiny(mask=mask), CPU)
    assert same_weights(one.model, other.model)
    assert result_of(one) == result_of(other)
    assert not same_weights(one.model, train_run(tiny(mask=mask, seed=1), CPU).model)


def test_global_random_states_are_left_alone(tiny: Tiny) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    train_run(tiny(mask="fisher:labels=model"), CPU)
    train_run(tiny(mask="random", model="vit_small", width=16), CPU)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]
    assert before[2] == random.getstate()


def test_arms_of_a_seed_start_from_the_same_weights_and_see_the_same_batches(tiny: Tiny, watched: Watch) -> None:
    _, base = watched(tiny(mask="none"))
    assert len(base.batches) == 2 * 4  # 100 images in batches of 32, twice
    assert [len(y) for _, y in base.batches] == [32, 32, 32, 4] * 2
    for mask in MASKS[1:]:
        _, steps = watched(tiny(mask=mask))
        assert base.first.keys() == steps.first.keys()
        assert all(torch.equal(base.first[key], steps.first[key]) for key in base.first), mask
        assert len(steps.batches) == len(base.batches)
        for (x, y), (x_base, y_base) in zip(steps.batches, base.batches, strict=True):
            assert torch.equal(x, x_base)
            assert torch.equal(y, y_base)
        # Dropout draws from this stream: it must stand at the same place in every arm.
        assert all(torch.equal(a, b) for a, b in zip(base.rng, steps.rng, strict=True)), mask
    _, other = watched(tiny(mask="none", seed=1))
    assert not torch.equal(base.batches[0][0], other.batches[0][0])
    assert not torch.equal(base.first["stem.0.weight"], other.first["stem.0.weight"])


def test_every_epoch_has_each_training_image_once_in_a_new_order(tiny: Tiny, watched: Watch) -> None:
    trained, steps = watched(tiny(mask="none"))
    epochs = [torch.cat([x for x, _ in steps.batches[i : i + 4]]) for i in (0, 4)]
    labels = [torch.cat([y for _, y in steps.batches[i : i + 4]]) for i in (0, 4)]
    assert not torch.equal(*epochs)
    key = trained.split.train_x.flatten(1).double() @ torch.arange(64.0, dtype=torch.float64)
    for x, y in zip(epochs, labels, strict=True):
        found = x.flatten(1).double() @ torch.arange(64.0, dtype=torch.float64)
        order, wanted = found.argsort(), key.argsort()
        torch.testing.assert_close(found[order], key[wanted])
        assert torch.equal(y[order], trained.split.train_y[wanted])  # the noisy labels, image by image
    assert not torch.equal(trained.split.train_y, trained.split.train_y_clean)


def test_dropout_is_paired_across_arms(in_folder: Path, tiny: Tiny) -> None:
    (in_folder / "dropped_net.py").write_text(
        "import torch\nfrom torch import nn\n\nseen = []\n\nclass Drop(nn.Dropout):\n    def forward(self, x):\n"
        "        out = super().forward(x)\n        if self.training and torch.is_grad_enabled():\n"
        "            seen.append((out == 0).flatten().tolist())\n        return out\n\n"
        "def make(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16), Drop(0.5),"
        " nn.Linear(16, num_classes))\n"
    )
    drawn = {}
    for mask in ("none", "all", "random", "fisher"):
        import dropped_net  # type: ignore[import-not-found]

        dropped_net.seen.clear()
        train_run(tiny(model="dropped_net:make", width=None, mask=mask, epochs=1), CPU)
        drawn[mask] = list(dropped_net.seen)
    assert len(drawn["none"]) == 4
    assert drawn["none"][0] != drawn["none"][1]
    for mask in ("all", "random", "fisher"):
        assert drawn[mask] == [step for step in drawn["none"] for _ in range(2)]  # both passes of a step


# -- against loops written here -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 4},
        {"epochs": 2, "tuning": True, "seed": 7},
        {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.1},
        {"model": "vit_small", "width": 16},
        {"model": "mlp", "width": 8, "momentum": 0.0, "weight_decay": 0.0},
        {"weight_decay": 0.1, "norm_weight_decay": False},
        {"weight_decay": 0.1, "norm_weight_decay": False, "optimizer": "adamw", "model": "vit_small", "width": 16},
        {"label_smoothing": 0.3},
        {"clip_grad_norm": 1e6},
    ],
)
def test_mask_none_is_the_base_optimizer_bit_for_bit(tiny: Tiny, digits: ImageSet, changes: dict[str, Any]) -> None:
    config = tiny(mask="none", rho=3.0, **changes)
    with torch.random.fork_rng(devices=[]):
        model, losses, right = plain_loop(config, digits)
    trained = train_run(config, CPU)
    assert same_weights(trained.model, model)
    assert [epoch.loss for epoch in trained.history] == pytest.approx(losses, rel=1e-12)
    assert trained.val_accuracy == right
    assert [(e.ascent, e.radius) for e in trained.history] == [(0, 0)] * config.epochs
    assert [b.num_kept for b in trained.builds] == [0]
    assert not trained.model.training


def test_rho_zero_is_the_base_optimizer_and_a_radius_is_not(tiny: Tiny) -> None:
    base = train_run(tiny(mask="none"), CPU)
    # Running statistics come from the first pass in both; the gradient from w + 0 in the second.
    assert same_weights(train_run(tiny(mask="all", rho=0.0), CPU).model, base.model)
    assert not same_weights(train_run(tiny(mask="all", rho=0.05), CPU).model, base.model)


def test_one_epoch_of_sam_by_hand(tiny: Tiny, digits: ImageSet) -> None:
    """SGD without momentum on a net without normalization, SAM written out in float64."""
    rho, lr = 0.3, 0.1
    changes = {"mask": "all", "rho": rho, "model": "mlp", "width": 8, "momentum": 0.0, "weight_decay": 0.0}
    config = tiny(epochs=1, lr=lr, **changes)
    model = initial_model(config, digits).double()
    split = make_split(digits, seed=0, n_train=100, n_val=30, n_test=50, label_noise=0.2)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(derive_seed(0, "order")))
    params = list(model.parameters())
    losses, ascents = [], []
    for step, index in enumerate(order.split(32)):
        x, y = split.train_x[index].double(), split.train_y[index]
        loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, params)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        moved = [p.detach() + rho * g / norm for p, g in zip(params, grads, strict=True)]
        names = [name for name, _ in model.named_parameters()]
        for p in moved:
            p.requires_grad_()
        high = F.cross_entropy(torch.func.functional_call(model, dict(zip(names, moved, strict=True)), (x,)), y)
        second = torch.autograd.grad(high, moved)
        rate = lr * (1 + np.cos(np.pi * step / 4)) / 2
        with torch.no_grad():
            for p, g in zip(params, second, strict=True):
                p -= rate * g
        losses.append(loss.item())
        ascents.append((high - loss).item())
    trained = train_run(config, CPU)
    for p, q in zip(trained.model.parameters(), params, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5)
    assert trained.history[0].loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert trained.history[0].ascent == pytest.approx(np.mean(ascents), rel=1e-3)
    assert trained.history[0].radius == pytest.approx(rho, rel=1e-5)


def test_the_learning_rate_falls_to_zero_over_the_steps_of_the_run(tiny: Tiny, watched: Watch) -> None:
    trained, steps = watched(tiny(mask="random", epochs=3))
    wanted = [0.1 * (1 + np.cos(np.pi * t / 12)) / 2 for t in range(12)]
    assert steps.lr == pytest.approx(wanted, rel=1e-6)
    assert trained.sam.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n_train", [2, 31, 32, 33, 34, 64, 65])
def test_the_number_of_steps_is_known_before(tiny: Tiny, watched: Watch, n_train: int) -> None:
    config = tiny(mask="none", model="mlp", width=2, n_train=n_train, label_noise=0.0)
    trained, steps = watched(config)
    assert len(steps.batches) == number_of_steps(config, n_train)
    assert min(len(y) for _, y in steps.batches) > 1
    assert len(trained.split.train_y) == n_train


# -- masks: when, which, how many ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "built_at"),
    [
        ("norm", [(0, 0)]),
        ("random", [(0, 0)]),
        ("fisher", [(0, 0), (1, 4), (2, 8)]),
        ("magnitude", [(0, 0), (1, 4), (2, 8)]),
        ("magnitude@every=2", [(0, 0), (2, 8)]),
        ("magnitude@init", [(0, 0)]),
        ("magnitude@after=2", [(2, 8)]),
        ("gradient@after=5steps", [(1, 5)]),
        ("snip@every=3steps", [(0, 0), (0, 3), (1, 6), (2, 9)]),
        ("random@every=1", [(0, 0), (1, 4), (2, 8)]),
    ],
)
def test_a_mask_is_built_when_its_schedule_says(
    tiny: Tiny, watched: Watch, mask: str, built_at: list[tuple[int, int]]
) -> None:
    trained, steps = watched(tiny(mask=mask, epochs=3, rho=0.1))
    assert [(build.epoch, build.step) for build in trained.builds] == built_at
    kept = trained.builds[0].num_kept
    assert steps.kept == [0] * built_at[0][1] + [kept] * (12 - built_at[0][1])
    assert steps.radius[: built_at[0][1]] == [0] * built_at[0][1]
    assert min(steps.radius[built_at[0][1] :]) > 0
    if len(built_at) > 1:
        assert len({build.digest for build in trained.builds}) == len(built_at)  # and not built of stale weights
    assert trained.builds[-1].digest == trained.mask.digest()
    epoch, step = built_at[-1]
    assert trained.mask.provenance.built_at == f"epoch {epoch}, step {step}"


def test_until_a_late_mask_is_built_the_run_is_the_base_optimizers(tiny: Tiny) -> None:
    base, late = train_run(tiny(mask="none", epochs=3), CPU), train_run(tiny(mask="all@after=2", epochs=3), CPU)
    assert late.history[:2] == base.history[:2]
    assert late.history[2] != base.history[2]


@pytest.mark.parametrize("mask", ["norm@after=2", "norm@after=3", "norm@after=8steps"])
def test_a_mask_that_would_never_be_built_is_refused(tiny: Tiny, mask: str) -> None:
    with pytest.raises(InputError, match=rf"mask {mask} would never be built: the run ends after (2 epochs|8 steps)"):
        train_run(tiny(mask=mask), CPU)


def test_a_magnitude_mask_is_that_of_the_weights_at_its_building(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[dict[str, Tensor]] = []
    original = SAM.set_mask

    def set_mask(sam: SAM, mask: Mask) -> None:
        if mask.num_kept:
            weights.append({name: p.detach().clone() for name, p in sam.model.named_parameters()})
        original(sam, mask)

    monkeypatch.setattr(SAM, "set_mask", set_mask)
    trained = train_run(tiny(mask="magnitude:exclude_norm=true", epochs=3), CPU)
    assert len(weights) == len(trained.builds) == 3
    norm = {
        f"{n}.{p}"
        for n, m in trained.model.named_modules()
        if isinstance(m, nn.BatchNorm2d)
        for p in ("weight", "bias")
    }
    for state, build in zip(weights, trained.builds, strict=True):
        free = {name: w.abs().flatten() for name, w in state.items() if name not in norm}
        flat = torch.cat(list(free.values()))
        threshold = flat.sort(descending=True).values[build.num_kept - 1]
        assert build.kept_per_tensor == {
            n: int((w >= threshold).sum()) for n, w in free.items() if (w >= threshold).any()
        }


@pytest.mark.parametrize("mask", MASKS)
def test_the_anatomy_in_the_record_is_the_masks(tiny: Tiny, mask: str) -> None:
    trained = train_run(tiny(mask=mask, rho=0.1), CPU)
    params = dict(trained.model.named_parameters())
    norm = {
        name
        for module_name, module in trained.model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name in (f"{module_name}.weight", f"{module_name}.bias")
    }
    kept = {row.name: part for row, part in zip(trained.mask.table, trained.mask.dense(), strict=True)}
    assert set(kept) == set(params)
    counts = {name: int(part.sum()) for name, part in kept.items() if part.any()}
    build = trained.builds[-1]
    total, in_norm = sum(counts.values()), sum(c for n, c in counts.items() if n in norm)
    all_norm = sum(params[n].numel() for n in norm)
    assert build.kept_per_tensor == counts
    assert (build.num_kept, build.numel) == (total, sum(p.numel() for p in params.values()))
    assert build.num_tensors == len(counts)
    assert build.norm_share == (in_norm / total if total else None)
    assert build.jaccard_norm == in_norm / (total + all_norm - in_norm)
    budgeted = mask_info(mask.partition(":")[0]).kind == "budgeted"
    if budgeted:  # exactly the norm mask's count, at every building
        assert {b.num_kept for b in trained.builds} == {all_norm}
    if "exclude_norm" in mask or mask == "random_depth":
        assert in_norm == 0


@pytest.mark.parametrize("mask", ["random", *SCORED])
def test_a_density_is_kept_exactly(tiny: Tiny, mask: str) -> None:
    trained = train_run(tiny(mask=mask, density=0.137, epochs=1, rho=0.1), CPU)
    numel = sum(p.numel() for p in trained.model.parameters())
    assert {b.num_kept for b in trained.builds} == {int(0.137 * numel + 0.5)}


def test_budgets(tiny: Tiny, digits: ImageSet) -> None:
    model = initial_model(tiny(), digits)
    numel = sum(p.numel() for p in model.parameters())
    norm = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    gammas = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    random_mask = MaskSpec.parse("random")
    budget = budget_of(tiny(), random_mask, model)
    assert budget is not None
    assert (budget.num_kept, budget.numel) == (norm, numel)
    smaller = budget_of(tiny(match="norm:part=weights"), random_mask, model)
    assert smaller is not None
    assert smaller.num_kept == gammas
    assert budget_of(tiny(), MaskSpec.parse("norm"), model) is None
    for changes, message in (
        ({"density": 1e-9}, "out of reach"),
        ({"match": "fisher"}, "fisher is budgeted"),
    ):
        with pytest.raises(InputError, match=message):
            budget_of(tiny(**changes), random_mask, model)
    plain = initial_model(tiny(model="mlp"), digits)
    with pytest.raises(InputError, match="none of the model's 6 trainable tensors belongs to a normalization layer"):
        budget_of(tiny(model="mlp"), random_mask, plain)


def test_a_random_mask_is_another_one_for_every_seed(tiny: Tiny) -> None:
    digests = [train_run(tiny(mask="random", seed=seed, epochs=1), CPU).builds[0].digest for seed in (0, 1, 2, 0)]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


# -- images to score on -------------------------------------------------------------------------------------


def sorted_by_class(path: Path) -> str:
    """A data set whose images come class by class, as those of a folder do."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 50)
    x = rng.random((200, 8, 8)).astype(np.float32) + y[:, None, None]
    np.savez(path, x_train=x, y_train=y, x_test=x[::5], y_test=y[::5])
    return f"npz:{path}"


def test_scores_are_taken_on_images_of_all_classes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def context(*args: Any, **kwargs: Any) -> MaskContext:
        if "batches" in kwargs:
            seen.append(torch.cat([y for _, y in kwargs["batches"]]))
        return MaskContext(*args, **kwargs)

    monkeypatch.setattr(train, "MaskContext", context)
    spec = sorted_by_class(tmp_path / "a.npz")
    config = tiny(data=spec, mask="fisher", n_train=150, n_val=20, score_images=40, n_test=None)
    train_run(config, CPU)
    assert [len(y) for y in seen] == [40, 40]
    assert torch.bincount(seen[0], minlength=4).min() >= 4  # 10 of each are expected
    assert torch.equal(*seen)  # the same images at every building
    train_run(replace(config, mask="snip"), CPU)
    assert torch.equal(seen[0], seen[2])  # and in every arm


def test_a_sample_is_of_different_images_with_their_labels(digits: ImageSet) -> None:
    split = make_split(digits, seed=0, n_train=100, n_val=30, n_test=50, label_noise=0.5)
    x, y = sample_of(split, 40, 3, CPU)
    assert (len(x), len(y)) == (40, 40)
    index = [next(i for i, image in enumerate(split.train_x) if torch.equal(image, one)) for one in x]
    assert len(set(index)) == 40
    assert torch.equal(y, split.train_y[index])
    everything, _ = sample_of(split, 1000, 3, CPU)
    assert len(everything) == 100
    assert torch.equal(everything[:40], x)
    assert not torch.equal(sample_of(split, 40, 4, CPU)[0], x)


# -- the test images ----------------------------------------------------------------------------------------


class Sealed(Split):
    """A split whose test images cannot be looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("test_images", "test_x", "test_y") and "sealed" in vars(self):
            raise AssertionError("training looked at the test images")
        return super().__getattribute__(name)


@pytest.mark.parametrize("mask", ["none", "fisher"])
def test_training_does_not_look_at_the_test_images(tiny: Tiny, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sealed(*args: Any, **kwargs: Any) -> Split:
        split = make_split(*args, **kwargs)
        assert len(split.test_y) == 50
        out = Sealed(**vars(split))
        vars(out)["sealed"] = True
        return out

    open_run = train_run(tiny(mask=mask), CPU)
    monkeypatch.setattr(parts, "make_split", sealed)
    run = train_run(tiny(mask=mask), CPU)
    assert same_weights(run.model, open_run.model)
    with pytest.raises(AssertionError, match="looked at"):
        run.split.test_x  # noqa: B018


def test_a_tuning_run_has_no_test_images_and_none_of_its_images_is_ever_tested(tiny: Tiny) -> None:
    tuned = train_run(tiny(tuning=True, seed=10_000), CPU).split
    assert (len(tuned.test_x), len(tuned.test_y), len(tuned.val_y)) == (0, 0, 30)
    used = {*tuned.train_index.tolist(), *tuned.val_index.tolist()}
    for seed in range(3):
        assert not used & set(train_run(tiny(epochs=1, seed=seed), CPU).split.test_index.tolist())


# -- diverged runs ------------------------------------------------------------------------------------------


def test_a_healthy_run_is_not_called_diverged(tiny: Tiny) -> None:
    trained = train_run(tiny(mask="none", epochs=8), CPU)
    assert trained.diverged is None
    assert trained.skipped_steps == 0
    assert trained.history[-1].loss < trained.history[0].loss


def test_a_run_that_ends_above_its_start_is_called_diverged(tiny: Tiny) -> None:
    trained = train_run(tiny(mask="none", epochs=2), CPU)
    first, last = trained.history
    for losses, diverged in (((2.4, 2.5), True), ((2.4, 2.35), False), ((1.0, 2.2), False), ((2.2, 2.31), True)):
        history = (replace(first, loss=losses[0]), replace(last, loss=losses[1]))
        assert (replace(trained, history=history).diverged is not None) == diverged, losses


def test_a_run_that_has_not_learned_is_not_called_diverged(tiny: Tiny) -> None:
    assert train_run(tiny(mask="none", lr=0.0, epochs=1), CPU).diverged is None


@pytest.mark.parametrize("mask", ["none", "norm", "random", *SCORED])
def test_a_run_that_explodes_ends_and_says_so(tiny: Tiny, mask: str) -> None:
    trained = train_run(tiny(mask=mask, lr=1e18, momentum=0.9, epochs=3, model="vit_small", width=16), CPU)
    assert trained.diverged is not None
    assert len(trained.history) == 3
    assert trained.skipped_steps > 0
    assert f"{trained.skipped_steps} steps with a non-finite gradient" in trained.diverged


def test_a_mask_that_cannot_be_rebuilt_because_training_diverged_is_kept_and_noted(tiny: Tiny) -> None:
    trained = train_run(tiny(mask="gradient", lr=1e18, epochs=3), CPU)
    first, *rest = trained.builds
    assert first.error is None
    assert any(build.error and "not finite" in build.error for build in rest)
    kept = [build for build in rest if build.error]
    assert {build.num_kept for build in kept} == {first.num_kept}
    assert trained.diverged is not None


@pytest.fixture
def own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks registered inside are forgotten."""
    mask_info("norm")
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def test_a_builder_that_breaks_its_contract_is_not_taken_for_divergence(tiny: Tiny, own_masks: None) -> None:
    calls = []

    @register_mask(
        "fickle",
        kind="budgeted",
        summary="wrong the second time",
        source="test",
        schedule=MaskSpec.parse("fisher").schedule,
    )
    def build(context: MaskContext, budget: Any) -> Mask:
        calls.append(1)
        return MaskSpec.parse("random").build(context, replace(budget, num_kept=budget.num_kept + len(calls) - 1))

    with pytest.raises(BuilderError, match="its budget is"):
        train_run(tiny(mask="fickle"), CPU)
    assert len(calls) == 2


# -- every rule, scope and model ----------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["norm", "random", "all"])
@pytest.mark.parametrize("rule", ["l2", "linf", "elementwise_l2", "elementwise_linf", "layerwise_l2", "layerwise_linf"])
def test_every_rule_trains(tiny: Tiny, rule: str, mask: str) -> None:
    trained = train_run(tiny(rule=rule, mask=mask, rho=0.01, epochs=1), CPU)
    radius, kept = trained.history[0].radius, trained.builds[0].num_kept
    assert trained.sam.method == trained.config.sam_method()
    assert trained.sam.method.rule == Rule.named(rule)
    if rule == "l2":
        assert radius == pytest.approx(0.01, rel=1e-5)
    if rule == "linf":
        assert 0.5 * 0.01 * kept**0.5 < radius <= 0.01 * kept**0.5 * (1 + 1e-6)
    assert radius > 0


def test_full_scope_gives_a_sparse_mask_its_share_of_the_radius(tiny: Tiny) -> None:
    masked, full = (train_run(tiny(mask="random", rho=0.5, norm_scope=s, epochs=1), CPU) for s in ("masked", "full"))
    assert masked.history[0].radius == pytest.approx(0.5, rel=1e-5)
    share = (masked.builds[0].num_kept / masked.builds[0].numel) ** 0.5
    assert 0.3 * share < full.history[0].radius / 0.5 < 3 * share
    assert train_run(tiny(mask="all", rho=0.5, norm_scope="full", epochs=1), CPU).history[0].radius == pytest.approx(
        0.5
    )


@pytest.mark.parametrize("changes", [{"norm_statistics": "second"}, {"norm_statistics": "both"}, {"eta": 0.3}])
def test_settings_of_the_perturbation_reach_it(tiny: Tiny, changes: dict[str, Any]) -> None:
    rule = {"rule": "elementwise_l2"} if "eta" in changes else {}
    one, other = (train_run(tiny(mask="all", rho=0.2, **rule, **more), CPU) for more in ({}, changes))
    assert not same_weights(one.model, other.model)


def test_layer_norm_models(tiny: Tiny) -> None:
    trained = train_run(tiny(model="vit_small", width=16, mask="norm"), CPU)
    norm = sum(p.numel() for m in trained.model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    assert trained.builds[0].num_kept == norm == 7 * 32


# -- weights and devices ------------------------------------------------------------------------------------


def test_given_weights_are_started_from(tiny: Tiny, digits: ImageSet) -> None:
    weights = initial_model(tiny(seed=9), digits).state_dict()
    still = train_run(tiny(mask="none", lr=0.0, epochs=1), CPU, initial={k: v.clone() for k, v in weights.items()})
    for name, p in still.model.named_parameters():
        assert torch.equal(p, weights[name])


def test_weights_of_another_model_are_refused(tiny: Tiny, digits: ImageSet) -> None:
    model = initial_model(tiny(), digits)
    state = model.state_dict()
    cases = {
        "lacks head.bias": {k: v for k, v in state.items() if k != "head.bias"},
        "the model lacks extra": state | {"extra": torch.zeros(1)},
        r"head.bias has shape \(3,\) there, \(10,\) here": state | {"head.bias": torch.zeros(3)},
    }
    for message, weights in cases.items():
        with pytest.raises(InputError, match=f"the checkpoint is of another model: .*{message}"):
            load_weights(model, weights)


@pytest.mark.parametrize(
    ("name", "message"), [("gpu", "unknown device 'gpu'"), ("meta", "device meta is not supported")]
)
def test_devices_that_cannot_be_had(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_where_there_is_none() -> None:
    assert pick_device("auto") == CPU
    for name in ("cuda", "cuda:3"):
        with pytest.raises(InputError, match="finds no CUDA device here"):
            pick_device(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_is_deterministic_and_leaves_its_random_state(tiny: Tiny) -> None:
    device = pick_device("cuda")
    before = torch.cuda.get_rng_state(device)
    one, other = (train_run(tiny(mask="norm"), device) for _ in range(2))
    assert torch.equal(before, torch.cuda.get_rng_state(device))
    assert result_of(one)["mask_builds"] == result_of(other)["mask_builds"]
    assert asdict(one.history[-1])["loss"] == pytest.approx(asdict(other.history[-1])["loss"], rel=1e-3)
