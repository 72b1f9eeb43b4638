"""The studies: what their configurations ask for, what becomes of claims, and their pages."""

from __future__ import annotations

import io
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from experiments.config import Arm, CompareConfig
from experiments.data import load_data
from studies import page, run, sharpness, tables, unpack_jpeg
from studies.claims import contrasts, estimate, outcome, settle

FIELDS = {field.name for field in fields(CompareConfig)}
FOLDERS = sorted(path.parent for path in run.HERE.glob("*/claims.yaml"))


Found = tuple[float, float | None, float | None]


def verdict(total: Found, flattening: Found, word: str = "not identified", arm: str = "sam/norm") -> dict[str, Any]:
    """As sam-masks verdict prints it."""

    def interval(found: Found) -> dict[str, float | None]:
        return dict(zip(("value", "low", "high"), found, strict=True))

    return {
        "word": word, "arm": arm, "reference": "none", "seeds": 12, "gain": {"p_holm": 0.25}, "confidence": 0.9875,
        "mediation": {"total": interval(total), "flattening": interval(flattening)},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "low", "high", "held"),
    [
        ("better", 0.1, 0.9, True), ("better", -0.1, 0.9, None), ("better", -0.9, -0.1, False),
        ("not_worse", -0.2, 0.9, True), ("not_worse", -0.4, 0.9, None), ("not_worse", -0.9, -0.4, False),
        ("not_better", -0.9, 0.2, True), ("not_better", -0.9, 0.4, None), ("not_better", 0.4, 0.9, False),
        ("equivalent", -0.2, 0.2, True), ("equivalent", -0.4, 0.2, None), ("equivalent", -0.2, 0.4, None),
        ("equivalent", 0.4, 0.9, False), ("equivalent", -0.9, -0.4, False), ("equivalent", None, 0.2, None),
        ("better", 0.1, None, True), ("better", None, None, None), ("not_better", None, 0.2, True),
    ],
)  # fmt: skip
def test_a_claim_is_decided_by_the_whole_interval(
    kind: str, low: float | None, high: float | None, held: bool | None
) -> None:
    found = outcome({"is": kind}, verdict((0.0, low, high), (9.0, 8.0, 10.0)), 0.3)
    assert found["held"] is held
    assert (found["low"], found["high"], found["unit"], found["p"]) == (low, high, "points of test accuracy", 0.25)


@pytest.mark.parametrize(("low", "high", "sharper"), [(0.1, 0.5, False), (-0.5, -0.1, True), (-0.1, 0.1, None)])
def test_sharper_is_of_the_flattening(low: float, high: float, sharper: bool | None) -> None:
    made = verdict((5.0, 4.0, 6.0), (0.0, low, high))
    assert outcome({"is": "sharper"}, made, 0.3)["held"] is sharper
    assert outcome({"is": "flatter"}, made, 0.3)["held"] is (None if sharper is None else not sharper)


@pytest.mark.parametrize(
    ("word", "held"),
    [
        ("not explained", True),
        ("explained", False),
        ("partly", None),
        ("not identified", None),
        ("too few seeds", None),
    ],
)
def test_not_explained_is_the_word_of_the_verdict(word: str, held: bool | None) -> None:
    made = verdict((1.0, 0.5, 1.5), (0.0, -1.0, 1.0), word)
    assert outcome({"is": "not_explained"}, made, 0.3) == {"held": held, "word": word}


def test_contrasts_are_those_that_the_arms_allow_under_each_method() -> None:
    claims = [{"arm": "norm", "reference": "none"}, {"arm": "norm", "reference": "all"},
              {"arm": "norm", "reference": "none"}, {"arm": "fisher", "reference": "none"}]  # fmt: skip
    arms = ["none", "none_2x", "sam/all", "sam/norm", "asam/norm"]
    assert contrasts(claims, arms) == ["sam/norm-none", "sam/norm-sam/all", "asam/norm-none"]
    assert contrasts(claims, ["none", "sam/random"]) == []
    rivals = [{"arm": "norm", "reference": "none_2x", "rivals": ["all", "random"]}]
    assert contrasts(rivals, arms) == ["sam/norm-none_2x", "sam/norm-sam/all", "asam/norm-none_2x"]


