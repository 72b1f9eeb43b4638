"""Roles of tensors as a model grows, and the initialization and learning rates of muP."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from masks import InputError, ParamTable
from sam import mup_init_, mup_param_groups, mup_roles
from tests.sam.nets import make, same_bits, snapshot

WIDTHS = (32, 64, 128, 256, 512)


def mlp(width: int, seed: int = 0) -> nn.Sequential:
    """Two hidden ReLU layers, 8 inputs, 3 outputs, float64."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        ).double()


def mup_mlp(width: int, seed: int = 0) -> tuple[nn.Sequential, nn.Sequential]:
    """With the initialization of muP, and its base of width 32."""
    model, base = mlp(width, seed), mlp(WIDTHS[0], seed + 100)
    mup_init_(model, base)
    return model, base


def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (16,), generator=generator)


def sizes_and_effects(model: nn.Module, moves: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Of a move of each tensor by itself: its spectral norm over that of the weights, and the change of the outputs
    to first order."""
    out = {}
    with torch.no_grad():
        before = model(batch()[0])
        for name, param in model.named_parameters():
            size = torch.linalg.norm(moves[name], 2) / torch.linalg.norm(param, 2)
            param.add_(moves[name], alpha=1e-4)
            effect = (model(batch()[0]) - before).norm() / 1e-4
            param.sub_(moves[name], alpha=1e-4)
            out[name] = (float(size), float(effect))
    return out


def exponents(by_width) -> dict[str, np.ndarray]:
    """Slopes of the logarithms over log width, from ``by_width(width, seed)``; per tensor (size, effect)."""
    rows = [[by_width(width, seed) for seed in range(3)] for width in WIDTHS]
    names = rows[0][0]
    logs = {name: [np.mean([np.log(found[name]) for found in row], 0) for row in rows] for name in names}
    return {name: np.polyfit(np.log(WIDTHS), values, 1)[0] for name, values in logs.items()}


# -- roles ---------------------------------------------------------------------------------------------------


def test_roles_of_a_convolutional_net():
    shapes = mup_roles(make("resnet", width=12), make("resnet", width=4))
    assert shapes.ratio == 3
    table = {
        "conv1.weight": "input",
        "conv2.weight": "hidden",
        "shortcut.0.weight": "hidden",
        "bn1.weight": "input",
        "bn2.bias": "input",
        "fc.weight": "output",
        "fc.bias": "fixed",
    }
    assert {name: shapes.roles[name] for name in table} == table


def test_roles_of_a_transformer():
    shapes = mup_roles(make("vit", dim=16), make("vit", dim=8))
    assert shapes.ratio == 2
    table = {
        "patch.weight": "input",
        "token": "input",
        "position": "input",
        "block.self_attn.in_proj_weight": "hidden",
        "block.self_attn.in_proj_bias": "input",
        "block.self_attn.out_proj.weight": "hidden",
        "block.linear1.weight": "hidden",
        "block.norm1.weight": "input",
        "head.weight": "output",
        "head.bias": "fixed",
    }
    assert {name: shapes.roles[name] for name in table} == table


class Odd(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.depthwise = nn.Conv1d(width, width, 3, groups=width)
        self.up = nn.ConvTranspose1d(width, 5, 2)
        self.head = nn.Linear(width, 1)


def test_layers_decide_where_shapes_do_not():
    """An embedding table grows in its second dimension like an output layer; a head of one output is (1, width)."""
    shapes = mup_roles(Odd(8), Odd(4), roles={"up.weight": "output"})
    assert shapes.roles == {
        "table.weight": "input",
        "depthwise.weight": "input",
        "depthwise.bias": "input",
        "up.weight": "output",
        "up.bias": "fixed",
        "head.weight": "output",
        "head.bias": "fixed",
    }
    with pytest.raises(InputError, match=r"role of up.weight is ambiguous: shape \(8, 5, 2\), \(4, 5, 2\) in the base"):
        mup_roles(Odd(8), Odd(4))


class Tied(nn.Module):
    def __init__(self, width: int, extra: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.hidden = nn.Linear(width, extra)
        self.head = nn.Linear(width, 7)
        self.head.weight = self.table.weight


def test_what_is_refused():
    with pytest.raises(InputError, match=r"table.weight is ambiguous.*tied to head.weight; give it, as in roles="):
        mup_roles(Tied(8), Tied(4))
    assert mup_roles(Tied(8), Tied(4), roles={"table.weight": "output"}).roles["table.weight"] == "output"
    with pytest.raises(InputError, match=r"table.weight grows by 2 and hidden.weight by 3; muP here needs one factor"):
        mup_roles(Tied(8, 9), Tied(4, 3), roles={"table.weight": "output"})
    with pytest.raises(InputError, match=r"must have the same trainable tensors; they differ in 0\.bias"):
        mup_roles(mlp(8), nn.Sequential(nn.Linear(8, 4, bias=False)))
    with pytest.raises(InputError, match=r"0.weight has shape \(8, 8\), and \(8, 8, 1\) in the base model"):
        mup_roles(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Conv1d(8, 8, 1)))
    with pytest.raises(InputError, match=r"unknown parameter '0\.wight'; did you mean 0\.weight"):
        mup_roles(mlp(8), mlp(4), roles={"0.wight": "input"})
    with pytest.raises(InputError, match="unknown muP role 'inputs'; did you mean input"):
        mup_roles(mlp(8), mlp(4), roles={"0.weight": "inputs"})
    raw = [nn.Module(), nn.Module()]
    for module, width in zip(raw, (8, 4), strict=True):
        module.matrix, module.child = nn.Parameter(torch.ones(1, width)), nn.Linear(2, 2)
    with pytest.raises(InputError, match="matrix is ambiguous"):
        mup_roles(*raw)


# -- initialization ------------------------------------------------------------------------------------------


def test_initialization_has_the_stated_deviations():
    """From the base's uniform draws of variance 1 / (3 fan_in), fan_in at the base width."""
    model, _ = mup_mlp(512)
    n = 16
    expected = {
        "0.weight": 1 / math.sqrt(3 * 8),
        "2.weight": 1 / math.sqrt(3 * 32) / math.sqrt(n),
        "4.weight": 1 / math.sqrt(3 * 32) / n,
        "2.bias": 1 / math.sqrt(3 * 32),
    }
    for name, deviation in expected.items():
        assert float(model.get_parameter(name).detach().square().mean().sqrt()) == pytest.approx(deviation, rel=0.15), (
            name
        )


def test_initialization_keeps_directions_and_ones_and_zeros():
    model, base = make("resnet", width=12), make("resnet", width=4)
    for net in (model, base):
        nn.init.ones_(net.bn1.weight)
        nn.init.zeros_(net.bn1.bias)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out")  # a deviation that falls with the width
    before = snapshot(model)
    mup_init_(model, base)
    assert (model.bn1.weight == 1).all()
    assert (model.bn1.bias == 0).all()
    rms = [float(net.conv1.weight.detach().square().mean().sqrt()) for net in (model, base)]
    assert rms[0] == pytest.approx(rms[1], rel=1e-6)
    for name, weight in snapshot(model).items():
        if before[name].any():
            assert float(F.cosine_similarity(weight.flatten(), before[name].flatten(), 0)) == pytest.approx(1, abs=1e-6)
    nn.init.zeros_(model.fc.weight)
    with pytest.raises(InputError, match=r"fc\.weight is zero, and in the base model it is not"):
        mup_init_(model, base)


def test_at_the_base_width_nothing_changes():
    model = make("vit", seed=1)
    before = snapshot(model)
    mup_init_(model, make("vit", seed=2))
    assert same_bits(snapshot(model), before)
    groups = mup_param_groups(model, make("vit"), 0.3, optimizer="sgd", weight_decay=0.1)
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.3, 0.1)}


