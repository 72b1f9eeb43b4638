"""Compare arms: choose each arm's radius on validation data, then train all arms on the report's seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from experiments.build import budget_of, initial_model, load_cached, split_of
from experiments.config import Arm, CompareConfig
from experiments.cost import step_costs
from experiments.executors.base import Executor
from experiments.executors.local import LocalExecutor
from experiments.measure import MeasureConfig
from experiments.record import RunRecord, content_digests, write_text
from experiments.runner import Policy, Runner
from experiments.train import number_of_steps
from experiments.worker import Job
from masks import MaskContext, MaskSpec, mask_info
from masks.errors import InputError
from sam import MethodSpec

STUDY_FILE = "study.json"
STUDY_SCHEMA = "sam-masks/comparison/1"
RUN_NAMES = "by arm"
"""How runs are named, as part of a comparison's name: one whose runs were named otherwise would be made again beside
them."""


@dataclass(frozen=True)
class Trial:
    """What one radius of one arm reached on the validation images of the tuning seeds.

    Attributes:
        arm: name of the arm.
        rho: the radius.
        val_accuracy: mean over the tuning seeds.
        diverged: how many of the tuning runs diverged.
        n: number of tuning seeds.
    """

    arm: str
    rho: float
    val_accuracy: float
    diverged: int
    n: int


@dataclass(frozen=True)
class Comparison:
    """Everything that a report is made from.

    Attributes:
        config: what was asked, with the grids as they were extended.
        measure: what was measured.
        trials: every radius that was tried.
        chosen: the radius of each arm that has one.
        records: for each arm its runs in the order of the seeds.
        folder: where it is kept.
        swept: how many runs at other radii than the chosen ones were made on the report's seeds, for a verdict.
    """

    config: CompareConfig
    measure: MeasureConfig
    trials: tuple[Trial, ...]
    chosen: dict[str, float]
    records: dict[str, tuple[RunRecord, ...]]
    folder: Path
    swept: int = 0


def open_folder(folder: Path, config: CompareConfig, measure: MeasureConfig, study_id: str) -> None:
    """Make the folder, or go on in it if it holds this very comparison.

    Raises:
        InputError: it holds something else, or cannot be written.
    """
    if not holds(folder, study_id):
        _describe(folder, config, measure, study_id)


def as_extended(folder: Path, config: CompareConfig) -> CompareConfig:
    """The comparison with the radii that its folder has beyond those asked for, from an earlier ``extend``."""
    with _using(folder):
        found = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))
        grids = {arm["name"]: tuple(arm["rho"]) for arm in found["config"]["arms"]}
    arms = [replace(arm, rho=arm.rho + grids[arm.name][len(arm.rho) :]) for arm in config.arms]
    return replace(config, arms=tuple(arms))


def _describe(folder: Path, config: CompareConfig, measure: MeasureConfig, study_id: str) -> None:
    """Write what the folder is of: the comparison as asked for, with the grids as they are now."""
    content = {
        "schema": STUDY_SCHEMA,
        "study_id": study_id,
        "config": config.settings(),
        "measure": asdict(measure),
    }
    with _using(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / STUDY_FILE, json.dumps(content, indent=1) + "\n")


def holds(folder: Path, study_id: str) -> bool:
    """Whether a folder holds this comparison; False where it is not there, or empty.

    Raises:
        InputError: it holds something else, or cannot be read.
    """
    marker = folder / STUDY_FILE
    with _using(folder):
        if marker.exists():
            found = json.loads(marker.read_text(encoding="utf-8"))
            if found.get("study_id") != study_id:
                raise InputError(
                    f"{folder} holds the results of another comparison ({found.get('study_id')}, this is {study_id}); "
                    f"choose another folder with --out; --reuse {folder} takes over the runs that both have"
                )
            return True
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no comparison; choose another folder with --out")
    return False


@contextmanager
def _using(folder: Path) -> Iterator[None]:
    """One line for what is wrong with a folder for results."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"cannot use {folder} for results: {error}") from None


def _withdraw(folder: Path) -> None:
    """Leave nothing behind of a comparison of whose runs nothing was kept: the corrected one may take the folder."""
    runs = folder / "runs"
    if not any(runs.glob("*")):
        (folder / STUDY_FILE).unlink(missing_ok=True)
        for empty in (runs, folder):
            with suppress(OSError):
                empty.rmdir()


def check_arms(config: CompareConfig) -> None:
    """Draw the data, and build what can be built of every arm's mask on the initial model, before any run starts.

    Raises:
        InputError: a mask, model, data set, size or schedule that cannot be had.
    """
    data = load_cached(config.data)
    tuned = any(len(arm.rho) > 1 for arm in config.arms)
    for tuning in (True, False) if tuned else (False,):
        split = split_of(config.run(config.arms[0], rho=0.0, seed=config.first_seed, tuning=tuning), data)
    for arm in config.arms:
        run = config.run(arm, rho=0.0, seed=config.first_seed, tuning=False)
        model = initial_model(run, data)
        spec = MaskSpec.parse(run.mask)
        try:
            number_of_steps(run, len(split.train_y))
            budget = budget_of(run, spec, model)
            if not spec.info.needs_data:
                spec.build(MaskContext(model), budget)
        except InputError as error:
            raise InputError(f"arm {arm.name}: {error}") from None


