"""Reuse of what no perturbed weight reaches: no bit differs, and the operations really are not repeated."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from masks import InputError, Mask, ParamTable
from sam import SAM, Accumulated, MethodSpec, list_methods
from sam.tape import Tape, address_of, tensors_in
from tests.sam.nets import BASES, batches, buffers, losses, make, own_settings, same_bits, snapshot, state_of


class Deep(nn.Module):
    """Two convolutions with BatchNorm and a residual, then the part under test, then a perturbed classifier."""

    def __init__(self, middle: nn.Module | None = None, *, inplace: bool = False, width: int = 6) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace)
        self.middle = middle or nn.Identity()
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.middle(x).mean((2, 3)))


def late(model: nn.Module, *prefixes: str) -> Mask:
    table = ParamTable.from_model(model)
    return Mask(table, tuple(row.name.startswith(prefixes) for row in table))


def run(template, prefixes, reuse, *, base="sgd", steps=3, loss_of=losses, data=None, rebuilt=None, **options):
    """All that steps leave behind, and the optimizer; before every step ``rebuilt(model, mask)`` is the new mask."""
    model = copy.deepcopy(template)
    options = {"mask": late(model, *prefixes), "rho": 0.3, "reuse_prefix": reuse, **options}
    optimizer = SAM(BASES[base](model.parameters()), model, **options)
    torch.manual_seed(5)
    stats = []
    for batch in data or batches(steps):
        if rebuilt is not None:
            optimizer.set_mask(rebuilt(model, optimizer.mask))
        optimizer.step_on(loss_of(model), batch)
        stats += [optimizer.stats.loss, optimizer.stats.perturbed_loss, optimizer.stats.radius]
    return [stats, snapshot(model), buffers(model), state_of(optimizer), torch.get_rng_state()], optimizer


def check_same(template, prefixes=("fc",), **options):
    """No bit differs; how much was reused."""
    plain, _ = run(template, prefixes, "off", **options)
    found, optimizer = run(template, prefixes, "on", **options)
    assert same_bits(plain, found)
    return optimizer.prefix.share


@pytest.mark.parametrize("statistics", ["first", "second", "both"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize(("net", "prefixes", "share"), [
    ("resnet", ("fc",), 3 / 4),
    ("resnet", ("conv2", "fc"), 2 / 4),  # the convolution of the shortcut is not behind conv2
    ("resnet", ("bn1",), 1 / 4),
    ("vit", ("head",), 5 / 6),  # attention on CPUs is not counted, but it is reused
    ("vit", ("block.linear2",), 4 / 6),
    ("vit", ("position",), 1 / 6),
])  # fmt: skip
def test_no_bit_differs(net, prefixes, share, base, statistics):
    """Weights, running statistics, optimizer state, losses and radius of three steps; the share is counted by hand."""
    assert check_same(make(net), prefixes, base=base, norm_statistics=statistics) == pytest.approx(share)


def test_the_operations_are_not_repeated():
    """Counted from outside: a step takes one forward pass less of all but the classifier."""
    model = make("resnet")
    batch = batches()[0]

    def flops(reuse):
        twin = copy.deepcopy(model)
        optimizer = SAM(BASES["sgd"](twin.parameters()), twin, mask=late(twin, "fc"), reuse_prefix=reuse)
        with FlopCounterMode(display=False) as counter:
            optimizer.step_on(losses(twin), batch)
        return counter.get_total_flops()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch[0])
    classifier = 2 * len(batch[0]) * model.fc.weight.numel()
    assert flops("off") - flops("on") == counter.get_total_flops() - classifier


OWN_MASK = [info.name for info in list_methods() if "mask" in MethodSpec(info.name).preset]


@pytest.mark.parametrize("name", [info.name for info in list_methods() if info.name not in OWN_MASK])
def test_every_method(name):
    """Methods with other passes than a clean and a final one, too."""
    spec = MethodSpec(name)
    method = spec.build().prepared(make("resnet"), make("resnet", width=3))
    check_same(make("resnet"), method=method, norm_scope=spec.preset.get("norm_scope", "masked"))


@pytest.mark.parametrize("name", OWN_MASK)
def test_methods_with_a_mask_of_their_own(name):
    """Rebuilt before every step, as between epochs. What comes before the first layer that is trained is reused,
    whatever the mask keeps; under the mask norm all convolutions are."""
    spec, model = MethodSpec(name), make("resnet")
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    masks = []

    def rebuilt(model, mask):
        masks.append(own_settings(spec, model, mask)["mask"])
        return masks[-1]

    share = check_same(model, rebuilt=rebuilt, **own_settings(spec, model))
    assert share == 3 / 4 if name == "sam_on" else share >= 1 / 4
    assert (masks[0] == masks[1]) == (name == "sam_on")


@pytest.mark.parametrize(("net", "share"), [("resnet", 1 / 4), ("vit", 1 / 6)])
def test_all_normalization_layers(net, share):
    """SAM-ON: what is before the first of them."""
    assert check_same(make(net), **own_settings(MethodSpec("sam_on"), make(net))) == pytest.approx(share)


def test_norm_over_all_parameters():
    """The first pass then goes through the whole graph; what is reused is none of that graph."""
    assert check_same(make("resnet"), norm_scope="full") == 3 / 4


class AddsInPlace(nn.Module):
    """Changes what came before, in place, by a perturbed weight."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = x * 2
        x += self.shift
        return x


