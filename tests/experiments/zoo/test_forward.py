"""What the architectures compute, against torchvision's or against a formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.zoo.layers import Gain
from experiments.zoo.resnet import ResNet, ResNeXt
from experiments.zoo.vgg import VGG
from experiments.zoo.vit import ViT
from experiments.zoo.wide_resnet import WideResNet


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers one by one; for nets whose layers come in the same order."""
    ours, theirs = list(source.state_dict().values()), target.state_dict()
    assert [t.shape for t in ours] == [t.shape for t in theirs.values()]
    target.load_state_dict(dict(zip(theirs, ours, strict=True)))


def images(model: nn.Module, *shape: int) -> Tensor:
    """Random images, after every BatchNorm got statistics, scales and shifts that it cannot be left out with."""
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return torch.randn(*shape)


def test_resnet18_is_torchvisions_behind_the_stem() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    ours = ResNet(3, (16, 16), 7, 64, blocks=(2, 2, 2, 2))
    x = images(ours, 4, 3, 16, 16)
    theirs = resnet18(num_classes=7)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    copy_in_order(ours, theirs)
    torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_resnext_is_torchvisions_behind_the_stem() -> None:
    from torchvision.models.resnet import Bottleneck
    from torchvision.models.resnet import ResNet as Theirs

    torch.manual_seed(0)
    ours = ResNeXt(3, (16, 16), 7, 64, cardinality=8, bottleneck=4, blocks=(2, 1, 2))
    x = images(ours, 4, 3, 16, 16)
    theirs = Theirs(Bottleneck, [2, 1, 2, 1], num_classes=7, groups=8, width_per_group=4)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.layer4, theirs.fc = nn.Identity(), nn.Linear(1024, 7)
    copy_in_order(ours, theirs)
    torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_vgg_is_torchvisions_up_to_the_classifier() -> None:
    from torchvision.models import vgg16_bn

    torch.manual_seed(0)
    ours = VGG(3, (32, 32), 7, 64)
    x = images(ours, 2, 3, 32, 32)
    theirs = vgg16_bn(num_classes=7)
    for module in theirs.features:
        if isinstance(module, nn.Conv2d):
            module.bias = None
    copy_in_order(ours.features, theirs.features)
    torch.testing.assert_close(ours(x), ours.head(theirs.eval().features(x).flatten(1)))


def test_vit_is_torchvisions() -> None:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    ours = ViT(3, (16, 16), 7, 128, depth=3).eval()
    theirs = VisionTransformer(
        image_size=16, patch_size=4, num_layers=3, num_heads=2, hidden_dim=128, mlp_dim=512, num_classes=7
    ).eval()
    state, mine = theirs.state_dict(), ours.state_dict()
    names = {"class_token": "token", "encoder.pos_embedding": "position"}
    for end in ("weight", "bias"):
        names |= {f"conv_proj.{end}": f"embed.{end}", f"encoder.ln.{end}": f"norm.{end}"}
        names |= {f"heads.head.{end}": f"head.{end}"}
        for i in range(3):
            there, here = f"encoder.layers.encoder_layer_{i}", f"blocks.{i}"
            names |= {f"{there}.ln_{j}.{end}": f"{here}.norm{j}.{end}" for j in (1, 2)}
            names |= {f"{there}.self_attention.in_proj_{end}": f"{here}.attention.qkv.{end}"}
            names |= {f"{there}.self_attention.out_proj.{end}": f"{here}.attention.proj.{end}"}
            names |= {f"{there}.mlp.{a}.{end}": f"{here}.mlp.{b}.{end}" for a, b in ((0, 0), (3, 2))}
    assert set(names) == set(state)
    assert set(names.values()) == set(mine)
    theirs.load_state_dict({there: mine[here] for there, here in names.items()})
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_option_a_takes_every_second_pixel_and_new_channels_are_zero() -> None:
    torch.manual_seed(0)
    model = ResNet(3, (8, 8), 5, 4, blocks=(1, 1), shortcut="padding")
    shortcut = model.get_submodule("stages.1.0.shortcut")
    x = torch.randn(2, 4, 8, 7)
    out = shortcut(x)
    assert out.shape == (2, 8, 4, 4)
    assert torch.equal(out[:, :4], x[:, :, ::2, ::2])
    assert not out[:, 4:].any()
    assert not list(shortcut.parameters())


def test_wide_resnet_by_hand() -> None:
    """WRN-10-k in evaluation mode, from its weights, as figure 1 (b) and table 1 of the paper say."""
    torch.manual_seed(0)
    model = WideResNet(3, (12, 12), 5, 32, depth=10)
    x = images(model, 4, 3, 12, 12)
    state = model.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        stats = [state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *stats))

    out = F.conv2d(x, state["stem.weight"], padding=1)
    for stage, stride in enumerate((1, 2, 2)):
        at = f"stages.{stage}.0"
        active = norm(out, f"{at}.norm1")
        branch = norm(F.conv2d(active, state[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.norm2")
        branch = F.conv2d(branch, state[f"{at}.conv2.weight"], padding=1)
        out = branch + F.conv2d(active, state[f"{at}.shortcut.weight"], stride=stride)
    pooled = norm(out, "norm").mean(dim=(2, 3))
    torch.testing.assert_close(model(x), F.linear(pooled, state["head.weight"], state["head.bias"]))


def test_identity_shortcuts_pass_the_input_on() -> None:
    """With the second convolutions of a stage's later blocks at 0, the blocks change nothing."""
    torch.manual_seed(0)
    model = WideResNet(3, (8, 8), 5, 16, depth=16).eval()
    stage = model.stages[0]
    for block in stage:
        nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 8, 8)  # width 16: the first block has no convolution in its shortcut
    assert torch.equal(stage(x), x)


def test_convolutions_start_as_he_et_al() -> None:
    torch.manual_seed(0)
    for model in (WideResNet(3, (32, 32), 10, 64, depth=16), VGG(3, (32, 32), 10, 64)):
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
                expected = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
                assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
    model = ViT(3, (32, 32), 10, 192)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.06)


def test_a_net_without_normalization_starts_with_branches_of_the_size_of_one() -> None:
    torch.manual_seed(0)
    model = ResNet(3, (32, 32), 10, 16, blocks=(9, 9, 9), shortcut="padding", norm="none")
    gains = [m.weight.item() for m in model.modules() if isinstance(m, Gain)]
    assert gains == pytest.approx([27**-0.5] * 27)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        size = [float(x.square().mean())]
        size += [float((x := part(x)).square().mean()) for part in (model.stem, *model.stages)]
    assert all(0.1 < s < 10 for s in size), size  # without gains, the signal grows 2^27 times
