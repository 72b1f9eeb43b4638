"""The registry: names, options, plugins, and what it does not let a builder get away with."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from masks import (
    Budget,
    BuilderError,
    Mask,
    MaskContext,
    MaskError,
    Option,
    ParamTable,
    Schedule,
    broken_plugins,
    build_mask,
    list_masks,
    load_plugin,
    mask_info,
    register_mask,
    register_score,
    registry,
)
from masks.params import model_digest

pytestmark = pytest.mark.usefixtures("clean_registry")

BUILT_IN = {
    "all",
    "dynamic",
    "fisher",
    "gradient",
    "magnitude",
    "no_norm",
    "none",
    "norm",
    "parameters",
    "random",
    "random_depth",
    "snip",
}


@pytest.fixture
def context() -> MaskContext:
    torch.manual_seed(0)
    return MaskContext(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)), seed=3, built_at="epoch 2")


def everything(context: MaskContext, budget: None) -> Mask:
    return Mask(context.table, (True,) * len(context.table))


def register(name: str, fn: Callable[..., Mask] = everything, kind: Any = "natural") -> None:
    register_mask(name, kind=kind, summary="", source="")(fn)


# -- what is there ----------------------------------------------------------------------------------------------


def test_built_in_masks() -> None:
    infos = {info.name: info for info in list_masks()}
    assert set(infos) >= BUILT_IN
    assert list(infos) == sorted(infos)
    for name in BUILT_IN:
        assert infos[name] is mask_info(name)
        assert infos[name].origin == "sam-masks"
        assert infos[name].summary
        assert infos[name].source
    natural = {name for name in BUILT_IN if infos[name].kind == "natural"}
    assert natural == {"all", "none", "norm", "no_norm", "parameters"}
    assert {name for name in BUILT_IN if infos[name].needs_data} == {"dynamic", "fisher", "gradient", "snip"}
    every_epoch = {name for name in BUILT_IN if infos[name].schedule == Schedule("every", 1)}
    assert every_epoch == {"dynamic", "fisher", "gradient", "snip", "magnitude"}


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(MaskError, match=r"^unknown mask 'magnitud'; did you mean magnitude"):
        mask_info("magnitud")
    with pytest.raises(MaskError, match=r"one of your own is known with --plugin MODULE$"):
        mask_info("magnitud")
    with pytest.raises(MaskError, match=r"^unknown mask 'xyzzy'; known: all, .*fisher, gradient, "):
        mask_info("xyzzy")


@pytest.mark.parametrize("name", ["Mine", "my-mask", "my mask", "", "1st", "a.b", "a:b", "a@b"])
def test_names_must_be_snake_case(name: str) -> None:
    with pytest.raises(MaskError, match="snake_case"):
        register(name)
    assert name not in {info.name for info in list_masks()}


# -- duplicates ---------------------------------------------------------------------------------------------------


def test_a_taken_name_is_refused_and_both_origins_are_named() -> None:
    norm = mask_info("norm")
    with pytest.raises(MaskError, match=f"mask 'norm' is already registered by sam-masks; {__name__} must rename"):
        register("norm")
    with pytest.raises(MaskError, match="'magnitude' is already registered by sam-masks"):
        register_score("magnitude", summary="", source="")(lambda context: context.parameters())
    assert mask_info("norm") is norm


def test_the_same_function_may_be_registered_again() -> None:
    register("mine")
    register("mine")
    with pytest.raises(MaskError, match="'mine' is already registered"):
        register("mine", lambda context, budget: everything(context, budget))

    def score(context: MaskContext) -> list[Tensor]:
        return context.parameters()

    for schedule in (Schedule(), Schedule("every", 2)):
        register_score("mine_too", summary="", source="", schedule=schedule)(score)
    assert mask_info("mine_too").schedule == Schedule("every", 2)


def test_names_of_built_in_masks_are_taken_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that registers a name of ours and is imported first does not push ours out."""
    for name in [n for n in sys.modules if n.startswith("masks.builders")]:
        monkeypatch.delitem(sys.modules, name)
    registry._registry.clear()
    registry._builtins_loaded = registry._discovered = False
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    with pytest.raises(MaskError, match=f"'random' is already registered by sam-masks; {__name__} must rename"):
        register("random")
    assert {info.name for info in list_masks()} >= BUILT_IN
    assert mask_info("random").origin == "sam-masks"


