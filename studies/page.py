"""The tables of the studies' pages, from their committed records.

    python -m studies.page [--check]

A line ``<!-- study: STUDY/COMPARISON -->`` in docs/study-STUDY.md is followed by the comparison's table and figures, up
to ``<!-- end -->``; ``<!-- study: STUDY/claims -->`` by the outcome of every claim. Figures are copied to docs/figures.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from studies.claims import estimate

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
FIGURES = {
    "accuracy.svg": "Test accuracy per arm",
    "rho.svg": "Accuracy against the radius: validation, over the tuning seeds; of a sweep also test, over the "
    "report's. The ring marks the radius chosen; an axis ends 15 points below the lowest ring",
    "sharpness-3.svg": "Test error against the primary metric of sharpness: a dot per run, a mark per arm",
}
CURVES = "equal-sharpness-{}.svg"
_FEW = 6
_NEAR = 10
_BLOCK = re.compile(r"(<!-- study: (\w+)/(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_WORDS = {True: "held", False: "**not held**", None: "not decided"}


def markdown(rows: list[dict[str, str]]) -> str:
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row[head] for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(records: Path) -> str:
    """The arms of a comparison: what they kept, the radius chosen, accuracy and gain with their intervals."""
    arms = pd.read_csv(records / "table.csv", keep_default_na=False, na_values=[""])
    trials = pd.read_csv(records / "trials.csv")
    train_error = reported(records).groupby("arm").train_error.mean()
    rows = [
        {
            "arm": arm.arm,
            "kept": f"{arm.kept:,}" if arm.kept else "-",
            "normalization": "-" if pd.isna(arm.norm_share) else f"{_percent(arm.norm_share)} %",
            "rho": f"{arm.rho:.3g}{' (edge)' if arm.rho_at_edge else ''}" if arm.kept else "-",
            "test accuracy, %": _interval(arm.test_accuracy, arm.test_accuracy_low, arm.test_accuracy_high),
            "gain, points": "-" if pd.isna(arm.gain) else _interval(arm.gain, arm.gain_low, arm.gain_high, "+"),
            "p (Holm)": "-" if pd.isna(arm.gain_p_holm) else f"{arm.gain_p_holm:.3f}",
            "training error, %": f"{100 * train_error[arm.arm]:.1f}",
            "ascent": f"{arm.ascent:.3f}" if arm.kept else "-",
            "lambda_max": f"{arm.lambda_max:.3g}",
            "cost": "-" if pd.isna(arm.predicted_cost) else f"{arm.predicted_cost:.2f}",
        }
        for arm in arms.itertuples()
    ]
    tried = trials.groupby("arm").size()
    below = trials.groupby("arm").val_accuracy.transform("max") - trials.val_accuracy
    near = (below.round(9) <= _NEAR / 100).groupby(trials.arm).sum()
    n, tries = int(arms.n.iloc[0]), int(trials.n.iloc[0])
    controls = (arms.role == "control").sum()
    families = _count((arms.role == "main").sum() - 1, "main arm")
    families += f" and, apart, {_count(controls, 'control')}: equal gains may have other p" if controls else ""
    return (
        f"{markdown(rows)}\n\nn = {n} seeds; 95 % intervals, of accuracy over seeds and test images, of gain (over "
        f"none, paired) over seeds given the images; p by sign flips, Holm's correction over {families}; "
        "normalization: share of the mask that is of normalization layers; rho chosen per arm that has one from "
        f"{_range(tried)} radii by the mean validation accuracy of {tries} other seeds, of equals the smallest; "
        f"{_range(near)} of an arm's radii came within {_NEAR} points of its best; training error: on the labels "
        "trained on; ascent: L(w + eps) - L(w), mean over all steps, nats; cost: operations of a step over those of "
        "none, counted, without building masks."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def reported(records: Path) -> pd.DataFrame:
    """The runs that a comparison's table is of: on the report's seeds, at the radii chosen."""
    chosen = pd.read_csv(records / "table.csv", keep_default_na=False, na_values=[""]).set_index("arm").rho.fillna(0.0)
    runs = pd.read_csv(records / "runs.csv", keep_default_na=False, na_values=[""], low_memory=False)
    return runs[runs.test_accuracy.notna() & (runs.rho == runs.arm.map(chosen))]


def _percent(share: float) -> str:
    """Whole, and below 1 % to one digit: a few coordinates are not none."""
    return f"{100 * share:.0f}" if not 0 < share < 0.01 else f"{100 * share:.1g}"


def _range(numbers: pd.Series[int]) -> str:
    low, high = numbers.min(), numbers.max()
    return f"{low}" if low == high else f"{low} to {high}"


def flatness(verdicts: list[dict[str, Any]]) -> str:
    """Per contrast of a sweep: gain and its parts, the word of the verdict, and flattening by every metric."""
    rows = []
    for one in verdicts:
        parts, iso = one["mediation"], one["iso"]["sweep"]
        rows.append(
            {
                "contrast": f"{one['arm']} - {one['reference']}",
                "gain, points": estimate(parts["total"]),
                "flatter by, log units": estimate(parts["flattening"]),
                "through sharpness, points": estimate(parts["indirect"]),
                "not through it, points": estimate(parts["direct"]),
                "at equal sharpness, points": "-" if iso is None else estimate(iso["direct"]),
                "verdict": one["word"],
            }
            | _with_every_radius(one)
        )
    first = verdicts[0]
    by_metric = [
        {one["metric"]: one["mediation"]["flattening"]}
        | {other["metric"]: other["flattening"] for other in one["secondary"]}
        for one in verdicts
    ]
    metrics = [
        {"flatter by, log units": metric}
        | {
            f"{one['arm']} - {one['reference']}": estimate(of[metric])
            for one, of in zip(verdicts, by_metric, strict=True)
        }
        for metric in by_metric[0]
    ]
    return (
        f"{markdown(rows)}\n\n{markdown(metrics)}\n\nThe first table by {first['metric']}; n = {first['seeds']} seeds; "
        f"intervals at {100 * first['confidence']:.4g} % (95 % over the contrasts together); through sharpness and "
        "not: mediation within seeds; at equal sharpness: analysis of covariance over the radii of both arms, - where "
        "their ranges do not overlap."
        + "".join(f" {note.replace('LEFT OUT', 'Left out')}." for note in first["left_out"])
    )


def _with_every_radius(one: dict[str, Any]) -> dict[str, str]:
    """The same with collapsed radii, where the verdict has left some out."""
    if "every_radius" not in one:
        return {}
    every = one["every_radius"]
    return {
        "at equal sharpness, with collapsed radii": "-" if every["iso"] is None else estimate(every["iso"]["direct"]),
        "verdict with collapsed radii": every["word"],
    }


def association(records: Path) -> str:
    """Rank correlation, over the arms trained for as long as the base optimizer, of sharpness and accuracy; of few arms
    none."""
    study = json.loads((records / "study.json").read_text(encoding="utf-8"))
    metric = study["measure"]["metrics"].split(",")[0]
    same = {arm["name"] for arm in study["config"]["arms"] if arm["epochs_factor"] == 1}
    if len(same) < _FEW:
        return ""
    runs = reported(records)
    runs = runs[runs.arm.isin(same)]
    means = runs.groupby("arm")[["test_accuracy", metric, "train_error"]].mean()
    sharpness, fit = means.corr("spearman").iloc[0, 1:]
    return (
        f"Rank correlation (Spearman) of the arms' mean test accuracy with their mean {metric}: {sharpness:+.2f}; with "
        f"their mean training error on the labels trained on: {fit:+.2f}. Over {len(means)} arms trained for as many "
        "epochs, at their chosen radii; exploratory, no claim rests on it."
    )


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f} [{100 * low:{sign}.2f}, {100 * high:{sign}.2f}]"


def claims(records: Path) -> str:
    """The outcome of every claim at a glance, then each with its numbers, in the order of the claims."""
    settled = json.loads((records / "claims.json").read_text(encoding="utf-8"))
    glance = _glance(settled)
    legend = "-: no contrast of that comparison decides the claim. " if " - |" in glance else ""
    return f"{glance}\n\n{legend}The numbers of each outcome:\n\n{markdown([_claim(one) for one in settled])}"


def _glance(settled: list[dict[str, Any]]) -> str:
    """A line per claim, a column per comparison and method; ``-`` where the comparison cannot decide it."""
    columns = dict.fromkeys(f"{one['comparison']}, {one['method']}" for one in settled)
    lines: dict[str, dict[str, str]] = {}
    for one in settled:
        line = lines.setdefault(one["says"], {"claim": f"{one['says']} ({one['by']})"} | dict.fromkeys(columns, "-"))
        line[f"{one['comparison']}, {one['method']}"] = _WORDS[one["held"]]
    return markdown(list(lines.values()))


def _claim(one: dict[str, Any]) -> dict[str, str]:
    numbers = [f"{estimate(one)} {one['unit']}"] if "value" in one else []
    numbers += [one["word"]] if "word" in one else []
    level = f"; {100 * one['confidence']:.4g} % interval" if "value" in one else ""
    return {
        "claim": f"{one['says']} ({one['by']})",
        "comparison": f"{one['comparison']}, {one['method']}",
        "outcome": _WORDS[one["held"]],
        "by": f"{'; '.join(numbers)}; n = {one['n']}{level}",
    }


def block(study: str, name: str) -> str:
    records = HERE / study / "records"
    if name == "claims":
        return (
            claims(records) if (records / "claims.json").exists() else f"Not run yet: `python -m studies.run {study}`."
        )
    if not (records / name).exists():
        return f"Not run yet: `python -m studies.run {study} --only {name}`."
    found = json.loads((records / name / "verdict.json").read_text(encoding="utf-8"))
    verdicts = [one for one in found if not one["family"]]
    curves = {
        CURVES.format(i): f"Test error against sharpness along the radii of {one['arm']} and {one['reference']}"
        for i, one in enumerate(verdicts, start=1)
    }
    figures = [
        f"![{words}](figures/{study}-{name}-{file})"
        for file, words in (FIGURES | curves).items()
        if (records / name / file).exists()
    ]
    of_sweep = [flatness(verdicts)] if any(one["iso"]["sweep"] for one in verdicts) else []
    return "\n\n".join([table(records / name), *of_sweep, *filter(None, [association(records / name)]), *figures])


def filled(page: str) -> str:
    """The page with its tables made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{block(match[2], match[3])}\n\n{match[4]}", page)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studies.page", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is not current")
    options = parser.parse_args(arguments)
    current = True
    for path in sorted(DOCS.glob("study-*.md")):
        old = path.read_text(encoding="utf-8")
        new = filled(old)
        current &= old == new
        if not options.check:
            path.write_text(new, encoding="utf-8")
    files = {
        DOCS / "figures" / f"{file.parents[2].name}-{file.parent.name}-{file.name}": file
        for file in HERE.glob("*/records/*/*.svg")
        if file.name in FIGURES or file.match(CURVES.format("*"))
    }
    for target, source in files.items():
        current &= target.exists() and target.read_bytes() == source.read_bytes()
        if not options.check:
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
    return 0 if current or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
