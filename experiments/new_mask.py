"""A plugin project for a mask of one's own: a copy of ``examples/mask_plugin`` under another name."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from pathlib import Path

from experiments.store import writing_to
from masks import list_masks
from masks.errors import InputError

EXAMPLE = "relative_magnitude"
SOURCE = Path(__file__).with_name("examples") / "mask_plugin"
FILES = ("pyproject.toml", "README.md", f"{EXAMPLE}_mask.py", f"tests/test_{EXAMPLE}_mask.py")


@dataclass(frozen=True)
class NewMaskOptions:
    """What to write.

    Args:
        mask_name: name of the mask, such as my_idea.
        out: folder of the project, which must not be there yet (default: the name with dashes and -mask, such as
            my-idea-mask).
    """

    mask_name: str
    out: str | None = None


def new_mask(options: NewMaskOptions) -> Path:
    """Write a complete plugin project: pyproject with its entry point, module, tests, README.

    Returns:
        Its folder.

    Raises:
        InputError: the name is no name of a mask or is taken, or the folder is there or cannot be written to.
    """
    name = options.mask_name
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise InputError(
            f"a mask's name is in snake_case (a-z, 0-9, single underscores) and no keyword of Python, got {name!r}"
        )
    for info in list_masks():
        if info.name == name:
            raise InputError(f"there is a mask {name} already, from {info.origin}; choose another name")
    folder = Path(options.out or f"{_dashed(name)}-mask")
    if folder.exists():
        raise InputError(f"{folder} is there already; name another folder with --out, or another mask")
    with writing_to(folder):
        for file in FILES:
            target = folder / file.replace(EXAMPLE, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = (SOURCE / file).read_text(encoding="utf-8")
            text = text.replace(EXAMPLE, name).replace(_dashed(EXAMPLE), _dashed(name))
            target.write_text(text, encoding="utf-8")
    return folder


def _dashed(name: str) -> str:
    return name.replace("_", "-")
