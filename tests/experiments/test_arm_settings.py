"""Arms with training settings of their own: their runs are those of a comparison with the settings; it is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import cli
from experiments.by_method import methods_notes
from experiments.compare import Comparison, compare, predicted_costs
from experiments.config import PERTURBATION_SETTINGS, UPDATE_SETTINGS, Arm, CompareConfig, RunConfig
from experiments.measure import MeasureConfig
from experiments.report.folder import load_comparison
from experiments.table import Table, build_table, frame
from masks.errors import InputError
from tests.experiments.conftest import QUIET, SerialExecutor

OWN: dict[str, Any] = {
    "bias": "adaptive",
    "eta": 0.1,
    "norm_scope": "full",
    "norm_statistics": "second",
    "rho_min": 0.1,
    "rule": "layerwise_l2",
    "sam_epochs": "1..2",
    "clip_grad_norm": 1,
    "label_smoothing": 0.1,
    "lr": 1,
    "momentum": 0.5,
    "norm_weight_decay": False,
    "optimizer": "adamw",
    "schedule": "step",
    "trainable": "no_norm",
    "warmup": 1,
    "weight_decay": 0,
}
NONE = Arm("none", "none")


def arm(**settings: Any) -> Arm:
    return Arm("a", "no_norm", (0.5,), settings=settings)


def only_run(config: CompareConfig) -> RunConfig:
    return config.run(config.arms[-1], rho=0.5, seed=3, tuning=False)


@pytest.mark.parametrize("name", OWN)
def test_a_run_of_the_arm_is_the_run_of_a_comparison_with_the_setting(name: str) -> None:
    shared = {"rule": "elementwise_l2"} if name in ("eta", "bias") else {}  # a rule that takes them
    inside = only_run(CompareConfig(arms=(NONE, arm(**{name: OWN[name]})), **shared))
    outside = only_run(CompareConfig(arms=(NONE, arm()), **shared, **{name: OWN[name]}))
    plain = only_run(CompareConfig(arms=(NONE, arm()), **shared))
    assert inside == outside
    assert inside.digest({"data": "x"}) == outside.digest({"data": "x"}) != plain.digest({"data": "x"})


def test_an_arm_may_set_these_and_no_others() -> None:
    allowed = {*PERTURBATION_SETTINGS, *UPDATE_SETTINGS}
    assert set(OWN) == allowed
    for field in fields(RunConfig):
        if field.name not in allowed:
            with pytest.raises(InputError, match=f"^arm a: settings cannot hold {field.name}: runs are paired"):
                arm(**{field.name: field.default})


def test_arms_without_settings_are_recorded_as_before_there_were_any() -> None:
    config = CompareConfig(arms=(NONE, arm(), replace(arm(lr=1), name="b")))
    recorded = config.settings()["arms"]
    assert ["settings" in one for one in recorded] == [False, False, True]
    assert recorded[-1]["settings"] == {"lr": 1.0}
    assert CompareConfig(arms=tuple(Arm(**one) for one in recorded)) == config
    before = {"name": "none", "mask": "none", "rho": (), "epochs_factor": 1, "role": "main", "method": ""}
    assert recorded[0] == before


def test_one_setting_written_in_two_ways_is_one_comparison() -> None:
    one, other = (CompareConfig(arms=(NONE, arm(lr=lr, eta=None))) for lr in (1, 1.0))
    assert one.digest({}) == other.digest({})


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown": (lambda: arm(lrate=1), "arm a: unknown setting 'lrate'; did you mean lr"),
    "text for a number": (lambda: arm(lr="fast"), "arm a: lr must be float, got 'fast'"),
    "a number for a switch": (lambda: arm(norm_weight_decay=0), "arm a: norm_weight_decay must be bool, got 0"),
    "a switch for a number": (lambda: arm(warmup=True), "arm a: warmup must be int, got True"),
    "a number for a choice": (lambda: arm(rule=2), "arm a: rule must be str, got 2"),
    "null for a number": (lambda: arm(lr=None), "arm a: lr must be float, got None"),
    "a list for a number or null": (lambda: arm(eta=[1]), r"arm a: eta must be float or null, got \[1\]"),
    "nothing perturbed": (
        lambda: Arm("a", "none", settings={"rule": "linf"}),
        "arm a: mask none perturbs nothing; leave rule out of its settings",
    ),
    "the baseline": (lambda: Arm("none", "none", settings={"lr": 1.0}), "is the base optimizer that all others"),
    "no such choice": (lambda: CompareConfig(arms=(arm(rule="l3"),)), "arm a: unknown rule 'l3'; did you mean l2"),
    "a window after the end": (
        lambda: CompareConfig(arms=(arm(sam_epochs="9.."),), epochs=5),
        "arm a: sam_epochs 9.. begins after the run",
    ),
    "a scope twice": (
        lambda: CompareConfig(arms=(replace(arm(norm_scope="masked"), mask="", method="ssam_d"),)),
        "arm a: method ssam_d has a norm_scope of its own",
    ),
    "the setting that all have": (
        lambda: CompareConfig(arms=(arm(), replace(arm(lr=0.05), name="b"))),
        "arms a and b are the same run at rho 0.5; leave one out",
    ),
    "one mask twice": (
        lambda: CompareConfig(masks="norm,norm:part=both,all", rho_grid="0.1,0.2"),
        "arms norm and norm:part=both are the same run at rho 0.1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_cannot_be_had_are_refused(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(InputError, match=message):
        make()


def test_a_file_says_them_as_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    settings = {"sam_epochs": "0..5", "norm_weight_decay": False, "eta": None, "lr": 0.1}
    arms = [{"name": "a", "mask": "norm", "rho": [0.5], "settings": settings}]
    file.write_text(yaml.safe_dump({"arms": arms}))
    parser = cli.build_parser()
    values = parser.instantiate(parser.parse_args(["compare", "--config", str(file)]))["compare"]
    (found,) = values.arms
    assert found == Arm("a", "norm", (0.5,), settings={**settings, "sam_epochs": "0..5"})


@pytest.fixture(scope="module")
def made(
    tiny_comparison: Callable[..., CompareConfig], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Comparison]:
    """A comparison of arms with settings, and for each of these a comparison that has them for all its arms."""
    own = {"norm_scope": "full", "lr": 0.05}
    late = Arm("late", "norm", (0.5,), settings={"sam_epochs": "1.."})
    frozen = Arm("frozen", "all", (0.1,), method="asam", settings={"trainable": "no_norm"})
    configs = {
        "arms": tiny_comparison(seeds=1, arms=(NONE, Arm("own", "norm", (0.5,), settings=own), late, frozen)),
        "own": tiny_comparison(seeds=1, arms=(NONE, Arm("own", "norm", (0.5,))), **own),
        "late": tiny_comparison(seeds=1, arms=(NONE, replace(late, settings={})), sam_epochs="1.."),
        "frozen": tiny_comparison(seeds=1, arms=(NONE, replace(frozen, settings={})), trainable="no_norm"),
    }
    folder = tmp_path_factory.mktemp("arms")
    return {
        name: compare(
            config,
            folder / name,
            measure=MeasureConfig(images=32, sharpness_m=16, metrics="", repeats=1),
            policy=QUIET,
            executor=SerialExecutor(),
        )
        for name, config in configs.items()
    }


@pytest.mark.parametrize("name", ["own", "late", "frozen"])
def test_results_are_byte_for_byte_those_of_the_comparison_with_the_settings(
    made: dict[str, Comparison], name: str
) -> None:
    inside, outside = (made[where].records[name] for where in ("arms", name))
    assert len(inside) == 1
    # Not the whole files: these also say which version of the code has run, and names count the masks of all arms.
    contents = [[json.dumps([one.config, one.result]) for one in records] for records in (inside, outside)]
    assert contents[0] == contents[1]


def test_the_table_says_what_differs(made: dict[str, Comparison]) -> None:
    table = build_table(made["arms"])
    assert (
        "Settings differ: own has lr 0.05, norm_scope full; late has sam_epochs 1..; frozen has trainable no_norm."
        in (table.notes)
    )
    assert (
        "The arm none is trained without these settings: gains of own, frozen are also those of the settings."
        in table.notes
    )
    numbers = frame(table).set_index("arm")["settings"]
    assert list(numbers.fillna("-")) == ["-", "lr 0.05, norm_scope full", "sam_epochs 1..", "trainable no_norm"]
    plain = build_table(made["own"])
    assert not [note for note in plain.notes if "ettings" in note]
    assert "settings" not in frame(plain)


def test_methods_by_masks_say_that_settings_differ(made: dict[str, Comparison]) -> None:
    for name, ending in (("arms", ", settings that differ (below) excepted."), ("frozen", ".")):
        table = build_table(made[name], predicted={})
        tuned = [replace(row, arm=replace(row.arm, rho=(0.1, 0.2))) if row.arm.rho else row for row in table.rows]
        (note,) = (note for note in methods_notes(made[name], Table(tuple(tuned), ())) if note.startswith("Tuned"))
        assert note.endswith(f"in every cell and in the baseline{ending}")


def test_predicted_costs_follow_the_settings(made: dict[str, Comparison]) -> None:
    costs = predicted_costs(made["arms"])
    assert costs["own"] == 2.0  # the first pass needs every gradient
    whole = predicted_costs(replace(made["late"], config=replace(made["late"].config, sam_epochs="")))["late"]
    assert whole is not None
    assert costs["late"] == pytest.approx(1 + (whole - 1) / 2)  # one of two epochs
    assert predicted_costs(made["late"])["late"] == costs["late"]
    assert costs["frozen"] is None


def test_the_comparison_is_read_back_with_them(made: dict[str, Comparison]) -> None:
    assert load_comparison(made["arms"].folder).comparison.config == made["arms"].config