def choose(trials: Sequence[Trial]) -> dict[str, float]:
    """The radius of the best mean validation accuracy of each arm; among equals the smallest.

    A radius of which a run diverged is chosen only if all of the arm's did.
    """
    best: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda t: t.rho):
        old = best.get(trial.arm)
        if old is None or (-trial.diverged, trial.val_accuracy) > (-old.diverged, old.val_accuracy):
            best[trial.arm] = trial
    return {arm: trial.rho for arm, trial in best.items()}


def extended(config: CompareConfig, trials: Sequence[Trial]) -> CompareConfig | None:
    """The comparison with one radius more in every grid, or None if every arm's best one lies inside its grid.

    A best one at an end is followed by one beyond it, in the ratio of the last two; one inside by the geometric mean of
    it and its better neighbour, so that all arms have as many trials.
    """
    best, found = choose(trials), {(trial.arm, trial.rho): trial.val_accuracy for trial in trials}
    arms, at_edge = [], False
    for arm in config.arms:
        grid = sorted(arm.rho)
        if len(grid) > 1:
            i = grid.index(best[arm.name])
            at_edge |= grid[i] > 0 and i in (0, len(grid) - 1)  # below 0 there is nothing to try
            if i == 0 and grid[0]:
                new = grid[0] ** 2 / grid[1]
            elif i == len(grid) - 1:
                new = grid[-1] * (grid[-1] / grid[-2] if grid[-2] else 2)
            else:
                below = i > 0 and found[arm.name, grid[i - 1]] > found[arm.name, grid[i + 1]]
                low, high = (grid[i - 1], grid[i]) if below else (grid[i], grid[i + 1])
                new = math.sqrt(low * high) or high / 2
            arm = replace(arm, rho=(*arm.rho, float(f"{new:.6g}")))
        arms.append(arm)
    return replace(config, arms=tuple(arms)) if at_edge else None


class Plan:
    """Jobs of a comparison.

    Args:
        config: what to compare.
        measure: what to measure.
        content: of each arm, the digests of what it names but does not contain; a run depends on those of its own arm
            only, so that it is the same run in every comparison that has the arm.
    """

    def __init__(self, config: CompareConfig, measure: MeasureConfig, content: dict[str, dict[str, str]]) -> None:
        self.config, self.measure, self.content = config, measure, content

    @property
    def study_id(self) -> str:
        """Name of the comparison: hash of all that its runs are named after."""
        together = {name: digest for content in self.content.values() for name, digest in content.items()}
        own = {"measure": json.dumps(asdict(self.measure)), "run names": RUN_NAMES}
        return self.config.digest(together | own)

    @property
    def default_folder(self) -> Path:
        return Path("results") / f"compare-{self.study_id[:8]}"

    def chosen(self, trials: Sequence[Trial]) -> dict[str, float]:
        """The radius of each arm that has one; of an arm with several, once they were tried."""
        return {arm.name: arm.rho[0] for arm in self.config.arms if len(arm.rho) == 1} | choose(trials)

    def next(self, asked: CompareConfig, trials: Sequence[Trial]) -> Plan | None:
        """The plan with a radius more for every arm; None where no arm needs it, or as many as asked for were added."""
        added = max(len(arm.rho) - len(old.rho) for arm, old in zip(self.config.arms, asked.arms, strict=True))
        more = extended(self.config, trials) if added < asked.extend else None
        return None if more is None else Plan(more, self.measure, self.content)

    def job(self, arm: Arm, rho: float, seed: int, *, tuning: bool) -> Job:
        run = self.config.run(arm, rho=rho, seed=seed, tuning=tuning)
        measure = None if tuning else self.measure
        content = self.content[arm.name] | ({} if measure is None else {"measure": json.dumps(asdict(measure))})
        cost = run.epochs * (1.0 if not arm.rho else 2.0 + mask_info(MaskSpec.parse(arm.mask).name).needs_data)
        return Job(run.digest(content), arm.name, run, measure, cost)

    def tuning(self) -> dict[tuple[str, float], list[Job]]:
        return {
            (arm.name, rho): [self.job(arm, rho, seed, tuning=True) for seed in self.config.seeds_for_tuning()]
            for arm in self.config.arms
            if len(arm.rho) > 1
            for rho in arm.rho
        }

    def report(self, arm: Arm, rho: float) -> list[Job]:
        return [self.job(arm, rho, seed, tuning=False) for seed in self.config.report_seeds()]

    def sweep(self) -> list[Job]:
        return [job for arm in self.config.arms for rho in arm.rho for job in self.report(arm, rho)]


def prepare(config: CompareConfig, measure: MeasureConfig) -> Plan:
    """Check what can be checked before any run, and name all that the runs depend on; nothing is written.

    Raises:
        InputError: see :func:`check_arms`.
    """
    data = load_cached(config.data)
    check_arms(config)  # imports the user's own model, whose source is part of the content
    content = {}
    for arm in config.arms:
        run = config.run(arm, rho=0.0, seed=config.first_seed, tuning=False)
        content[arm.name] = content_digests([arm.mask], run, data.digest, methods=[run.method])
    return Plan(config, measure, content)


