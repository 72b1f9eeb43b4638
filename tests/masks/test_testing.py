"""The contract of builders: every registered mask keeps it, and it catches those that do not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from masks import (
    Budget,
    Mask,
    MaskContext,
    MaskError,
    ParamTable,
    list_masks,
    register_mask,
    register_score,
    select,
    testing,
)
from masks.builders.gradient import score_gradient
from masks.testing import check_mask_builder


@pytest.mark.parametrize("name", [info.name for info in list_masks()])
def test_registered_masks_keep_the_contract(name: str, tmp_path: Path) -> None:
    options = {}
    if name == "file":  # a mask of the last model of the zoo; it is refused on the others
        models, _ = testing._zoo()
        table = ParamTable.from_model(list(models.values())[-1])
        Mask(table, (True, *(False,) * (len(table) - 1))).save(tmp_path / "m.npz")
        options = {"path": str(tmp_path / "m.npz")}
    check_mask_builder(name, options=options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fisher", {"labels": "model", "scope": "per_layer"}),
        ("random", {"exclude_norm": True}),
        ("magnitude", {"order": "smallest"}),
        ("norm", {"part": "weights"}),
        ("parameters", {"role": "weight+bias", "depth": "1/2"}),
    ],
)
def test_registered_masks_keep_the_contract_with_options(name: str, options: dict[str, Any]) -> None:
    check_mask_builder(name, options=options)


def test_the_zoo_has_what_it_promises() -> None:
    models, batches = testing._zoo()
    assert len({len(x) for x, _ in batches}) > 1
    tables = {title: ParamTable.from_model(model) for title, model in models.items()}
    norm = [{row.module_type for row in table if row.is_norm} for table in tables.values()]
    assert norm == [{"BatchNorm2d"}, {"LayerNorm"}, {"GroupNorm"}, set()]
    assert any(row.aliases for row in tables["tied and frozen weights"])
    assert tables["tied and frozen weights"].frozen_numel > 0
    assert "in_proj_weight" in {row.name.rpartition(".")[2] for row in tables["transformer with LayerNorm"]}
    for model in models.values():
        assert {module.training for module in model.modules()} == {True, False}
        assert {p.grad is None for p in model.parameters() if p.requires_grad} == {True, False}
        assert model(batches[0][0]).shape == (6, 4)
    again, _ = testing._zoo()
    for a, b in zip(models.values(), again.values(), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_check_leaves_no_trace() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    check_mask_builder("random")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_unknown_names_and_options_are_no_breach() -> None:
    with pytest.raises(MaskError, match="did you mean random"):
        check_mask_builder("randm")
    with pytest.raises(MaskError, match="unknown option"):
        check_mask_builder("random", options={"depth": 1})


# -- builders that break it ----------------------------------------------------------------------------------------


def good(context: MaskContext, budget: Budget) -> Mask:
    return Mask(context.table, select(context.table, [w.abs() for w in context.parameters()], budget.num_kept))


def changes_weights(context: MaskContext, budget: Budget) -> Mask:
    context.parameters()[-1].view(-1)[0].add_(1e-6)
    return good(context, budget)


def changes_a_sign_of_zero(context: MaskContext, budget: Budget) -> Mask:
    for p in context.parameters():
        p[p == 0] = -0.0
    return good(context, budget)


def replaces_storage(context: MaskContext, budget: Budget) -> Mask:
    p = next(context.model.parameters())
    p.data = p.data.clone()
    return good(context, budget)


def replaces_a_parameter(context: MaskContext, budget: Budget) -> Mask:
    for module in context.model.modules():
        if isinstance(module, nn.Linear):
            grad = module.weight.grad
            module.weight = nn.Parameter(module.weight.data, module.weight.requires_grad)
            module.weight.grad = grad
    return good(context, budget)


def changes_frozen_weights(context: MaskContext, budget: Budget) -> Mask:
    with torch.no_grad():
        for p in context.model.parameters():
            if not p.requires_grad:
                p.mul_(2)
    return good(context, budget)


def runs_the_model(context: MaskContext, budget: Budget) -> Mask:
    with torch.no_grad():
        context.model(context.batches[0][0])
    return good(context, budget)


def sets_eval_mode(context: MaskContext, budget: Budget) -> Mask:
    context.model.eval()
    return good(context, budget)


def leaves_gradients(context: MaskContext, budget: Budget) -> Mask:
    context.model.eval()
    modes = [module.training for module in context.model.modules()]
    for x, y in context.batches:
        context.loss(context.model(x), y).sum().backward()
    for module, mode in zip(context.model.modules(), modes, strict=True):
        module.training = mode
    return good(context, budget)


def adds_to_gradients(context: MaskContext, budget: Budget) -> Mask:
    for p in context.model.parameters():
        if p.grad is not None:
            p.grad += 1
    return good(context, budget)


def clears_gradients(context: MaskContext, budget: Budget) -> Mask:
    context.model.zero_grad()
    return good(context, budget)


def freezes(context: MaskContext, budget: Budget) -> Mask:
    mask = good(context, budget)
    next(context.model.parameters()).requires_grad_(False)
    return mask


def leaves_a_hook(context: MaskContext, budget: Budget) -> Mask:
    next(context.model.children()).register_forward_hook(lambda *args: None)
    return good(context, budget)


def normalizes_the_batch(context: MaskContext, budget: Budget) -> Mask:
    context.batches[0][0].sub_(1)
    return good(context, budget)


def seeds_torch(context: MaskContext, budget: Budget) -> Mask:
    torch.manual_seed(context.seed)
    return good(context, budget)


def draws_from_numpy(context: MaskContext, budget: Budget) -> Mask:
    np.random.rand()
    return good(context, budget)


def draws_from_python(context: MaskContext, budget: Budget) -> Mask:
    random.random()
    return good(context, budget)


def switches_gradients_off(context: MaskContext, budget: Budget) -> Mask:
    torch.set_grad_enabled(False)
    return good(context, budget)


def changes_the_default_dtype(context: MaskContext, budget: Budget) -> Mask:
    torch.set_default_dtype(torch.float64)
    return good(context, budget)


def uses_global_randomness(context: MaskContext, budget: Budget) -> Mask:
    """It puts the state back, so that only the masks tell."""
    with torch.random.fork_rng(devices=[]):
        scores = [torch.rand(row.shape) for row in context.table]
    return Mask(context.table, select(context.table, scores, budget.num_kept))


def counts_its_calls(context: MaskContext, budget: Budget) -> Mask:
    CALLS.append(1)
    scores = [torch.rand(row.shape, generator=context.generator(str(len(CALLS)))) for row in context.table]
    return Mask(context.table, select(context.table, scores, budget.num_kept))


CALLS: list[int] = []


def looks_at_the_mode(context: MaskContext, budget: Budget) -> Mask:
    scores = [w.abs() if context.model.training else -w.abs() for w in context.parameters()]
    return Mask(context.table, select(context.table, scores, budget.num_kept))


def needs_data_after_all(context: MaskContext, budget: Budget) -> Mask:
    scores = score_gradient(context)
    return Mask(context.table, select(context.table, scores, budget.num_kept))


def looks_at_data_if_there_is_any(context: MaskContext, budget: Budget) -> Mask:
    return needs_data_after_all(context, budget) if context.batches else good(context, budget)


def keeps_one_too_many(context: MaskContext, budget: Budget) -> Mask:
    return good(context, Budget(min(budget.num_kept + 1, budget.numel), budget.numel))


def keeps_one_too_few_of_many(context: MaskContext, budget: Budget) -> Mask:
    return good(context, Budget(budget.num_kept - (budget.num_kept > 500), budget.numel))


def divides_by_zero(context: MaskContext, budget: Budget) -> Mask:
    norm = sum(row.numel for row in context.table if row.is_norm)
    return good(context, Budget(budget.num_kept * norm // norm, budget.numel))


def refuses_everything(context: MaskContext, budget: Budget) -> Mask:
    raise MaskError("not today")


def returns_a_list(context: MaskContext, budget: Budget) -> Mask:
    return list(good(context, budget).parts)  # type: ignore[return-value]


def lists_tied_weights_twice(context: MaskContext, budget: Budget) -> Mask:
    names = [name for name, _ in context.model.named_parameters(remove_duplicate=False)]
    if len(names) > len(list(context.model.parameters())):
        table = ParamTable(context.table.rows + context.table.rows[-1:])
        return Mask(table, (False,) * len(table))
    return good(context, budget)


@pytest.fixture
def restored_globals() -> Any:
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)


BREACHES: list[tuple[Callable[..., Mask], str]] = [
    (changes_weights, r"model resnet with BatchNorm, .*the builder changed parameter 5\.bias"),
    (changes_a_sign_of_zero, "the builder changed parameter"),
    (replaces_storage, "the builder changed parameter unused"),
    (replaces_a_parameter, r"the builder changed parameter 5\.weight"),
    (changes_frozen_weights, r"model tied and frozen weights, .*the builder changed parameter 0\.1\.weight"),
    (runs_the_model, r"model resnet with BatchNorm, .*the builder changed buffer"),
    (sets_eval_mode, "the builder changed the training mode of module ''"),
    (leaves_gradients, "the builder changed .*the gradient of"),
    (adds_to_gradients, "the builder changed the gradient of unused"),
    (clears_gradients, "the builder changed the gradient of unused"),
    (freezes, "the builder changed requires_grad of unused"),
    (leaves_a_hook, "the builder changed the hooks of module '0'"),
    (normalizes_the_batch, "the builder changed batch 0"),
    (seeds_torch, "the builder changed the random state of torch"),
    (draws_from_numpy, "the builder changed the random state of numpy"),
    (draws_from_python, "the builder changed the random state of python"),
    (switches_gradients_off, "the builder changed the grad mode"),
    (changes_the_default_dtype, "the builder changed the default dtype"),
    (uses_global_randomness, "another random state and training mode gives another mask"),
    (counts_its_calls, "the same context gives another mask .overlap"),
    (looks_at_the_mode, "another random state and training mode gives another mask"),
    (
        needs_data_after_all,
        "a context without data, though needs_data is False, is refused: this mask is scored on data",
    ),
    (looks_at_data_if_there_is_any, "a context without data, though needs_data is False, gives another mask"),
    (keeps_one_too_many, "budget 0: the builder of mask broken .* kept 1 coordinates, its budget is 0"),
    (keeps_one_too_few_of_many, r"kept \d+ coordinates, its budget is \d+"),
    (divides_by_zero, "model no normalization, .*raised ZeroDivisionError: .*a builder refuses with a MaskError"),
    (refuses_everything, "refused on every model and budget of the zoo; the last time: not today"),
    (returns_a_list, "returned list, not a Mask"),
    (lists_tied_weights_twice, "model tied and frozen weights, .*used another model's table"),
]


@pytest.mark.usefixtures("clean_registry", "restored_globals")
@pytest.mark.parametrize(("fn", "message"), BREACHES, ids=[fn.__name__ for fn, _ in BREACHES])
def test_breaches_are_caught(fn: Callable[..., Mask], message: str) -> None:
    register_mask("broken", kind="budgeted", summary="", source="")(fn)
    with pytest.raises(AssertionError, match=r"(?s)^mask broken\b.*" + message):
        check_mask_builder("broken")


@pytest.mark.usefixtures("clean_registry")
def test_a_good_builder_passes() -> None:
    register_mask("fine", kind="budgeted", summary="", source="")(good)
    check_mask_builder("fine")
    register_mask("fine_too", kind="budgeted", summary="", source="", needs_data=True)(needs_data_after_all)
    check_mask_builder("fine_too")


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("bad", ["b", True])
def test_every_value_of_an_option_is_tried(bad: object) -> None:
    @register_mask("broken", kind="budgeted", summary="", source="")
    def build(
        context: MaskContext, budget: Budget, *, which: Literal["a", "b"] = "a", on: bool = False, n: int = 3
    ) -> Mask:
        if bad in (which, on):
            raise KeyError("untested")
        return good(context, budget)

    with pytest.raises(AssertionError, match="options {.*" + repr(bad) + ".*raised KeyError: 'untested'"):
        check_mask_builder("broken")


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: scores[:-1], "must return 1. tensors"),
        (
            lambda scores: [s / s.abs().max() for s in scores],
            r"resnet with BatchNorm, .*8 of 8 scores of 1\.bias are NaN",
        ),
        (lambda scores: [s.reshape(-1) for s in scores], "must have shape"),
    ],
)
def test_wrong_scores_are_caught(change: Callable[[list[Tensor]], list[Tensor]], message: str) -> None:
    @register_score("broken", summary="", source="")
    def score(context: MaskContext) -> list[Tensor]:
        return change(context.parameters())

    with pytest.raises(AssertionError, match="^mask broken, model .*" + message):
        check_mask_builder("broken")


@pytest.mark.usefixtures("clean_registry")
def test_a_natural_builder_that_breaks_its_word() -> None:
    calls: list[int] = []

    @register_mask("broken", kind="natural", summary="", source="")
    def build(context: MaskContext, budget: None) -> Mask:
        calls.append(1)
        return Mask(context.table, (len(calls) % 2 == 0,) * len(context.table))

    with pytest.raises(AssertionError, match="budget None: the same context gives another mask"):
        check_mask_builder("broken")


@pytest.mark.usefixtures("clean_registry")
def test_the_contract_holds_without_assert_statements() -> None:
    """``python -O`` removes assert statements, and may not remove the contract."""
    source = Path(testing.__file__).read_text()
    namespace: dict[str, Any] = {"__name__": "masks.testing_optimized"}
    exec(compile(source, "testing_optimized", "exec", optimize=1), namespace)
    register_mask("broken", kind="budgeted", summary="", source="")(sets_eval_mode)
    with pytest.raises(AssertionError, match=r"^mask broken, model resnet with BatchNorm"):
        namespace["check_mask_builder"]("broken")
    namespace["check_mask_builder"]("norm")
    assert len(source.splitlines()) < 250