@pytest.mark.parametrize(
    ("gain", "over_all", "over_random", "ascents", "held", "word"),
    [
        (1.0, 2.0, -9.0, {"norm": 0.2, "all": 0.2, "random": 0.1}, True, "all +2.00 [+1.50, +2.50]"),
        (1.0, 2.0, -9.0, {"norm": 0.2, "all": 0.2, "random": 0.3}, True, "random -9.00 [-9.50, -8.50]"),
        (1.0, -2.0, 9.0, {"norm": 0.2, "all": 0.2, "random": 0.1}, False, "all -2.00 [-2.50, -1.50]"),
        (1.0, 0.4, 9.0, {"norm": 0.2, "all": 0.3, "random": 0.1}, None, "all +0.40 [-0.10, +0.90]"),
        (1.0, 9.0, 9.0, {"norm": 0.2, "all": 0.1, "random": 0.1}, None, "none of all, random ascends as strongly"),
        (0.4, 9.0, 9.0, {"norm": 0.2, "all": 0.3, "random": 0.3}, None, "not shown to be better than none_2x"),
        (-2.0, 9.0, 9.0, {"norm": 0.2, "all": 0.3, "random": 0.3}, None, "not shown to be better than none_2x"),
    ],
)
def test_beyond_ascent(
    gain: float, over_all: float, over_random: float, ascents: dict[str, float], held: bool | None, word: str
) -> None:
    """Through settle: only rivals that ascend at least as strongly count, and one that is worse is enough."""
    found = {"none_2x": gain, "sam/all": over_all, "sam/random": over_random}
    verdicts = [
        verdict((value, value - 0.5, value + 0.5), (0, 0, 0)) | {"reference": name} for name, value in found.items()
    ]
    claim = {"says": "x", "arm": "norm", "reference": "none_2x", "is": "beyond_ascent", "rivals": ["all", "random"]}
    claims = {"margin": 0.3, "comparisons": ["a"], "sweeps": [], "claims": [claim]}
    strength = {"none_2x": 0.0, **{f"sam/{name}": much for name, much in ascents.items()}, "asam/all": 9.0}
    [settled] = settle(claims, {"a": verdicts}, {"a": strength})
    assert settled["held"] is held
    assert word in settled["word"]
    assert (settled["value"], settled["n"]) == (gain, 12)