def test_importing_a_file_of_builders_first_registers_them_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("masks.builders")]:
        monkeypatch.delitem(sys.modules, name)
    registry._registry.clear()
    registry._builtins_loaded = registry._discovered = False
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    importlib.import_module("masks.builders.norm")
    assert {info.name for info in list_masks()} >= BUILT_IN
    assert {info.origin for info in list_masks()} == {"sam-masks"}


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        (bool, True, True),
        (bool, "true", True),
        (bool, "False", False),
        (int, 3, 3),
        (int, "3", 3),
        (int, "-12", -12),
        (float, 3, 3.0),
        (float, "1e-3", 1e-3),
        (float, 0.5, 0.5),
        (str, "a", "a"),
        (str, "none", "none"),
        (Literal["a", "b"], "b", "b"),
        (Literal[1, 2], 2, 2),
        (Literal[1, 2], "2", 2),
        (Literal["1", 1], "1", "1"),
        (Literal["1", 1], 1, 1),
        (Literal[True, "auto"], "true", True),
        (Literal["a", None], None, None),
        (Literal["a", None], "none", None),
        (int | None, None, None),
        (int | None, "none", None),
        (int | None, "4", 4),
        (int | str, "4", 4),
        (int | str, "four", "four"),
        (float | Literal["auto"], "auto", "auto"),
        (float | Literal["auto"], "0.5", 0.5),
        (tuple[str, ...], "a+b", ("a", "b")),
        (tuple[str, ...], ["a", "b"], ("a", "b")),
        (tuple[str, ...], ("a",), ("a",)),
        (tuple[str, ...], "", ()),
        (tuple[int, ...], "1+2+3", (1, 2, 3)),
        (tuple[int, str], "1+2", (1, "2")),
        (tuple[Literal["a", "b"], ...], "b+a", ("b", "a")),
    ],
)
def test_options_are_converted(kind: Any, given: Any, wanted: Any) -> None:
    found = Option("x", kind, None).convert(given, "mask m")
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("kind", "given", "type_name"),
    [
        (bool, "yes", "bool"),
        (bool, 1, "bool"),
        (bool, None, "bool"),
        (int, 1.0, "int"),
        (int, "1.0", "int"),
        (int, True, "int"),
        (int, "", "int"),
        (int, float("inf"), "int"),
        (int, float("nan"), "int"),
        (int, None, "int"),
        (float, "fast", "float"),
        (float, True, "float"),
        (float, None, "float"),
        (str, 3, "str"),
        (str, None, "str"),
        (Literal["a", "b"], "c", r"a\|b"),
        (Literal[1, 2], True, r"1\|2"),
        (Literal[1, 2], 1.0, r"1\|2"),
        (int | None, "nothing", "int | None"),
        (int | str, None, "int | str"),
        (tuple[int, ...], "1+x", r"tuple\[int, ...\]"),
        (tuple[int, ...], 3, r"tuple\[int, ...\]"),
        (tuple[int, str], "1", r"tuple\[int, str\]"),
        (tuple[int, str], "1+a+b", r"tuple\[int, str\]"),
        (list, [1], "list"),
    ],
)
def test_options_of_the_wrong_type_are_refused(kind: Any, given: Any, type_name: str) -> None:
    with pytest.raises(MaskError, match=f"option x of mask m must be .*{type_name.replace(' | ', '.*')}.*, got"):
        Option("x", kind, None).convert(given, "mask m")


def test_options_are_read_off_the_signature() -> None:
    def build(
        context: MaskContext, budget: None, *, n: int = 3, rate: float = 1, which: Literal["a", "b"] = "b"
    ) -> Mask:
        return everything(context, budget)

    register("mine", build)
    info = mask_info("mine")
    assert info.options == (Option("n", int, 3), Option("rate", float, 1.0), Option("which", Literal["a", "b"], "b"))
    assert [option.type_name for option in info.options] == ["int", "float", "a|b"]
    assert info.resolve_options({"n": "5"}) == {"n": 5, "rate": 1.0, "which": "b"}
    with pytest.raises(MaskError, match="unknown option of mask mine 'witch'; did you mean which"):
        info.resolve_options({"witch": "a"})
    fisher = [option.name for option in mask_info("fisher").options]
    assert fisher == ["labels", "order", "scope", "exclude_norm"]


