"""Ablations: a question, the comparisons that answer it as one configuration file, and their joint table.

A file is a configuration of ``sam-masks compare`` with a comment at its top. Where what is varied decides how runs are
paired or matched (model, label noise, density), it lists ``points``: settings that replace the others, a comparison for
each, with a baseline of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.config import CompareConfig
from experiments.measure import MeasureConfig
from experiments.report.content import Document, Notes, Section, Text, grid
from experiments.report.markdown import markdown
from experiments.store import writing_to
from experiments.table import Table, frame, shown
from masks.errors import InputError, unknown_name

LIST = "list"
_FOLDER = Path(__file__).with_name("ablations")
_CHOICE = ("arms", "masks", "methods", "rho_grid")
"""What may differ between points without being what is varied."""
_COLUMNS = ("kept", "density", "rho", "accuracy %", "gain", "p Holm")


@dataclass(frozen=True)
class AblateOptions:
    """Which ablation: every option of compare below changes it.

    Args:
        ablation: a name, list for all of them with question and cost, or a file of your own (.yaml).
        show: print its file instead, as a start for one of your own.
        smoke: only see whether it runs: as many training images as a batch holds, two seeds, one radius per arm; its
            numbers mean nothing.
    """

    ablation: str
    show: bool = False
    smoke: bool = False


@dataclass(frozen=True)
class Ablation:
    """An ablation as its file has it.

    Attributes:
        name: of the file, without its ending.
        source: the whole file.
        settings: of all its comparisons.
        points: for each comparison the settings that it has otherwise; one without any where nothing is listed.
    """

    name: str
    source: str
    settings: dict[str, Any]
    points: tuple[dict[str, Any], ...]

    @property
    def paragraphs(self) -> list[str]:
        """The comment at the top of the file: a paragraph for each line that begins with Question, Cost or Reading."""
        lines = re.match(r"(?:#.*\n)*", self.source)[0].splitlines()  # type: ignore[index]
        text = " ".join(line.lstrip("# ") for line in lines)
        return [part.strip() for part in re.split(r"(?=\b(?:Question|Cost|Reading): )", text) if part.strip()]

    def comparisons(self, given: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """For each point what is varied there, and all its settings.

        Args:
            given: settings that replace those of the file.

        Raises:
            InputError: one of them is varied here.
        """
        found = []
        for point in self.points:
            varied = {name: value for name, value in point.items() if name not in _CHOICE}
            for name in varied:
                if name in given:
                    raise InputError(f"{name} is what ablation {self.name} varies; leave it out")
            found.append((varied, {**self.settings, **point, **given}))
        return found


def list_ablations() -> list[str]:
    """Names of the ablations that come with the project."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def describe_ablations() -> str:
    """All of them, each with its question and its cost."""
    lines = []
    for name in list_ablations():
        lines += [name, *(f"  {part}" for part in load_ablation(name).paragraphs if not part.startswith("Reading"))]
    return "\n".join(lines)


def load_ablation(name: str) -> Ablation:
    """Read an ablation by its name or from a file.

    Raises:
        InputError: no such name or file, or a file that is none of an ablation.
    """
    own = Path(name).suffix in (".yaml", ".yml")
    if not own and name not in list_ablations():
        raise InputError(unknown_name("ablation", name, [*list_ablations(), LIST, "FILE.yaml"]))
    path = Path(name) if own else _FOLDER / f"{name}.yaml"
    try:
        source = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(source)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    points = settings.pop("points", [{}]) if isinstance(settings, dict) else None
    if not isinstance(points, list) or not points or not all(isinstance(point, dict) for point in points):
        raise InputError(f"{path} must hold settings of a comparison, and under points, if at all, a list of settings")
    ablation = Ablation(path.stem, source, settings, tuple(points))
    labels = [point_name(varied) for varied, _ in ablation.comparisons({})]
    if len(set(labels)) < len(labels):
        raise InputError(f"{path}: two points vary the same: {', '.join(sorted(labels))}")
    return ablation


