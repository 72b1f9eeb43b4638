"""A study, from nothing to its report: every comparison of a folder of configurations, and what became of its claims.

    python -m studies.run digits [--only NAME ...] [--processes 2] [--data npz:FILE] [--name NAME]
        [--out FOLDER] [--scale 0.1] [--records]

The comparisons are the folder's YAML files, as ``sam-masks compare --config`` takes them; claims.yaml holds what is
tested, fixed beforehand. Interrupted, the same command goes on. What is committed is written to records/NAME/: the
configuration as it was run, a line per run, what all runs have in common (versions, too), the table, every radius that
was tried, the verdict on every contrast that a claim needs; then claims.json with the outcome of every claim;
``python -m studies.page`` makes the documentation's pages from them. ``--scale`` shrinks a study to try it: that share
of its seeds, epochs and images, and its records go into the results' folder instead.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.cli import main as sam_masks
from experiments.config import default_processes
from experiments.runs import load_results
from studies.claims import contrasts, settle

HERE = Path(__file__).resolve().parent
KEPT = ("study.json", "table.csv", "trials.csv")
FIGURES = ("accuracy.svg", "rho.svg", "sharpness-3.svg", "equal-sharpness-*.svg")
EVERY_RADIUS = 100
"""``--collapsed`` of a verdict that leaves no collapsed radius out: more points of accuracy are not to be lost."""
OF_LAST_EPOCH = ("loss", "ascent", "radius")
"""Columns of a run's line whose means over training stand in the table: named for what they are."""
LONG = ("test_correct", "test_index", "folder", "reason")
"""Columns of a run's line that are not committed: a digit per test image, paths."""