def compare(
    config: CompareConfig,
    folder: Path | None = None,
    *,
    measure: MeasureConfig | None = None,
    sweep: bool = False,
    executor: Executor | None = None,
    policy: Policy | None = None,
) -> Comparison:
    """Run a comparison, or finish one that was interrupted: finished runs are read, not made again.

    Args:
        config: what to compare.
        folder: where to keep it; by default ``results/compare-ID`` with the comparison's own id.
        measure: what to measure at the end of each run.
        sweep: train every arm at every radius of its grid on the report's seeds, too, and measure it: what a verdict
            at equal sharpness rests on. The radius that is reported is chosen as without.
        executor: where runs execute; by default one after the other in a process of this machine.
        policy: device, plugins, retries, checkpoints.

    Raises:
        InputError: what was asked for cannot be had; nothing was run, or what was run is kept.
        RunFailed: a run failed for another reason; the others are finished first, and kept.
    """
    measure, policy = measure or MeasureConfig(), policy or Policy()
    executor = executor or LocalExecutor(1)
    plan = prepare(config, measure)
    folder = folder or plan.default_folder
    policy.check(config.data, folder / "runs")
    study_id = plan.study_id  # of the grids as asked for
    open_folder(folder, config, measure, study_id)
    try:
        with Runner(folder / "runs", executor, policy) as runner:
            plan = Plan(as_extended(folder, config), measure, plan.content)
            trials = _tried(plan, runner)
            while (more := plan.next(config, trials)) is not None:
                _describe(folder, more.config, measure, study_id)
                plan = more
                trials = _tried(plan, runner)
            chosen = plan.chosen(trials)
            report = {arm.name: plan.report(arm, chosen.get(arm.name, 0.0)) for arm in plan.config.arms}
            done = runner.run([job for jobs in report.values() for job in jobs], "comparing")
            rest = [job for job in plan.sweep() if job.run_id not in done] if sweep else []
            runner.run(rest, "sweeping rho")
    except InputError:
        _withdraw(folder)
        raise
    records = {arm: tuple(done[job.run_id] for job in jobs) for arm, jobs in report.items()}
    return Comparison(plan.config, measure, trials, chosen, records, folder, len(rest))


def _tried(plan: Plan, runner: Runner) -> tuple[Trial, ...]:
    """What every radius of the grids reached."""
    tuning = plan.tuning()
    done = runner.run([job for jobs in tuning.values() for job in jobs], "choosing rho")
    return tuple(trial_of(arm, rho, [done[job.run_id] for job in jobs]) for (arm, rho), jobs in tuning.items())


def trial_of(arm: str, rho: float, records: Sequence[RunRecord]) -> Trial:
    """What the tuning runs of one radius reached."""
    accuracies = [record.result["val_accuracy"] for record in records]
    diverged = sum(record.result["diverged"] is not None for record in records)
    mean = round(sum(accuracies) / len(accuracies), 12)  # radii with as many images right are equals
    return Trial(arm, rho, mean, diverged, len(records))


def predicted_costs(comparison: Comparison) -> dict[str, float | None]:
    """Cost of a step of every arm relative to the base optimizer, from counted operations of the final masks, mean
    over seeds and over the steps in and outside the arm's window; None where it cannot be counted."""
    config = comparison.config
    first = config.run(config.arms[0], rho=0.0, seed=config.first_seed, tuning=False)
    data = load_cached(config.data)
    final = {
        arm: [frozenset(record.result["mask_builds"][-1]["kept_per_tensor"]) for record in records]
        for arm, records in comparison.records.items()
    }
    # Masks that touch the same tensors cost the same.
    sets = {str(i): names for i, names in enumerate(set().union(*final.values()))}
    costs = step_costs(initial_model(first, data), data.first(2), sets, every_gradient=config.norm_scope == "full")
    by_set = {names: costs[key] for key, names in sets.items()}
    out: dict[str, float | None] = {}
    for arm in config.arms:
        run = config.run(arm, rho=0.0, seed=config.first_seed, tuning=False)
        spec = MethodSpec.parse(run.method)
        unrestricted = spec.build().every_gradient or run.norm_scope == "full" or spec.info.passes == "1"
        if arm.rho and unrestricted:
            out[arm.name] = spec.info.num_passes(**spec.options)
        elif spec.info.passes == "2":
            out[arm.name] = _mean_or_none([by_set[names] for names in final[arm.name]])
        else:  # how its passes divide into restricted and full ones is not known here
            out[arm.name] = None
        if "trainable" in arm.settings:  # the counts above are of the comparison's trainable parameters
            out[arm.name] = None
        elif (cost := out[arm.name]) is not None:
            window = run.window()
            out[arm.name] = 1 + (cost - 1) * sum(epoch in window for epoch in range(run.epochs)) / run.epochs
    return out


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