# -- learning rates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "factors"),
    [
        ("sgd", {"input": 4, "hidden": 1, "output": 1 / 4, "fixed": 1}),
        ("adamw", {"input": 1, "hidden": 1 / 4, "output": 1 / 4, "fixed": 1}),
    ],
)
def test_groups(optimizer, factors):
    model, base = mup_mlp(128)
    groups = mup_param_groups(model, base, 0.2, optimizer=optimizer, weight_decay=0.01)
    assert {group["role"]: group["lr"] / 0.2 for group in groups} == pytest.approx(factors)
    assert [group["lr"] * group["weight_decay"] for group in groups] == pytest.approx([0.002] * 4)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in ParamTable.from_model(model).tensors(model))
    with pytest.raises(InputError, match="unknown muP optimizer 'adam'; did you mean adamw"):
        mup_param_groups(model, base, 0.1, optimizer="adam")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_step_changes_the_outputs_as_much_at_every_width(optimizer):
    """Through every tensor; with one learning rate for all it does not."""

    def step(width, seed, groups_of):
        model, base = mup_mlp(width, seed)
        before = snapshot(model)
        make_optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
        stepper = make_optimizer(groups_of(model, base), lr=1e-3, weight_decay=0.0)
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        stepper.step()
        moves = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        model.load_state_dict(before)
        return sizes_and_effects(model, moves)

    mup = exponents(lambda w, s: step(w, s, lambda m, b: mup_param_groups(m, b, 1e-3, optimizer=optimizer)))
    assert max(abs(slope[1]) for slope in mup.values()) < 0.25, mup
    one = exponents(lambda w, s: step(w, s, lambda m, b: list(m.parameters())))
    assert one["4.weight"][1] > 0.75
    other = "0.weight" if optimizer == "sgd" else "2.weight"
    assert abs(one[other][1]) > 0.75