def test_every_claim_is_settled_wherever_it_can_be() -> None:
    claims = {
        "margin": 0.3, "comparisons": ["a", "b"], "sweeps": ["s"],
        "claims": [
            {"says": "x", "arm": "norm", "reference": "none", "is": "better"},
            {"says": "y", "arm": "norm", "reference": "none", "is": "not_explained"},
        ],
    }  # fmt: skip
    good, bad = verdict((1.0, 0.5, 1.5), (0, 0, 0)), verdict((-1.0, -1.5, -0.5), (0, 0, 0), arm="asam/norm")
    sweep = verdict((1.0, 0.5, 1.5), (0, 0, 0), "not explained")
    found = settle(claims, {"a": [good, bad], "s": [sweep]}, {})
    keys = ("says", "comparison", "method", "held")
    assert [tuple(one[key] for key in keys) for one in found] == [
        ("x", "a", "sam", True),
        ("x", "a", "asam", False),
        ("y", "s", "sam", True),
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_claims_are_about_comparisons_and_arms_that_are_there(folder: Path) -> None:
    claims = yaml.safe_load((folder / "claims.yaml").read_text(encoding="utf-8"))
    arms: dict[str, set[str]] = {}
    for name in [*claims["comparisons"], *claims["sweeps"]]:
        config = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        arms[name] = {arm["name"] for arm in config["arms"]}
        assert config.get("sweep", False) == (name in claims["sweeps"])
    for claim in claims["claims"]:
        wanted = claims["sweeps"] if claim["is"] == "not_explained" else claims["comparisons"]
        assert any({claim["arm"], claim["reference"]} <= arms[name] for name in wanted), claim["says"]
        assert set(claim.get("rivals", ())) <= set().union(*arms.values())
        if claim["is"] == "beyond_ascent":
            continue
        made = verdict((0.0, -9.0, 9.0), (0.0, -9.0, 9.0))
        assert outcome(claim, made, claims["margin"])["held"] is None


def test_numbers_of_runs_are_those_of_the_configurations() -> None:
    """Of the first lines of each file, and of the table of docs/studies.md."""
    page_text = (page.DOCS / "studies.md").read_text(encoding="utf-8")
    for folder in FOLDERS:
        totals = [0, 0]
        files = [file for file in sorted(folder.glob("*.yaml")) if file.name != "claims.yaml"]
        for file in files:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            asked = CompareConfig(**{key: value for key, value in config.items() if key in FIELDS}
                                  | {"arms": tuple(Arm(**arm) for arm in config["arms"])})  # fmt: skip
            tuned = [arm for arm in asked.arms if arm.rho]
            each = asked.tuning_seeds + config.get("sweep", False) * asked.seeds
            report = len(asked.arms) - len(tuned) * config.get("sweep", False)
            runs = report * asked.seeds + each * sum(len(arm.rho) for arm in tuned)
            more = each * asked.extend * len(tuned)
            assert f"Cost: {runs} runs and up to {more} more" in file.read_text(encoding="utf-8"), file
            totals = [totals[0] + runs, totals[1] + more]
        per = 2 if folder.name == "digits" else 1
        assert f"{totals[0] // per} runs" in page_text
        assert f"up to {totals[1] // per} more" in page_text


def test_the_pages_hold_what_the_records_say() -> None:
    assert page.main(["--check"]) == 0


def test_a_table_from_records(tmp_path: Path) -> None:
    arm = {
        "arm": "norm", "kept": 1288, "rho": 0.5, "rho_at_edge": True, "test_accuracy": 0.9123, "test_accuracy_low": 0.9,
        "test_accuracy_high": 0.92, "gain": 0.0123, "gain_low": -0.001, "gain_high": 0.02, "gain_p_holm": 0.04,
        "ascent": 0.25, "lambda_max": 12.3, "predicted_cost": 1.75, "n": 12, "role": "main", "norm_share": 0.5,
    }  # fmt: skip
    bare = {"rho": math.nan, "rho_at_edge": False, "gain": math.nan, "gain_p_holm": math.nan, "norm_share": math.nan}
    none = {**arm, "arm": "none", "kept": 0, **bare}
    pd.DataFrame([none, arm]).to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "every_run.json").write_text('{"test_is_shared": true}')
    (tmp_path / "study.json").write_text('{"measure": {"images": 512}}')
    trials = {
        "arm": ["norm"] * 7,
        "n": [2] * 7,
        "diverged": [0] * 6 + [2],
        "val_accuracy": [0.9, 0.8, 0.801, 0.799, 0.1, 0.88, math.nan],
    }
    pd.DataFrame(trials).to_csv(tmp_path / "trials.csv", index=False)
    runs = [("none", 0.0, 0.9, 0.1), ("none", 0.0, 0.9, 0.2), ("norm", 0.5, 0.9, 0.25), ("norm", 0.1, 0.9, 0.75),
            ("norm", 0.5, math.nan, 0.75)]  # fmt: skip
    columns = ["arm", "rho", "test_accuracy", "train_error"]
    pd.DataFrame(runs, columns=columns).to_csv(tmp_path / "runs.csv", index=False)
    text = tables.table(tmp_path)
    assert (
        "| norm | 1,288 | 50 % | 0.5 (edge) | 91.23 [90.00, 92.00] | +1.23 [-0.10, +2.00] | 0.040 | 25.0 | 0.250 | "
        "12.3 | 1.75 |"
    ) in text
    assert "| none | - | - | - | 91.23 [90.00, 92.00] | - | - | 15.0 | - | 12.3 | 1.75 |" in text
    assert "n = 12 seeds" in text
    assert "from 7 radii by the mean validation accuracy of 2 other seeds, of equals the smallest; 4 of an" in text
    assert "an arm's radii came within 10 points of its best in it; 2 of the tuning runs diverged; training" in text
    assert "of gain (over none, paired) Student's t over seeds, given the test images that all share; p by" in text
    assert "Hessian of the loss on 512 training images" in text
    pd.DataFrame(trials | {"diverged": [0] * 7}).to_csv(tmp_path / "trials.csv", index=False)
    assert "diverged" not in tables.table(tmp_path)
    assert "over 1 main arm; normalization" in text