class InPlaceLater(nn.Module):
    """A perturbed weight reads a tensor that is changed in place afterwards, and one that is not."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.full((), 0.7))

    def forward(self, x):
        y = x * 2
        before = (y + self.shift).detach()
        y.add_(1).sub_(3)
        return y * before


class ChangesBuffer(nn.Module):
    """Reads a buffer, and changes it with or without a word to autograd."""

    def __init__(self, quiet):
        super().__init__()
        self.quiet = quiet
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        x = x * self.scale.clone()
        (self.scale.data if self.quiet else self.scale).add_(0.5)
        return x


class FilledUnseen(nn.Module):
    """Fills new memory from a perturbed weight behind torch's back, as a kernel of one's own may."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, x):
        memory = torch.zeros_like(x)
        memory.numpy()[:] = float(self.shift.detach())
        return x + memory * 2 + self.shift  # the last of which moves it


class _Overwrite(torch.autograd.Function):
    """Changes its argument in place by a kernel of its own, and tells autograd, as such functions must."""

    @staticmethod
    def forward(ctx, x, shift):
        ctx.mark_dirty(x)
        x.detach().numpy()[:] += float(shift.detach())
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.sum()


class ChangedUnseen(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return _Overwrite.apply(x * 2, self.shift) * 3


class Draws(nn.Module):
    """A random operation that returns new memory."""

    def forward(self, x):
        return x * torch.bernoulli(x.detach().sigmoid())


class Alternates(nn.Module):
    """Computes something else in every other call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * 2 if self.calls % 2 else torch.tanh(x) + x.square()


class Constants(nn.Module):
    """Memory that no pass before knows, freed and allocated again."""

    def forward(self, x):
        for i in range(3):
            x = x * torch.tensor(1.0 + i) + torch.arange(x.shape[-1])
        return torch.cat([x, torch.zeros_like(x)], 1)[:, : x.shape[1]].clamp(min=-0.5)


class Eval(nn.BatchNorm2d):
    """Normalises by running statistics, which no pass changes."""

    def __init__(self):
        super().__init__(6)

    def train(self, mode=True):
        return super().train(False)


class Untracked(nn.Module):
    """A BatchNorm whose running statistics SAM does not know to be such."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance, training=True) + self.mean[:, None, None]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("middle", "prefixes"), [
    (AddsInPlace, ("middle", "fc")),
    (InPlaceLater, ("middle", "fc")),
    (lambda: ChangesBuffer(False), ("fc",)),
    (lambda: ChangesBuffer(True), ("fc",)),
    (FilledUnseen, ("middle", "fc")),
    (ChangedUnseen, ("middle", "fc")),
    (Alternates, ("fc",)),
    (Constants, ("fc",)),
    (Eval, ("fc",)),
    (Untracked, ("fc",)),
    (lambda: nn.BatchNorm2d(6, momentum=None), ("fc",)),
    (lambda: nn.InstanceNorm2d(6, track_running_stats=True), ("fc",)),
    (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1)), ("fc",)),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1)), ("fc",)),
])  # fmt: skip
def test_models_that_ask_for_a_mistake(middle, prefixes, inplace):
    """Each would be wrong with a simpler reuse: by the module, by the position, or by the address alone."""
    torch.manual_seed(1)
    assert check_same(Deep(middle(), inplace=inplace), prefixes) >= 2 / 5


