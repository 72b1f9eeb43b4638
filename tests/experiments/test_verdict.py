"""The command's verdict: the numbers are those of the analysis on the folder's runs, and what is lacking is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import PRIMARY
from analysis.verdict import verdicts
from experiments.cli import main
from experiments.equal_loss import NotReached, at_equal_loss, value_at
from experiments.study import load_frame, load_study
from experiments.verdict import as_json, as_text, judge
from masks.errors import InputError
from tests.experiments.studies import ARMS, CHOSEN, weights, write_study

Output = pytest.CaptureFixture[str]
OTHER = "gradient_norm"


def result(arm: str, rho: float, seed: int, primary: str = PRIMARY) -> dict[str, Any]:
    """Runs whose error follows log sharpness, with errors of measurement."""
    rng = np.random.default_rng([seed, *map(ord, arm), int(1000 * rho)])
    place = {"none": 0.0, "all": 0.8}.get(arm, 0.9) + 0.3 * math.log2(rho / CHOSEN.get(arm, 1.0) if rho else 1.0)
    log_sharpness = 1.0 - place + 0.2 * rng.normal()
    error = 0.10 + 0.02 * log_sharpness + 0.002 * rng.normal()
    first, second = (math.exp(log_sharpness + 0.05 * rng.normal()) for _ in range(2))
    metrics = {primary: first, OTHER: 2 * first}
    return {"test_accuracy": 1 - error, **weights(0.3 + 0.01 * seed, metrics, {primary: second, OTHER: 2 * second})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = {"none": (), "all": (0.05, 0.1, 0.2, 0.4, 0.8), "norm": (0.25, 0.5, 1.0, 2.0, 4.0)}
    return write_study(tmp_path_factory.mktemp("made") / "study", result, arms=arms)


def refused(arguments: list[str], output: Output) -> str:
    assert main(["verdict", *arguments]) == 2
    out, err = output.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err.removeprefix("sam-masks: error: ").rstrip()


def test_the_numbers_are_those_of_the_analysis(folder: Path) -> None:
    got = judge(folder, resamples=99)
    want = verdicts(
        load_frame(folder),
        [("norm", "all"), ("norm", "none")],
        primary=PRIMARY,
        secondary=[OTHER],
        chosen=CHOSEN,
        resamples=99,
    )
    assert repr(got.verdicts) == repr(want)  # nan equals nan
    assert (got.chosen, got.notes, got.levels, got.not_decided) == (CHOSEN, (), {}, {})
    assert {one.confidence for one in got.verdicts} == {0.975}  # two contrasts
    assert got.verdicts[0].iso.decided
    one = judge(folder, contrasts=["norm-all"], margin=0.5, alpha=0.1, resamples=0).verdicts
    assert len(one) == 1
    assert (one[0].confidence, one[0].margin) == (0.9, 0.5)

    # Points of the gain: by hand from the records.
    def mean_error(arm: str, rho: float) -> float:
        return float(np.mean([1 - result(arm, rho, seed)["test_accuracy"] for seed in range(8)]))

    gain = 100 * (mean_error("all", 0.2) - mean_error("norm", 1.0))
    assert one[0].mediation.total.value == pytest.approx(gain, abs=1e-9)


def test_text_and_json_say_the_same_and_all_of_it(folder: Path, capsys: Output) -> None:
    assert main(["verdict", str(folder)]) == 0
    text = capsys.readouterr().out
    assert main(["verdict", str(folder), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    judgement = judge(folder)
    assert found == json.loads(json.dumps(as_json(judgement)))
    for one in found["verdicts"]:
        for line in (*one["lines"], *one["assumptions"]):
            assert line in text
        assert {r["metric"] for r in one["reliability"]} == {PRIMARY, OTHER}
    for heading in ("Tests (97.5 % intervals)", "Test-retest reliability", "Kendall's tau", "Assumptions", "Notes"):
        assert f"\n{heading}" in text
    assert f"{OTHER}: flatter by" in text
    ranks = text.partition("Kendall's tau")[2].partition("\n\n")[0]
    for part in ("gap, labels as given", "gap, clean labels", "partial", "given train loss, rho"):
        assert part in ranks
    first = found["verdicts"][0]
    total = next(line for line in text.splitlines() if "norm-all" in line and "total gain, points" in line)
    numbers = (first["mediation"]["total"]["value"], first["p_total"], first["gain"]["p_holm"])
    for number in numbers:
        assert f"{number:.3g}" in total.split()
    assert "Radii, chosen on validation images of other seeds: all 0.2, norm 1." in text


def test_a_study_without_the_primary_names_what_there_is_and_how_to_measure_it(tmp_path: Path, capsys: Output) -> None:
    folder = write_study(tmp_path / "s", lambda *run: result(*run, primary="lambda_max"))
    message = refused([str(folder)], capsys)
    assert f"the runs lack the primary metric {PRIMARY} (compare measures it with --metrics {PRIMARY}" in message
    assert "they have lambda_max, gradient_norm: name one with --primary" in message
    assert main(["verdict", str(folder), "--primary=lambda_max", "--secondary="]) == 0
    text = capsys.readouterr().out
    assert "by lambda_max: " in text
    assert OTHER not in text
    assert "did you mean lambda_max?" in refused([str(folder), "--primary=lamda_max"], capsys)
    assert "unknown metric of the runs" in refused([str(folder), "--primary=lambda_max", "--secondary=x"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing: FOLDER"),
        (["nowhere"], "nowhere is not the folder of a comparison: cannot read its study.json"),
        (["{}", "--contrasts=norm-nrom"], "contrast 'norm-nrom': unknown arm 'nrom'; did you mean norm"),
        (["{}", "--contrasts=norm"], "contrast 'norm' must be ARM-REFERENCE, for two of the arms none, all, norm"),
        (["{}", "--contrasts=norm-norm"], "arm norm is compared with itself"),
        (["{}", "--contrasts=norm-all,norm-all"], "need one or more different contrasts, got 2, 1 different"),
        (["{}", "--alpha=0"], "alpha must lie between 0 and 1, got 0.0"),
        (["{}", "--margin=-1"], "margin must be a positive finite number of percentage points, got -1.0"),
        (["{}", "--at=start"], "option at must be one of end, equal_train_loss"),
        (["{}", "--primray=x"], "unknown option 'primray'; did you mean primary?"),
        (["{}", "--at=equal_train_loss"], "was measured at its end only; equal training loss needs"),
    ],
)
def test_bad_input_is_one_line(folder: Path, arguments: list[str], message: str, capsys: Output) -> None:
    assert message in refused([a.format(folder) for a in arguments], capsys)


def test_the_middle_of_a_grid_is_named_as_compare_takes_it(tmp_path: Path, capsys: Output) -> None:
    folder = write_study(tmp_path / "s", result)
    name, _, _ = PRIMARY.partition("@")
    assert main(["verdict", str(folder), f"--primary={name}@middle", "--secondary="]) == 0
    assert f"by {PRIMARY}: " in capsys.readouterr().out
    assert "did you mean" in refused([str(folder), f"--primary={name[:-1]}@middle"], capsys)


def test_names_of_arms_may_hold_the_sign_between_them(tmp_path: Path) -> None:
    arms = {"none": (), "a-b": (0.5, 1.0, 2.0), "a": (0.5, 1.0, 2.0)}
    folder = write_study(tmp_path / "s", result, arms=arms, seeds=4, chosen={"a-b": 1.0, "a": 0.5},
                         role=lambda name: "control" if name == "a" else "main")  # fmt: skip
    (one,) = judge(folder, contrasts=["a-b-a"], resamples=0).verdicts
    assert (one.arm, one.reference) == ("a-b", "a")
    # Without an arm norm: the main arms against none.
    (one,) = judge(folder, resamples=0).verdicts
    assert (one.arm, one.reference) == ("a-b", "none")


def test_where_training_counts_as_collapsed_is_a_choice(tmp_path: Path, capsys: Output) -> None:
    def made(arm: str, rho: float, seed: int) -> dict[str, Any]:
        return result(arm, rho, seed) | {"val_accuracy": 0.7 if (arm, rho) == ("norm", 2.0) else 0.9}

    folder = write_study(tmp_path / "s", made)
    words = "LEFT OUT: norm at rho 2: collapsed: validation accuracy 70.0 %, 90.0 % at rho 1"
    assert judge(folder, resamples=0).notes == (words,)
    for points, told in (("19", True), ("21", False)):
        assert main(["verdict", str(folder), f"--collapsed={points}"]) == 0
        assert (words in capsys.readouterr().out) == told
    assert "collapsed must be a positive number" in refused([str(folder), "--collapsed=0"], capsys)


def test_diverged_radii_are_named_and_an_arm_whose_chosen_one_diverged_is_refused(tmp_path: Path) -> None:
    def diverging(rho: float) -> Any:
        return lambda *run: result(*run) | ({"diverged": "loss"} if run == ("norm", rho, 3) else {})

    judgement = judge(write_study(tmp_path / "a", diverging(2.0)), contrasts=["norm-all"])
    assert judgement.notes == ("LEFT OUT: norm at rho 2: 1 of 8 runs diverged (seed 3)",)
    assert "- LEFT OUT: norm at rho 2: 1 of 8 runs diverged (seed 3)." in as_text(judgement)
    assert judgement.verdicts[0].iso.radii_arm <= 2
    folder = write_study(tmp_path / "b", diverging(1.0))
    with pytest.raises(InputError, match=r"arm norm cannot be judged at its chosen radius 1: 1 of 8 runs diverged"):
        judge(folder)
    assert judge(folder, contrasts=["all-none"], resamples=0).verdicts[0].arm == "all"


def test_what_a_study_lacks_is_in_the_notes(tmp_path: Path) -> None:
    def single(arm: str, rho: float, seed: int) -> dict[str, Any] | None:
        if rho not in (0.0, 0.2, 1.0):
            return None
        made = result(arm, rho, seed)
        del made["metrics_repeat"]
        return made

    folder = tmp_path / "s"
    write_study(folder, single, seeds=8)
    judgement = judge(folder, resamples=0)
    assert judgement.notes[0].startswith("NO SWEEP: one radius of norm, all was trained on the report's seeds")
    assert judgement.notes[1].startswith(f"NOT REPEATED: {PRIMARY} was measured once")
    assert not judgement.verdicts[0].iso.decided


def test_one_seed_is_one_line(tmp_path: Path, capsys: Output) -> None:
    folder = write_study(tmp_path / "s", result, seeds=1)
    assert "needs at least 2 seeds" in refused([str(folder)], capsys)


# -- what the primary metric was measured on ---------------------------------------------------------------


def changed(folder: Path, change: Any) -> Path:
    """The study with every record's settings of the primary metric changed."""
    for path in (folder / "runs").glob("*/result.json"):
        record = json.loads(path.read_text())
        if PRIMARY in record["result"].get("metrics", {}):
            change(record, record["result"]["metrics"][PRIMARY]["settings"])
            path.write_text(json.dumps(record))
    return folder