@pytest.mark.parametrize(
    ("share", "shown"),
    [(1.0, "100"), (0.5, "50"), (0.0146, "1"), (0.01, "1"), (0.0099, "1"), (0.0038, "0.4"), (0.0, "0")],
)
def test_a_share_of_few_coordinates_is_not_shown_as_none(share: float, shown: str) -> None:
    assert tables._percent(share) == shown


def test_a_table_of_the_contrasts_of_a_family() -> None:
    made = [verdict((1.0, 0.5, 1.5), (0.2, 0.1, 0.3)), verdict((-0.5, -0.75, None), (-0.2, -0.3, 0.1), arm="sam/all")]
    text = tables.family([one | {"family": "ascent", "metric": "m"} for one in made])
    assert text.splitlines()[2:4] == [
        "| sam/norm - none | +1.00 [+0.50, +1.50] | +0.20 [+0.10, +0.30] |",
        "| sam/all - none | -0.50 [-0.75, unbounded] | -0.20 [-0.30, +0.10] |",
    ]
    assert text.endswith(
        "The family on ascent strength, flatter by m; n = 12 seeds; at the radii chosen; intervals by sign flips over "
        "seeds at 98.75 % (95 % over the family's 2 contrasts together)."
    )


def test_a_table_of_claims(tmp_path: Path) -> None:
    claim = {"says": "a is b", "by": "us", "comparison": "c", "method": "sam", "n": 12, "confidence": 0.9875}
    made = [
        {**claim, "held": False, "value": -0.5, "low": None, "high": -0.25, "unit": "points of test accuracy"},
        {**claim, "held": None, "word": "not identified"},
    ]
    (tmp_path / "claims.json").write_text(json.dumps(made))
    text = tables.claims(tmp_path)
    assert (
        "| a is b (us) | c, sam | **not held** | -0.50 [unbounded, -0.25] points of test accuracy; n = 12; "
        "98.75 % interval |"
    ) in text
    assert "| a is b (us) | c, sam | not decided | not identified; n = 12 |" in text


def test_claims_at_a_glance(tmp_path: Path) -> None:
    which = (("a", "c", "sam", True), ("a", "d", "asam", None), ("b", "d", "asam", False))
    made = [
        {"says": says, "by": "us", "comparison": of, "method": how, "held": held, "word": "w", "n": 12}
        for says, of, how, held in which
    ]
    (tmp_path / "claims.json").write_text(json.dumps(made))
    assert tables.claims(tmp_path).startswith(
        "| claim | c, sam | d, asam |\n| --- | --- | --- |\n"
        "| a (us) | held | not decided |\n| b (us) | - | **not held** |\n\n-: "
    )
    (tmp_path / "claims.json").write_text(json.dumps(made[1:]))
    assert "-: " not in tables.claims(tmp_path)


def test_estimates_show_the_sign_that_decides() -> None:
    assert estimate({"value": 0.106, "low": 0.0018, "high": None}) == "+0.11 [+0.002, unbounded]"
    assert estimate({"value": 0.0, "low": -0.0099, "high": 0.01}) == "+0.00 [-0.01, +0.01]"
    assert estimate({"value": 3.0, "low": None, "high": None}) == "unbounded"