def no_type(context: MaskContext, budget: None, *, x=3) -> Mask: ...  # type: ignore[no-untyped-def, empty-body]
def no_default(context: MaskContext, budget: None, *, x: int) -> Mask: ...  # type: ignore[empty-body]
def by_position(context: MaskContext, budget: None, x: int = 3) -> Mask: ...  # type: ignore[empty-body]
def anything(context: MaskContext, budget: None, **x: int) -> Mask: ...  # type: ignore[empty-body]
def wrong_default(context: MaskContext, budget: None, *, x: int = "3 or so") -> Mask: ...  # type: ignore
def wrong_choice(context: MaskContext, budget: None, *, x: Literal["a"] = "b") -> Mask: ...  # type: ignore
def no_such_type(context: MaskContext, budget: None, *, x: list[int] = []) -> Mask: ...  # type: ignore  # noqa: B006
def no_budget(context: MaskContext, *, x: int = 3) -> Mask: ...  # type: ignore[empty-body]
def nothing() -> Mask: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (no_type, "argument x of no_type must be keyword-only, with a type and a default"),
        (no_default, "keyword-only, with a type and a default"),
        (by_position, "keyword-only, with a type and a default"),
        (anything, "keyword-only, with a type and a default"),
        (wrong_default, r"option x of .*wrong_default \(its default\) must be int, got '3 or so'"),
        (wrong_choice, "must be a, got 'b'"),
        (no_such_type, r"must be list\[int\], got \[\]"),
        (no_budget, "no_budget must take context and budget by position"),
        (nothing, "must take context and budget by position"),
    ],
)
def test_signatures_that_are_refused(fn: Callable[..., Mask], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        register("mine", fn)
    with pytest.raises(MaskError, match="unknown mask 'mine'"):
        mask_info("mine")


@pytest.mark.parametrize("name", ["order", "scope", "exclude_norm"])
def test_scores_cannot_redefine_the_common_options(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def score(context, *, {name}: str = 'x'): ...", namespace)
    with pytest.raises(MaskError, match=f"score 'mine' cannot have an option {name}"):
        register_score("mine", summary="", source="")(namespace["score"])
    with pytest.raises(MaskError, match="must take context by position"):
        register_score("mine", summary="", source="")(lambda *, x=3: [])


# -- building -----------------------------------------------------------------------------------------------------


def test_provenance_is_filled_in(context: MaskContext) -> None:
    mask = build_mask("random", context, Budget(7, 47), {"exclude_norm": "true"})
    assert mask.provenance.builder == "random"
    assert mask.provenance.options == {"exclude_norm": True}
    assert mask.provenance.seed == 3
    assert mask.provenance.model_digest == model_digest(context.model)
    assert mask.provenance.built_at == "epoch 2"
    assert mask.provenance.kind == "budgeted"
    assert build_mask("norm", context).provenance.kind == "natural"


def test_budgets_missing_superfluous_and_of_another_model(context: MaskContext) -> None:
    with pytest.raises(MaskError, match="mask random needs a budget: a density, or a mask to match"):
        build_mask("random", context)
    with pytest.raises(MaskError, match="mask norm has a natural size and takes no budget"):
        build_mask("norm", context, Budget(10, 47))
    with pytest.raises(MaskError, match="the budget counts 46 coordinates, the model has 47"):
        build_mask("random", context, Budget(10, 46))


def test_data_missing(context: MaskContext) -> None:
    with pytest.raises(MaskError, match="mask snip is scored on data, and none was given"):
        build_mask("snip", context, Budget(10, 47))


def flat_score(context: MaskContext) -> list[Tensor]:
    return [torch.full_like(w, -1.0) for w in context.parameters()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:-1], r"must return 6 tensors \(one per parameter\), got 5"),
        (lambda s: [s[0].T, *s[1:]], r"the scores of 0\.weight must have shape \(5, 4\), got \(4, 5\)"),
        (lambda s: [s[0] * float("nan"), *s[1:]], r"20 of 20 scores of 0\.weight are NaN"),
        (lambda s: [s[0].long(), *s[1:]], r"must be floating point"),
        (lambda s: dict(enumerate(s)), "must return a list of tensors, got dict"),
        (lambda s: None, "must return a list of tensors, got NoneType"),
    ],
)
def test_wrong_scores(context: MaskContext, change: Callable[[list[Tensor]], Any], message: str) -> None:
    register_score("mine", summary="", source="")(lambda context: change(flat_score(context)))
    with pytest.raises(BuilderError, match=message):
        build_mask("mine", context, Budget(10, 47))


