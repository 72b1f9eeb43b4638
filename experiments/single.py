"""One run from the command line: train, measure, keep the record and a checkpoint."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from experiments.build import initial_model, load_cached, pick_device
from experiments.checkpoint import read_weights
from experiments.config import RunConfig
from experiments.measure import MeasureConfig
from experiments.record import RunRecord, content_digests, file_digest
from experiments.runner import Policy, RunFailed
from experiments.store import RESULT, read_run
from experiments.worker import STOP, Job, Task, raise_interrupted, work
from masks.errors import InputError


def train_one(
    config: RunConfig, folder: Path | None = None, *, init: Path | None = None, policy: Policy | None = None
) -> tuple[RunRecord, Path, tuple[str, ...]]:
    """Train and measure one model in this process, or go on where it was interrupted; a finished run is read.

    Args:
        config: the run.
        folder: of the run, as in :mod:`experiments.store`, with ``checkpoint.pt`` (model and SAM state) in it; by
            default ``results/train-ID``. While it is not finished, what is kept of it lies in ``FOLDER.work``.
        init: checkpoint to start from instead of the seed's weights.
        policy: device, plugins, checkpoints.

    Returns:
        The record, its folder, and what the user should be told.

    Raises:
        InputError: what was asked for cannot be had, the folder holds something else, or another process works on it.
        RunFailed: it failed for another reason.
        KeyboardInterrupt: it was interrupted; what is needed to go on is kept.
    """
    policy = policy or Policy()
    config = config.resolved()
    pick_device(policy.device)
    data = load_cached(config.data)
    initial_model(config, data)  # imports the user's own model, whose source is part of the content
    content = content_digests([config.mask], config, data.digest, methods=[config.method])
    if init is not None:
        read_weights(init)
        content["init"] = file_digest(init)
    run_id = config.digest(content)
    folder = folder or Path("results") / f"train-{run_id[:8]}"
    _check_folder(folder, run_id)
    place = folder.resolve()
    made = not place.parent.exists()
    outcome = work(
        Task(
            Job(run_id, config.mask, config, MeasureConfig(repeats=1), 1.0, init, True, place.name),
            place.parent,
            policy.device,
            policy.plugins,
            policy.checkpoint_epochs,
            policy.checkpoint_minutes,
        )
    )
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


def _check_folder(folder: Path, run_id: str) -> None:
    """Refuse, before the work is done, a folder that holds something else or that cannot be made or written to."""
    place = folder.resolve()
    there = next(path for path in (place, *place.parents) if path.exists())
    try:
        others = there == place and any(there.iterdir())
    except OSError as error:
        raise InputError(f"cannot use {folder} for results: {error.strerror or error}") from None
    if others and not _may_be(place, run_id):
        raise InputError(f"{folder} holds something else than run {run_id}; choose another folder with --out")
    if Path.cwd().is_relative_to(place):
        raise InputError(f"cannot use {folder} for results: it is the current folder; name one in it with --out")
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot use {folder} for results: {there} is not a folder that can be written to")


def _may_be(folder: Path, run_id: str) -> bool:
    """Whether a folder holds the record of this run, or a damaged one."""
    try:
        return read_run(folder).run_id == run_id
    except InputError:
        return (folder / RESULT).exists()