def test_what_is_kept_of_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No paths of the machine, no outputs per image, numbers of the last epoch named so; what never varies apart."""
    for name in run.KEPT:
        (tmp_path / name).write_text("")
    lines = {
        "arm": ["a", "b"], "ascent": [0.1, 0.2], "taken_from": [None, str(tmp_path / "other" / "vit_count")],
        "folder": ["x", "y"], "torch": ["2.14", "2.14"],
    }  # fmt: skip
    monkeypatch.setattr(run, "load_results", lambda folder: pd.DataFrame(lines))
    run.keep(tmp_path, tmp_path / "records", [{"arm": "a", "associations": 1}])
    assert (tmp_path / "records" / "runs.csv").read_text() == (
        "arm,ascent_last_epoch,taken_from\na,0.1,\nb,0.2,vit_count\n"
    )
    assert json.loads((tmp_path / "records" / "every_run.json").read_text()) == {"torch": "2.14"}
    assert json.loads((tmp_path / "records" / "verdict.json").read_text()) == [{"arm": "a"}]


def test_what_was_not_run_is_said_with_its_command() -> None:
    assert page.block("digits", "nothing") == "Not run yet: `python -m studies.run digits --only nothing`."
    assert page.block("nothing", "claims") == "Not run yet: `python -m studies.run nothing`."


def test_a_table_of_verdicts_of_a_sweep() -> None:
    made = verdict((1.0, 0.5, 1.5), (0.2, 0.1, 0.3)) | {"metric": "m", "left_out": ["LEFT OUT: a at rho 4: collapsed"]}
    made["reasons"] = ["of this", "of that"]
    made["mediation"] |= {"indirect": {"value": 9.0, "low": None, "high": None}, "direct": made["mediation"]["total"]}
    made["mediation"]["corrected"] = True
    interaction = {"value": -5.0, "low": -7.0, "high": -3.0}
    made["iso"] = {"sweep": {"direct": {"value": 0.4, "low": -0.1, "high": 0.9}, "interaction": interaction}}
    made["secondary"] = [{"metric": "other", "flattening": {"value": -0.4, "low": -0.6, "high": None}}]
    text = sharpness.flatness([made])
    assert (
        "| sam/norm - none | +1.00 [+0.50, +1.50] | +0.20 [+0.10, +0.30] | unbounded | +1.00 [+0.50, +1.50] | "
        "+0.40 [-0.10, +0.90] | -5.00 [-7.00, -3.00] | not identified |"
    ) in text
    assert "- sam/norm - none: not identified, because of this; and of that." in text
    assert "n = 12 seeds; gain and flatter by: at the radii chosen; intervals by sign flips over seeds at 98.75" in text
    assert "logarithms, mean over seeds and both measurements; through" in text
    once = made | {"mediation": made["mediation"] | {"corrected": False}}
    assert "logarithms, mean over seeds; through" in sharpness.flatness([once])
    bare = {"direct": interaction, "interaction": dict.fromkeys(("value", "low", "high"))}
    assert "| -5.00 [-7.00, -3.00] | - | not identified |" in sharpness.flatness([made | {"iso": {"sweep": bare}}])
    assert text.endswith(" Left out: a at rho 4: collapsed.")
    flatter = made["mediation"] | {"flattening": {"value": 0.5, "low": 0.4, "high": 0.6}}
    text = sharpness.by_metric([made, made | {"arm": "b", "mediation": flatter}])
    assert text.startswith("| flatter by, log units | sam/norm - none | b - none |\n")
    assert "| m | +0.20 [+0.10, +0.30] | +0.50 [+0.40, +0.60] |\n| other | -0.40 [-0.60, unbounded] | -0.40" in text
    assert "mean over seeds and both measurements; the primary metric first; n = 12 seeds" in text
    text = sharpness.flatness([made])
    assert "with collapsed radii" not in text
    every = {"word": "partly", "iso": made["iso"]["sweep"] | {"direct": {"value": -9.0, "low": -12.0, "high": -6.0}}}
    text = sharpness.flatness([made | {"every_radius": every}])
    assert "at equal sharpness, with collapsed radii | interaction, with collapsed radii | verdict with" in text
    assert "| -5.00 [-7.00, -3.00] | not identified | -9.00 [-12.00, -6.00] | -5.00 [-7.00, -3.00] | partly |" in text


def test_every_radius_of_a_sweep(tmp_path: Path) -> None:
    """Means over the report's seeds alone, sharpness by logarithms; what was chosen and what left out is named."""
    (tmp_path / "study.json").write_text('{"measure": {"metrics": "m,other"}}')
    arms = ["none", "sam/one", "sam/all"]
    pd.DataFrame({"arm": arms, "rho": [math.nan, 0.2, 0.05]}).to_csv(tmp_path / "table.csv", index=False)
    tried = {"arm": ["sam/all"] * 2, "rho": [0.05, 0.1], "val_accuracy": [0.5, 0.25]}
    pd.DataFrame(tried).to_csv(tmp_path / "trials.csv", index=False)
    columns = ["arm", "rho", "test_accuracy", "val_accuracy", "train_error", "m", "m_repeat", "lambda_max",
               "lambda_max_repeat"]  # fmt: skip
    runs = [
        ("sam/all", 0.1, 0.5, 0.2, 0.5, 1, 1, 1, 1), ("sam/all", 0.05, 0.5, 0.9, 0.1, 1, 1, 10, 1000),
        ("none", 0, 0.75, 0.8, 0.25, 2, 2, 3, 3), ("sam/all", 0.05, 0.7, 0.7, 0.3, 16, 16, 10, 1000),
        ("sam/all", 0.05, math.nan, 0.1, 0.9, 9, 9, 9, 9),
        ("sam/one", 0.2, 0.5, 0.5, 0.5, 5, 5, 5, 5),
    ]  # fmt: skip
    frame = pd.DataFrame(runs, columns=columns)
    frame.to_csv(tmp_path / "runs.csv", index=False)
    lines = sharpness.radii(tmp_path, ["LEFT OUT: sam/all at rho 0.1: collapsed: why"]).split("\n")
    assert lines[2:6] == [
        "| none | - | 1 |  | - | 80.00 | 75.00 | 25.0 | 2 | 3 |",
        "| sam/one | 0.2 | 1 | chosen | - | 50.00 | 50.00 | 50.0 | 5 | 5 |",
        "| sam/all | 0.05 | 2 | chosen | 50.00 | 80.00 | 60.00 | 20.0 | 4 | 100 |",
        "| sam/all | 0.1 | 1 | left out | 25.00 | 20.00 | 50.00 | 50.0 | 1 | 1 |",
    ]
    assert lines[-1].endswith("over seeds and both measurements.")
    frame.drop(columns=["m_repeat", "lambda_max_repeat"]).to_csv(tmp_path / "runs.csv", index=False)
    text = sharpness.radii(tmp_path, [])
    assert "| 20.0 | 4 | 10 |" in text
    assert text.endswith("over seeds.")