def test_common_options_of_scores(context: MaskContext) -> None:
    def score(context: MaskContext, *, shift: float = 0.0) -> list[Tensor]:
        flat = torch.arange(context.table.numel, dtype=torch.float32) + shift
        parts = torch.split(flat, [row.numel for row in context.table])
        return [part.reshape(row.shape) for row, part in zip(context.table, parts, strict=True)]

    register_score("mine", summary="", source="")(score)

    def kept(**options: Any) -> list[int]:
        mask = build_mask("mine", context, Budget(10, 47), options)
        assert mask.num_kept == 10
        return torch.cat([part.reshape(-1) for part in mask.dense()]).nonzero().squeeze(1).tolist()

    # 0.weight 0-19, 0.bias 20-24, 1.weight 25-29, 1.bias 30-34, 2.weight 35-44, 2.bias 45-46
    assert kept() == kept(shift=5.0) == list(range(37, 47))
    assert kept(order="smallest") == list(range(10))
    assert kept(exclude_norm=True, order="smallest") == list(range(10))
    assert kept(scope="per_layer") == [16, 17, 18, 19, 24, 29, 34, 43, 44, 46]
    without = kept(scope="per_layer", exclude_norm=True)
    assert not set(without) & set(range(25, 35))
    assert without == [15, 16, 17, 18, 19, 24, 42, 43, 44, 46]
    with pytest.raises(MaskError, match="cannot keep 38 coordinates: only 37 of 47 are eligible"):
        build_mask("mine", context, Budget(38, 47), {"exclude_norm": True})


def wrong_count(context: MaskContext, budget: Budget) -> Mask:
    flat = torch.arange(context.table.numel) <= budget.num_kept
    parts = torch.split(flat, [row.numel for row in context.table])
    return Mask(context.table, tuple(p.reshape(row.shape) for row, p in zip(context.table, parts, strict=True)))


def no_mask(context: MaskContext, budget: Budget) -> Mask:
    return [True] * 6  # type: ignore[return-value]


def other_model(context: MaskContext, budget: Budget) -> Mask:
    return Mask(ParamTable.from_model(nn.Linear(3, 3)), (True, True))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (wrong_count, r"the builder of mask mine \(.*test_registry\) kept 11 coordinates, its budget is 10"),
        (no_mask, r"the builder of mask mine \(.*test_registry\) returned list, not a Mask"),
        (other_model, r"the builder of mask mine \(.*test_registry\) used another model's table: parameter 0\.weight"),
    ],
)
def test_builders_that_break_their_word(context: MaskContext, fn: Callable[..., Mask], message: str) -> None:
    register("mine", fn, "budgeted")
    with pytest.raises(BuilderError, match=message):
        build_mask("mine", context, Budget(10, 47))


# -- plugins ------------------------------------------------------------------------------------------------------


