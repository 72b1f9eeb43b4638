import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.models import build_model, check_model, list_models, user_module
from experiments.zoo.layers import make_norm
from masks.errors import InputError
from masks.params import ParamTable, model_digest, norm_modules

SIZES = [(1, (8, 8)), (3, (32, 32)), (1, (28, 28)), (2, (5, 9)), (3, (64, 48))]
NARROW = {"vit_small": 16, "vit_t": 64, "vit_s": 64, "resnext29_32x4d": 16}
"""Small widths that the models can have; 4 for all others."""


def build(spec: str, channels: int = 1, size: tuple[int, int] = (8, 8), classes: int = 10, **options: Any) -> nn.Module:
    return build_model(spec, in_channels=channels, image_size=size, num_classes=classes, **options)


# -- built-in models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", list_models())
@pytest.mark.parametrize(("channels", "size"), SIZES)
def test_built_in_models_take_images_of_any_size(spec: str, channels: int, size: tuple[int, int]) -> None:
    model = build(spec, channels, size, 7, width=NARROW.get(spec, 4))
    check_model(model, torch.randn(3, channels, *size), 7, name=spec)
    model(torch.randn(4, channels, *size)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("spec", list_models())
def test_weights_follow_torchs_seed_and_nothing_else(spec: str) -> None:
    digests = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        digests.append(model_digest(build(spec, width=NARROW.get(spec, 4))))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("spec", list_models())
def test_nothing_is_random_in_training(spec: str) -> None:
    model = build(spec, width=NARROW.get(spec, 4)).train()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("spec", list_models())
def test_models_of_the_paper_in_full_size(spec: str) -> None:
    model = build(spec, 3, (32, 32), 100)
    check_model(model, torch.randn(2, 3, 32, 32), 100, name=spec)


def test_normalization_layers_are_those_of_the_architecture() -> None:
    def norms(spec: str, **options: Any) -> list[str]:
        return [type(m).__name__ for _, m in norm_modules(build(spec, **options))]

    assert norms("resnet_small") == ["BatchNorm2d"] * 6
    assert norms("resnet_small", size=(32, 32)) == ["BatchNorm2d"] * 9
    assert norms("vit_small") == ["LayerNorm"] * 7
    assert norms("mlp") == []


def test_parameter_counts_by_hand() -> None:
    def numel(spec: str, **options: Any) -> int:
        return ParamTable.from_model(build(spec, **options)).numel

    w = 4
    stem = 9 * w + 2 * w
    first = 2 * (9 * w * w + 2 * w)
    second = 9 * w * 2 * w + 4 * w + 9 * 4 * w * w + 4 * w + 2 * w * w + 4 * w
    assert numel("resnet_small", width=w) == stem + first + second + 2 * w * 10 + 10
    assert numel("mlp", width=w) == 64 * w + w + w * w + w + w * 10 + 10
    w = 32
    block = 2 * 2 * w + 3 * w * w + 3 * w + w * w + w + 2 * (2 * w * w) + 3 * w
    assert numel("vit_small", width=w) == 4 * w + w + 16 * w + 3 * block + 2 * w + w * 10 + 10


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((8, 8), 16), ((16, 16), 64), ((20, 20), 25), ((28, 28), 49), ((32, 32), 64), ((96, 96), 36), ((5, 9), 15)],
)
def test_tokens_of_the_transformer(size: tuple[int, int], tokens: int) -> None:
    assert build("vit_small", size=size).get_parameter("position").shape == (1, tokens, 64)


def test_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours = build("vit_small").get_submodule("blocks.0.attention")
    theirs = nn.MultiheadAttention(64, 4, batch_first=True)
    state = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias", "out_proj.weight": "proj.weight"}
    theirs.load_state_dict({k: ours.state_dict()[v] for k, v in (state | {"out_proj.bias": "proj.bias"}).items()})
    x = torch.randn(3, 16, 64)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_the_transformer_sees_all_pixels_and_where_they_are() -> None:
    torch.manual_seed(0)
    model = build("vit_small", size=(5, 9))
    x = torch.randn(1, 1, 5, 9, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())
    model = build("vit_small")
    x = torch.randn(1, 1, 8, 8)
    swapped = torch.cat((x[..., 4:], x[..., :4]), dim=-1)  # the same patches elsewhere
    assert (model(x) - model(swapped)).abs().max() > 1e-2


