"""Checkpoint files: written whole or not at all, read without executing anything."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masks.errors import InputError


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write aside, then rename; what could not be written whole is removed.

    Raises:
        OSError: it cannot be written.
    """
    buffer = io.BytesIO()  # torch's own file writer hides the reason why it could not write
    torch.save(content, buffer)
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_bytes(buffer.getbuffer())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def read_weights(path: Path) -> dict[str, Tensor]:
    """The model weights in a checkpoint: a state dict, or a dict with one under "model" or "state_dict".

    Raises:
        InputError: missing, truncated, not a checkpoint, or one that would execute code to be read.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        inside = path / "checkpoint.pt"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise InputError(f"cannot read checkpoint {path}: {error.strerror or error}{hint}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the pickle of a file that is then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler raises whatever a foreign file leads it into
        # Its messages advise to load without the restriction, which would execute the file.
        kind = type(error).__name__
        raise InputError(
            f"{path} is not a checkpoint of plain tensors, or is truncated ({kind}); a whole model is saved as one by "
            "torch.save(model.state_dict(), FILE)"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path} holds no state dict (a dict of names and tensors, or one under the key model)")
    return content
