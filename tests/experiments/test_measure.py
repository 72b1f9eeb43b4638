"""What is measured on final weights: against counts and products made here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis import HessianOperator, evaluate, lambda_max, m_sharpness
from analysis.examples import data_digest
from experiments import measure as module
from experiments.build import sample_of
from experiments.config import RunConfig
from experiments.measure import MeasureConfig, measure, observe
from experiments.train import Trained, result_of, train_run
from experiments.worker import Job, execute
from masks.errors import InputError
from sam.perturbation import Rule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., RunConfig]) -> Trained:
    return train_run(tiny(mask="all", rho=0.1, epochs=15), CPU)


@pytest.fixture(scope="module")
def found(trained: Trained, measured: MeasureConfig) -> dict[str, Any]:
    return measure(trained, measured, CPU)


def test_test_accuracy_is_counted_by_hand(trained: Trained, found: dict[str, Any]) -> None:
    split = trained.split
    with torch.no_grad():
        logits = torch.stack([trained.model(image[None])[0] for image in split.test_x]).numpy()
    right = [int(np.argmax(row)) == int(label) for row, label in zip(logits, split.test_y, strict=True)]
    assert found["test_correct"] == "".join("1" if r else "0" for r in right)
    assert found["test_accuracy"] == sum(right) / 50
    assert 0.3 < found["test_accuracy"] < 1  # of a model that has learned something
    assert found["test_index"] == split.test_index.tolist()


def test_an_own_test_split_needs_no_index(trained: Trained, measured: MeasureConfig) -> None:
    shared = replace(trained, split=replace(trained.split, test_is_shared=True))
    assert measure(shared, measured, CPU)["test_index"] is None


def test_lambda_max_is_that_of_the_training_loss(trained: Trained) -> None:
    found = measure(trained, MeasureConfig(images=1000, sharpness_m=16, repeats=1), CPU)["metrics"]["lambda_max"]
    split = trained.split
    # All training images: their order and batches cannot matter. The labels are those trained on.
    with HessianOperator(trained.model, [(split.train_x, split.train_y)], dtype=torch.float64) as operator:
        exact = lambda_max(operator, tol=1e-6).value
    with HessianOperator(trained.model, [(split.train_x, split.train_y_clean)], dtype=torch.float64) as operator:
        clean = lambda_max(operator, tol=1e-6).value
    assert found["value"] == pytest.approx(exact, rel=2e-3)
    assert abs(clean - exact) > 0.005 * exact
    assert found["settings"]["converged"]
    assert found["error"] == found["settings"]["residual"] <= 1e-3 * found["value"]
    assert "100 examples, all parameters" in found["settings"]["name"]


@pytest.mark.parametrize("i", [0, 1])
def test_metrics_are_those_of_the_registry_on_disjoint_halves_with_other_probes(
    trained: Trained, found: dict[str, Any], measured: MeasureConfig, i: int
) -> None:
    x, y = sample_of(trained.split, 64 + 36, trained.config.seed, CPU)  # all; the halves of 100 are 50 each
    half = [(x[50 * i : 50 * i + 50], y[50 * i : 50 * i + 50])]
    got = found[("metrics", "metrics_repeat")[i]]
    names = ["lambda_max", "one_step_l2@0.1", "one_step_linf_adaptive_normalised@0.002"]
    assert list(got) == names == measured.names()
    for name, want in evaluate(trained.model, half, names, m=16, seed=i).items():
        assert (got[name]["value"], got[name]["n"]) == (want.value, want.n)
        assert got[name]["settings"]["name"] == want.name
        assert got[name]["settings"]["data_digest"] == data_digest(half)
    # The table's m-sharpness is the one-step l2 one.
    sharpness = m_sharpness(trained.model, half, m=16, rho=measured.sharpness_rho, rule=Rule())
    assert got[measured.m_sharpness]["value"] == sharpness.value
    assert (got[measured.m_sharpness]["error"], got[measured.m_sharpness]["n"]) == (sharpness.standard_error, 3)


def test_one_measurement_takes_all_images_asked_for(trained: Trained, found: dict[str, Any]) -> None:
    once = measure(trained, MeasureConfig(images=64, sharpness_m=16, repeats=1, metrics=""), CPU)
    assert list(once["metrics"]) == ["lambda_max", "one_step_l2@0.1"]
    assert "metrics_repeat" not in once
    assert once["metrics"]["lambda_max"]["n"] == 64
    # Half of 100 images hold no micro-batch of 51: no repeat, and nothing is lost.
    large = measure(trained, MeasureConfig(images=64, sharpness_m=51, metrics=""), CPU)
    assert (large["metrics"]["one_step_l2@0.1"]["n"], "metrics_repeat" in large) == (1, False)
    enough = measure(trained, MeasureConfig(images=20, sharpness_m=16, metrics="gradient_norm"), CPU)
    digests = {key: enough[key]["gradient_norm"]["settings"]["data_digest"] for key in ("metrics", "metrics_repeat")}
    x, y = sample_of(trained.split, 40, 0, CPU)
    assert digests == {"metrics": data_digest([(x[:20], y[:20])]), "metrics_repeat": data_digest([(x[20:], y[20:])])}


def test_fit_is_counted_by_hand_on_labels_as_given_and_clean(trained: Trained, found: dict[str, Any]) -> None:
    split = trained.split
    with torch.no_grad():
        logits = trained.model(split.train_x).double().numpy()
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for suffix, labels in (("", split.train_y.numpy()), ("_clean", split.train_y_clean.numpy())):
        assert found["fit"][f"train_loss{suffix}"] == pytest.approx(-logp[np.arange(100), labels].mean(), rel=1e-5)
        assert found["fit"][f"train_error{suffix}"] == (logits.argmax(1) != labels).mean()
    assert found["fit"]["train_error"] != found["fit"]["train_error_clean"]
    flat = np.concatenate([p.detach().double().numpy().ravel() for p in trained.model.parameters()])
    assert found["fit"]["weight_norm"] == pytest.approx(np.sqrt((flat**2).sum()), rel=1e-12)


def test_m_sharpness_by_hand(trained: Trained, found: dict[str, Any], measured: MeasureConfig) -> None:
    x, y = sample_of(trained.split, 48, 0, CPU)  # of the first half, 50 images, 3 micro-batches
    params = list(trained.model.parameters())
    rises = []
    for xs, ys in zip(x.split(16), y.split(16), strict=True):
        loss = torch.nn.functional.cross_entropy(trained.model(xs), ys)
        grads = torch.autograd.grad(loss, params)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        saved = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p += measured.sharpness_rho * g / norm
            rises.append((torch.nn.functional.cross_entropy(trained.model(xs), ys) - loss).item())
            for p, old in zip(params, saved, strict=True):
                p.copy_(old)
    assert found["metrics"]["one_step_l2@0.1"]["value"] == pytest.approx(np.mean(rises), rel=1e-4)


def test_every_arm_is_measured_on_the_same_images(tiny: Callable[..., RunConfig], measured: MeasureConfig) -> None:
    digests = set()
    for mask in ("none", "random", "fisher"):
        found = measure(train_run(tiny(mask=mask, epochs=1), CPU), measured, CPU)
        digests.add(
            tuple(
                one["settings"]["data_digest"] for key in ("metrics", "metrics_repeat") for one in found[key].values()
            )
        )
    assert len(digests) == 1
    assert len(set(digests.pop())) == 2


def test_measuring_reads_the_test_images_once_and_leaves_the_model(
    trained: Trained, measured: MeasureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    counted = []
    original = module.correct
    monkeypatch.setattr(module, "correct", lambda *args: counted.append(len(args[1])) or original(*args))
    first, second = (measure(trained, measured, CPU) for _ in range(2))
    assert counted == [50, 50]
    assert first == second
    assert all(torch.equal(before[name], value) for name, value in trained.model.state_dict().items())


def test_a_metric_that_cannot_be_taken_says_why(tiny: Callable[..., RunConfig], measured: MeasureConfig) -> None:
    broken = train_run(tiny(mask="none", epochs=1), CPU)
    with torch.no_grad():
        broken.model.head.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    found = measure(broken, measured, CPU)
    for one in found["metrics"].values():
        assert (one["value"], one["error"], one["n"]) == (None, None, 0)
        assert "not finite" in one["settings"]["reason"]
    assert 0 <= found["test_accuracy"] <= 1
    assert len(found["test_correct"]) == 50


def test_too_few_images_for_a_micro_batch(trained: Trained) -> None:
    found = measure(trained, MeasureConfig(images=10, sharpness_m=64), CPU)["metrics"]
    reason = found["one_step_l2@0.1"]["settings"]["reason"]
    assert reason == "m-sharpness with m=64 needs at least 64 examples, got 10"
    assert found["lambda_max"]["value"] is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 0}, "images and sharpness_m must be at least 1, got 0"),
        ({"sharpness_m": 0}, "must be at least 1"),
        ({"sharpness_rho": 0.0}, "sharpness_rho must be a positive finite number, got 0.0"),
        ({"sharpness_rho": float("nan")}, "must be a positive finite number, got nan"),
        ({"repeats": 3}, "repeats must be 1 or 2, got 3"),
        ({"metrics": "lamda_max"}, "unknown metric 'lamda_max'; did you mean lambda_max"),
        ({"metrics": "gradient_norm@1"}, "takes no radius"),
        ({"sharpness_rho": float("inf")}, "must be a positive finite number, got inf"),
    ],
)
def test_measurements_that_cannot_be_had(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MeasureConfig(**settings)


DROPOUT = """from torch import nn

