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
from sam import build_method
from sam.perturbation import Rule

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
    "schedule": "step",
    "warmup": 1,
    "momentum": 0.8,
    "weight_decay": 0.0,
    "norm_weight_decay": False,
    "clip_grad_norm": 1.0,
    "label_smoothing": 0.1,
    "augment": "flip",
    "trainable": "norm",
    "epochs": 3,
    "batch_size": 3,
    "method": "friendly_sam",
    "mask": "random",
    "sam_epochs": "1..",
    "match": "norm:part=weights",
    "density": 0.5,
    "rho": 0.4,
    "rho_min": 0.1,
    "rule": "elementwise_linf",
    "eta": 0.5,
    "bias": "adaptive",
    "norm_scope": "full",
    "norm_statistics": "both",
    "precision": "bf16",
    "channels_last": False,
    "score_images": 3,
    "seed": 1,
    "tuning": True,
    "measure_every": 2,
    "world_size": 2,
    "ascent_gradient": "synchronised",
    "cuda_graph": True,
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
        ({"method": "sam"}, {"method": " sam:p=2 "}),
        ({"method": "gsam:alpha=1"}, {"method": "gsam:alpha=1.0"}),
        ({"method": "ssam_f"}, {"method": "ssam_f:every=1", "mask": "fisher@every=1", "norm_scope": "full"}),
        ({"optimizer": "adamw"}, {"optimizer": "AdamW:amsgrad=false"}),
        ({"augment": "flip+crop"}, {"augment": "crop=4+flip"}),
        ({"sam_epochs": ""}, {"sam_epochs": "0.."}),
        ({"clip_grad_norm": 1, "label_smoothing": 0, "rho_min": 0}, {"clip_grad_norm": 1.0, "rho_min": 0.0}),
        ({}, {"mask": "norm", "norm_scope": "masked"}),
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
    "unknown optimizer": ({"optimizer": "adem"}, "unknown optimizer 'adem'; did you mean adam"),
    "unknown scope": ({"norm_scope": "mask"}, "unknown norm_scope 'mask'; did you mean masked"),
    "unknown precision": ({"precision": "fp16"}, "unknown precision 'fp16'"),
    "unknown statistics": ({"norm_statistics": "frist"}, "did you mean first"),
    "eta without a metric": ({"eta": 0.1}, "takes neither eta nor a bias convention"),
    "rho_min above rho": ({"rho_min": 0.6}, "rho_min must lie between 0 and rho=0.5, got 0.6"),
    "rho_min is NaN": ({"rho_min": math.nan}, "rho_min must lie between 0 and rho=0.5, got nan"),
    "no clipping": ({"clip_grad_norm": 0.0}, "clip_grad_norm must be a positive finite number, got 0"),
    "clipping at infinity": ({"clip_grad_norm": math.inf}, "clip_grad_norm must be a positive finite number, got inf"),
    "negative smoothing": ({"label_smoothing": -0.1}, "label_smoothing must lie in [0, 1), got -0.1"),
    "smoothing is NaN": ({"label_smoothing": math.nan}, "label_smoothing must lie in [0, 1), got nan"),
    "negative warm-up": ({"warmup": -1}, "warmup must be at least 0, got -1"),
    "nothing but warm-up": ({"epochs": 3, "warmup": 3}, "warmup must be shorter than the run: 3 of 3 epochs"),
    "unknown schedule of the rate": ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean cosine"),
    "unknown choice of what is trained": ({"trainable": "norms"}, "unknown trainable 'norms'; did you mean norm"),
    "window after the end": ({"epochs": 3, "sam_epochs": "3..9"}, "sam_epochs 3..9 begins after the run, which has 3"),
    "unknown method": ({"method": "asma"}, "unknown method 'asma'; did you mean asam"),
    "option out of range": ({"method": "vasso:theta=2"}, "theta"),
    "a rule twice": (
        {"method": "asam", "rule": "linf"},
        "method asam has a rule of its own; leave rule, eta and bias out",
    ),
    "no updates of a mask": ({"method": "ssam_f:every=0"}, "every must be at least 1"),
    "a mask twice": ({"method": "sam_on", "mask": "all"}, "method sam_on has a mask of its own (norm); leave mask out"),
    "a scope twice": ({"method": "ssam_d", "norm_scope": "masked"}, "has a norm_scope of its own (full); leave"),
    "p = infinity in full scope": ({"method": "sam:p=inf", "norm_scope": "full"}, "norm_scope full has no meaning"),
    "scope of a step without norm": ({"rule": "linf", "norm_scope": "full"}, "norm_scope full has no meaning"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_run_that_cannot_be_had_is_refused(case: str) -> None:
    settings, message = BAD_RUNS[case]
    with pytest.raises(InputError) as caught:
        RunConfig(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("method", "mask", "scope"),
    [
        ("sam", "norm", "masked"),
        ("ssam_f", "fisher", "full"),
        ("ssam_f:every=5", "fisher@every=5", "full"),
        (
            "ssam_d:drop=magnitude:grow=gradient:drop_rate=0.3",
            "dynamic:drop=magnitude:grow=gradient:drop_rate=0.3",
            "full",
        ),
        ("sam_on:rule=elementwise_l2", "norm", "masked"),
    ],
)
def test_what_a_method_fixes_is_filled_in(method: str, mask: str, scope: str) -> None:
    run = RunConfig(method=method)
    assert (run.mask, run.norm_scope) == (str(MaskSpec.parse(mask)), scope)
    assert RunConfig(**asdict(run)) == run  # as a record is read


def test_the_rule_is_that_of_the_method_or_of_the_run() -> None:
    assert RunConfig(method="sam_on:rule=linf").sam_method().rule == Rule.named("linf")
    friendly = RunConfig(method="friendly_sam", rule="elementwise_l2", eta=0.1).sam_method()
    assert friendly == replace(build_method("friendly_sam"), rule=Rule.named("elementwise_l2", eta=0.1))


# -- arms ---------------------------------------------------------------------------------------------------

BAD_ARMS: dict[str, tuple[tuple[Any, ...], str]] = {
    "none with a grid": (("a", "none", (0.1,)), "mask none takes no rho grid"),
    "no grid": (("a", "norm", ()), "every other mask needs one"),
    "negative": (("a", "norm", (0.1, -0.1)), "distinct finite numbers >= 0, got [0.1, -0.1]"),
    "NaN": (("a", "norm", (math.nan,)), "distinct finite numbers >= 0, got [nan]"),
    "infinite": (("a", "norm", (math.inf,)), "distinct finite numbers"),
    "twice the same": (("a", "norm", (0.1, 0.1)), "distinct finite numbers"),
    "unknown mask": (("a", "nrom", (0.1,)), "unknown mask 'nrom'; did you mean norm"),
    "no mask": (("a", "", (0.1,)), "unknown mask ''"),
    "no mask, and a method without one": (("a", "", (0.1,), 1, "main", "asam"), "unknown mask ''"),
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


def test_methods_multiply_arms_and_grids() -> None:
    config = CompareConfig(masks="none_2x,all,norm,fisher", methods="sam, friendly_sam:sigma=0.5,ssam_d,sam_on")
    by_name = {arm.name: arm for arm in DEFAULT_ARMS}
    arms = {arm.name: arm for arm in config.arms}
    masks = ("all", "norm", "fisher")
    assert list(arms) == [
        *("none", "none_2x", "sam/all", "sam/norm", "sam/fisher"),
        *(f"friendly_sam:sigma=0.5/{mask}" for mask in masks),
        *("ssam_d", "sam_on"),
    ]
    for mask in masks:
        assert arms[f"sam/{mask}"] == replace(by_name[mask], name=f"sam/{mask}", method="sam")
        # Its radius is 0.2 where sam's is 0.05.
        friendly = arms[f"friendly_sam:sigma=0.5/{mask}"]
        assert friendly.rho == pytest.approx([4 * rho for rho in by_name[mask].rho])
        assert (friendly.mask, friendly.method) == (by_name[mask].mask, "friendly_sam:sigma=0.5")
    assert arms["ssam_d"].rho == pytest.approx([2 * rho for rho in by_name["all"].rho])
    assert (arms["ssam_d"].mask, arms["sam_on"].mask) == ("dynamic", "norm")
    assert {arm.rho for arm in CompareConfig(masks="all", methods="sam,gsam", rho_grid="1,2").arms[1:]} == {(1.0, 2.0)}


def test_runs_of_an_arm_with_a_method() -> None:
    config = CompareConfig(masks="all", methods="friendly_sam,ssam_f,sam_on", rho_min=0.01, epochs=7)
    runs = {arm.name: config.run(arm, rho=0.5 if arm.rho else 0.0, seed=1, tuning=False) for arm in config.arms}
    assert {name: (run.method, run.mask, run.norm_scope, run.rho_min) for name, run in runs.items()} == {
        "none": ("sam", "none", "masked", None),
        "friendly_sam/all": ("friendly_sam", "all", "masked", 0.01),
        "ssam_f": ("ssam_f", "fisher", "full", 0.01),
        "sam_on": ("sam_on", "norm", "masked", 0.01),
    }
    # The base optimizer is one run, whatever it is compared with.
    base = CompareConfig(masks="all", method="gsam:alpha=0.1", epochs=7)
    assert base.run(base.arms[0], rho=0.0, seed=1, tuning=False) == runs["none"]
    assert base.run(base.arms[1], rho=0.5, seed=1, tuning=False).method == "gsam:alpha=0.1"


def test_a_comparison_of_methods_is_read_back_from_its_settings() -> None:
    config = CompareConfig(masks="all,norm", methods="sam,ssam_f", rho_min=0.01)
    settings = config.settings()
    again = CompareConfig(**{**settings, "arms": tuple(Arm(**arm) for arm in settings["arms"])})
    assert again == config
    assert again.digest({}) == config.digest({})
    assert replace(config, seeds=3).arms == config.arms


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
    "no mask for methods": (lambda: CompareConfig(masks="none,none_2x", methods="sam"), "no mask for the methods sam"),
    "a method twice": (
        lambda: CompareConfig(masks="all", methods="sam,sam:p=2"),
        "two arms have the same name: sam/all",
    ),
    "an unknown method": (lambda: CompareConfig(methods="sam,gasm"), "unknown method 'gasm'; did you mean gsam"),
    "an empty method": (lambda: CompareConfig(methods="sam,"), "unknown method ''"),
    "method and methods": (lambda: CompareConfig(method="asam", methods="sam"), "give method or methods, not both"),
    "one method with a mask": (lambda: CompareConfig(method="sam_on"), "compare it with methods=sam_on"),
    "methods for arms with methods": (
        lambda: CompareConfig(arms=(replace(ONE, method="asam"),), methods="sam"),
        "arm a has a method of its own (asam); leave methods out",
    ),
    "a least radius above a grid's": (
        lambda: CompareConfig(masks="all", rho_min=0.06),
        "between 0 and rho=0.05, got 0.06",
    ),
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