def test_m_images_labels_and_data_of_the_primary_metric_are_stated(tmp_path: Path) -> None:
    def as_named(record: dict[str, Any], settings: dict[str, Any]) -> None:
        record["config"]["label_noise"] = 0.2
        settings["data_digest"] = f"{record['config']['seed']:08d}ff"

    folder = changed(write_study(tmp_path / "a", result, seeds=4), as_named)
    got = judge(folder, resamples=0)
    assert got.notes == ()
    assert (got.measured["m"], got.measured["images"], got.measured["label_noise"]) == (128, 1024, 0.2)
    assert got.measured["data_digests"]["3"] == ["00000003ff"]
    assert as_text(got).startswith(
        f"Primary metric {PRIMARY}: m = 128 on 1,024 training images, labels as given (20 % redrawn at random); data "
        "00000000, 00000001, 00000002, 00000003, by seed."
    )
    assert as_json(got)["measured"]["m"] == 128

    def smaller(record: dict[str, Any], settings: dict[str, Any]) -> None:
        settings |= {"m": 32, "num_examples": 64}
        settings["data_digest"] = "a" if (record["config"]["seed"], record["arm"]) == (2, "norm") else "b"

    notes = judge(changed(write_study(tmp_path / "b", result, seeds=4), smaller), resamples=0).notes
    assert notes == (
        f"NOT AS NAMED: the primary metric named beforehand is {PRIMARY}, m = 128 on 1,024 images; here {PRIMARY}, m = "
        "32 on 64 training images",
        "MIXED DATA: runs of seed 2 were measured on different images",
    )
    notes = judge(write_study(tmp_path / "c", result, seeds=4), primary=OTHER, resamples=0).notes
    assert notes[0].endswith(f"here {OTHER}, m = 128 on 1,024 training images")