def test_the_verdict_with_collapsed_radii_stands_beside_the_one_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other verdicts are asked for only where a radius collapsed, and are matched to the contrasts."""
    asked: list[str] = []

    def sam_masks(arguments: list[str]) -> str:
        every = "--collapsed=100" in arguments
        asked.append(arguments[2])
        notes = [] if every else ["LEFT OUT: norm at rho 4: collapsed: why", "other"]
        if "none_2x" in arguments[2]:
            notes = ["LEFT OUT: norm at rho 9: diverged"]
        pairs = arguments[2].removeprefix("--contrasts=").split(",")
        made = [
            {"arm": pair, "reference": "r", "word": "b" if every else "a", "iso": {"sweep": f"{pair} {every}"}}
            for pair in pairs
        ]
        return json.dumps({"verdicts": made[::-1] if every else made, "notes": notes})

    monkeypatch.setattr(run, "run", sam_masks)
    claims = {
        "margin": 0.3,
        "claims": [
            {"arm": "norm", "reference": "none"},
            {"arm": "norm", "reference": "all"},
            {"arm": "norm", "reference": "none_2x", "family": "ascent"},
        ],
    }
    first, second, third = run.judged(tmp_path, claims, ["none", "none_2x", "sam/norm", "sam/all"])
    left_out = ["LEFT OUT: norm at rho 4: collapsed: why"]
    assert first == {
        "family": "", "left_out": left_out, "arm": "sam/norm-none", "reference": "r", "word": "a",
        "iso": {"sweep": "sam/norm-none False"},
        "every_radius": {"left_out": [], "word": "b", "iso": "sam/norm-none True"},
    }  # fmt: skip
    assert second["every_radius"]["iso"] == "sam/norm-sam/all True"
    assert (third["family"], "every_radius" in third) == ("ascent", False)
    assert len(asked) == 3


def test_the_rank_correlation_is_over_arms_of_one_length_at_their_chosen_radii(tmp_path: Path) -> None:
    names = ["none", "a", "b", "c", "d", "e"]
    arms = [{"name": name, "epochs_factor": 1} for name in names] + [{"name": "none_2x", "epochs_factor": 2}]
    study = {"measure": {"metrics": "m,other"}, "config": {"arms": arms}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    chosen = pd.DataFrame({"arm": [*names, "none_2x"], "rho": [np.nan, *[0.1] * 5, np.nan]})
    chosen.to_csv(tmp_path / "table.csv", index=False)
    runs = [(name, 0.0 if name == "none" else 0.1, 0.9 - 0.01 * i, 1.0 + i, -i) for i, name in enumerate(names)]
    runs += [("none_2x", 0.0, 0.1, 0.0, 0), ("a", 0.9, 0.1, 0.0, 0), ("b", 0.1, np.nan, 0.0, 9)]
    columns = ["arm", "rho", "test_accuracy", "m", "train_error"]
    pd.DataFrame(runs, columns=columns).to_csv(tmp_path / "runs.csv", index=False)
    assert "of the arms' mean test accuracy with their mean m, and with" in sharpness.association(tmp_path)
    assert "trained on: -1.00 and +1.00 over the 6 arms. Arms" in sharpness.association(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps(study | {"config": {"arms": arms[1:]}}))
    assert sharpness.association(tmp_path) == ""


def test_rank_correlations_within_each_of_several_methods(tmp_path: Path) -> None:
    names = ["none", *(f"{method}/{arm}" for method in ("sam", "asam") for arm in "abcdef"), "other/a"]
    arms = [{"name": name, "epochs_factor": 1} for name in names]
    (tmp_path / "study.json").write_text(json.dumps({"measure": {"metrics": "m"}, "config": {"arms": arms}}))
    pd.DataFrame({"arm": names, "rho": [np.nan, *[0.1] * 13]}).to_csv(tmp_path / "table.csv", index=False)
    falls = {name: (-1 if name.startswith("asam") else 1) for name in names}
    runs = [(name, 0.1 * (name != "none"), 0.5 + 0.01 * i, falls[name] * i, -i) for i, name in enumerate(names)]
    pd.DataFrame(runs, columns=["arm", "rho", "test_accuracy", "m", "train_error"]).to_csv(
        tmp_path / "runs.csv", index=False
    )
    text = sharpness.association(tmp_path)
    assert (
        "and -1.00 over the 14 arms; -1.00 and -1.00 over 6 under asam; +1.00 and -1.00 over 6 under sam. Arms" in text
    )
    arms = [arm for arm in arms if arm["name"].partition("/")[0] in ("none", "sam")]
    (tmp_path / "study.json").write_text(json.dumps({"measure": {"metrics": "m"}, "config": {"arms": arms}}))
    assert " under " not in sharpness.association(tmp_path)


def test_jpegs_are_unpacked_as_they_are_read(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), dtype=np.uint8)
    files = []
    for pixels in drawn:
        Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(buffer := io.BytesIO(), "jpeg", quality=80)
        files.append(buffer.getvalue())
    header = files[0][: next(i for i, same in enumerate(zip(*files, strict=False)) if len(set(same)) > 1)]
    bodies = [file.removeprefix(header).removesuffix(unpack_jpeg.END) for file in files]
    np.savez(
        tmp_path / "pack.npz",
        header=np.frombuffer(header, np.uint8),
        data=np.frombuffer(b"".join(bodies), np.uint8),
        lengths=np.array([len(body) for body in bodies], np.uint16),
        y_train=np.array([2, 0, 1], np.uint8),
        y_test=np.array([1, 2], np.uint8),
    )
    unpack_jpeg.main([str(tmp_path / "pack.npz"), str(tmp_path / "out" / "plain.npz")])
    found = load_data(f"npz:{tmp_path / 'out' / 'plain.npz'}")
    with np.load(tmp_path / "out" / "plain.npz") as plain:
        images = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
        assert np.array_equal(np.concatenate([plain["x_train"], plain["x_test"]]), np.stack(images))
        assert plain["y_train"].tolist() == [2, 0, 1]
    assert found.num_classes == 3


@pytest.mark.slow
def test_a_study_shrunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["digits", "--scale", "0.05", "--only", "resnet_half", "--processes", "1", "--out", str(tmp_path)])
    records = tmp_path / "digits-0.05" / "records"
    runs = pd.read_csv(records / "resnet_half" / "runs.csv")
    assert len(runs) == 12 * 5 + 13 * 2
    assert json.loads((records / "claims.json").read_text()) == []
    assert (records / "resnet_half" / "accuracy.svg").exists()
