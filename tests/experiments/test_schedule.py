"""Learning-rate schedules in closed form, base optimizers against torch's own, windows of epochs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.schedule import OptimizerSpec, Window, scheduler
from masks.errors import InputError

# -- learning rates -----------------------------------------------------------------------------------------


def rate(kind: str, t: int, steps: int, warmup: int) -> float:
    """Share of the peak at step t, from 0."""
    if t < warmup:
        return (t + 1) / (warmup + 1)
    if kind == "cosine":
        return (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))) / 2
    return 0.1 ** ((t >= steps // 2) + (t >= 3 * steps // 4)) if kind == "step" else 1.0


@pytest.mark.parametrize("kind", ["cosine", "step", "constant"])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(12, 0), (12, 3), (12, 6), (12, 7), (12, 10), (13, 12), (40, 1), (3, 2), (2, 0), (1, 0)]
)
@pytest.mark.filterwarnings("error")
def test_every_learning_rate_of_a_run_in_closed_form(kind: str, steps: int, warmup: int) -> None:
    if steps == 1 and kind == "step":
        return  # half of one step is none
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.03}], lr=0.3)
    schedule = scheduler(optimizer, kind, steps, warmup)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    wanted = [[peak * rate(kind, t, steps, warmup) for peak in (0.3, 0.03)] for t in range(steps)]
    assert [x for pair in found for x in pair] == pytest.approx([x for pair in wanted for x in pair], rel=1e-9)
    if kind == "cosine":
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0, 0], abs=1e-12)


# -- base optimizers ----------------------------------------------------------------------------------------

OPTIMIZERS = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
REFUSED = {"lbfgs": "more than one gradient", "sparseadam": "sparse gradients", "adadelta": "rho of its own"}
NO_DECAY = {"rprop"}


def trajectory(optimizer: torch.optim.Optimizer, weights: Tensor) -> list[Tensor]:
    """Five steps on ``sum(w^4)``, whose gradients are neither constant nor sparse."""
    out = []
    for _ in range(5):
        optimizer.zero_grad()
        (weights**4).sum().backward()
        optimizer.step()
        out.append(weights.detach().clone())
    return out


def start() -> Tensor:
    return torch.linspace(-1, 2, 12).view(3, 4).clone().requires_grad_()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - REFUSED))
def test_every_optimizer_of_torch_gets_learning_rate_and_weight_decay(name: str) -> None:
    paths = {}
    for case, (lr, decay) in {"base": (0.02, 0.1), "lr": (0.04, 0.1), "decay": (0.02, 0.2)}.items():
        decay = 0.0 if name in NO_DECAY else decay
        given = {} if name in NO_DECAY else {"weight_decay": decay}
        if name == "sgd":
            given["momentum"] = 0.7
        weights, twin = start(), start()
        built = OptimizerSpec.parse(name).build(
            [{"params": [weights]}], lr=lr, momentum=0.7, weight_decay=decay, fused=False
        )
        assert type(built) is OPTIMIZERS[name]
        paths[case] = trajectory(built, weights)
        wanted = trajectory(OPTIMIZERS[name]([twin], lr=lr, **given), twin)
        assert all(torch.equal(a, b) for a, b in zip(paths[case], wanted, strict=True))
    assert not torch.equal(paths["base"][-1], paths["lr"][-1])
    assert torch.equal(paths["base"][-1], paths["decay"][-1]) == (name in NO_DECAY)


def test_a_group_keeps_a_weight_decay_of_its_own() -> None:
    free, bound = start(), start()
    groups: list[dict[str, Any]] = [{"params": [bound]}, {"params": [free], "weight_decay": 0.0}]
    built = OptimizerSpec.parse("sgd").build(groups, lr=0.1, momentum=0.0, weight_decay=0.5, fused=False)
    for w in (free, bound):
        w.grad = torch.zeros_like(w)
    built.step()
    assert torch.equal(free, start())
    torch.testing.assert_close(bound, start() * (1 - 0.1 * 0.5))


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "adamw:betas=0.9+0.95": ({"betas": (0.9, 0.95)}, "adamw:betas=0.9+0.95"),
    "adamw:eps=1e-6:amsgrad=true": ({"amsgrad": True, "eps": 1e-6}, "adamw:amsgrad=true:eps=1e-06"),
    "adamw:amsgrad=true:eps=1e-06": ({"amsgrad": True, "eps": 1e-6}, "adamw:amsgrad=true:eps=1e-06"),
    "adamw:eps=1e-8:amsgrad=false": ({}, "adamw"),
    " AdamW ": ({}, "adamw"),
    "sgd:nesterov=true:dampening=0": ({"nesterov": True}, "sgd:nesterov=true"),
    "rmsprop:momentum=0.9:centered=true": ({"momentum": 0.9, "centered": True}, "rmsprop:centered=true:momentum=0.9"),
    "adafactor:eps=none+0.01": ({"eps": (None, 0.01)}, "adafactor:eps=none+0.01"),
    "muon:ns_steps=3:adjust_lr_fn=original": (
        {"adjust_lr_fn": "original", "ns_steps": 3},
        "muon:adjust_lr_fn=original:ns_steps=3",
    ),
}


@pytest.mark.parametrize("text", OPTIONS)
def test_options_of_an_optimizer_have_types_and_one_spelling(text: str) -> None:
    options, canonical = OPTIONS[text]
    spec = OptimizerSpec.parse(text)
    assert spec.options == options
    assert {key: type(value) for key, value in spec.options.items()} == {k: type(v) for k, v in options.items()}
    assert str(spec) == canonical
    assert OptimizerSpec.parse(canonical) == spec
    built = spec.build([{"params": [start()]}], lr=0.1, momentum=0.5, weight_decay=0.0, fused=False)
    assert {key: built.defaults[key] for key in options} == options


BAD: dict[str, str] = {
    **{name: f"optimizer {name} cannot be the base optimizer: .*{why}" for name, why in REFUSED.items()},
    "adem": "unknown optimizer 'adem'; did you mean adam",
    "": "unknown optimizer ''",
    "sgd:lr=1": "lr is a setting of the run; leave it out of optimizer sgd:lr=1",
    "sgd:momentum=0.5": "momentum is a setting of the run",
    "adam:weight_decay=1": "weight_decay is a setting of the run",
    "adam:beta=1": "unknown option of optimizer adam 'beta'; did you mean betas",
    "adam:fused=true": "unknown option of optimizer adam 'fused'",
    "adam:capturable=true": "unknown option of optimizer adam 'capturable'",
    "adam:differentiable=true": "unknown option of optimizer adam 'differentiable'",
    "adam:params=1": "unknown option of optimizer adam 'params'",
    "adam:betas=0.9": "option betas of optimizer adam must be .*, got '0.9'",
    "adam:betas=0.9+x": "option betas of optimizer adam must be",
    "adam:eps=x": "option eps of optimizer adam must be float, got 'x'",
    "adam:amsgrad=maybe": "option amsgrad of optimizer adam must be bool, got 'maybe'",
    "adam:eps": "must be written option=value",
    "adam:eps=1:eps=2": "given twice",
}


@pytest.mark.parametrize("text", BAD)
def test_optimizers_that_cannot_be_had(text: str) -> None:
    with pytest.raises(InputError, match=BAD[text]):
        OptimizerSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("rprop", {"weight_decay": 0.1}, "optimizer rprop has no weight decay; set weight_decay to 0, got 0.1"),
        ("adam:betas=0.9+1.5", {}, r"optimizer adam:betas=0.9\+1.5: Invalid beta"),
        ("sgd:nesterov=true", {}, "optimizer sgd:nesterov=true: Nesterov momentum requires a momentum"),
        ("muon", {"shape": (3,)}, "optimizer muon: Muon only supports 2D parameters"),
    ],
)
def test_what_torch_refuses_is_one_line(text: str, settings: dict[str, Any], message: str) -> None:
    shape = settings.pop("shape", (3, 4))
    groups = [{"params": [torch.zeros(shape, requires_grad=True)]}]
    with pytest.raises(InputError, match=message) as caught:
        OptimizerSpec.parse(text).build(groups, lr=0.1, momentum=0.0, fused=False, **({"weight_decay": 0.0} | settings))
    assert "\n" not in str(caught.value)


# -- windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside", "canonical"),
    [
        ("", set(range(10)), ""),
        ("0..", set(range(10)), ""),
        ("..", set(range(10)), ""),
        ("3..5", {3, 4}, "3..5"),
        ("..5", {0, 1, 2, 3, 4}, "0..5"),
        ("8..", {8, 9}, "8.."),
        ("03..04", {3}, "3..4"),
    ],
)
def test_a_window_holds_its_epochs(text: str, inside: set[int], canonical: str) -> None:
    window = Window.parse(text)
    assert {epoch for epoch in range(10) if epoch in window} == inside
    assert str(window) == canonical
    assert Window.parse(canonical) == window


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "sam_epochs must be START..END, got '3'"),
        ("3-5", "must be START"),
        ("-1..5", "must be START"),
        ("a..b", "must be START"),
        ("5..5", "sam_epochs 5..5 holds no epoch"),
        ("5..3", "holds no epoch"),
        ("..0", "holds no epoch"),
    ],
)
def test_windows_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Window.parse(text)