# -- metrics that grow with flatness -----------------------------------------------------------------------


def flatter(folder: Path, name: str) -> Path:
    """The study with the primary metric replaced by its inverse, which a plugin registered as flatter."""
    for path in (folder / "runs").glob("*/result.json"):
        record = json.loads(path.read_text())
        for part in ("metrics", "metrics_repeat"):
            found = record["result"].get(part, {})
            if PRIMARY in found:
                one = found.pop(PRIMARY)
                one["settings"]["direction"] = "flatter"
                found[name] = one | {"value": 1 / one["value"]}
        path.write_text(json.dumps(record))
    return folder


def test_a_metric_that_grows_with_flatness_says_the_same_as_its_sharper_twin(tmp_path: Path) -> None:
    arms = {"none": (), "all": (0.05, 0.1, 0.2, 0.4, 0.8), "norm": (0.25, 0.5, 1.0, 2.0, 4.0)}
    settings: dict[str, Any] = {"contrasts": ["norm-all"], "secondary": [], "resamples": 0}
    (twin,) = judge(write_study(tmp_path / "a", result, arms=arms), **settings).verdicts
    folder = flatter(write_study(tmp_path / "b", result, arms=arms), "width")
    got = judge(folder, primary="width", **settings)
    (one,) = got.verdicts
    assert (got.primary, one.metric) == ("1/width", "1/width")
    assert one.word == twin.word
    assert one.mediation.flattening.value == pytest.approx(twin.mediation.flattening.value, rel=1e-9)
    assert one.mediation.indirect.value == pytest.approx(twin.mediation.indirect.value, rel=1e-9)
    assert twin.mediation.flattening.value != 0
    assert "by 1/width" in as_text(got)
    # As a secondary metric it has the same name.
    both = judge(folder, primary=OTHER, secondary=["width"], contrasts=["norm-all"], resamples=0).verdicts[0].secondary
    assert [row.metric for row in both] == ["1/width"]


