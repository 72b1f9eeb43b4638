"""What a command would run and about how long that takes: ``--dry-run``. Nothing is written."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from experiments.build import clock_of, pick_device
from experiments.compare import Plan, as_extended, holds, prepare, trial_of
from experiments.config import BASELINE, Arm, CompareConfig, RunConfig
from experiments.measure import MeasureConfig, observe
from experiments.record import RunRecord
from experiments.resume import Checkpointing, Interrupted
from experiments.runner import Policy
from experiments.significance import too_few_seeds
from experiments.single import MEASURE, check_places, default_folder, identified
from experiments.store import CHECKPOINT, WORK, Store, read_run
from experiments.train import Training
from experiments.worker import Job
from masks import MaskSpec
from masks.errors import InputError
from masks.schedule import INIT

STEPS = 10
"""Steps that are timed after the first one: two periods of the methods that do something else every fifth step."""
SECONDS = 5.0
"""No further step of an arm is timed once its steps have taken as long."""

TIMED = (
    f"by timing up to {STEPS} training steps of each arm and one measurement of barely trained weights, on this "
    "machine; weights count as perturbed in every step, and the start of processes and the report are not counted"
)
KEPT = "from the times of the same arm's runs in the folder"


@dataclass(frozen=True)
class ArmPlan:
    """The runs of an arm.

    Attributes:
        arm: its name.
        mask: its mask.
        method: its method.
        rho: radii to choose from.
        chosen: the radius of the report, if it is known yet.
        tuning_runs: runs that choose the radius.
        tuning_done: how many of them are in the folder.
        report_runs: runs on the report's seeds, those of a sweep included.
        report_done: how many of them are in the folder; with a radius not chosen yet and no sweep, none.
        tuning_seconds: about how long one of them takes; None for an arm without any.
        report_seconds: about how long one of them takes.
    """

    arm: str
    mask: str
    method: str
    rho: tuple[float, ...]
    chosen: float | None
    tuning_runs: int
    tuning_done: int
    report_runs: int
    report_done: int
    tuning_seconds: float | None
    report_seconds: float

    @property
    def seconds_left(self) -> float:
        tuning = (self.tuning_runs - self.tuning_done) * (self.tuning_seconds or 0.0)
        return tuning + (self.report_runs - self.report_done) * self.report_seconds


@dataclass(frozen=True)
class StudyPlan:
    """What a comparison would run.

    Attributes:
        study_id: its name.
        folder: where it would be kept.
        arms: per arm.
        processes: runs at once; None on a cluster, where that is not known.
        estimated: how the seconds were found.
        extend: how many radii more every arm may try.
        warnings: what its results could not show.
    """

    study_id: str
    folder: Path
    arms: tuple[ArmPlan, ...]
    processes: int | None
    estimated: str
    extend: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def seconds_left(self) -> float:
        """Of all runs that are not in the folder, one after the other."""
        return sum(arm.seconds_left for arm in self.arms)

    def as_json(self) -> str:
        """One object with every number."""
        found = asdict(self) | {"folder": str(self.folder), "seconds_left": self.seconds_left}
        return json.dumps(found, indent=1)

    def as_text(self) -> str:
        """A table, and what it comes to."""
        rows = [
            {
                "arm": a.arm,
                "mask": a.mask,
                **({"method": a.method} if len({b.method for b in self.arms}) > 1 else {}),
                "radii": ", ".join(f"{rho:g}" for rho in a.rho) or "-",
                "tuning runs": _done(a.tuning_done, a.tuning_runs),
                "report runs": _done(a.report_done, a.report_runs),
                "a run": duration(a.report_seconds),
            }
            for a in self.arms
        ]
        runs = sum(a.tuning_runs + a.report_runs for a in self.arms)
        done = sum(a.tuning_done + a.report_done for a in self.arms)
        left = duration(self.seconds_left / (self.processes or 1))
        more = f", and up to {self.extend} radii more for every arm" if self.extend else ""
        place = f"with {self.processes} at once" if self.processes else "one after the other, on this machine"
        return "\n".join(
            [
                f"comparison {self.study_id}, in {self.folder}; nothing was run or written",
                "",
                pd.DataFrame(rows).to_string(index=False),
                "",
                f"{runs} runs, {done} of them done; about {left} for the others {place}{more}",
                f"estimated {self.estimated}",
                *self.warnings,
            ]
        )


@dataclass(frozen=True)
class Pace:
    """Seconds of the parts of a run, by the clock of its device: processor seconds on CPUs.

    Attributes:
        step: of a training step.
        build: of building the mask.
        measure: of measuring the weights.
        steps: of the run.
        kept: coordinates of the mask, and of all.
    """

    step: float
    build: float
    measure: float
    steps: int
    kept: tuple[int, int]

    def of_run(self, run: RunConfig, *, measures: bool) -> float:
        """Seconds of a run with as many steps an epoch as the one that was timed."""
        per_epoch = self.steps // run.epochs
        schedule = MaskSpec.parse(run.mask).schedule
        builds = sum(schedule.due(i // per_epoch, i, epoch_start=i % per_epoch == 0) for i in range(self.steps))
        times = sum(run.measures_after(epoch) for epoch in range(run.epochs - 1)) + 1 if measures else 0
        return self.steps * self.step + builds * self.build + times * self.measure


def pace_of(run: RunConfig, device: torch.device, measure: MeasureConfig | None, workers: int = 0) -> Pace:
    """Time the first steps of a run, with its mask from the first one on.

    Args:
        run: the run, resolved.
        device: where.
        measure: what to measure once after these steps; None for nothing.
        workers: processes that decode images.

    Raises:
        InputError: the run cannot be had.
    """
    spec = MaskSpec.parse(run.mask)
    if spec.schedule.kind == "after":
        spec = replace(spec, schedule=INIT)
    clock = clock_of(device)
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as aside:
        training = Training(replace(run, mask=str(spec), sam_epochs=RunConfig.sam_epochs), device, None, None, workers)
        passed: list[float] = []

        def enough() -> bool:
            passed.append(training.seconds["train"] - training.seconds["mask"])
            return len(passed) > STEPS or (len(passed) > 1 and passed[-1] > SECONDS)

        with suppress(Interrupted):
            training.run(Checkpointing(Path(aside) / CHECKPOINT, stop=enough))
        start = clock()
        if measure is not None:
            observe(training.model, training.split, run.seed, measure, device)
        measured = clock() - start
    # The first step allocates; of a run of one step it is all there is.
    step = (passed[-1] - passed[0]) / (len(passed) - 1) if len(passed) > 1 else passed[0]
    first = training.builds[0]
    return Pace(
        step, training.seconds["mask"] / len(training.builds), measured, training.steps, (first.num_kept, first.numel)
    )


def plan_comparison(
    config: CompareConfig,
    folder: Path | None = None,
    *,
    measure: MeasureConfig | None = None,
    sweep: bool = False,
    processes: int | None = None,
    policy: Policy | None = None,
) -> StudyPlan:
    """What :func:`experiments.compare.compare` would run with these arguments.

    Args:
        config, folder, measure, sweep, policy: as there.
        processes: runs at once, for the estimate; None where they execute elsewhere.

    Raises:
        InputError: what was asked for cannot be had.
    """
    measure, policy = measure or MeasureConfig(), policy or Policy()
    device = pick_device(policy.device)
    plan = prepare(config, measure)
    study_id, folder = plan.study_id, folder or plan.default_folder
    known = holds(folder, study_id)  # refuses a folder of something else
    policy.check(config.data, folder / "runs")
    stores = [Store(place / "runs") for place in (folder, *policy.reuse)]
    plan, left = _extended(plan, as_extended(folder, config) if known else config, stores)
    config = plan.config
    timed: dict[str, Pace] = {}
    arms = []

    def seconds(arm: Arm, kept: Sequence[RunRecord], *, tuning: bool) -> float:
        """Of a run of the arm."""
        if kept:
            took = [r.telemetry["train_seconds"] + r.telemetry["measure_seconds"] for r in kept]
            return float(statistics.median(took))
        run = config.run(arm, rho=max(arm.rho, default=0.0), seed=config.first_seed, tuning=tuning)
        if arm.name not in timed:
            # Measuring takes every arm as long, and may take longer than all the rest: once is enough.
            timed[arm.name] = pace_of(run, device, None if timed else measure, policy.workers)
        measured = next(iter(timed.values())).measure
        return replace(timed[arm.name], measure=measured).of_run(run, measures=not tuning)

    tuning = plan.tuning()
    for arm in config.arms:
        grid = {rho: jobs for (name, rho), jobs in tuning.items() if name == arm.name}
        tried = {rho: _kept(stores, jobs) for rho, jobs in grid.items()}
        complete = all(len(tried[rho]) == len(jobs) for rho, jobs in grid.items())
        chosen = plan.chosen([trial_of(arm.name, rho, found) for rho, found in tried.items()] if complete else [])
        rho = chosen.get(arm.name) if arm.rho else 0.0
        radii = (arm.rho if sweep else ()) or (() if rho is None else (rho,))
        report = [found for rho in radii for found in _kept(stores, plan.report(arm, rho))]
        trials = [found for records in tried.values() for found in records]
        arms.append(
            ArmPlan(
                arm=arm.name,
                mask=arm.mask,
                method=arm.method or config.method,
                rho=arm.rho,
                chosen=rho if arm.rho else None,
                tuning_runs=sum(map(len, grid.values())),
                tuning_done=len(trials),
                report_runs=max(1, len(radii)) * config.seeds,
                report_done=len(report),
                tuning_seconds=seconds(arm, trials, tuning=True) if grid else None,
                report_seconds=seconds(arm, report, tuning=False),
            )
        )
    roles = [arm.role for arm in config.arms if arm.name != BASELINE]
    warnings = tuple(too_few_seeds(config.seeds, roles.count("main"), roles.count("control")))
    return StudyPlan(study_id, folder, tuple(arms), processes, TIMED if timed else KEPT, left, warnings)


def _extended(asked: Plan, config: CompareConfig, stores: Sequence[Store]) -> tuple[Plan, int]:
    """The plan with the grids as far as finished runs tell how they are extended, and how many more radii there may be
    for every arm."""
    plan: Plan | None = Plan(config, asked.measure, asked.content)
    while plan is not None:
        now, tuning = plan, plan.tuning()
        kept = {cell: _kept(stores, jobs) for cell, jobs in tuning.items()}
        added = max(len(a.rho) - len(b.rho) for a, b in zip(now.config.arms, asked.config.arms, strict=True))
        left = max(0, asked.config.extend - added)
        if any(len(kept[cell]) < len(jobs) for cell, jobs in tuning.items()):
            return now, left
        plan = now.next(asked.config, [trial_of(arm, rho, found) for (arm, rho), found in kept.items()])
    return now, 0


@dataclass(frozen=True)
class RunPlan:
    """What ``sam-masks train`` would run.

    Attributes:
        run_id: its name.
        folder: where it would be kept.
        state: "done", "unfinished" (it goes on from a checkpoint) or "new".
        steps: of the run.
        kept: coordinates of the first mask.
        numel: trainable coordinates.
        seconds: about how long the whole run takes.
    """

    run_id: str
    folder: Path
    state: str
    steps: int
    kept: int
    numel: int
    seconds: float

    def as_json(self) -> str:
        """One object with every number."""
        return json.dumps(asdict(self) | {"folder": str(self.folder)}, indent=1)

    def as_text(self) -> str:
        return "\n".join(
            [
                f"run {self.run_id} ({self.state}), in {self.folder}; nothing was run or written",
                f"{self.steps} steps; the mask keeps {self.kept:,} of {self.numel:,} coordinates",
                f"about {duration(self.seconds)} from its beginning, estimated {TIMED}",
            ]
        )


def plan_run(
    config: RunConfig, folder: Path | None = None, *, init: Path | None = None, policy: Policy | None = None
) -> RunPlan:
    """What :func:`experiments.single.train_one` would run with these arguments, in one process.

    Raises:
        InputError: what was asked for cannot be had.
    """
    policy = policy or Policy()
    config, run_id = identified(config, init, policy, None)
    folder = folder or default_folder(run_id)
    check_places(folder, run_id, config, policy)
    state = "unfinished" if folder.with_name(folder.name + WORK).exists() else "new"
    with suppress(InputError):
        state = "done" if read_run(folder).run_id == run_id else state
    pace = pace_of(config, pick_device(policy.device), MEASURE, policy.workers)
    return RunPlan(run_id, folder, state, pace.steps, *pace.kept, pace.of_run(config, measures=True))


def duration(seconds: float) -> str:
    """Two figures and a unit: "0.35 s", "12 s", "3.4 min", "2.1 h", "15 d"."""
    units = (("s", 1.0, 90.0), ("min", 60.0, 90 * 60.0), ("h", 3600.0, 48 * 3600.0), ("d", 86400.0, math.inf))
    unit, length = next((unit, length) for unit, length, end in units if seconds < end)
    return f"{float(f'{seconds / length:.2g}'):g} {unit}"


def _done(done: int, runs: int) -> str:
    return f"{runs} ({done} done)" if done else f"{runs}"


def _kept(stores: Sequence[Store], jobs: Iterable[Job]) -> list[RunRecord]:
    """The records of those jobs that are done in one of the stores; a damaged one would be made again."""

    def read(job: Job) -> RunRecord | None:
        for store in stores:
            with suppress(InputError):
                record = store.read(job.name, config=asdict(job.config))
                if record is not None:
                    return record
        return None

    return [record for record in map(read, jobs) if record is not None]
