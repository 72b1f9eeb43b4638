"""The page: complete, self-contained, and equal to the table and the records."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import build_parser
from experiments.compare import Comparison
from experiments.config import CompareConfig
from experiments.measure import MeasureConfig
from experiments.report.content import Absent, Details, Document, Grid, Notes, Section, Text
from experiments.report.findings import Findings
from experiments.report.html import html
from experiments.report.sections import document
from experiments.table import Table, shown
from tests.experiments.report.pages import Page


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text(encoding="utf-8"))


def test_the_page_has_every_arm_cell_note_and_run(page: Page, comparison: Comparison, table: Table) -> None:
    text = shown(table)
    assert page.tables[0][0] == ["arm", *text.columns]
    assert page.tables[0][1:] == [[name, *text.loc[name]] for name in text.index]
    told = page.items["li"] + page.items["p"]
    for note in table.notes:
        assert note in told
    assert sum(note.partition(":")[0].isupper() for note in table.notes) == sum(
        name == "class" and value == "warning" for _, name, value in page.attributes
    )
    environment = comparison.records["none"][0].environment
    assert all(str(value) in "".join(page.items["p"]) for value in environment.values())
    for records in comparison.records.values():
        for record in records:
            assert sum(record.run_id in text for text in page.items["pre"]) == 1


def test_a_table_in_a_notebook_is_the_same(table: Table) -> None:
    page = Page(replace(table, notes=("a <b> & c",))._repr_html_())
    text = shown(table)
    assert [row[1:] for row in page.tables[0][2:]] == [list(text.loc[name]) for name in text.index]
    assert page.items["li"] == ["a <b> & c"]


def test_the_runs_behind_an_arm_are_its_own(page: Page, findings: Findings) -> None:
    blocks = {
        title.partition(":")[0]: text for title, text in zip(page.items["summary"], page.items["pre"], strict=True)
    }
    for record in findings.runs:
        kind = "tuning, rho" if record.config["tuning"] else "report"
        lines = [line for line in blocks[record.arm].splitlines() if record.run_id in line]
        assert len(lines) == 1
        assert lines[0].startswith(kind)
        assert record.config["tuning"] is False or f"rho {record.config['rho']:g}:" in lines[0]
    assert len(findings.runs) == 21 + 5 * 2 * 2


def test_every_figure_has_a_title_a_description_and_a_caption_that_says_n(page: Page, content: Document) -> None:
    pictures = content.pictures
    assert len(page.items["svg"]) == len(page.items["figcaption"]) == len(pictures) >= 14
    assert page.items["figcaption"] == [picture.caption for picture in pictures]
    assert len(page.items["desc"]) == len(pictures)
    assert {picture.title for picture in pictures} <= set(page.items["title"])
    for picture in pictures:
        assert re.search(r"n = \d", picture.caption), picture.name
        assert re.search(r"band|bar|interval", picture.caption), picture.name
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == [picture.title for picture in pictures]


def test_identifiers_are_unique_and_references_lead_somewhere(page: Page, written: Path) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids) > 100
    text = (written / "report.html").read_text(encoding="utf-8")
    wanted = {value[1:] for _, name, value in page.attributes if name.endswith("href") and value.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted
    assert wanted <= set(ids)


def test_the_page_needs_nothing_from_anywhere(page: Page, written: Path) -> None:
    for path in [written / "report.html", *(written / "figures").iterdir()]:
        text = path.read_text(encoding="utf-8")
        found = Page(text[text.index("<svg") :]) if path.suffix == ".svg" else page
        assert not {tag for tag, *_ in found.attributes} & {"script", "link", "img", "iframe"}
        assert "<script" not in text
        for tag, name, value in found.attributes:
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
        assert "@import" not in text
        assert not re.search(r"url\((?!#)", text)
        assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))


def test_no_text_can_break_the_page() -> None:
    evil = "<script>alert(1)</script>&amp;\"'"
    blocks = (Text(evil), Notes((evil,)), Grid((evil,), ((evil,),)), Absent(evil, evil, evil), Details(evil, evil))
    text = html(Document(evil, (Section(evil, blocks),)))
    assert "<script" not in text
    page = Page(text)
    for tag in ("h1", "h2", "li", "td", "th", "summary", "pre"):
        assert evil in page.items[tag]


def test_equal_neighbours_of_a_grouped_table_are_one_cell() -> None:
    rows = (("a", "1"), ("a", "2"), ("b", "3"), ("a", "4"))
    text = html(Document("t", (Section("s", (Grid(("x", "y"), rows, grouped=True),)),)))
    assert Page(text).tables == [[["x", "y"], ["a", "1"], ["2"], ["b", "3"], ["a", "4"]]]
    assert re.findall(r'scope="rowgroup" rowspan="(\d)"', text) == ["2", "1", "1"]


def test_the_configuration_on_the_page_is_a_file_that_asks_for_the_same(
    page: Page, comparison: Comparison, tmp_path: Path
) -> None:
    path = tmp_path / "again.yaml"
    path.write_text(page.items["pre"][-1])
    parser = build_parser()
    values = vars(parser.instantiate(parser.parse_args(["compare", "--config", str(path)])).compare)

    def pick(cls: type) -> Any:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    assert pick(CompareConfig) == comparison.config
    assert pick(CompareConfig).digest({}) == comparison.config.digest({})
    assert pick(MeasureConfig) == comparison.measure


def test_a_density_is_named_instead_of_what_is_matched(findings: Findings, no_figures: None) -> None:
    def asked(one: Findings) -> str:
        return html(document(one))

    assert "as many coordinates as norm." in asked(findings)
    comparison = replace(findings.comparison, config=replace(findings.comparison.config, density=0.125))
    assert "budgeted masks keep a density of 0.125." in asked(replace(findings, comparison=comparison))


def test_what_is_missing_is_named_with_what_adds_it(content: Document, findings: Findings, no_figures: None) -> None:
    def absent(one: Document) -> dict[str, Absent]:
        return {b.what: b for section in one.sections for b in section.blocks if isinstance(b, Absent)}

    found = absent(content)
    assert {"Spectrum of the Hessian", "Loss along a direction", "Loss on a plane"} <= set(found)
    (option,) = re.findall(r"--metrics (\S+),", found["Spectrum of the Hessian"].remedy)
    assert MeasureConfig(metrics=option).metrics.endswith(",spectrum")
    assert "--sweep" in found["norm and all at equal sharpness"].remedy
    bare = replace(findings, study=None, judgement=None, masks=None, absent={"judgement": "j", "masks": "m"})
    bare = replace(bare, comparison=replace(bare.comparison, trials=()))
    more = absent(document(bare))
    assert more["The comparison at equal sharpness"].why == "j"
    assert more["The masks' anatomy"].why == "m"
    assert "Accuracy against rho" in more


def test_failed_runs_and_unfinished_arms_are_told(findings: Findings, no_figures: None) -> None:
    failed = ({"run": "r1", "state": "failed", "arm": "norm", "rho": 0.5, "seed": 3, "reason": "no <memory>"},)
    page = Page(html(document(replace(findings, failed=failed, left_out={"fisher": "2 of its 3 runs are finished"}))))
    assert ["r1", "failed", "norm", "0.5", "3", "no <memory>"] in page.tables[-1]
    assert any(text.startswith("LEFT OUT: fisher: 2 of its 3 runs are finished") for text in page.items["p"])
    # An unfinished comparison has no answer: p values over the rest of the arms are too small.
    assert not any(text.startswith(("Of ", "Not decided", "Does the gain")) for text in page.items["p"])
    assert page.items["p"][0].startswith("Not answered yet: runs of fisher are missing")
    assert "None: every run in the folder ended well." not in page.items["p"]