def test_an_inverse_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    folder = flatter(write_study(tmp_path / "s", result, seeds=4), "width")
    path = next((folder / "runs").glob("norm-1p0-2-False/result.json"))
    record = json.loads(path.read_text())
    record["result"]["metrics"]["width"]["value"] = -1.0
    path.write_text(json.dumps(record))
    with pytest.raises(
        InputError, match=r"larger width is flatter, so the verdict needs its inverse.* in 1 of 28 runs"
    ):
        judge(folder, primary="width", resamples=0)


# -- at equal training loss ---------------------------------------------------------------------------------


def test_a_power_law_is_read_off_exactly() -> None:
    losses = np.array([2.0, 1.1, 0.4, 0.05])
    values = 3.0 * losses**-0.7
    for level in (2.0, 1.5, 1.1, 0.8, 0.4, 0.05, 0.1):
        assert value_at(level, losses, values) == pytest.approx(3.0 * level**-0.7, rel=1e-12)


def test_the_first_crossing_counts() -> None:
    losses, values = np.array([2.0, 1.0, 1.5, 0.5]), np.array([1.0, 2.0, 100.0, 1000.0])
    assert value_at(1.0, losses, values) == 2.0
    assert value_at(math.sqrt(2), losses, values) == pytest.approx(math.sqrt(2), rel=1e-12)
    assert value_at(0.5, losses, values) == 1000.0
    assert value_at(math.sqrt(0.75), losses, values) == pytest.approx(math.sqrt(1e5), rel=1e-12)


def test_a_metric_without_a_logarithm_there_is_nan() -> None:
    losses = np.array([2.0, 1.0, 0.5])
    assert math.isnan(value_at(1.5, losses, np.array([1.0, -1.0, 1.0])))
    assert math.isnan(value_at(1.5, losses, np.array([1.0, math.nan, 1.0])))
    # Measured at the level itself, no other measurement matters.
    assert value_at(1.0, losses, np.array([-1.0, 3.0, 1.0])) == 3.0
    assert value_at(2.0, losses, np.array([4.0, -1.0, 1.0])) == 4.0