def double_net(spec: str) -> tuple[list[torch.Tensor], Callable[[bool], list[torch.Tensor]], list[torch.Tensor]]:
    """Parameters of a narrow net in float64, its gradients of a loss, and a random direction of norm 1."""
    torch.manual_seed(0)
    model = build(spec, width=NARROW.get(spec, 4)).double().eval()
    params = list(model.parameters())
    x, y = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)

    def gradients(create_graph: bool) -> list[torch.Tensor]:
        loss = nn.functional.cross_entropy(model(x), y)
        return list(torch.autograd.grad(loss, params, create_graph=create_graph))

    v = [torch.randn_like(p) for p in params]
    torch._foreach_div_(v, float(torch.cat([t.flatten() for t in v]).norm()))
    return params, gradients, v


@pytest.mark.parametrize("spec", ["resnet_small", "resnet_small:norm=rms", "vit_small", "mlp", "vit_t"])
def test_second_derivatives_are_differences_of_first_ones(spec: str) -> None:
    params, gradients, v = double_net(spec)
    products = torch.autograd.grad(gradients(True), params, v)
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            torch._foreach_add_(params, v, alpha=step)
            ends.append(torch.enable_grad()(gradients)(False))
            torch._foreach_add_(params, v, alpha=-step)
    for product, plus, minus in zip(products, *ends, strict=True):
        torch.testing.assert_close(product, (plus - minus) / 2e-6, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("spec", list_models())
def test_second_derivatives_exist(spec: str) -> None:
    """Hessian products are taken of every model; the fused attention of torch has none. In deep nets differences
    cross the kinks of ReLUs, so this asks whether u'(Hv) = v'(Hu)."""
    params, gradients, v = double_net(spec)
    u = [torch.randn_like(p) for p in params]

    def product(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        h = torch.autograd.grad(gradients(True), params, a)
        return float(sum((s * t).sum() for s, t in zip(h, b, strict=True)))

    assert product(u, v) == pytest.approx(product(v, u), rel=1e-8)
    assert abs(product(u, v)) > 1e-6


@pytest.mark.parametrize("spec", [name for name, text in list_models().items() if "norm=" in text])
@pytest.mark.parametrize("norm", ["group", "layer", "rms", "none"])
def test_norm_variants(spec: str, norm: str) -> None:
    """They train, agree with BatchNorm in the norm coordinates (RMSNorm in its weights; or have none), and treat every
    image alone."""
    torch.manual_seed(0)
    width = NARROW.get(spec, 4)
    model = build(f"{spec}:norm={norm}", 3, (16, 16), 5, width=width)
    batch = ParamTable.from_model(build(spec, 3, (16, 16), 5, width=width))
    found = [row.numel for row in ParamTable.from_model(model) if row.is_norm]
    roles = {"none": (), "rms": ("norm_weight",)}.get(norm, ("norm_weight", "norm_bias"))
    assert found == [row.numel for row in batch if row.role in roles]
    x = torch.randn(4, 3, 16, 16)
    model(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    torch.testing.assert_close(model(x)[:2], model(x[:2]), rtol=1e-4, atol=1e-5)


def test_rms_norm_of_images_is_its_formula() -> None:
    layer = make_norm("rms", 3).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        found = layer(x)
    size = (x.square().sum(dim=1, keepdim=True) / 3).sqrt()
    torch.testing.assert_close(found, x / size * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:, None, None])
    assert [row.role for row in ParamTable.from_model(nn.Sequential(layer))] == ["norm_weight"]


def test_groups_are_those_of_wu_and_he_where_channels_allow() -> None:
    wide = {m.num_channels: m.num_groups for m in build("wrn28_10:norm=group").modules() if isinstance(m, nn.GroupNorm)}
    assert wide == {16: 8, 160: 16, 320: 32, 640: 32}
    odd = {
        m.num_channels: m.num_groups
        for m in build("resnet20:norm=group", width=9).modules()
        if isinstance(m, nn.GroupNorm)
    }
    assert odd == {9: 1, 18: 1, 36: 2}
    layer = {m.num_groups for m in build("resnet20:norm=layer").modules() if isinstance(m, nn.GroupNorm)}
    assert layer == {1}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet20:norm=grup", "model resnet20:norm=grup: unknown norm 'grup'; did you mean group"),
        ("resnet20:patch=4", "unknown option of resnet20 'patch'; known: norm"),
        ("vgg16_bn:norm=none", "unknown option of vgg16_bn 'norm'; known: none"),
        ("vit_t:patch=4.0", "patch must be a whole number, found '4.0'"),
        ("vit_t:patch=0", "patch side of at least 1, found 0"),
        ("wrn16_4:norm=group:norm=layer", "gives norm twice"),
        ("resnet20:make", "cannot import 'resnet20'"),
    ],
)
def test_options_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(spec)


