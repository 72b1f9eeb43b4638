"""Configurations: defaults, arms, errors, and digests that change with what changes a result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from experiments.config import BASELINE, DEFAULT_ARMS, OTHER_RHO, Arm, CompareConfig, RunConfig
from masks.errors import InputError
from masks.spec import MaskSpec

# -- a run --------------------------------------------------------------------------------------------------


def test_defaults_that_depend_on_the_data_set() -> None:
    digits = RunConfig().resolved()
    assert (digits.n_train, digits.n_val, digits.n_test, digits.label_noise) == (400, 300, None, 0.2)
    other = RunConfig(data="cifar10").resolved()
    assert (other.n_train, other.n_val, other.n_test, other.label_noise) == (None, None, None, 0.0)
    given = RunConfig(n_train=7, n_val=0, label_noise=0.0).resolved()
    assert (given.n_train, given.n_val, given.label_noise) == (7, 0, 0.0)
    assert digits.resolved() == digits


CHANGES: dict[str, Any] = {
    "data": "mnist",
    "n_train": 1,
    "n_val": 1,
    "n_test": 1,
    "label_noise": 0.1,
    "model": "mlp",
    "width": 3,
    "optimizer": "adamw",
    "lr": 0.04,
    "momentum": 0.8,
    "weight_decay": 0.0,
    "epochs": 3,
    "batch_size": 3,
    "mask": "random",
    "match": "norm:part=weights",
    "density": 0.5,
    "rho": 0.4,
    "rule": "elementwise_linf",
    "eta": 0.5,
    "bias": "adaptive",
    "norm_scope": "full",
    "norm_statistics": "both",
    "score_images": 3,
    "seed": 1,
    "tuning": True,
}


def test_the_digest_changes_with_every_setting() -> None:
    assert set(CHANGES) == {f.name for f in fields(RunConfig)}
    base = RunConfig(rule="elementwise_l2")  # a rule that takes eta and bias
    changed = [replace(base, **{name: value}) for name, value in CHANGES.items()]
    digests = {config.digest({"data": "x"}) for config in (base, *changed)}
    assert len(digests) == len(CHANGES) + 1
    assert base.digest({"data": "y"}) not in digests
    assert base.digest({"data": "x", "mask a": "y"}) not in digests


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rho": 1}, {"rho": 1.0}),
        ({"lr": 1}, {"lr": 1.0}),
        ({"mask": "random"}, {"mask": " random:exclude_norm=false "}),
        ({"mask": "fisher"}, {"mask": "fisher:labels=data@every=1epoch"}),
        ({"match": "norm"}, {"match": "norm:part=both@init"}),
    ],
)
def test_two_spellings_of_one_run_are_one_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert RunConfig(**one) == RunConfig(**other)
    assert RunConfig(**one).digest({}) == RunConfig(**other).digest({})


BAD_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "negative rho": ({"rho": -0.1}, "rho must be a finite number >= 0, got -0.1"),
    "rho is NaN": ({"rho": math.nan}, "rho must be a finite number >= 0, got nan"),
    "infinite lr": ({"lr": math.inf}, "lr must be"),
    "negative weight decay": ({"weight_decay": -1.0}, "weight_decay must be"),
    "no epochs": ({"epochs": 0}, "epochs must be at least 1, got 0"),
    "batches of one": ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
    "nothing to score on": ({"score_images": 0}, "score_images must be at least 1"),
    "density above 1": ({"density": 1.01}, "density must lie between 0 and 1, got 1.01"),
    "density is NaN": ({"density": math.nan}, "density must lie between 0 and 1, got nan"),
    "unknown mask": ({"mask": "nrom"}, "unknown mask 'nrom'; did you mean norm"),
    "unknown match": ({"match": "nrom"}, "unknown mask 'nrom'"),
    "unknown option": ({"mask": "magnitude:exclude_nrom=true"}, "did you mean exclude_norm"),
    "bad option value": ({"mask": "random:exclude_norm=maybe"}, "must be bool, got 'maybe'"),
    "bad schedule": ({"mask": "fisher@sometimes"}, "unknown schedule 'sometimes'"),
    "unknown rule": ({"rule": "l3"}, "unknown rule 'l3'; did you mean l2"),
    "unknown optimizer": ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean adamw"),
    "unknown scope": ({"norm_scope": "mask"}, "unknown norm_scope 'mask'; did you mean masked"),
    "unknown statistics": ({"norm_statistics": "frist"}, "did you mean first"),
    "eta without a metric": ({"eta": 0.1}, "takes neither eta nor a bias convention"),
    "scope of a step without norm": ({"rule": "linf", "norm_scope": "full"}, "norm_scope full has no meaning"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_run_that_cannot_be_had_is_refused(case: str) -> None:
    settings, message = BAD_RUNS[case]
    with pytest.raises(InputError) as caught:
        RunConfig(**settings)
    assert message in str(caught.value)


# -- arms ---------------------------------------------------------------------------------------------------

BAD_ARMS: dict[str, tuple[tuple[Any, ...], str]] = {
    "none with a grid": (("a", "none", (0.1,)), "mask none takes no rho grid"),
    "no grid": (("a", "norm", ()), "every other mask needs one"),
    "negative": (("a", "norm", (0.1, -0.1)), "distinct finite numbers >= 0, got [0.1, -0.1]"),
    "NaN": (("a", "norm", (math.nan,)), "distinct finite numbers >= 0, got [nan]"),
    "infinite": (("a", "norm", (math.inf,)), "distinct finite numbers"),
    "twice the same": (("a", "norm", (0.1, 0.1)), "distinct finite numbers"),
    "unknown mask": (("a", "nrom", (0.1,)), "unknown mask 'nrom'; did you mean norm"),
    "no epochs": (("a", "norm", (0.1,), 0), "epochs_factor must be at least 1"),
    "a mask as the baseline": (("none", "norm", (0.1,)), "is the base optimizer"),
    "a longer baseline": (("none", "none", (), 2), "is the base optimizer"),
}


@pytest.mark.parametrize("case", BAD_ARMS)
def test_an_arm_that_cannot_be_had_is_refused(case: str) -> None:
    arguments, message = BAD_ARMS[case]
    with pytest.raises(InputError) as caught:
        Arm(*arguments)
    assert message in str(caught.value)


def test_the_default_comparison_is_the_one_of_the_issue() -> None:
    arms = {arm.name: arm for arm in CompareConfig().arms}
    assert set(arms) == {
        *("none", "none_2x", "all", "no_norm"),
        *("norm", "random", "random_depth", "magnitude", "fisher"),
    }
    assert arms["none_2x"].epochs_factor == 2
    assert {name for name, arm in arms.items() if arm.role == "control"} == {"none_2x", "no_norm"}
    assert {name for name, arm in arms.items() if not arm.rho} == {"none", "none_2x"}
    for name in ("magnitude", "fisher"):
        spec = MaskSpec.parse(arms[name].mask)
        assert spec.options["exclude_norm"]
        assert str(spec.schedule) == "every=1"
    assert CompareConfig().seeds == 8


# -- a comparison -------------------------------------------------------------------------------------------


def test_runs_of_a_seed_differ_in_what_the_arm_says_and_in_nothing_else() -> None:
    config = CompareConfig(epochs=7)
    arms = {arm.name: arm for arm in config.arms}
    base = asdict(config.run(arms["none"], rho=0.0, seed=3, tuning=False))
    for name, own in {"norm": {"mask": "norm", "rho": 0.5}, "none_2x": {"mask": "none", "epochs": 14}}.items():
        run = config.run(arms[name], rho=own.get("rho", 0.0), seed=3, tuning=False)
        assert asdict(run) == base | own
        assert type(run) is RunConfig
    assert base["seed"] == 3
    assert (base["n_train"], base["label_noise"]) == (400, 0.2)  # resolved
    assert config.run(arms["norm"], rho=0.5, seed=3, tuning=True).tuning


@pytest.mark.parametrize(("first", "seeds", "tuning"), [(0, 8, 2), (5, 10_000, 10_000), (-3, 1, 1)])
def test_no_seed_is_both_tuned_and_reported_on(first: int, seeds: int, tuning: int) -> None:
    config = CompareConfig(first_seed=first, seeds=seeds, tuning_seeds=tuning)
    report, tuned = config.report_seeds(), config.seeds_for_tuning()
    assert (len(report), report[0], len(tuned)) == (seeds, first, tuning)
    assert not set(report) & set(tuned)


def test_masks_chooses_arms_by_name_and_makes_new_ones() -> None:
    config = CompareConfig(masks="all, magnitude,magnitude:order=smallest,none_2x")
    by_name = {arm.name: arm for arm in DEFAULT_ARMS}
    assert config.arms == (
        Arm(BASELINE, "none"),
        by_name["all"],
        by_name["magnitude"],
        Arm("magnitude:order=smallest", "magnitude:order=smallest", OTHER_RHO),
        by_name["none_2x"],
    )


def test_rho_grid_is_the_grid_of_every_arm() -> None:
    config = CompareConfig(masks="none,all,snip", rho_grid="0.1, 3")
    assert {arm.name: arm.rho for arm in config.arms} == {"none": (), "all": (0.1, 3.0), "snip": (0.1, 3.0)}
    everywhere = CompareConfig(rho_grid="0.7")
    assert {arm.rho for arm in everywhere.arms} == {(), (0.7,)}
    assert len(everywhere.arms) == len(DEFAULT_ARMS)


def test_the_digest_of_a_comparison_is_of_what_is_compared() -> None:
    digest = CompareConfig(masks="norm").digest({})
    assert CompareConfig(arms=CompareConfig(masks="norm").arms).digest({}) == digest
    grid = ",".join(map(str, CompareConfig(masks="norm").arms[1].rho))
    assert CompareConfig(masks="norm", rho_grid=grid).digest({}) == digest
    changed = [{"masks": "all"}, {"seeds": 7}, {"first_seed": 1}, {"tuning_seeds": 3}, {"lr": 0.1}, {"rho_grid": "1"}]
    digests = {CompareConfig(**{"masks": "norm", **change}).digest({}) for change in changed}
    assert len(digests | {digest, CompareConfig(masks="norm").digest({"data": "x"})}) == len(changed) + 2


ONE = Arm("a", "norm", (0.1,))
BAD_COMPARISONS: dict[str, tuple[Callable[[], Any], str]] = {
    "two of a name": (lambda: CompareConfig(masks="norm,all,norm"), "two arms have the same name: norm"),
    "two of a name in a file": (lambda: CompareConfig(arms=(ONE, ONE)), "two arms have the same name: a"),
    "grids of two lengths": (lambda: CompareConfig(arms=(ONE, Arm("b", "all", (1.0, 2.0)))), "grids of [1, 2]"),
    "nothing to compare": (lambda: CompareConfig(masks="none"), "nothing to compare"),
    "no arms": (lambda: CompareConfig(arms=()), "nothing to compare"),
    "unknown mask": (lambda: CompareConfig(masks="norm,rnadom"), "unknown mask 'rnadom'; did you mean random"),
    "empty name": (lambda: CompareConfig(masks="norm,,all"), "unknown mask ''"),
    "grid of words": (lambda: CompareConfig(rho_grid="1,x"), "rho_grid must be numbers separated by commas"),
    "negative grid": (lambda: CompareConfig(rho_grid="1,-2"), "distinct finite numbers >= 0"),
    "grid with NaN": (lambda: CompareConfig(rho_grid="1,nan"), "distinct finite numbers >= 0"),
    "no seeds": (lambda: CompareConfig(seeds=0), "seeds must be from 1 to 10000, got 0"),
    "too many seeds": (lambda: CompareConfig(seeds=10_001), "seeds must be from 1 to 10000, got 10001"),
    "no tuning seeds": (lambda: CompareConfig(tuning_seeds=0), "tuning_seeds must be from 1"),
    "a mask for all": (lambda: CompareConfig(mask="all"), "takes mask from its arms and seeds"),
    "a radius for all": (lambda: CompareConfig(rho=0.3), "takes rho from its arms and seeds"),
    "one seed": (lambda: CompareConfig(seed=3), "takes seed from its arms and seeds"),
    "only tuning": (lambda: CompareConfig(tuning=True), "takes tuning from its arms and seeds"),
}


@pytest.mark.parametrize("case", BAD_COMPARISONS)
def test_a_comparison_that_cannot_be_had_is_refused(case: str) -> None:
    make, message = BAD_COMPARISONS[case]
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)
