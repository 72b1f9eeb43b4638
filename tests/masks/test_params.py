"""The parameter table: which tensors, in which role, and how many coordinates."""

from __future__ import annotations

import hashlib
import itertools
import json

import pytest
import torch
import torchvision
from torch import Tensor, nn

from masks import Mask, MaskError, ParamTable, register_norm_type
from masks.params import model_digest, norm_modules, norm_types, rows_matching

NORM_CLASSES = {"BatchNorm2d", "LayerNorm", "LayerNorm2d"}


def roles(model: nn.Module) -> dict[str, str]:
    return {row.name: row.role for row in ParamTable.from_model(model)}


@pytest.mark.parametrize(
    ("name", "norm", "total"),
    [
        ("resnet18", 9_600, 11_181_642),
        ("resnet50", 53_120, None),
        ("vgg16_bn", 8_448, None),
        ("vit_b_16", 38_400, None),
        ("convnext_tiny", 16_320, None),
        ("efficientnet_b0", 42_016, None),
    ],
)
def test_norm_coordinates_of_torchvision_models(name: str, norm: int, total: int | None) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=10)
    table = ParamTable.from_model(model)

    by_hand = 0
    for module in model.modules():
        if type(module).__name__ in NORM_CLASSES:
            by_hand += module.weight.numel() + module.bias.numel()
    assert sum(row.numel for row in table if row.is_norm) == norm == by_hand
    assert table.numel == sum(p.numel() for p in model.parameters())
    assert total is None or table.numel == total

    # A mask of whole tensors needs no values.
    mask = Mask(table, tuple(row.is_norm for row in table))
    assert (mask.num_kept, mask.norm_share) == (norm, 1.0)
    assert (~mask).num_kept == table.numel - norm
    assert len(mask.digest()) == 64


def test_every_norm_tensor_of_resnet18_is_found_also_in_the_shortcuts() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    found = {row.name for row in ParamTable.from_model(model) if row.is_norm}
    assert len(found) == 40
    for stage in (2, 3, 4):
        assert {f"layer{stage}.0.downsample.1.weight", f"layer{stage}.0.downsample.1.bias"} <= found
    assert not any("downsample.0" in name for name in found)


def test_roles_come_from_types_never_from_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Linear(3, 3)
            self.batchnorm_fc = nn.Conv1d(3, 3, 1)
            self.fc = nn.LayerNorm(3)
            self.norm_token = nn.Parameter(torch.zeros(1, 3))

    assert roles(Named()) == {
        "norm_token": "other",
        "norm.weight": "weight",
        "norm.bias": "bias",
        "batchnorm_fc.weight": "weight",
        "batchnorm_fc.bias": "bias",
        "fc.weight": "norm_weight",
        "fc.bias": "norm_bias",
    }


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm1d(4, affine=True),
        nn.InstanceNorm2d(4, affine=True),
        type("MyBatchNorm", (nn.BatchNorm2d,), {})(4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_norm_layers(module: nn.Module) -> None:
    assert roles(nn.Sequential(module)) == {"0.weight": "norm_weight", "0.bias": "norm_bias"}


def test_rms_norm_has_a_weight_only() -> None:
    assert roles(nn.RMSNorm(4)) == {"weight": "norm_weight"}


def test_norm_layers_without_affine_parameters_have_no_rows() -> None:
    bare = [nn.BatchNorm1d(4, affine=False), nn.InstanceNorm1d(4), nn.LayerNorm(4, elementwise_affine=False)]
    model = nn.Sequential(*bare, nn.Linear(4, 1))
    assert [row.name for row in ParamTable.from_model(model)] == ["3.weight", "3.bias"]
    assert [name for name, _ in norm_modules(model)] == ["0", "1", "2"]


def test_roles_of_multihead_attention() -> None:
    expected = {
        "in_proj_weight": "weight",
        "in_proj_bias": "bias",
        "bias_k": "bias",
        "bias_v": "bias",
        "out_proj.weight": "weight",
        "out_proj.bias": "bias",
    }
    assert roles(nn.MultiheadAttention(4, 2, add_bias_kv=True)) == expected
    assert roles(type("Mine", (nn.MultiheadAttention,), {})(4, 2, add_bias_kv=True)) == expected


def test_roles_of_other_layers() -> None:
    assert set(roles(nn.LSTM(2, 3)).items()) == {
        ("weight_ih_l0", "weight"),
        ("weight_hh_l0", "weight"),
        ("bias_ih_l0", "bias"),
        ("bias_hh_l0", "bias"),
    }
    assert roles(nn.PReLU(3)) == {"weight": "weight"}
    assert roles(nn.Embedding(5, 2)) == {"weight": "weight"}
    assert roles(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))["bias"] == "bias"