def test_modules_of_the_user_are_told_from_ours() -> None:
    ours = ("resnet20", "resnet20:norm=group", "torchvision:resnet18", "timm:resnet18")
    assert [user_module(spec) for spec in ours] == [None] * 4
    assert [user_module(spec) for spec in ("nets.mine:make", "resnet20:make")] == ["nets.mine", "resnet20"]


@pytest.mark.parametrize(
    ("spec", "width", "message"),
    [
        ("resnet_small", 0, "width must be at least 1, found 0"),
        ("vit_small", 24, "multiple of 16 .*, found 24"),
        ("vit_t", 96, "multiple of 64 .*, found 96"),
        ("resnext29_32x4d", 24, "of which 4 / 64 is a whole number, found 24"),
        ("torchvision:resnet18", 8, "torchvision:resnet18 takes no width, found 8"),
    ],
)
def test_widths_that_cannot_be(spec: str, width: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(spec, width=width)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet_smal", "unknown model 'resnet_smal'; did you mean resnet_small"),
        ("zzz", "unknown model 'zzz'; known: mlp, module:function, resnet18, .*, timm:NAME, torchvision:NAME, "),
        ("torchvision:resnet19", "unknown torchvision model 'resnet19'; did you mean resnet1"),
    ],
)
def test_unknown_models(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(spec)


def test_torchvision_models() -> None:
    torch.manual_seed(3)
    digest = model_digest(build("torchvision:shufflenet_v2_x0_5", 3, (32, 32)))
    torch.manual_seed(3)
    model = build("torchvision:shufflenet_v2_x0_5", 3, (32, 32))
    assert model_digest(model) == digest
    check_model(model, torch.randn(2, 3, 32, 32), 10)
    message = r"torchvision:x does not take images of 1x8x8 \(RuntimeError: .*3 channels"
    with pytest.raises(InputError, match=message) as error:
        check_model(model, torch.randn(2, 1, 8, 8), 10, name="torchvision:x")
    assert "\n" not in str(error.value)


def test_timm_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"model timm:resnet18 needs timm, .*; install sam-masks\[timm\]") as error:
        build("timm:resnet18")
    assert "\n" not in str(error.value)


def test_timm_models() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    digest = model_digest(build("timm:resnet10t", 1, (32, 32)))
    torch.manual_seed(3)
    model = build("timm:resnet10t", 1, (32, 32))
    assert model_digest(model) == digest
    check_model(model, torch.randn(2, 1, 32, 32), 10)
    vit = build("timm:vit_tiny_patch16_224", 3, (32, 48))
    check_model(vit, torch.randn(2, 3, 32, 48), 10)
    assert ParamTable.from_model(build("timm:vit_tiny_patch16_224", 3, (224, 224), 1000)).numel == 5_717_416
    with pytest.raises(InputError, match="unknown timm model 'resnet11t'; did you mean resnet1"):
        build("timm:resnet11t")
    with pytest.raises(InputError, match="takes no width, found 8"):
        build("timm:resnet10t", width=8)
    with torch.device("meta"):
        model = build("timm:mobilenetv4_conv_small", 3, (32, 32))
    assert sum(row.is_norm for row in ParamTable.from_model(model)) == 2 * len(list(norm_modules(model))) > 0
    assert timm.layers.RmsNorm in {type(m) for _, m in norm_modules(nn.Sequential(timm.layers.RmsNorm(4)))}


# -- the user's own -----------------------------------------------------------------------------------------