def net(num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, num_classes)
    )
"""


def test_measuring_along_training_changes_nothing_and_is_the_measurement_of_those_weights(
    tiny: Callable[..., RunConfig], measured: MeasureConfig, in_folder: Path
) -> None:
    # Random state, batch statistics, momentum and a mask that is built anew: all could be disturbed.
    Path("drop_net.py").write_text(DROPOUT)
    quiet = tiny(mask="fisher@every=1", epochs=5, weight_decay=0.01, model="drop_net:net", width=None)
    config = replace(quiet, measure_every=2)
    observed: list[dict[str, Any]] = []

    def observer(model: Any, split: Any) -> dict[str, Any]:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        grads = {name: p.grad for name, p in model.named_parameters()}
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        observed.append(observe(model, split, config.seed, measured, CPU))
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == modes
        assert all(p.grad is grads[name] for name, p in model.named_parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        torch.rand(7)  # what an observer draws is not missing in training
        return observed[-1]

    plain, watched = train_run(quiet, CPU), train_run(config, CPU, observer=observer)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    assert [epoch.observed for epoch in watched.history] == [None, observed[0], None, observed[1], None]
    assert [replace(epoch, observed=None) for epoch in watched.history] == list(plain.history)
    assert plain.builds == watched.builds
    assert observed[0]["fit"]["train_loss"] > observed[1]["fit"]["train_loss"]
    assert "observed" not in result_of(plain)["history"][1]
    assert result_of(watched)["history"][1]["observed"] == observed[0]


def test_batch_statistics_are_untouched_by_measuring_along_training(
    tiny: Callable[..., RunConfig], measured: MeasureConfig
) -> None:
    config = tiny(mask="norm", epochs=3, measure_every=1)
    job = Job("a", "norm", config, measured)
    (record, _), (plain, _) = (
        execute(job, CPU),
        execute(replace(job, config=replace(config, measure_every=0)), CPU),
    )
    history = record.result["history"]
    assert ["observed" in epoch for epoch in history] == [True, True, False]
    assert set(history[0]["observed"]) == {"fit", "metrics", "metrics_repeat"}
    for epoch in history:
        epoch.pop("observed", None)
    assert record.result == plain.result
    # A tuning run reads nothing but validation images.
    tuned, _ = execute(replace(job, measure=None), CPU)
    assert not any("observed" in epoch for epoch in tuned.result["history"])
