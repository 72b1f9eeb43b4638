"""The contract of mask builders, for their authors: one call checks a registered mask on a small zoo of models.

In the tests of a plugin, once the module that registers the mask has been imported::

    from masks.testing import check_mask_builder

    def test_my_mask() -> None:
        check_mask_builder("my_mask")
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

from masks.budget import Budget
from masks.context import Batch, MaskContext
from masks.errors import BuilderError, MaskError
from masks.mask import Mask
from masks.params import ParamTable, model_digest
from masks.registry import MaskInfo, build_mask, mask_info

_SEED = 7


def check_mask_builder(name: str, *, options: Mapping[str, Any] | None = None) -> None:
    """Check that a registered mask keeps the contract of mask builders.

    On each of four small models (a ResNet with BatchNorm, a transformer with LayerNorm, one with tied and
    frozen weights, one without normalization), all on the CPU, with images to score on:

    - a budgeted builder keeps exactly k coordinates, for k of 0, 1, the number of normalization parameters, a
      half, all and a tenth of them; a natural one refuses a budget;
    - what it cannot do, it refuses with a ``MaskError``, and with no other exception;
    - the mask is over the model's table: tied weights once, frozen ones not at all;
    - the same context gives the same mask, and so does a new one with the same seed, whatever the global
      random state and the training mode; unless it declares ``needs_data``, also one without data;
    - the model is left bit for bit: parameters, buffers, gradients, ``requires_grad``, modes, hooks; so are the
      batches, the global random states, the default dtype and whether torch records gradients;
    - provenance says how the mask was built, and mask and provenance survive a file;
    - every value of every option of a ``Literal`` or ``bool`` type builds or is refused.

    Args:
        name: the registered name.
        options: the options to check with; the defaults for the others.

    Raises:
        AssertionError: the first breach; the message names the mask, the model and what differs. A mask that is
            refused on every model and budget is one too.
        MaskError: there is no such mask or option.
    """
    info = mask_info(name)
    chosen = info.resolve_options(options or {})
    listed = [(option.name, value) for option in info.options for value in _values(option.type)]
    variants = [{**chosen, key: value} for key, value in listed if value != chosen[key]]
    built, refusal = 0, ""
    with _random_states():
        models, batches = _zoo()
        for title, model in models.items():
            case = _Case(info, title, model, batches)
            for budget in case.budgets():
                built += case.check(budget, chosen)
                refusal = case.refusal or refusal
            for variant in variants:
                case.check(case.budgets()[-1], variant)
    if not built:
        raise AssertionError(f"mask {name}: refused on every model and budget of the zoo; the last time: {refusal}")


class _Case:
    """One builder on one model."""

    def __init__(self, info: MaskInfo, title: str, model: nn.Module, batches: list[Batch]) -> None:
        self.info, self.title, self.model, self.batches = info, title, model, batches
        self.table = ParamTable.from_model(model)
        self.refusal = ""

    def budgets(self) -> list[Budget | None]:
        """What to ask for; options are checked with the last one, a tenth."""
        if self.info.kind == "natural":
            return [None]
        n, norm = self.table.numel, sum(row.numel for row in self.table if row.is_norm)
        return [Budget(k, n) for k in dict.fromkeys((0, 1, norm, n // 2, n, n // 10))]

    def fail(self, what: str, budget: Budget | None, options: Mapping[str, Any]) -> NoReturn:
        asked = f"options {dict(options)}, budget {budget and budget.num_kept}"
        raise AssertionError(f"mask {self.info.name}, model {self.title}, {asked}: {what}")

    def context(self, *, data: bool = True) -> MaskContext:
        return MaskContext(self.model, batches=self.batches if data else (), seed=_SEED, built_at="epoch 3")

    def build(self, context: MaskContext, budget: Budget | None, options: Mapping[str, Any]) -> Mask | None:
        """The mask, or None if it is refused; in both cases nothing else may have changed."""
        before = _state(self.model, self.batches)
        mask, wrong, self.refusal = None, "", ""
        try:
            mask = build_mask(self.info.name, context, budget, options)
        except BuilderError as error:
            wrong = str(error)
        except MaskError as error:
            self.refusal = str(error)
        except Exception as error:
            wrong = f"raised {type(error).__name__}: {error}; what it cannot do, a builder refuses with a MaskError"
        after = _state(self.model, self.batches)
        changed = [key for key in before | after if before.get(key) != after.get(key)]
        if changed or wrong:
            self.fail(wrong or f"the builder changed {', '.join(changed[:3])}", budget, options)
        return mask

    def check(self, budget: Budget | None, options: Mapping[str, Any]) -> bool:
        """Whether there is a mask for this budget and these options; raises if it breaks the contract."""
        context = self.context()
        mask = self.build(context, budget, options)
        if mask is None:
            return False
        self.check_content(mask, budget, options)
        if budget is None and self.build(context, Budget(mask.num_kept, mask.numel), options):
            self.fail("takes a budget, though it is of natural size", budget, options)
        others = {"the same context": context, "another random state and training mode": self.context()}
        if not self.info.needs_data:
            others["a context without data, though needs_data is False,"] = self.context(data=False)
        for what, other in others.items():
            with _random_states(self.model if what.startswith("another") else None):
                again = self.build(other, budget, options)
            if again is None:
                self.fail(f"{what} is refused: {self.refusal}", budget, options)
            if again.digest() != mask.digest():
                self.fail(f"{what} gives another mask (overlap {mask.jaccard(again):.3f})", budget, options)
        return True

    def check_content(self, mask: Mask, budget: Budget | None, options: Mapping[str, Any]) -> None:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        rows = [id(named.get(row.name)) for row in mask.table]
        if len(rows) != len(set(rows)) or set(rows) != {id(p) for p in self.model.parameters() if p.requires_grad}:
            self.fail("the mask's table does not list each trainable tensor once, and no other", budget, options)
        kept = sum(int(part.sum()) for part in mask.dense())
        if kept != (budget.num_kept if budget else mask.num_kept):
            self.fail(f"{kept} coordinates are True", budget, options)
        p = mask.provenance
        found = (p.builder, p.options, p.seed, p.model_digest, p.built_at, p.kind)
        wanted = (self.info.name, dict(options), _SEED, model_digest(self.model), "epoch 3", self.info.kind)
        if found != wanted:
            self.fail(f"provenance is {found}, it should be {wanted}", budget, options)
        with tempfile.TemporaryDirectory() as folder:
            mask.save(Path(folder) / "mask.npz")
            loaded = Mask.load(Path(folder) / "mask.npz", self.table)
        if loaded != mask or loaded.provenance != p:
            self.fail("the mask or its provenance is another one after saving and loading", budget, options)


def _values(kind: Any) -> tuple[Any, ...]:
    """The values of an option's type, if they can be listed."""
    return get_args(kind) if get_origin(kind) is Literal else (True, False) if kind is bool else ()