@pytest.mark.parametrize("replay", [True, False])
def test_dropout(replay):
    """What random numbers reach is computed again, with the numbers that it has without reuse."""
    torch.manual_seed(1)
    for layer in (nn.Dropout(0.5), Draws()):
        assert check_same(Deep(layer), replay_rng=replay) == 2 / 3
    assert check_same(Deep(nn.Sequential(nn.Dropout(0.5), nn.Conv2d(6, 6, 1))), replay_rng=replay) == 2 / 4


def test_a_known_tensor_changed_between_the_passes():
    known = torch.ones(3)
    tape = Tape([known], [])
    with tape.during("clean"):
        first = known * 2
    known.add_(1)
    with tape.during("final"):
        assert torch.equal(known * 2, first + 2)


@torch.no_grad()
def test_an_address_that_is_used_again():
    """Memory made unseen where numbered memory lay before does not inherit its number."""
    x = torch.ones(3)
    tape = Tape([x], [])
    found = []
    for role in ("clean", "final"):
        with tape.during(role):
            for i in range(50):
                F.relu(x + i)  # the sum is not held
                found.append(torch.from_numpy(np.full(3, float(len(found)), np.float32)) * 1)
    assert [int(t[0]) for t in found] == list(range(100))


def test_another_model_in_the_loss():
    """A teacher, whose weights are not known, is asked twice, as without reuse."""
    torch.manual_seed(1)
    teacher = Deep().eval()

    def loss_of(model):
        return lambda batch: F.cross_entropy(model(batch[0]), teacher(batch[0]).softmax(1), reduction="none")

    assert check_same(Deep(), loss_of=loss_of) == 2 / 6


def test_the_batch_changed_in_place():
    """By the loss function, between the passes: the second one sees another batch."""

    def loss_of(model):
        def loss_fn(batch):
            out = losses(model)((batch[0].clone(), batch[1]))
            batch[0].mul_(0.9)
            return out

        return loss_fn

    torch.manual_seed(1)
    model, data = Deep(), batches(3)
    plain, _ = run(model, ("fc",), "off", loss_of=loss_of, data=copy.deepcopy(data))
    found, optimizer = run(model, ("fc",), "on", loss_of=loss_of, data=copy.deepcopy(data))
    assert same_bits(plain, found)
    assert optimizer.prefix.share == 0