def test_parameters_of_containers_are_other() -> None:
    with torch.device("meta"):
        vit = torchvision.models.vit_b_16()
        convnext = torchvision.models.convnext_tiny()
    other = {name for name, role in roles(vit).items() if role == "other"}
    assert other == {"class_token", "encoder.pos_embedding"}
    other = {name for name, role in roles(convnext).items() if role == "other"}
    assert len(other) == 18
    assert all(name.endswith(".layer_scale") for name in other)

    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 2))
            self.token = nn.Parameter(torch.zeros(1, 2))
            self.bias = nn.Parameter(torch.zeros(()))

    assert roles(Net())["token"] == "other"
    assert roles(Net())["bias"] == "bias"


class Scale(nn.Module):
    """A normalization layer of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.std() * self.gain + self.bias


@pytest.mark.usefixtures("clean_norm_types")
def test_register_norm_type() -> None:
    assert roles(Scale()) == {"gain": "other", "bias": "bias"}
    assert register_norm_type(Scale) is Scale
    register_norm_type(Scale)
    assert norm_types().count(Scale) == 1
    assert roles(nn.Sequential(Scale())) == {"0.gain": "norm_weight", "0.bias": "norm_bias"}
    for wrong in (int, "BatchNorm2d", Scale()):
        with pytest.raises(MaskError, match="subclass"):
            register_norm_type(wrong)  # type: ignore[arg-type]


def test_tied_tensors_are_listed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.again = nn.Linear(3, 7)
            self.again.weight = self.embed.weight
            self.twice = self.again

    table = ParamTable.from_model(Tied())
    assert [(row.name, row.aliases) for row in table] == [
        ("embed.weight", ("again.weight", "twice.weight")),
        ("again.bias", ("twice.bias",)),
    ]
    assert table.numel == 21 + 7
    assert table.rows[0].module_type == "Embedding"


def test_frozen_tensors_are_not_eligible() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    table = ParamTable.from_model(model)
    assert [row.name for row in table] == ["1.weight", "2.weight", "2.bias"]
    assert (table.numel, table.frozen_numel) == (4 + 8 + 2, 12 + 4 + 4)
    everything = ParamTable.from_model(model, include_frozen=True)
    assert (everything.numel, everything.frozen_numel) == (34, 0)
    with pytest.raises(MaskError, match=r"0\.weight is frozen"):
        everything.tensors(model)
    with pytest.raises(MaskError, match=r"no trainable parameter \(34 frozen"):
        ParamTable.from_model(model.requires_grad_(False))


def test_models_without_a_countable_parameter_are_refused() -> None:
    with pytest.raises(MaskError, match="no trainable parameter"):
        ParamTable.from_model(nn.ReLU())
    with pytest.raises(MaskError, match="no trainable parameter"):
        ParamTable.from_model(nn.ParameterList([nn.Parameter(torch.empty(0, 3))]))
    with pytest.raises(MaskError, match=r"1\.weight is lazy"):
        ParamTable.from_model(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


def test_order_offsets_and_index() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    table = ParamTable.from_model(model)
    assert [row.name for row in table] == [name for name, _ in model.named_parameters()]
    assert [(row.module_name, row.module_type) for row in table] == [
        ("0", "Linear"),
        ("0", "Linear"),
        ("1", "LayerNorm"),
        ("1", "LayerNorm"),
        ("2", "Linear"),
    ]
    assert [row.shape for row in table] == [(4, 3), (4,), (4,), (4,), (2, 4)]
    assert list(table.offsets) == [0, *itertools.accumulate([12, 4, 4, 4])]
    assert [row.is_bias for row in table] == [False, True, False, True, False]
    assert table.index("1.bias") == 3
    with pytest.raises(MaskError, match=r"unknown parameter '1\.bia'; did you mean 1\.bias"):
        table.index("1.bia")
    assert rows_matching(table, role=("norm_weight", "weight")) == [0, 2, 4]
    assert rows_matching(table, module_name="1") == [2, 3]
    assert rows_matching(table, role=("bias",), module_name="") == [1]


def test_module_name_matches_whole_components() -> None:
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(11)])
    assert rows_matching(ParamTable.from_model(model), module_name="1") == [1]


def test_tensors_are_the_parameters_themselves_in_order() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    table = ParamTable.from_model(model)
    assert all(a is b for a, b in zip(table.tensors(model), model.parameters(), strict=True))
    with pytest.raises(MaskError, match=r"no parameter 1\.weight"):
        table.tensors(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(MaskError, match=r"0\.weight has shape \(4, 2\), the mask's table \(4, 3\)"):
        table.tensors(nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4)))
    model[1].requires_grad_(False)
    with pytest.raises(MaskError, match=r"1\.weight is frozen"):
        table.tensors(model)


def test_digest_and_check_same_go_by_names_and_shapes() -> None:
    table = ParamTable.from_model(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    same = ParamTable.from_model(nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)))
    text = '[["0.weight", [4, 3]], ["0.bias", [4]], ["1.weight", [4]], ["1.bias", [4]]]'
    assert table.digest() == same.digest() == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(text)[0] == ["0.weight", [4, 3]]
    table.check_same(same, "x")
    table.check_same(table, "x")

    wider = ParamTable.from_model(nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4)))
    renamed = ParamTable.from_model(nn.ModuleDict({"0": nn.Linear(3, 4), "b": nn.LayerNorm(4)}))
    longer = ParamTable.from_model(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)))
    assert len({t.digest() for t in (table, wider, renamed, longer)}) == 4
    with pytest.raises(MaskError, match=r"what: parameter 0\.weight \(4, 3\) here, 0\.weight \(4, 2\) there"):
        table.check_same(wider, "what")
    with pytest.raises(MaskError, match=r"1\.weight \(4,\) here, b\.weight"):
        table.check_same(renamed, "what")
    for a, b in ((table, longer), (longer, table)):
        with pytest.raises(MaskError, match=r"what: \d trainable tensors here, \d there"):
            a.check_same(b, "what")


def test_model_digest_is_of_values_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    digest = model_digest(model)
    model.eval()
    model[0].weight.grad = torch.ones(4, 3)
    model[0].bias.requires_grad_(False)
    assert model_digest(model) == digest
    with torch.no_grad():
        model[0].weight[1, 2] += 1e-6
    changed = model_digest(model)
    model[1].running_mean[0] += 1
    assert len({digest, changed, model_digest(model)}) == 3


def test_model_digest_takes_any_dtype_and_layout() -> None:
    class Odd(nn.Module):
        def __init__(self, values: Tensor) -> None:
            super().__init__()
            self.w = nn.Parameter(values)
            self.register_buffer("flag", torch.tensor(True))
            self.register_buffer("none", torch.empty(0))
            self.register_buffer("short", torch.ones(3, dtype=torch.bfloat16))

        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None:
            pass

    values = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert model_digest(Odd(values)) == model_digest(Odd(values.to(memory_format=torch.channels_last)))
    assert model_digest(Odd(values)) != model_digest(Odd(values.double()))
    with torch.device("meta"), pytest.raises(MaskError, match="meta device"):
        model_digest(nn.Linear(2, 2))