def point_name(varied: Mapping[str, Any]) -> str:
    """What is varied, as the name of a folder; empty where there is but one comparison."""
    return re.sub(r"[^\w.=,-]", "-", ",".join(f"{name}={value}" for name, value in varied.items()))


def default_folder(name: str, asked: Sequence[tuple[CompareConfig, MeasureConfig]]) -> Path:
    """results/ablate-NAME-ID, with an id of everything that was asked."""
    text = json.dumps([[config.settings(), asdict(measure)] for config, measure in asked], sort_keys=True)
    return Path("results") / f"ablate-{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def shrunk(config: CompareConfig, measure: MeasureConfig) -> tuple[CompareConfig, MeasureConfig]:
    """The comparison in seconds: a step per epoch, two seeds, the first radius of each arm."""
    small = replace(
        config,
        n_train=config.batch_size,
        n_val=50,
        n_test=100,
        seeds=2,
        tuning_seeds=1,
        arms=tuple(replace(arm, rho=arm.rho[:1]) for arm in config.arms),
    )
    return small, replace(measure, images=min(measure.images, config.batch_size), metrics="", repeats=1)


def joint_frame(tables: Sequence[tuple[Mapping[str, Any], Table]]) -> pd.DataFrame:
    """All comparisons as numbers: columns for what is varied, then those of :func:`experiments.table.frame`."""
    return _joined([(varied, frame(table)) for varied, table in tables])


def joint_shown(tables: Sequence[tuple[Mapping[str, Any], Table]]) -> pd.DataFrame:
    """All comparisons as text: what is varied, arm, size, radius, accuracy and gain with their intervals, n."""
    return _joined(
        [
            (varied, shown(table)[list(_COLUMNS)].reset_index().assign(n=[row.n for row in table.rows]))
            for varied, table in tables
        ]
    )


def _joined(parts: Sequence[tuple[Mapping[str, Any], pd.DataFrame]]) -> pd.DataFrame:
    varied = list(dict.fromkeys(name for point, _ in parts for name in point))
    joint = pd.concat([part.assign(**point) for point, part in parts], ignore_index=True)
    return joint[[*varied, *(column for column in joint.columns if column not in varied)]]


SMOKE = "SMOKE: it runs. It was trained too little and on too few images for any number here to mean something."


def joint_notes(tables: Sequence[tuple[Mapping[str, Any], Table]], *, smoke: bool = False) -> list[str]:
    """The notes of all comparisons: those that all of them have as they are, the others with their points."""
    where: dict[str, list[str]] = {}
    for varied, table in tables:
        for note in table.notes:
            where.setdefault(note, []).append(point_name(varied))
    several = [
        "Each point has a baseline and an adjustment of p values of its own: gains are to the arm none of the same "
        "point, and no test compares points."
    ]
    return (
        [SMOKE] * smoke
        + several * (len(tables) > 1)
        + [note if len(points) == len(tables) else f"{'; '.join(points)}: {note}" for note, points in where.items()]
    )


def write_joint(
    ablation: Ablation, tables: Sequence[tuple[Mapping[str, Any], Table]], folder: Path, *, smoke: bool = False
) -> Path:
    """Write ``ablation.csv`` (numbers) and ``ablation.md`` (question, table, notes); returns the latter's path.

    Raises:
        InputError: the folder cannot be written to.
    """
    sections = (
        Section("What is asked", tuple(Text(part) for part in ablation.paragraphs)),
        Section("Results", (grid(joint_shown(tables)), Notes(tuple(joint_notes(tables, smoke=smoke))))),
    )
    page = folder / "ablation.md"
    with writing_to(folder):
        joint_frame(tables).to_csv(folder / "ablation.csv", index=False)
        page.write_text(markdown(Document(f"Ablation {ablation.name}", sections)), encoding="utf-8")
    return page
