"""Small models, batches, masks and oracles that the tests of `sam` share."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masks import Budget, Mask, MaskContext, MaskSpec, ParamTable, build_mask, list_masks
from sam import SAM, Elementwise, Identity, Layerwise, MethodSpec, Rule

Batch = tuple[Tensor, Tensor]


class TinyResNet(nn.Module):
    """Three convolutions, three BatchNorms (one on a 1x1 shortcut), dropout, a classifier; 3x6x6 inputs."""

    def __init__(self, width: int = 6, dropout: float = 0.0, momentum: float | None = 0.1) -> None:
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, momentum=momentum)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = norm(2 * width)
        self.shortcut = nn.Sequential(nn.Conv2d(width, 2 * width, 1, stride=2, bias=False), norm(2 * width))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + self.shortcut(x))
        return self.fc(self.dropout(x.mean((2, 3))))


class TinyViT(nn.Module):
    """One pre-norm transformer block over nine patches and a class token; LayerNorm, attention, dropout."""

    def __init__(self, dim: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 10, dim) * 0.02)
        self.block = nn.TransformerEncoderLayer(dim, 2, 2 * dim, dropout, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.block(x))[:, 0])


def own_settings(spec: MethodSpec, model: nn.Module, previous: Mask | None = None) -> dict[str, Any]:
    """Method, mask and norm scope of a method that fixes the latter two; the mask may evolve from a previous one."""
    context = MaskContext(model, batches=batches(2, seed=7), previous=previous)
    mask = MaskSpec.parse(spec.preset["mask"]).build(context, Budget.matching(build_mask("norm", context)))
    return {"method": spec.build(), "mask": mask, "norm_scope": spec.preset["norm_scope"]}


def make(name: str, *, dropout: float = 0.0, seed: int = 0, **options) -> nn.Module:
    """A model by name with weights that depend on the seed alone; the affine weights of norms are not all 1."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = {"resnet": TinyResNet, "vit": TinyViT}[name](dropout=dropout, **options)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1:
                    p.add_(torch.randn_like(p) * 0.1)
    return model


def batches(count: int = 1, size: int = 8, seed: int = 1, dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 6, 6, generator=generator, dtype=dtype),
            torch.randint(0, 4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def losses(model: nn.Module) -> Callable[[Batch], Tensor]:
    """The per-example losses that `step_on` takes."""
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def closure(optimizer: torch.optim.Optimizer, loss_fn: Callable[[Batch], Tensor], batch: Batch) -> Callable[[], Tensor]:
    """The same computation in torch's convention."""

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(batch).mean()
        loss.backward()
        return loss

    return run


def take(optimizer: SAM, loss_fn: Callable[[Batch], Tensor], batch: Batch, entry: str) -> Tensor:
    """One step through either entry."""
    return (
        optimizer.step_on(loss_fn, batch) if entry == "step_on" else optimizer.step(closure(optimizer, loss_fn, batch))
    )


ENTRIES = ("step_on", "step")

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-3),
    "sgd_nesterov_foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-3, fused=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.02),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, 0.02, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.005, momentum=0.5),
}

RULES = {
    "l2": Rule.named("l2"),
    "linf": Rule.named("linf"),
    **{
        f"{name}-eta{eta:g}-{bias}": Rule.named(name, eta=eta, bias=bias)
        for name in ("elementwise_l2", "elementwise_linf", "layerwise_l2", "layerwise_linf")
        for eta in (0.0, 0.05)
        for bias in ("identity", "adaptive")
    },
}
RULES_AND_SCOPES = [
    (rule, scope) for rule in RULES for scope in ("masked", "full") if scope == "masked" or RULES[rule].p == 2
]

MASK_NAMES = tuple(info.name for info in list_masks() if info.origin == "sam-masks")


def build(model: nn.Module, name: str, *, density: float | None = None, seed: int = 0) -> Mask:
    """A registered mask; budgeted ones keep as much as the norm mask unless a density is given."""
    context = MaskContext(model, batches=batches(2, seed=7), seed=seed)
    info = next(info for info in list_masks() if info.name == name)
    if name == "file":
        with tempfile.TemporaryDirectory() as folder:
            mixed_mask(model).save(f"{folder}/mask.npz")
            return build_mask(name, context, options={"path": f"{folder}/mask.npz"})
    if info.kind == "natural":
        return build_mask(name, context)
    budget = (
        Budget.matching(build_mask("norm", context))
        if density is None
        else Budget.from_density(density, context.table.numel)
    )
    return build_mask(name, context, budget)