def run(arguments: Sequence[str]) -> str:
    """What a command of sam-masks prints.

    Raises:
        SystemExit: it failed; it has said why.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = sam_masks(list(arguments))
    if code:
        raise SystemExit(code)
    return printed.getvalue()


def shrunk(config: dict[str, Any], scale: float) -> list[str]:
    """Options that shrink a comparison."""
    if scale == 1:
        return []
    least = {"seeds": 2, "epochs": 1, "images": 128, "n_train": 128, "n_val": 32, "batch_size": 32}
    found = [f"--{name}={max(few, round(scale * config[name]))}" for name, few in least.items() if name in config]
    return [*found, "--n_test=128", "--tuning_seeds=1", "--extend=0", "--sharpness_m=64", "--metrics="]


def judged(folder: Path, claims: dict[str, Any], arms: Sequence[str]) -> list[dict[str, Any]]:
    """The verdicts that the claims need, each with its ``family``, whose intervals hold together, and which radii were
    ``left_out``; of a sweep with collapsed radii also ``every_radius``, the verdict at equal sharpness with them. None
    where the arms allow none, or there are too few runs."""
    out: list[dict[str, Any]] = []
    for family in dict.fromkeys(claim.get("family", "") for claim in claims["claims"]):
        pairs = contrasts([claim for claim in claims["claims"] if claim.get("family", "") == family], arms)
        if pairs:
            options = [f"--contrasts={','.join(pairs)}", f"--margin={claims['margin']}", "--json"]
            found = json.loads(run(["verdict", str(folder), *options]))
            told: dict[str, Any] = {"family": family, "left_out": left_out(found)}
            made = [told | one for one in found["verdicts"]]
            if any("collapsed" in note for note in told["left_out"]):
                every = json.loads(run(["verdict", str(folder), *options, f"--collapsed={EVERY_RADIUS}"]))
                others = {_pair(one): one for one in every["verdicts"]}
                for one in made:
                    other = others[_pair(one)]
                    one["every_radius"] = {
                        "left_out": left_out(every), "word": other["word"], "iso": other["iso"]["sweep"],
                    }  # fmt: skip
            out += made
    return out


def _pair(verdict: dict[str, Any]) -> tuple[str, str]:
    return verdict["arm"], verdict["reference"]


def left_out(found: dict[str, Any]) -> list[str]:
    """The notes on radii that a verdict left out."""
    return [note for note in found["notes"] if note.startswith("LEFT OUT")]


def report(folder: Path, verdicts: list[dict[str, Any]]) -> None:
    """Draw the comparison anew, with the contrasts of the claims."""
    pairs = [f"{one['arm']}-{one['reference']}" for one in verdicts if not one["family"]]
    run(["report", str(folder), *([f"--contrasts={','.join(pairs)}"] if pairs else [])])


def keep(folder: Path, records: Path, verdicts: list[dict[str, Any]]) -> None:
    """What is committed of a comparison."""
    records.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(folder / name, records / name)
    for figure in (found for name in FIGURES for found in (folder / "figures").glob(name)):
        shutil.copyfile(figure, records / figure.name)
    runs = load_results(folder).drop(columns=list(LONG), errors="ignore")
    runs = runs.rename(columns={name: f"{name}_last_epoch" for name in OF_LAST_EPOCH})
    if "taken_from" in runs:  # paths of this machine are of no use to others
        runs["taken_from"] = [None if pd.isna(place) else Path(place).name for place in runs.taken_from]
    varies = runs.nunique(dropna=False) > 1
    runs.loc[:, varies].to_csv(records / "runs.csv", index=False)
    same = json.loads(runs.loc[:, ~varies].iloc[:1].to_json(orient="records", double_precision=15))[0]
    (records / "every_run.json").write_text(json.dumps(same, indent=1) + "\n", encoding="utf-8")
    # Associations are long, the same for every contrast, and nothing here needs them.
    told = [{key: found for key, found in one.items() if key != "associations"} for one in verdicts]
    (records / "verdict.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def ascents_of(records: Path) -> dict[str, float]:
    """The mean ascent strength of every arm of a comparison's committed table, in nats."""
    table = pd.read_csv(records / "table.csv", keep_default_na=False, na_values=[""])
    return dict(zip(table.arm, table.ascent, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", choices=sorted(path.parent.name for path in HERE.glob("*/claims.yaml")))
    parser.add_argument("--only", nargs="+", help="names of comparisons")
    parser.add_argument("--processes", type=int, default=default_processes())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", help="as in sam-masks compare, in place of the configurations' data")
    parser.add_argument("--name", help="of results and records (default: the study); for other data")
    parser.add_argument("--out", type=Path, default=Path("results/studies"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--records", action="store_true", help="train nothing: make verdicts, figures and records anew")
    options = parser.parse_args(arguments)
    folder = HERE / options.study
    claims = yaml.safe_load((folder / "claims.yaml").read_text(encoding="utf-8"))
    whole = options.scale == 1
    kept = options.out / ((options.name or options.study) + ("" if whole else f"-{options.scale:g}"))
    records = (HERE if whole else options.out) / kept.name / "records"
    verdicts: dict[str, list[dict[str, Any]]] = {}
    ascents: dict[str, dict[str, float]] = {}
    for name in [*claims["comparisons"], *claims["sweeps"]]:
        if options.only and name not in options.only:
            if (records / name / "verdict.json").exists():
                verdicts[name] = json.loads((records / name / "verdict.json").read_text(encoding="utf-8"))
                ascents[name] = ascents_of(records / name)
            continue
        file = folder / f"{name}.yaml"
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        out = kept / name
        smaller = shrunk(config, options.scale)
        how = [f"--processes={options.processes}", f"--device={options.device}", f"--out={out}", "--quiet"]
        how += [f"--data={options.data}"] if options.data else []
        others = [str(place.parent) for place in sorted(kept.glob("*/runs")) if place.parent != out]
        how += [f"--reuse={','.join(others)}"] if others else []
        print(f"{name}: {out}", flush=True)
        if not options.records:
            run(["compare", f"--config={file}", *how, *smaller])
        made = json.loads((out / "study.json").read_text(encoding="utf-8"))
        arms = [arm["name"] for arm in made["config"]["arms"]]
        verdicts[name] = judged(out, claims, arms) if whole else []
        report(out, verdicts[name])
        keep(out, records / name, verdicts[name])
        ascents[name] = ascents_of(records / name)
    settled = settle(claims, verdicts, ascents)
    records.mkdir(parents=True, exist_ok=True)
    (records / "claims.json").write_text(json.dumps(settled, indent=1) + "\n", encoding="utf-8")
    words = {True: "held", False: "NOT HELD", None: "not decided"}
    for one in settled:
        print(f"{words[one['held']]:11}  {one['comparison']}, {one['method']}: {one['says']}")


if __name__ == "__main__":
    main()
