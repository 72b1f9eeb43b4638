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

import yaml

from studies.claims import contrasts
from studies.sharpness import association, averaged, by_metric, flatness, radii
from studies.tables import claims, family, table

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
FIGURES = {
    "accuracy.svg": "Test accuracy per arm: a dot per seed, mean and interval as in the table",
    "rho.svg": "Accuracy against the radius: validation, over the tuning seeds; of a sweep also test, over the "
    "report's, without collapsed radii. The ring marks the radius chosen; an axis ends 15 points "
    "below the lowest ring where values lie lower",
    "sharpness-3.svg": "Test error against the primary metric of sharpness at the radii chosen: a dot per run, a mark "
    "per arm (mean over seeds, of sharpness geometric)",
}
CURVES = "equal-sharpness-{}.svg"
_BLOCK = re.compile(r"(<!-- study: (\w+)/(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
        CURVES.format(i): f"Test error against sharpness along the radii of {one['arm']} and {one['reference']}: means "
        f"over {averaged(one)}, a mark per radius, without collapsed radii; "
        + ("the band is the range compared" if one["iso"]["sweep"] else "no band: not compared at equal sharpness")
        for i, one in enumerate(verdicts, start=1)
    }
    figures = [
        f"![{words.partition(':')[0]}](figures/{study}-{name}-{file})\n\n*{words}.*"
        for file, words in (FIGURES | curves).items()
        if (records / name / file).exists()
    ]
    members = [one for one in found if one["family"]]
    if any(one["iso"]["sweep"] for one in verdicts):
        more = [flatness(verdicts), radii(records / name, verdicts[0]["left_out"])]
    else:
        more = [family(members)] if members else []
    arms = dict.fromkeys(name for one in verdicts for name in (one["arm"], one["reference"]))
    asked = yaml.safe_load((HERE / study / "claims.yaml").read_text(encoding="utf-8"))["claims"]
    pairs = contrasts([claim for claim in asked if claim["is"] == "sharper"], [*arms])
    compared = [one for one in verdicts if f"{one['arm']}-{one['reference']}" in pairs]
    more += [by_metric(compared)] if compared else []
    return "\n\n".join([table(records / name), *more, *filter(None, [association(records / name)]), *figures])


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
