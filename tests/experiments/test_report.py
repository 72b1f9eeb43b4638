"""The page and the CSV files: complete, self-contained, and equal to the records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.cli import build_parser
from experiments.compare import Comparison
from experiments.config import CompareConfig
from experiments.measure import MeasureConfig
from experiments.report import write_report
from experiments.table import Table, build_table, frame, shown
from masks.errors import InputError

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects text, cells and attributes, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.items: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
            self.items.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.items[tag][-1] += data


@pytest.fixture(scope="module")
def table(comparison: Comparison) -> Table:
    return build_table(comparison)


@pytest.fixture(scope="module")
def written(comparison: Comparison, table: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the shared comparison, beside its files; leave them as they are."""
    return write_report(replace(comparison, folder=tmp_path_factory.mktemp("report")), table)


def test_the_page_is_whole_and_has_every_arm_cell_and_note(written: Path, comparison: Comparison, table: Table) -> None:
    page = Page(written.read_text(encoding="utf-8"))
    text = shown(table)
    assert page.items["th"] == ["arm", *text.columns]
    assert page.items["td"] == [cell for name in text.index for cell in (name, *text.loc[name])]
    told = page.items["li"] + page.items["p"]
    for note in table.notes:
        assert note in told
    assert sum(note.partition(":")[0].isupper() for note in table.notes) == sum(
        name == "class" and value == "warning" for _, name, value in page.attributes
    )
    assert len(page.items["svg"]) == len(page.items["figcaption"]) == 5
    environment = comparison.records["none"][0].environment
    assert all(str(value) in "".join(page.items["p"]) for value in environment.values())
    for records in comparison.records.values():
        assert all(record.run_id in page.items["pre"][1] for record in records)


def test_the_page_needs_nothing_from_anywhere(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, *_ in page.attributes} & {"script", "link", "img", "iframe"}
    assert "<script" not in text
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (tag, name, value)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    # What is left of addresses are names of formats.
    rest = re.sub(r'xmlns(:\w+)?="[^"]*"|rdf:resource="[^"]*"|<!DOCTYPE[^>]*>', "", text)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    assert not re.search(r"https?://", rest)


def test_the_same_comparison_gives_the_same_page(written: Path, comparison: Comparison, table: Table) -> None:
    before = written.read_bytes()
    write_report(replace(comparison, folder=written.parent), table)
    assert written.read_bytes() == before
    assert sorted(p.name for p in written.parent.iterdir()) == ["report.html", "runs.csv", "table.csv", "trials.csv"]