class Point:
    """An entry point that runs a function instead of importing a module."""

    def __init__(self, name: str, load: Callable[[], object], dist: str | None = None) -> None:
        self.name, self.value, self.load = name, f"{name}.module", load
        self.dist = SimpleNamespace(name=dist, version="1.2") if dist else None


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that these entry points are installed and have not been looked at."""

    def install(*points: Point) -> None:
        def entry_points(*, group: str) -> Iterable[Point]:
            assert group == "sam_masks.masks"
            return points

        monkeypatch.setattr(registry, "entry_points", entry_points)
        registry._discovered = False

    return install


def builder_of(module: str) -> Callable[..., Mask]:
    """A builder that looks as if it were defined in another module."""

    def build(context: MaskContext, budget: None) -> Mask:
        return everything(context, budget)

    build.__module__ = module
    return build


def test_plugins_are_found(install: Callable[..., None], context: MaskContext) -> None:
    install(
        Point("b", lambda: register("from_b", builder_of("b"))),
        Point("a", lambda: register("from_a", builder_of("a")), dist="plugin-a"),
    )
    assert mask_info("from_a").origin == "plugin-a 1.2 (a.module)"
    assert mask_info("from_b").origin == "b.module"
    assert broken_plugins() == {}
    assert build_mask("from_a", context).num_kept == 47


def test_a_broken_plugin_does_not_break_the_others(install: Callable[..., None], context: MaskContext) -> None:
    def half() -> None:
        register("half", builder_of("half"))
        raise ZeroDivisionError("on the way")

    def missing() -> None:
        raise ImportError("No module named 'nowhere'")

    install(
        Point("a_half", half, dist="half-plugin"),
        Point("b_missing", missing),
        Point("c_bad", lambda: register("Bad Name", builder_of("bad"))),
        Point("d_good", lambda: register("good", builder_of("good"))),
    )
    assert build_mask("good", context).num_kept == 47
    assert build_mask("norm", context).num_kept == 10
    assert broken_plugins() == {
        "half-plugin 1.2 (a_half.module)": "failed to import: ZeroDivisionError: on the way",
        "b_missing.module": "failed to import: ImportError: No module named 'nowhere'",
        "c_bad.module": "a mask's name must be snake_case, got 'Bad Name'",
    }
    # Nothing of the broken one stays, and who asks for it is told why it is not there.
    with pytest.raises(
        MaskError, match=r"unknown mask 'half'.*plugin half-plugin 1\.2 .*ZeroDivisionError: on the way"
    ):
        mask_info("half")
    # Plugins are loaded once.
    registry._broken.clear()
    assert broken_plugins() == {}


def test_a_name_that_two_plugins_claim_is_refused(install: Callable[..., None], context: MaskContext) -> None:
    def second() -> None:
        register("second_only", builder_of("second"))
        register("shared", builder_of("second"))

    install(
        Point("first", lambda: register("shared", builder_of("first")), dist="first-plugin"),
        Point("second", second, dist="second-plugin"),
    )
    both = (
        r"mask 'shared' is already registered by first-plugin 1\.2 \(first\.module\); "
        r"second-plugin 1\.2 \(second\.module\) must rename its own"
    )
    with pytest.raises(MaskError, match=both + ", or be uninstalled, before 'shared' can be used"):
        mask_info("shared")
    with pytest.raises(MaskError, match=both):
        build_mask("shared", context)
    with pytest.raises(MaskError, match="unknown mask 'second_only'"):
        mask_info("second_only")
    assert list(broken_plugins()) == ["second-plugin 1.2 (second.module)"]


def test_a_plugin_cannot_replace_a_built_in_mask(install: Callable[..., None], context: MaskContext) -> None:
    install(Point("thief", lambda: register("norm", builder_of("thief"))))
    with pytest.raises(MaskError, match=r"mask 'norm' is already registered by sam-masks; thief\.module must"):
        build_mask("norm", context)
    assert build_mask("no_norm", context).num_kept == 37


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, body: str) -> str:
        head = "from masks import Mask, MaskContext, register_mask\n"
        (tmp_path / f"{name}.py").write_text(head + body)
        importlib.invalidate_caches()
        return name

    return write


GOOD = """
@register_mask("{name}", kind="natural", summary="", source="")
def {name}(context: MaskContext, budget: None, *, n: int = 1) -> Mask:
    return Mask(context.table, (True,) * len(context.table))
"""


def test_load_plugin(plugin: Callable[[str, str], str], context: MaskContext) -> None:
    load_plugin(plugin("plugin_good", GOOD.format(name="mine")))
    assert mask_info("mine").origin == "plugin_good"
    assert build_mask("mine", context, options={"n": "2"}).provenance.options == {"n": 2}
    load_plugin("plugin_good")
    importlib.reload(sys.modules["plugin_good"])
    assert mask_info("mine").build is sys.modules["plugin_good"].mine


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", "plugin plugin_bad failed to import: ZeroDivisionError: division by zero"),
        ("import nowhere_at_all", "failed to import: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def x(:", "failed to import: SyntaxError"),
        (GOOD.format(name="random"), "plugin plugin_bad: mask 'random' is already registered by sam-masks; plugin_bad"),
        (GOOD.format(name="mine").replace("n: int", "n"), "plugin plugin_bad: argument n of mine must be keyword-only"),
    ],
)
def test_a_plugin_that_fails_leaves_no_trace(plugin: Callable[[str, str], str], body: str, message: str) -> None:
    before = list_masks()
    name = plugin("plugin_bad", GOOD.format(name="first") + body)
    for _ in range(2):
        with pytest.raises(MaskError, match=message):
            load_plugin(name)
        assert list_masks() == before
        assert registry._origin == []
    # Once it is put right, it loads.
    plugin("plugin_bad", GOOD.format(name="first") + "# longer than before, so that no stale bytecode is taken" * 9)
    load_plugin(name)
    assert mask_info("first").origin == "plugin_bad"


def test_load_plugin_that_does_not_exist() -> None:
    with pytest.raises(MaskError, match="plugin plugin_nowhere failed to import: ModuleNotFoundError"):
        load_plugin("plugin_nowhere")
