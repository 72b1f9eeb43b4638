"""One run from the command line: train, measure, keep the record and a checkpoint."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from experiments.build import initial_model, load_cached
from experiments.checkpoint import read_weights
from experiments.config import RunConfig
from experiments.distributed import Team, device_for, placed
from experiments.measure import MeasureConfig
from experiments.record import RunRecord, content_digests, file_digest
from experiments.resume import Interrupted
from experiments.runner import Policy, RunFailed
from experiments.store import PARTIAL, RESULT, WORK, check_writable, read_run
from experiments.worker import STOP, Job, Outcome, Task, assist, raise_interrupted, work
from masks.errors import InputError

MEASURE = MeasureConfig(repeats=1)
"""What is measured at the end."""


def default_folder(run_id: str) -> Path:
    """Where a run is kept if nothing else is said."""
    return Path("results") / f"train-{run_id[:8]}"


def train_one(
    config: RunConfig,
    folder: Path | None = None,
    *,
    init: Path | None = None,
    policy: Policy | None = None,
    team: Team | None = None,
) -> tuple[RunRecord, Path, tuple[str, ...]]:
    """Train and measure one model in this process, or go on where it was interrupted; a finished run is read.

    Args:
        config: the run.
        folder: of the run, as in :mod:`experiments.store`, with ``checkpoint.pt`` (model and SAM state) in it; by
            default ``results/train-ID``. While it is not finished, what is kept of it lies in ``FOLDER.work``.
        init: checkpoint to start from instead of the seed's weights.
        policy: device, plugins, checkpoints.
        team: processes that train the model together; this one leads, and the others call :func:`assist_one`.

    Returns:
        The record, its folder, and what the user should be told.

    Raises:
        InputError: what was asked for cannot be had, the folder holds something else, or another process works on it.
        RunFailed: it failed for another reason.
        KeyboardInterrupt: it was interrupted; what is needed to go on is kept.
    """
    policy = policy or Policy()
    config, run_id = identified(config, init, policy, team)
    folder = folder or default_folder(run_id)
    check_places(folder, run_id, config, policy)
    place = folder.resolve()
    made = not place.parent.exists()
    job = Job(run_id, config.mask, config, MEASURE, 1.0, init, True, place.name)
    outcome = work(_task(job, place.parent, policy), team)
    STOP.clear()  # this process may be asked for more
    if outcome.kind == "interrupted":
        raise_interrupted(outcome)
    if outcome.kind == "failed":
        raise RunFailed(outcome.text)
    if outcome.kind != "done":
        if made:
            with suppress(OSError):  # it holds something by now
                place.parent.rmdir()
        raise InputError(outcome.text or f"another process is working on {folder}")
    return read_run(folder), folder, outcome.notes


def assist_one(config: RunConfig, *, init: Path | None = None, policy: Policy | None = None, team: Team) -> None:
    """Train together with rank 0 of a team, which calls :func:`train_one` with the same arguments.

    Raises:
        InputError: what was asked for cannot be had, or rank 0 does another run.
        KeyboardInterrupt: it was interrupted; what is needed to go on is kept.
    """
    policy = policy or Policy()
    config, run_id = identified(config, init, policy, team)
    try:
        assist(_task(Job(run_id, config.mask, config, None, init=init), Path(), policy), team)
    except Interrupted:
        raise_interrupted(Outcome("interrupted", STOP.signal))
    finally:
        STOP.clear()


def identified(config: RunConfig, init: Path | None, policy: Policy, team: Team | None) -> tuple[RunConfig, str]:
    """The resolved configuration, and the name of the run."""
    config = placed(config, team).resolved()
    device_for(policy.device, team)
    data = load_cached(config.data)
    initial_model(config, data)  # imports the user's own model, whose source is part of the content
    content = content_digests([config.mask], config, data.digest, methods=[config.method])
    if init is not None:
        read_weights(init)
        content["init"] = file_digest(init)
    return config, config.digest(content)


def _task(job: Job, store: Path, policy: Policy) -> Task:
    return Task(
        job,
        store,
        policy.device,
        policy.plugins,
        policy.checkpoint_epochs,
        policy.checkpoint_minutes,
        policy.workers,
        policy.tensorboard,
        policy.quiet,
    )


def check_places(folder: Path, run_id: str, config: RunConfig, policy: Policy) -> None:
    """Refuse, before the work is done, a folder that holds something else or that cannot be made or written to.

    Raises:
        InputError: it is one; see also :meth:`experiments.runner.Policy.check`.
    """
    place = folder.resolve()
    try:
        others = place.exists() and any(place.iterdir())
    except OSError as error:
        raise InputError(f"cannot use {folder} for results: {error.strerror or error}") from None
    if others and not _may_be(place, run_id):
        raise InputError(f"{folder} holds something else than run {run_id}; choose another folder with --out")
    if Path.cwd().is_relative_to(place):
        raise InputError(f"cannot use {folder} for results: it is the current folder; name one in it with --out")
    check_writable(folder, "results")
    policy.check(config.data, *(place.with_name(place.name + kind) for kind in ("", WORK, PARTIAL)))


def _may_be(folder: Path, run_id: str) -> bool:
    """Whether a folder holds the record of this run, or a damaged one."""
    try:
        return read_run(folder).run_id == run_id
    except InputError:
        return (folder / RESULT).exists()