def test_names_cannot_break_the_page(comparison: Comparison, table: Table, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&amp;"
    arms = tuple(replace(arm, name=evil) if arm.name == "norm" else arm for arm in comparison.config.arms)
    rows = tuple(replace(row, arm=arm) for row, arm in zip(table.rows, arms, strict=True))
    named = replace(
        comparison,
        folder=tmp_path,
        config=replace(comparison.config, arms=arms),
        records={evil if name == "norm" else name: records for name, records in comparison.records.items()},
        chosen={evil if name == "norm" else name: rho for name, rho in comparison.chosen.items()},
        trials=tuple(replace(t, arm=evil) if t.arm == "norm" else t for t in comparison.trials),
    )
    text = write_report(named, Table(rows, (*table.notes, evil))).read_text(encoding="utf-8")
    assert "<script" not in text
    page = Page(text)
    assert any(cell.startswith(evil) for cell in page.items["td"])
    assert evil in page.items["li"]


def test_the_configuration_on_the_page_is_a_file_that_asks_for_the_same(
    written: Path, comparison: Comparison, tmp_path: Path
) -> None:
    path = tmp_path / "again.yaml"
    path.write_text(Page(written.read_text(encoding="utf-8")).items["pre"][0])
    parser = build_parser()
    values = vars(parser.instantiate(parser.parse_args(["compare", "--config", str(path)])).compare)

    def pick(cls: type) -> Any:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    assert pick(CompareConfig) == comparison.config
    assert pick(CompareConfig).digest({}) == comparison.config.digest({})
    assert pick(MeasureConfig) == comparison.measure


def test_runs_csv_is_the_records(written: Path, comparison: Comparison) -> None:
    runs = pd.read_csv(written.parent / "runs.csv", keep_default_na=False, na_values=[""])
    records = [(name, record) for name, found in comparison.records.items() for record in found]
    assert len(runs) == len(records) == 21
    for line, (arm, record) in zip(runs.to_dict("records"), records, strict=True):
        result, build = record.result, record.result["mask_builds"][-1]
        assert (line["run_id"], line["arm"], line["mask"]) == (record.run_id, arm, record.config["mask"])
        assert (line["seed"], line["epochs"]) == (record.config["seed"], record.config["epochs"])
        assert line["rho"] == record.config["rho"] if arm in comparison.chosen else pd.isna(line["rho"])
        assert (line["kept"], line["mask_digest"]) == (build["num_kept"], build["digest"])
        assert line["train_loss_last_epoch"] == result["history"][-1]["loss"]
        assert {key: line[key] for key in result["fit"]} == result["fit"]
        assert line["ascent_last_epoch"] == result["history"][-1]["ascent"]
        assert (line["val_accuracy"], line["test_accuracy"]) == (result["val_accuracy"], result["test_accuracy"])
        assert {"lambda_max", "one_step_l2@0.1"} < set(result["metrics"]) == set(result["metrics_repeat"])
        for name, metric in result["metrics"].items():
            assert line[name] == metric["value"]
            assert line[f"{name}_repeat"] == result["metrics_repeat"][name]["value"]
        assert line["diverged"] == result["diverged"] or (pd.isna(line["diverged"]) and result["diverged"] is None)
        assert line["train_seconds"] == record.telemetry["train_seconds"]


def test_the_other_files_are_the_table_and_the_trials(written: Path, comparison: Comparison, table: Table) -> None:
    lines = pd.read_csv(written.parent / "table.csv", keep_default_na=False, na_values=[""])
    pd.testing.assert_frame_equal(lines, frame(table))
    trials = pd.read_csv(written.parent / "trials.csv").to_dict("records")
    assert [(t["arm"], t["rho"], t["val_accuracy"], t["diverged"], t["n"]) for t in trials] == [
        (t.arm, t.rho, t.val_accuracy, t.diverged, t.n) for t in comparison.trials
    ]


def test_without_trials_their_file_has_its_header(
    comparison: Comparison, table: Table, tmp_path: Path, no_figures: None
) -> None:
    write_report(replace(comparison, folder=tmp_path, trials=()), table)
    assert (tmp_path / "trials.csv").read_text().split() == ["arm,rho,val_accuracy,diverged,n"]


def test_a_folder_that_cannot_be_written_to(
    comparison: Comparison, table: Table, tmp_path: Path, no_figures: None
) -> None:
    (tmp_path / "table.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot write to .*: Is a directory"):
        write_report(replace(comparison, folder=tmp_path), table)


def test_the_json_of_a_table_is_json(table: Table) -> None:
    lines = json.loads(frame(table).to_json(orient="records", double_precision=15))
    assert [line["arm"] for line in lines] == [row.arm.name for row in table.rows]
    assert lines[0]["gain"] is None


def test_densities_are_named_on_the_page(
    comparison: Comparison,
    table: Table,
    tmp_path: Path,
    tiny_comparison: Callable[..., CompareConfig],
    no_figures: None,
) -> None:
    config = tiny_comparison(density=0.125)
    text = write_report(replace(comparison, folder=tmp_path, config=config), table).read_text()
    assert "budgeted masks keep a density of 0.125." in text
    write_report(replace(comparison, folder=tmp_path), table)
    assert "as many coordinates as norm." in (tmp_path / "report.html").read_text()
