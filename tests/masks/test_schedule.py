"""When a mask is built, over a whole training."""

from __future__ import annotations

import pytest

from masks import MaskError, Schedule
from masks.schedule import EVERY_EPOCH, INIT

EPOCHS, STEPS = 4, 3


def due_steps(schedule: Schedule) -> list[int]:
    """The steps, counted from 0 over four epochs of three steps, before which the mask is built."""
    return [
        epoch * STEPS + i
        for epoch in range(EPOCHS)
        for i in range(STEPS)
        if schedule.due(epoch, epoch * STEPS + i, epoch_start=i == 0)
    ]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("init", [0]),
        ("after=0", [0]),
        ("after=2", [6]),
        ("after=9", []),
        ("after=5steps", [5]),
        ("after=0steps", [0]),
        ("every=1", [0, 3, 6, 9]),
        ("every=3", [0, 9]),
        ("every=1steps", list(range(12))),
        ("every=5steps", [0, 5, 10]),
    ],
)
def test_due(text: str, steps: list[int]) -> None:
    schedule = Schedule.parse(text)
    assert due_steps(schedule) == steps
    assert str(schedule) == text
    assert Schedule.parse(str(schedule)) == schedule


def test_constants_and_other_spellings() -> None:
    assert Schedule() == INIT == Schedule.parse("init")
    assert Schedule.parse("every=1") == Schedule.parse("every=1epoch") == Schedule.parse("every=1epochs") == EVERY_EPOCH
    assert Schedule.parse("after=1step") == Schedule("after", 1, "step")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Init",
        "after",
        "after=",
        "every=0",
        "every=0steps",
        "every=-1",
        "after=1.5",
        "every=2days",
        "init=1",
        " init",
    ],
)
def test_unreadable_schedules(text: str) -> None:
    with pytest.raises(MaskError):
        Schedule.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [("every",), ("every", 0), ("after", -1), ("init", 1), ("init", 0, "step"), ("weekly", 1), ("every", 1, "day")],
)
def test_impossible_schedules(arguments: tuple[str, ...]) -> None:
    with pytest.raises(MaskError, match="schedule"):
        Schedule(*arguments)  # type: ignore[arg-type]
