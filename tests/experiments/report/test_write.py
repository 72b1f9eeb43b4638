"""The files of a report: the same numbers in all of them, the same bytes each time."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from experiments.cli import main
from experiments.compare import Comparison, Trial
from experiments.report import write_report
from experiments.report.content import Document
from experiments.report.files import csv_files
from experiments.report.findings import Findings, find
from experiments.report.latex import COLUMNS, escape, latex
from experiments.report.markdown import escape as escape_markdown
from experiments.report.markdown import markdown
from experiments.table import Table, frame, shown
from masks.errors import InputError

CSV = {"runs.csv", "table.csv", "trials.csv", "training.csv", "verdict.csv"}
CSV |= {"mask_layers.csv", "mask_overlap.csv", "mask_builds.csv"}


def test_the_files(written: Path, content: Document) -> None:
    assert {p.name for p in written.iterdir()} == {"report.html", "report.md", "table.tex", "figures", *CSV}
    figures = {p.name: p.read_text(encoding="utf-8") for p in (written / "figures").iterdir()}
    assert figures == {f"{picture.name}.svg": f"{picture.svg}\n" for picture in content.pictures}


def test_the_command_writes_what_the_comparison_wrote(
    comparison: Comparison,
    table: Table,
    written: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the folder alone, byte for byte; without its table.csv, predicted costs are not known."""
    with monkeypatch.context() as patch:
        patch.setattr("experiments.report.content.svg", lambda *_: "<svg></svg>")
        assert main(["report", str(comparison.folder), "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'a' / 'report.html'}\n"
    without = pd.read_csv(tmp_path / "a" / "table.csv")
    assert without["predicted_cost"].isna().all()
    assert "Predicted costs are not in the folder" in (tmp_path / "a" / "report.html").read_text()
    copy = Path(shutil.copytree(comparison.folder, tmp_path / "copy"))
    (copy / "table.csv").write_text(frame(table).to_csv(index=False))
    assert main(["report", str(copy), "--out", str(tmp_path / "b")]) == 0
    for path in written.rglob("*"):
        if path.is_file():
            assert (tmp_path / "b" / path.relative_to(written)).read_bytes() == path.read_bytes(), path


def test_contrasts_and_metric_are_taken_or_refused_in_one_line(comparison: Comparison) -> None:
    one = find(comparison.folder, primary="lambda_max", contrasts=["random-all"])
    assert one.judgement is not None
    assert [(v.arm, v.reference, v.metric) for v in one.judgement.verdicts] == [("random", "all", "lambda_max")]
    with pytest.raises(InputError, match="unknown metric of the runs 'nosuch'"):
        find(comparison.folder, primary="nosuch")
    with pytest.raises(InputError, match="contrast 'norm-nosuch'"):
        find(comparison.folder, contrasts=["norm-nosuch"])


def test_runs_csv_is_the_records(written: Path, comparison: Comparison) -> None:
    runs = pd.read_csv(written / "runs.csv", keep_default_na=False, na_values=[""])
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


def test_the_other_files_are_the_table_the_trials_and_the_epochs(
    written: Path, comparison: Comparison, table: Table
) -> None:
    lines = pd.read_csv(written / "table.csv", keep_default_na=False, na_values=[""])
    pd.testing.assert_frame_equal(lines, frame(table))
    trials = pd.read_csv(written / "trials.csv").to_dict("records")
    assert [(t["arm"], t["rho"], t["val_accuracy"], t["diverged"], t["n"]) for t in trials] == [
        (t.arm, t.rho, t.val_accuracy, t.diverged, t.n) for t in comparison.trials
    ]
    epochs = pd.read_csv(written / "training.csv").set_index(["run_id", "epoch"])
    for records in comparison.records.values():
        for record in records:
            for i, epoch in enumerate(record.result["history"]):
                assert epochs.loc[(record.run_id, i + 1), ["loss", "ascent", "radius"]].to_dict() == {
                    key: epoch[key] for key in ("loss", "ascent", "radius")
                }


def test_without_trials_their_file_has_its_header(findings: Findings) -> None:
    files = csv_files(replace(findings, comparison=replace(findings.comparison, trials=())))
    assert files["trials.csv"].split() == ["arm,rho,val_accuracy,diverged,n"]


def test_failed_runs_have_a_file(findings: Findings) -> None:
    files = csv_files(replace(findings, failed=({"run": "r1", "state": "failed", "reason": "x"},)))
    assert files["failed.csv"] == "run,state,reason\nr1,failed,x\n"


def test_a_folder_that_cannot_be_written_to(
    comparison: Comparison, table: Table, tmp_path: Path, no_figures: None
) -> None:
    (tmp_path / "table.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot write to .*: Is a directory"):
        write_report(replace(comparison, folder=tmp_path), table)


# -- Markdown ---------------------------------------------------------------------------------------------


def unescaped(text: str) -> str:
    """What CommonMark shows of a line: backslashes before ASCII punctuation go, entities become characters."""
    text = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def cells(line: str) -> list[str]:
    return [unescaped(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_holds_the_same_table_notes_and_figures(written: Path, table: Table, content: Document) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    want = shown(table)
    assert rows[0] == ["arm", *want.columns]
    assert rows[2 : 2 + len(want)] == [[name, *want.loc[name]] for name in want.index]
    lines = [unescaped(line).strip("*") for line in text.splitlines()]
    for note in table.notes:
        assert note in lines or f"- {note}" in lines
    for picture in content.pictures:
        assert f"](figures/{picture.name}.svg)" in text
        assert picture.caption in lines
    assert [line.lstrip("# ") for line in lines if line.startswith("## ")] == [s.title for s in content.sections]


@pytest.mark.parametrize("name", ["a|b", "_x_ *y*", "<b>&amp;", "`c`", "[l](u)", "- d", "1. e", "# f", "back\\slash"])
def test_markdown_shows_names_as_they_are(name: str) -> None:
    got = escape_markdown(name)
    assert unescaped(got) == name
    assert not re.search(r"(?<!\\)[|_*`\[<]", got)
    assert not re.match(r"(-|\d+\.|#)\s", got)


def test_details_with_fences_stay_whole() -> None:
    from experiments.report.content import Details, Section

    text = markdown(Document("t", (Section("s", (Details("d", "a\n````\nb"),)),)))
    assert "\n`````text\na\n````\nb\n`````\n" in text


# -- LaTeX ------------------------------------------------------------------------------------------------


def untexed(text: str) -> str:
    """The inverse of what LaTeX's commands for single characters stand for."""
    words = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<", "textgreater": ">"}
    words |= {"textbar": "|", "textquotedbl": '"'}
    return re.sub(
        r"\\(text\w+)\{\}|\\([&%$#_{}])|\$-\$", lambda m: words[m[1]] if m[1] else m[2] if m[2] else "-", text
    )


def test_latex_holds_the_numbers_of_the_table(written: Path, table: Table) -> None:
    text = (written / "table.tex").read_text(encoding="utf-8")
    want = shown(table)[list(COLUMNS)]
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    rows = [[untexed(cell.strip()) for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))] for line in body]
    assert rows == [[name, *want.loc[name]] for name in want.index]
    assert r"\toprule" in text
    assert text.count("{") == text.count("}")


def test_latex_sets_names_as_they_are(table: Table) -> None:
    evil = 'a&b%c$d#e_f{g}~h^i\\j<k>|"'
    assert untexed(escape(evil)) == evil
    rows = (replace(table.rows[0], arm=replace(table.rows[0].arm, name="none")), *table.rows[1:])
    named = replace(table, rows=(*rows[:1], replace(rows[2], arm=replace(rows[2].arm, name=evil))))
    text = latex(named)
    line = next(line for line in text.splitlines() if line.startswith("a"))
    assert untexed(re.split(r"(?<!\\)&", line)[0].strip()) == evil
    # Nothing special is left bare: columns are separated eight times, and mathematics opens and closes.
    bare = re.sub(r"\\[&%$#_{}]|\\text\w+\{\}", "", line.removesuffix(r"\\"))
    assert bare.count("&") == len(COLUMNS)
    assert bare.count("$") % 2 == 0
    assert not set('%#_{}~^\\<>|"') & set(bare)


def test_a_radius_of_zero_has_no_place_on_a_logarithmic_axis(findings: Findings) -> None:
    from experiments.plot import outcome
    from experiments.plot.style import styles

    comparison = findings.comparison
    trials = (*comparison.trials, Trial("norm", 0.0, 0.9, 0, 2))
    zero = replace(comparison, trials=trials, chosen=comparison.chosen | {"norm": 0.0})
    figure = outcome.against_rho(zero, styles(comparison.config.arms), None)
    drawn = [line.get_xdata() for line in figure.axes[0].lines]
    assert all(x > 0 for line in drawn for x in line)
