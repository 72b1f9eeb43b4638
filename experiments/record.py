"""What is known of a finished run, and digests of all that it depends on; :mod:`experiments.store` keeps it."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.config import RunConfig
from experiments.models import user_module
from masks import MaskSpec
from masks.errors import InputError
from sam import MethodSpec


@dataclass(frozen=True)
class RunRecord:
    """One finished run.

    Attributes:
        run_id: hash of the resolved configuration and the digests of what it refers to.
        arm: name of the arm that the run belongs to.
        config: the resolved configuration.
        result: what the configuration and the seed determine, in plain JSON values: a number that is not finite
            is None.
        telemetry: what they do not: processor seconds.
        environment: versions, device, platform.
    """

    run_id: str
    arm: str
    config: dict[str, Any]
    result: dict[str, Any]
    telemetry: dict[str, Any]
    environment: dict[str, Any]

    def __post_init__(self) -> None:
        # What is kept in memory is what a later reader finds in the file.
        object.__setattr__(self, "result", json.loads(json.dumps(finite(self.result))))


def finite(value: Any) -> Any:
    """A plain value with None for every nan and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that it is complete or not there."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def content_digests(
    masks: Iterable[str], config: RunConfig, data_digest: str, *, methods: Iterable[str] = ()
) -> dict[str, str]:
    """Digests of all that a configuration names but does not contain, so that records of old code or files are not
    taken for new ones: the data, mask files, and the source files of plugins and of the user's own model (these
    files only, not what they import).

    Args:
        masks: the masks of all arms.
        config: says what is matched, and the model, which must have been imported.
        data_digest: of the data set.
        methods: the methods of all arms.
    """
    content = {"data": data_digest}
    for spec in map(MaskSpec.parse, (*masks, config.match)):
        content[f"mask {spec.name}"] = spec.info.origin
        if spec.info.origin != "sam-masks":
            content[f"mask {spec.name}"] += f" {_source_digest(inspect.unwrap(spec.info.build).__module__)}"
        if spec.name == "file":
            with suppress(InputError):  # the builder says what is wrong with it
                content[str(spec)] = file_digest(Path(spec.options["path"]))
    for method in methods:
        module = inspect.unwrap(MethodSpec.parse(method).info.make).__module__
        if not module.startswith("sam.methods."):
            content[f"method {method}"] = f"{module} {_source_digest(module)}"
    own = user_module(config.model)
    if own is not None:
        content[f"model {own}"] = _source_digest(own)
    return content


def _source_digest(module: str) -> str:
    path = getattr(sys.modules.get(module), "__file__", None)
    return file_digest(Path(path)) if path else "no file"


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for the record."""
    try:
        own = version("sam-masks")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "sam_masks": own,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "code": code_digest(),
    }


@cache
def code_digest() -> str:
    """Hash of the source of our packages: records of other code are then told apart, whatever the version says."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for package in ("masks", "sam", "analysis", "experiments"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def config_of(record: RunRecord) -> RunConfig:
    """The record's configuration as an object."""
    return RunConfig(**record.config)