def power_law(arm: str, rho: float, seed: int, *, start: float = 2.0, factor: float = 1.0) -> dict[str, Any]:
    """A run whose loss falls exponentially at a rate of its own, and whose metric is a power of its loss."""
    rng = np.random.default_rng([seed, *map(ord, arm), int(1000 * rho)])
    rate = 0.3 + 0.1 * rng.random() + (0.2 if arm == "norm" else 0.0)
    c = math.exp(0.1 * seed + 0.05 * rng.normal()) * factor
    losses = start * np.exp(-rate * np.arange(6))
    points = [weights(float(loss), {PRIMARY: c * loss**-0.5}, {PRIMARY: 1.1 * c * loss**-0.5}) for loss in losses]
    history = [{"loss": 1.0, "observed": point} for point in points[:-1]] + [{"loss": 1.0}]
    return {"test_accuracy": 0.9 + 0.01 * rng.random(), "history": history, **points[-1]} | {"c": c, "last": losses[-1]}


def test_every_run_is_read_at_the_loss_that_all_reached(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "s", power_law))
    runs = {(arm, seed, rho): power_law(arm, rho, seed)
            for arm in ("norm", "all") for rho in ARMS[arm] for seed in range(8)}  # fmt: skip
    frame, level, (first, last) = at_equal_loss(study, ("norm", "all"))
    crossed = [1 + next(i for i, point in enumerate([*run["history"][:-1], {"observed": run}])
                        if point["observed"]["fit"]["train_loss"] <= level) for run in runs.values()]  # fmt: skip
    assert (first, last) == (min(crossed), max(crossed))
    assert first < last
    assert level == max(run["last"] for run in runs.values())
    assert len(frame) == len(runs)
    for row in frame.to_dict("records"):
        run = runs[row["arm"], row["seed"], row["rho"]]
        assert row[PRIMARY] == pytest.approx(run["c"] * level**-0.5, rel=1e-9)
        assert row[f"{PRIMARY}_repeat"] == pytest.approx(1.1 * run["c"] * level**-0.5, rel=1e-9)
        assert (row["test_error"], row["train_loss"]) == (1 - run["test_accuracy"], level)
    # An arm that is not compared has no say.
    assert at_equal_loss(study, ("norm", "none"))[1] != level


def test_sharper_only_because_it_fits_better_is_no_difference_at_equal_loss(tmp_path: Path, capsys: Output) -> None:
    folder = write_study(tmp_path / "s", power_law)
    end = judge(folder, contrasts=["norm-all"], resamples=0).verdicts[0].mediation.flattening
    equal = judge(folder, contrasts=["norm-all"], at="equal_train_loss", resamples=0)
    level = equal.levels["norm-all"]
    flat = equal.verdicts[0].mediation.flattening
    assert end.high < -0.3  # norm trains faster, so its loss is smaller and its metric larger
    c = [[math.log(power_law(arm, CHOSEN[arm], seed)["c"]) for seed in range(8)] for arm in ("norm", "all")]
    assert flat.value == pytest.approx(np.mean(np.array(c[1]) - np.array(c[0])), abs=1e-9)
    assert abs(flat.value) < 0.1
    assert main(["verdict", str(folder), "--at=equal_train_loss", "--contrasts=norm-all"]) == 0
    out = capsys.readouterr().out
    first, last = equal.epochs["norm-all"]
    line = f"Sharpness where the run reached training loss {level:.4g} (epochs {first} to {last}); test error of the "
    assert f"{line}final weights." in out
    # One contrast at a time cannot be adjusted by Holm over contrasts, and is not called so.
    assert "p Bonferroni" in out
    assert "p Holm" not in out.partition("Test-retest")[0]


def test_a_level_that_was_not_passed_through_is_not_decided(tmp_path: Path, capsys: Output) -> None:
    def far(arm: str, rho: float, seed: int) -> dict[str, Any]:
        return power_law(arm, rho, seed, start=0.01 if (arm, rho, seed) == ("norm", 2.0, 5) else 2.0)

    folder = write_study(tmp_path / "s", far)
    with pytest.raises(NotReached, match=r"not reached: .* of 1 of 48 runs \(norm, rho 2, seed 5: 0.01\)"):
        at_equal_loss(load_study(folder), ("norm", "all"))
    assert main(["verdict", str(folder), "--at=equal_train_loss", "--contrasts=norm-all,all-none"]) == 0
    out = capsys.readouterr().out
    assert "norm-all: NOT DECIDED.\nBecause not reached: " in out
    assert "all against none" in out
    judgement = judge(folder, at="equal_train_loss", contrasts=["norm-all"])
    assert (judgement.verdicts, list(judgement.not_decided)) == ((), ["norm-all"])
    json.dumps(as_json(judgement), allow_nan=False)