def _bits(tensor: Tensor) -> Any:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), flat.numpy().tobytes()


def _state(model: nn.Module, batches: list[Batch]) -> dict[str, Any]:
    """All that a builder must leave as it is, by the name that a message gives it."""
    state: dict[str, Any] = {f"batch {i}": (_bits(x), _bits(y)) for i, (x, y) in enumerate(batches)}
    for name, p in model.named_parameters(remove_duplicate=False):
        state |= {f"parameter {name}": (id(p), _bits(p)), f"requires_grad of {name}": p.requires_grad}
        state[f"the gradient of {name}"] = None if p.grad is None else _bits(p.grad)
    state |= {f"buffer {name}": _bits(b) for name, b in model.named_buffers(remove_duplicate=False)}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in model.named_modules():
        state[f"the training mode of module {name!r}"] = module.training
        state[f"the hooks of module {name!r}"] = [list(getattr(module, kind)) for kind in hooks]
    state["the random state of torch"] = torch.get_rng_state().numpy().tobytes()
    state["the random state of numpy"] = [np.asarray(part).tobytes() for part in np.random.get_state()]
    state["the random state of python"] = random.getstate()
    return state | {"the grad mode": torch.is_grad_enabled(), "the default dtype": torch.get_default_dtype()}


@contextmanager
def _random_states(disturbed: nn.Module | None = None) -> Iterator[None]:
    """Put the global random states back on exit; inside, disturb them and this model's training modes."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    modes = {module: module.training for module in disturbed.modules()} if disturbed else {}
    try:
        if disturbed:
            for seed in (torch.manual_seed, np.random.seed, random.seed):
                seed(4711)
        for module, mode in modes.items():
            module.training = not mode
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        for module, mode in modes.items():
            module.training = mode


class _Residual(nn.Module):
    def __init__(self, *body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = nn.Sequential(*body), shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.body(x), self.shortcut(x))


class _Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def _zoo() -> tuple[dict[str, nn.Module], list[Batch]]:
    """Models of (B, 3, 8, 8), each with some gradients, modules in both modes and an unused weight; and batches."""
    torch.manual_seed(_SEED)

    def conv(width_in: int, width: int, size: int, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(width_in, width, size, stride, size // 2, bias=False)
        return [layer, nn.BatchNorm2d(width, momentum=0.1 if stride == 1 else None)]

    block = _Residual(*conv(8, 12, 3, 2), nn.ReLU(), *conv(12, 12, 3), shortcut=nn.Sequential(*conv(8, 12, 1, 2)))
    patches = [nn.Conv2d(3, 4, 2, 2), nn.Flatten(2)]
    attention = _Residual(nn.LayerNorm(16), _Attention(16, 2, dropout=0.1, add_bias_kv=True, batch_first=True))
    mlp = _Residual(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.LayerNorm(16)).requires_grad_(False)
    first, second, half_frozen = nn.Linear(16, 16), nn.Linear(16, 16), nn.GroupNorm(4, 16)
    second.weight = first.weight
    half_frozen.bias.requires_grad_(False)
    layers: dict[str, list[nn.Module]] = {
        "resnet with BatchNorm": [*conv(3, 8, 3), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)],
        "transformer with LayerNorm": [*patches, attention, mlp, nn.LayerNorm(16), nn.Flatten(), nn.Linear(64, 4)],
        "tied and frozen weights": [frozen, first, half_frozen, nn.Tanh(), second, nn.Tanh(), nn.Linear(16, 4)],
        "no normalization": [nn.Flatten(), nn.Linear(192, 12), nn.Tanh(), nn.Linear(12, 4)],
    }
    models = {title: nn.Sequential(*modules) for title, modules in layers.items()}
    for model in models.values():
        model.register_parameter("unused", nn.Parameter(torch.randn(3, 2)))
        model[0].eval()
        for param in [p for p in model.parameters() if p.requires_grad][::2]:
            param.grad = torch.randn_like(param)
    return dict(models), [(torch.randn(n, 3, 8, 8), torch.randint(4, (n,))) for n in (6, 6, 3)]