def test_autocast_and_scaler():
    def loss_of(model):
        def loss_fn(batch):
            with torch.autocast("cpu", torch.bfloat16):
                return losses(model)(batch)

        return loss_fn

    torch.manual_seed(1)
    assert check_same(Deep(), loss_of=loss_of) == 2 / 3
    for net in ("resnet", "vit"):
        assert check_same(make(net), ("fc", "head"), loss_of=loss_of) >= 3 / 4
    model = make("resnet")
    plain, _ = run(model, ("fc",), "off", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    found, _ = run(model, ("fc",), "on", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    assert same_bits(plain, found)


@pytest.mark.parametrize("given", ["model", "inner"])
def test_compiled(given):
    """A compiled model, known to SAM or only to the loss function: compiled and computed as without reuse."""
    torch.manual_seed(1)

    def loss_of(model):
        called = torch.compile(model, backend="aot_eager")
        return lambda batch: F.cross_entropy(called(batch[0]), batch[1], reduction="none")

    torch.compiler.reset()
    if given == "inner":
        check_same(Deep(), loss_of=loss_of, steps=2)
    else:
        model = Deep()
        model.middle = torch.compile(nn.Conv2d(6, 6, 1), backend="eager")
        optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=late(model, "fc"), reuse_prefix="on")
        assert "compiled" in optimizer.prefix.reason
    torch.compiler.reset()


def test_residual_nets_hold_nothing_that_autograd_lets_go():
    """Of each convolution, BatchNorm, ReLU and sum, only what the first pass's graph keeps alive is held."""
    model = Deep(width=16)
    batch = batches()[0]
    kept = set()
    tape = Tape([*model.parameters(), *model.buffers(), *batch], list(model.buffers()))

    def pack(tensor):
        kept.add(address_of(tensor))
        return tensor

    with tape.during("clean"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = losses(model)(batch)
    held = [t for call in tape._calls for t in tensors_in(call.held) if t.numel() >= batch[0].shape[0] * 16 * 36]
    assert len(held) == 4
    assert {address_of(t) for t in held} <= kept
    del loss


def test_auto_stops_where_it_is_not_worth_it():
    model = make("vit")
    options = {"mask": late(model, "block.linear1"), "reuse_prefix": "auto"}
    optimizer = SAM(BASES["sgd"](model.parameters()), model, **options)
    assert (optimizer.prefix.reason, optimizer.prefix.share) == (None, 0.0)
    optimizer.step_on(losses(model), batches()[0])
    assert (optimizer.prefix.reason, optimizer.prefix.share) == (None, 0.5)
    optimizer.set_mask(late(model, "block.self_attn.in_proj_weight"))
    optimizer.step_on(losses(model), batches()[0])
    assert optimizer.prefix.reason == "only 1 of 6 matrix products and convolutions could be reused"
    optimizer.set_mask(late(model, "position"))
    assert "first layers" in optimizer.prefix.reason
    optimizer.set_mask(late(model, "nothing"))
    assert "empty" in optimizer.prefix.reason
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=options["mask"], reuse_prefix="off")
    assert "switched off" in optimizer.prefix.reason
    with pytest.raises(InputError, match="reuse_prefix"):
        SAM(BASES["sgd"](model.parameters()), model, mask=options["mask"], reuse_prefix=True)


def test_accumulated_batches_are_computed_twice():
    model = make("resnet")
    optimizer = SAM(BASES["sgd"](model.parameters()), model, mask=late(model, "fc"), reuse_prefix="on")
    optimizer.step_on(losses(model), Accumulated(batches(2)))
    assert optimizer.prefix.share == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prefixes", "share"), [
    ("resnet18", ("layer4", "fc"), 0.6),
    ("vgg11_bn", ("classifier",), 0.7),
    ("densenet121", ("features.denseblock4",), 0.6),
    ("mobilenet_v3_small", ("classifier",), 0.6),
    ("vit_b_32", ("heads", "encoder.layers.encoder_layer_11"), 0.8),
    ("swin_t", ("head", "features.7"), 0.1),  # new memory is filled for the shifted windows: that is not numbered
    ("convnext_tiny", ("classifier", "features.7"), 0.6),
])  # fmt: skip
def test_torchvision(name, prefixes, share):
    """Without a word about their structure; dropout and stochastic depth are off, as they end what can be reused."""
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(name, weights=None, num_classes=10)
    for module in model.modules():
        if type(module).__name__ in ("Dropout", "StochasticDepth"):
            module.p = 0.0
    size = 224 if name.startswith("vit") else 64
    data = [(torch.randn(2, 3, size, size), torch.randint(0, 10, (2,))) for _ in range(2)]
    assert check_same(model, prefixes, data=data) >= share