def mixed_mask(model: nn.Module, seed: int = 3) -> Mask:
    """A mask in which whole, dense, index and untouched tensors all occur."""
    generator = torch.Generator().manual_seed(seed)
    table = ParamTable.from_model(model)
    parts: list[bool | Tensor] = []
    for i, row in enumerate(table):
        if row.numel >= 20 and i % 2 == 0:  # index form: less than a tenth
            part = torch.zeros(row.numel, dtype=torch.bool)
            part[torch.randperm(row.numel, generator=generator)[: max(1, row.numel // 12)]] = True
            parts.append(part.reshape(row.shape))
        elif i % 4 == 1:
            parts.append(torch.rand(row.shape, generator=generator) < 0.5)
        else:
            parts.append(i % 4 == 3)
    return Mask(table, tuple(parts))


class Recorder:
    """A loss function that notes, at every call, the weights, the gradients and what dropout drew."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Batch], Tensor] | None = None) -> None:
        self.model = model
        self.loss_fn = loss_fn or losses(model)
        self.weights: list[dict[str, Tensor]] = []
        self.drawn: list[list[Tensor]] = []
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda m, args, out: self.drawn[-1].append(out.detach() == 0))

    def __call__(self, batch: Batch) -> Tensor:
        self.weights.append(snapshot(self.model))
        self.drawn.append([])
        return self.loss_fn(batch)

    def eps(self, first: int = -2, second: int = -1) -> dict[str, Tensor]:
        return {k: self.weights[second][k] - w for k, w in self.weights[first].items()}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in model.named_buffers()}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def same_bits(a, b) -> bool:
    """Deep, bitwise equality of tensors and containers of them (NaN equals NaN, 0.0 is not -0.0)."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return a.detach().contiguous().numpy().tobytes() == b.detach().contiguous().numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def state_of(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The base optimizer's state per parameter, copied."""
    return [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state.get(p, {}).items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


# -- the quadratic -------------------------------------------------------------------------------------------


class _Leaf(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)


class Quadratic(nn.Module):
    """L_i(w) = 0.5 w^T A w - b_i^T w over four tensors (two of them biases), in float64."""

    SHAPES = ((8, 5), (4,), (6, 2), (3,))
    NUMEL = 40 + 4 + 12 + 3

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.SHAPES]
        tensors[0][0, 0] = 0.0  # an elementwise metric without a floor never moves it
        self.one, self.two = _Leaf(*tensors[:2]), _Leaf(*tensors[2:])
        root = torch.randn(self.NUMEL, self.NUMEL, generator=generator, dtype=torch.float64)
        self.A = root @ root.T / self.NUMEL + torch.eye(self.NUMEL, dtype=torch.float64)
        self.b = torch.randn(5, self.NUMEL, generator=generator, dtype=torch.float64)

    def forward(self, b: Tensor) -> Tensor:
        w = torch.cat([p.reshape(-1) for p in self.parameters()])
        return 0.5 * w @ self.A @ w - b @ w


def quadratic_masks(model: Quadratic) -> dict[str, Mask]:
    """One mask per form, and one of all forms together."""
    table = ParamTable.from_model(model)
    few = torch.zeros(8, 5, dtype=torch.bool)
    few[0, 0] = few[2, 3] = few[7, 4] = True  # 3 of 40: index form
    some = torch.zeros(6, 2, dtype=torch.bool)
    some[1:4] = True  # half: dense form
    half = torch.tensor([True, False, True, False])
    return {
        "whole": Mask(table, (True, False, False, True)),
        "index": Mask(table, (few, False, False, False)),
        "dense": Mask(table, (False, half, some, False)),
        "mixed": Mask(table, (few, True, some, False)),
        "all": Mask(table, (True,) * 4),
    }


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([t.detach().numpy().reshape(-1) for t in tensors])


def describe(rule: Rule) -> dict:
    """The rule in the words of the reference implementation."""
    name = {Identity: "identity", Elementwise: "elementwise", Layerwise: "layerwise"}[type(rule.metric)]
    return {
        "metric": name,
        "p": rule.p,
        "eta": getattr(rule.metric, "eta", 0.0),
        "bias": getattr(rule.metric, "bias", "identity"),
    }


def reference_eps(
    w: np.ndarray,
    g: np.ndarray,
    mask: Mask,
    *,
    metric: str,
    p: float,
    eta: float,
    bias: str,
    scope: str,
    rho: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """eps and T over all coordinates, written from the formulas in plain numpy."""
    keep = np.concatenate([part.numpy().reshape(-1) for part in mask.dense()])
    T = np.ones_like(w)
    start = 0
    for row in mask.table:
        span = slice(start, start + row.numel)
        start += row.numel
        if metric == "identity" or (bias == "identity" and row.name.endswith("bias")):
            continue
        T[span] = np.abs(w[span]) + eta if metric == "elementwise" else math.sqrt((w[span] ** 2).sum()) + eta
    if p == 2:
        over = keep if scope == "masked" else np.ones_like(keep)
        eps = rho * T**2 * g / math.sqrt(((T * g)[over] ** 2).sum())
    else:
        eps = rho * T * np.sign(g)
    return np.where(keep, eps, 0.0), T
