"""Runs taken over from other comparisons."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import worker
from experiments.compare import Comparison, compare, prepare
from experiments.config import Arm, CompareConfig
from experiments.measure import MeasureConfig
from experiments.plan import plan_comparison
from experiments.report.folder import load_comparison
from experiments.runner import Policy
from experiments.store import RESULT, Store, read_run
from experiments.study import load_study
from experiments.table import build_table
from masks import Mask
from masks.errors import InputError
from tests.experiments.command_line import refused
from tests.experiments.conftest import ARMS, QUIET

Make = Callable[..., CompareConfig]


@pytest.fixture
def bigger(comparison: Comparison) -> CompareConfig:
    """Of its arms some, one of them renamed; one arm more, a seed more."""
    none, random = ARMS[0], replace(ARMS[5], name="random mask")
    return replace(comparison.config, arms=(none, random, Arm("magnitude", "magnitude", (0.5, 2.0))), seeds=4)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, serial: None) -> list[str]:
    """The arms of the runs that are made."""
    arms: list[str] = []
    execute = worker.execute

    def watched(job: worker.Job, *rest: object, **options: object) -> object:
        arms.append(job.arm)
        return execute(job, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "execute", watched)
    return arms


def results(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (folder / "runs").glob(f"*/{RESULT}")}


def test_only_what_is_new_is_made_and_nothing_differs(
    comparison: Comparison, bigger: CompareConfig, made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(comparison.folder)
    reuse = replace(QUIET, reuse=(tmp_path / "none", comparison.folder))
    with pytest.raises(InputError, match=r"none is not the folder of a comparison"):
        compare(bigger, tmp_path / "a", measure=comparison.measure, policy=reuse)
    assert not (tmp_path / "a").exists()
    reuse = replace(QUIET, reuse=(comparison.folder,))
    planned = plan_comparison(bigger, tmp_path / "a", measure=comparison.measure, policy=reuse)
    found = compare(bigger, tmp_path / "a", measure=comparison.measure, policy=reuse)
    assert sorted(made) == ["magnitude"] * (4 + 4) + ["none", "random mask"]  # the new arm, and the fourth seed
    told = capsys.readouterr().err
    assert f"choosing rho: 4 of 8 runs taken over from {comparison.folder}" in told
    assert f"comparing: 6 of 12 runs taken over from {comparison.folder}" in told
    assert {r.arm for r in found.records["random mask"]} == {"random mask"}
    assert (
        "6 of 12 runs were taken over from other comparisons, with the times they took there."
        in build_table(found).notes
    )
    assert [(arm.tuning_done, arm.report_done) for arm in planned.arms] == [(0, 3), (4, 3), (0, 0)]
    made.clear()
    afresh = compare(bigger, tmp_path / "b", measure=comparison.measure, policy=QUIET)
    assert len(made) == 8 + 12
    assert results(afresh.folder) == results(found.folder)
    assert afresh.chosen == found.chosen
    for record in found.records["random mask"]:
        assert Mask.load(found.folder / "runs" / record.run_id / "mask.npz").num_kept
    assert results(comparison.folder) == before


def test_a_damaged_record_is_made_again(
    comparison: Comparison, made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(comparison.folder, tmp_path / "a")
    run_id = comparison.records["norm"][1].run_id
    (tmp_path / "a" / "runs" / run_id / RESULT).write_text("{")
    policy = replace(QUIET, reuse=(tmp_path / "a",))
    compare(comparison.config, tmp_path / "b", measure=comparison.measure, policy=policy)
    assert made == ["norm"]
    damaged = tmp_path / "a" / "runs" / run_id
    assert f"warning: not reused: {damaged} is not the record of a run" in capsys.readouterr().err
    assert results(tmp_path / "b") == results(comparison.folder)


def test_what_stands_in_a_runs_place_and_is_none_is_set_aside(comparison: Comparison, tmp_path: Path) -> None:
    record = comparison.records["norm"][0]
    store = Store(tmp_path / "runs")
    store.prepare()
    (tmp_path / "runs" / record.run_id).mkdir()
    (tmp_path / "runs" / record.run_id / "notes.txt").write_text("mine")
    assert store.take_over(record.run_id, Store(comparison.folder / "runs"), "norm", record.config)
    assert (tmp_path / "runs" / f"{record.run_id}.damaged-1" / "notes.txt").read_text() == "mine"
    assert not list((tmp_path / "runs").glob("*.partial"))


def test_the_same_run_under_two_names_is_refused(comparison: Comparison, tmp_path: Path) -> None:
    """As a version that named runs otherwise would leave it: every number would count it twice."""
    shutil.copytree(comparison.folder, tmp_path / "a")
    runs, run_id = tmp_path / "a" / "runs", comparison.records["norm"][0].run_id
    shutil.copytree(runs / run_id, runs / "0123456789abcdef")
    for read in (load_study, load_comparison):
        with pytest.raises(InputError, match=f"the same run of arm norm twice, as 0123456789abcdef and {run_id}"):
            read(tmp_path / "a")


def test_other_settings_or_measurements_are_other_runs(
    comparison: Comparison, measured: MeasureConfig, made: list[str], tmp_path: Path
) -> None:
    config = replace(comparison.config, arms=(Arm("none", "none"), Arm("norm", "norm", (0.5,))), seeds=1)
    policy = replace(QUIET, reuse=(comparison.folder,))
    for name, changed, measure, new in (
        ("a", replace(config, lr=0.2), measured, ["none", "norm"]),
        ("b", config, replace(measured, images=65), ["none", "norm"]),
        ("c", replace(config, arms=(Arm("none", "none"), Arm("norm", "norm", (0.75,)))), measured, ["norm"]),
    ):
        made.clear()
        compare(changed, tmp_path / name, measure=measure, policy=policy)
        assert sorted(made) == new, name


def test_a_run_does_not_depend_on_what_other_arms_name(
    comparison: Comparison, measured: MeasureConfig, tmp_path: Path
) -> None:
    """A file of a mask that is changed leaves the runs of the other arms as they were; the study is another one."""
    mask = comparison.folder / "runs" / comparison.records["norm"][0].run_id / "mask.npz"
    other = comparison.folder / "runs" / comparison.records["random"][0].run_id / "mask.npz"
    none, norm = Arm("none", "none"), Arm("norm", "norm", (0.5,))
    own = Arm("own", f"file:path={tmp_path / 'm.npz'}", (0.5,))
    ids, studies = [], set()
    for source in (mask, other):
        shutil.copy(source, tmp_path / "m.npz")
        plan = prepare(replace(comparison.config, arms=(none, norm, own)), measured)
        ids.append([plan.report(arm, 0.5)[0].run_id for arm in (norm, own)])
        studies.add(plan.study_id)
    alone = prepare(replace(comparison.config, arms=(none, norm)), measured).report(norm, 0.5)[0].run_id
    assert ids[0][0] == ids[1][0] == alone
    assert ids[0][1] != ids[1][1]
    assert len(studies) == 2


def test_masks_of_natural_size_are_the_same_run_at_every_density(
    comparison: Comparison, measured: MeasureConfig
) -> None:
    arms = (Arm("none", "none"), Arm("norm", "norm", (0.5,)), Arm("random", "random", (0.5,)))
    ids = [
        [prepare(replace(comparison.config, arms=arms, **changed), measured).report(arm, 0.5)[0].run_id for arm in arms]
        for changed in ({}, {"density": 0.5}, {"match": "all"})
    ]
    assert [len(set(of_arm)) for of_arm in zip(*ids, strict=True)] == [1, 1, 3]


def test_a_run_that_another_process_makes_is_left_to_it(comparison: Comparison, tmp_path: Path) -> None:
    record = comparison.records["norm"][0]
    source, store = Store(comparison.folder / "runs"), Store(tmp_path / "runs")
    store.prepare()
    with store.working_on(record.run_id):
        assert not store.take_over(record.run_id, source, "norm", record.config)
        assert not store.is_complete(record.run_id)
    assert store.take_over(record.run_id, source, "other", record.config)
    taken = read_run(tmp_path / "runs" / record.run_id)
    telemetry = record.telemetry | {"taken_from": str(comparison.folder)}
    assert taken == replace(record, arm="other", telemetry=telemetry)
    assert not store.take_over("0" * 16, source, "norm", record.config)
    with pytest.raises(InputError, match="is the record of another run"):
        store.take_over(record.run_id, source, "norm", record.config | {"lr": 9.0})


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "--model=resnet_small", "--masks=norm", f"--reuse={tmp_path}", f"--out={tmp_path / 'a'}"]
    assert "is not the folder of a comparison (it has no folder runs)" in refused(arguments, capsys)
    assert Policy().reuse == ()