USER = """
from torch import nn
import {helper}

def make_net(in_channels, image_size, num_classes):
    assert image_size == (8, 8)
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))

def make_wide(num_classes, width=3, *, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_classes))

def make_any(**options):
    make_any.options = options
    return nn.Linear(1, 1)

def make_none(): pass
def make_strange(depth): pass
def make_failure(num_classes): raise RuntimeError("two\\nlines")
number = 3
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_{tmp_path.name.rstrip('0123456789')}"
    name = "".join(c if c.isalnum() else "_" for c in name)
    (tmp_path / f"{name}_helper.py").write_text("")
    (tmp_path / f"{name}.py").write_text(USER.format(helper=f"{name}_helper"))
    monkeypatch.chdir(tmp_path)
    return name


def test_a_function_gets_what_it_accepts(user: str) -> None:
    path = list(sys.path)
    check_model(build(f"{user}:make_net"), torch.randn(2, 1, 8, 8), 10)
    assert build(f"{user}:make_wide").get_submodule("1").out_features == 3  # type: ignore[comparison-overlap]
    assert build(f"{user}:make_wide", width=5).get_submodule("1").out_features == 5  # type: ignore[comparison-overlap]
    for width in (None, 9):
        build(f"{user}:make_any", width=width)
        given = {"in_channels": 1, "image_size": (8, 8), "num_classes": 10} | ({"width": 9} if width else {})
        assert sys.modules[user].make_any.options == given
    assert sys.path == path


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("make_ned", r"unknown function of .* 'make_ned'; did you mean make_net"),
        ("number", "unknown function of .* 'number'"),
        ("make_none", "must return a torch.nn.Module, it returned NoneType"),
        ("make_strange", "failed when called with .*TypeError: .*missing 1 required positional argument: 'depth'"),
        ("make_failure", r"failed when called with num_classes=10 \(RuntimeError: two lines\)"),
    ],
)
def test_functions_that_do_not_work(user: str, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build(f"{user}:{function}")
    assert "\n" not in str(error.value)


def test_a_width_is_never_dropped(user: str) -> None:
    with pytest.raises(InputError, match="make_net takes no width, found 5"):
        build(f"{user}:make_net", width=5)


def test_modules_that_cannot_be_imported(user: str) -> None:
    hint = "; name one of the current folder"
    for absent in ("nowhere_at_all", "nowhere.at_all", f"{user}.py", f"./{user}.py"):
        with pytest.raises(InputError, match=rf"cannot import '{absent}' .(ModuleNotFound|Type)Error: .*{hint}"):
            build(f"{absent}:make")
    Path(f"{user}_lacks.py").write_text("import nowhere_at_all")
    with pytest.raises(InputError, match=r"_lacks' .ModuleNotFoundError: No module named 'nowhere_at_all'.$"):
        build(f"{user}_lacks:make")
    for spec in (user, f"{user}.py"):
        with pytest.raises(InputError, match=f"model '{spec}' is a module; name its function too: {user}:FUNCTION$"):
            build(spec)
    Path(f"{user}_broken.py").write_text("def (")
    with pytest.raises(InputError, match=r"_broken' .SyntaxError: invalid syntax"):
        build(f"{user}_broken:make")
    Path(f"{user}_raises.py").write_text("1 / 0")
    with pytest.raises(InputError, match=r"_raises' .ZeroDivisionError: division by zero"):
        build(f"{user}_raises:make")
    with pytest.raises(InputError, match=r"cannot import '' .ValueError"):
        build(":make")


# -- check_model --------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Everything a forward pass may change: running statistics, own buffers, attributes, random streams."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(64, 10))
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(len(x))
        return self.net(x) + torch.rand(10)  # type: ignore[no-any-return]


def test_checking_leaves_no_trace() -> None:
    model = Stateful().train()
    model.net[1].eval()
    digest, state = model_digest(model), torch.get_rng_state()
    check_model(model, torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 10)
    assert model_digest(model) == digest
    assert torch.equal(torch.get_rng_state(), state)
    assert model.seen == []
    assert [m.training for m in model.net] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


class Returns(nn.Module):
    """Returns what it is given, in one of the modes."""

    def __init__(self, value: Any, when_training: bool) -> None:
        super().__init__()
        self.value, self.when_training = value, when_training

    def forward(self, x: torch.Tensor) -> Any:
        return self.value if self.training == self.when_training else torch.zeros(len(x), 10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 9), r"returns shape \(2, 9\) for 2 images of 1x8x8 in {mode} mode; .* it must be \(2, 10\)"),
        (torch.zeros(10), r"returns shape \(10,\)"),
        ((torch.zeros(2, 10), None), "returns tuple in {mode} mode; it must return one tensor"),
        (torch.zeros(2, 10, dtype=torch.int64), "returns torch.int64 with 0 of 20 values not finite in {mode} mode"),
        (torch.eye(2, 10) / 0, "returns torch.float32 with 20 of 20 values not finite in {mode} mode"),
    ],
)
def test_outputs_that_cannot_be_used(value: Any, message: str, training: bool) -> None:
    message = message.replace("{mode}", "training" if training else "evaluation")
    with pytest.raises(InputError, match=f"model mine {message}"):
        check_model(Returns(value, training), torch.zeros(2, 1, 8, 8), 10, name="mine")


def test_one_image_is_enough_and_a_model_must_be_copyable() -> None:
    check_model(build("mlp"), torch.zeros(1, 1, 8, 8), 10)
    model = build("mlp")
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(InputError, match="model model cannot be copied"):
        check_model(model, torch.zeros(1, 1, 8, 8), 10)
