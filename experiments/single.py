"""One run from the command line: train, measure, keep the record and a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from experiments.build import initial_model, load_cached, pick_device
from experiments.checkpoint import read_weights, save_checkpoint
from experiments.config import RunConfig
from experiments.measure import MeasureConfig
from experiments.record import RunRecord, content_digests, file_digest
from experiments.train import train_run
from experiments.worker import observer_of, record_of
from masks.errors import InputError

CHECKPOINT = "checkpoint.pt"


def train_one(
    config: RunConfig, folder: Path | None = None, *, init: Path | None = None, device: str = "auto"
) -> tuple[RunRecord, Path]:
    """Train and measure one model.

    Args:
        config: the run.
        folder: for the record (``run_id.json``), the final mask (``mask.npz``) and the checkpoint
            (``checkpoint.pt``: model and SAM state); by default ``results/train-ID``.
        init: checkpoint to start from instead of the seed's weights.
        device: where it runs.

    Raises:
        InputError: what was asked for cannot be had, or the folder holds something else.
    """
    config, where = config.resolved(), pick_device(device)
    data = load_cached(config.data)
    initial_model(config, data)  # imports the user's own model, whose source is part of the content
    content = content_digests([config.mask], config, data.digest)
    weights = None
    if init is not None:
        weights = read_weights(init)
        content["init"] = file_digest(init)
    run_id = config.digest(content)
    folder = folder or Path("results") / f"train-{run_id[:8]}"
    _check_folder(folder, run_id)
    measure = MeasureConfig(repeats=1)
    trained = train_run(config, where, initial=weights, observer=observer_of(config, measure, where))
    record = record_of(trained, run_id, config.mask, measure, where)
    record.result["init_digest"] = content.get("init")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trained.mask.save(folder / "mask.npz")
        save_checkpoint(folder / CHECKPOINT, {"model": trained.model.state_dict(), "sam": trained.sam.state_dict()})
        record.save(folder)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return record, folder


def _check_folder(folder: Path, run_id: str) -> None:
    """Refuse, before the work is done, a folder that holds something else or that cannot be made or written to."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        others = there == folder and any(there.iterdir()) and not (folder / f"{run_id}.json").exists()
    except OSError as error:
        raise InputError(f"cannot use {folder} for results: {error.strerror or error}") from None
    if others:
        raise InputError(f"{folder} holds something else than run {run_id}; choose another folder with --out")
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot use {folder} for results: {there} is not a folder that can be written to")
