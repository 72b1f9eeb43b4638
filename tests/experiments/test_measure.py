"""What is measured on final weights: against counts and products made here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis import HessianOperator, lambda_max, m_sharpness
from experiments import measure as module
from experiments.config import RunConfig
from experiments.measure import MeasureConfig, measure
from experiments.train import Trained, sample_of, train_run
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
    found = measure(trained, MeasureConfig(images=1000, sharpness_m=16), CPU)["lambda_max"]
    split = trained.split
    # All training images: their order and batches cannot matter. The labels are those trained on.
    with HessianOperator(trained.model, [(split.train_x, split.train_y)], dtype=torch.float64) as operator:
        exact = lambda_max(operator, tol=1e-6).value
    with HessianOperator(trained.model, [(split.train_x, split.train_y_clean)], dtype=torch.float64) as operator:
        clean = lambda_max(operator, tol=1e-6).value
    assert found["value"] == pytest.approx(exact, rel=2e-3)
    assert abs(clean - exact) > 0.005 * exact
    assert found["converged"]
    assert found["residual"] <= 1e-3 * found["value"]
    assert "100 examples, all parameters" in found["name"]
    assert "vector" not in found


def test_metrics_are_those_of_analysis_on_the_sample(
    trained: Trained, found: dict[str, Any], measured: MeasureConfig
) -> None:
    x, y = sample_of(trained.split, 64, trained.config.seed, CPU)
    with HessianOperator(trained.model, [(x, y)]) as operator:
        direct = lambda_max(operator)
    assert found["lambda_max"]["value"] == pytest.approx(direct.value, rel=1e-6)
    assert "64 examples" in found["lambda_max"]["name"]
    sharpness = m_sharpness(trained.model, [(x, y)], m=16, rho=measured.sharpness_rho, rule=Rule())
    assert found["m_sharpness"] == asdict(sharpness)
    assert (found["m_sharpness"]["n"], found["m_sharpness"]["settings"]["m"]) == (4, 16)


def test_m_sharpness_by_hand(trained: Trained, found: dict[str, Any], measured: MeasureConfig) -> None:
    x, y = sample_of(trained.split, 64, 0, CPU)
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
    assert found["m_sharpness"]["value"] == pytest.approx(np.mean(rises), rel=1e-4)


def test_every_arm_is_measured_on_the_same_images(
    tiny: Callable[..., RunConfig], measured: MeasureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original = module.m_sharpness

    def spy(model: Any, batches: Any, **kwargs: Any) -> Any:
        seen.append(torch.cat([x for x, _ in batches]))
        return original(model, batches, **kwargs)

    monkeypatch.setattr(module, "m_sharpness", spy)
    for mask in ("none", "random", "fisher"):
        measure(train_run(tiny(mask=mask, epochs=1), CPU), measured, CPU)
    assert len(seen[0]) == 64
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


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
    for key in ("lambda_max", "m_sharpness"):
        assert set(found[key]) == {"error"}
        assert "not finite" in found[key]["error"]
    assert 0 <= found["test_accuracy"] <= 1
    assert len(found["test_correct"]) == 50


def test_too_few_images_for_a_micro_batch(trained: Trained) -> None:
    found = measure(trained, MeasureConfig(images=10, sharpness_m=64), CPU)
    assert found["m_sharpness"] == {"error": "m-sharpness with m=64 needs at least 64 examples, got 10"}
    assert "value" in found["lambda_max"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 0}, "images and sharpness_m must be at least 1, got 0"),
        ({"sharpness_m": 0}, "must be at least 1"),
        ({"sharpness_rho": 0.0}, "sharpness_rho must be a positive finite number, got 0.0"),
        ({"sharpness_rho": float("nan")}, "must be a positive finite number, got nan"),
        ({"sharpness_rho": float("inf")}, "must be a positive finite number, got inf"),
    ],
)
def test_measurements_that_cannot_be_had(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MeasureConfig(**settings)
