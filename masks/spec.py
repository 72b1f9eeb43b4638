"""A mask as it is written down: name, options and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from masks.budget import Budget
from masks.context import MaskContext
from masks.mask import Mask
from masks.options import options_text, parse_options
from masks.registry import MaskInfo, build_mask, mask_info
from masks.schedule import Schedule


@dataclass(frozen=True)
class MaskSpec:
    """Which mask, with which options, built when.

    Attributes:
        name: registry name.
        options: all options of the builder, resolved.
        schedule: when it is built.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        info = mask_info(self.name)
        object.__setattr__(self, "options", info.resolve_options(self.options))
        if self.schedule is None:
            object.__setattr__(self, "schedule", info.schedule)

    @classmethod
    def parse(cls, text: str) -> MaskSpec:
        """Read ``name[:option=value...][@schedule]``, such as ``fisher:exclude_norm=true:labels=model@every=2``.

        Lists of values are joined by "+".

        Raises:
            MaskError: an unknown name, option or schedule, an option given twice, or a part without "=".
        """
        text, at, schedule = text.strip().partition("@")
        name, options = parse_options(text, "mask")
        return cls(name, options, Schedule.parse(schedule) if at else None)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The text that :meth:`parse` reads; options at their default are left out."""
        at = "" if self.schedule == self.info.schedule else f"@{self.schedule}"
        return options_text(self.name, self.info.options, self.options) + at

    @property
    def info(self) -> MaskInfo:
        return mask_info(self.name)

    def build(self, context: MaskContext, budget: Budget | None) -> Mask:
        """Build the mask now; a budget is passed on only to a budgeted builder. Raises as ``build_mask``."""
        return build_mask(self.name, context, budget if self.info.kind == "budgeted" else None, self.options)
