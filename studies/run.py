"""A study, from nothing to its report: every comparison of a folder of configurations, and what became of its claims.

    python -m studies.run digits [--only NAME ...] [--processes 2] [--data npz:FILE] [--name NAME]
        [--out FOLDER] [--scale 0.1]

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
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.cli import main as sam_masks
from experiments.config import default_processes
from experiments.runs import load_results

HERE = Path(__file__).resolve().parent
KEPT = ("study.json", "table.csv", "trials.csv")
FIGURES = ("accuracy.svg", "rho.svg", "sharpness-3.svg", "equal-sharpness-*.svg")
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


def contrasts(claims: Iterable[dict[str, Any]], arms: Sequence[str]) -> list[str]:
    """The pairs ARM-REFERENCE of the claims that the arms of a comparison allow, under each of its methods."""
    out: list[str] = []
    for method in dict.fromkeys(arm.partition("/")[0] for arm in arms if "/" in arm):
        for claim in claims:
            for reference in (claim["reference"], *claim.get("rivals", ())):
                pair = [name if name in arms else f"{method}/{name}" for name in (claim["arm"], reference)]
                if set(pair) <= set(arms):
                    out.append("-".join(pair))
    return list(dict.fromkeys(out))


def outcome(claim: dict[str, Any], verdict: dict[str, Any], margin: float) -> dict[str, Any]:
    """Whether a claim held (True), did not hold (False) or is not decided (None), with what says so.

    Args:
        claim: with ``is``, see claims.yaml.
        verdict: of its contrast, as ``sam-masks verdict --json`` prints it.
        margin: points of accuracy that do not matter.

    Returns:
        ``held`` and, of a claim about a difference, ``value``, ``low`` and ``high`` in ``unit``: the claim held where
        the whole interval lies where the claim puts it, and did not hold where it lies wholly elsewhere.
    """
    kind = claim["is"]
    if kind == "not_explained":
        return {"held": {"not explained": True, "explained": False}.get(verdict["word"]), "word": verdict["word"]}
    inf = math.inf
    bounds = {
        "better": (0.0, inf), "not_worse": (-margin, inf), "not_better": (-inf, margin),
        "equivalent": (-margin, margin), "sharper": (-inf, 0.0), "flatter": (0.0, inf),
    }  # fmt: skip
    least, most = bounds[kind]
    of_sharpness = kind in ("sharper", "flatter")
    found = verdict["mediation"]["flattening" if of_sharpness else "total"]
    told = {"value": found["value"], "low": found["low"], "high": found["high"]}
    low = -inf if found["low"] is None else found["low"]
    high = inf if found["high"] is None else found["high"]
    inside = (low > least or least == -inf) and (high < most or most == inf)
    held = True if inside else False if high < least or most < low else None
    unit = "log units flatter" if of_sharpness else "points of test accuracy"
    return {"held": held, **told, "unit": unit, "p": None if of_sharpness else verdict["gain"]["p_holm"]}


def estimate(found: dict[str, Any]) -> str:
    """``+0.50 [-0.10, +1.10]`` of an outcome; the value says nothing where both ends are open."""
    if found["low"] is None and found["high"] is None:
        return "unbounded"
    value, low, high = ("unbounded" if found[of] is None else _signed(found[of]) for of in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _signed(number: float) -> str:
    """Two decimals; of less than a hundredth its first figure, whose sign decides claims."""
    return f"{number:+.1g}" if 0 < abs(number) < 0.01 else f"{number:+.2f}"


def beyond_ascent(
    claim: dict[str, Any], verdicts: dict[str, dict[str, Any]], ascents: dict[str, float], margin: float
) -> dict[str, Any]:
    """Whether an arm's gain over its reference is more than the ascent strength that it has in common with others.

    Args:
        claim: with ``arm``, ``reference`` and ``rivals``.
        verdicts: of the arm's contrasts, by the name of the other arm.
        ascents: mean of L(w + eps) - L(w) over training, by the arm's name.
        margin: points of accuracy that do not matter.

    Returns:
        As :func:`outcome`, of the difference to the reference; ``word`` says of which rivals. Where the arm is not
        better than its reference, or no rival ascends as strongly, nothing is decided. Otherwise the claim held where
        the arm is better than such a rival, and did not hold where it is better than none of them by the margin.
    """
    gain = outcome({"is": "better"}, verdicts[claim["reference"]], margin)
    rivals = [name for name in claim["rivals"] if name in verdicts and ascents[name] >= ascents[claim["arm"]]]
    if not gain["held"]:
        return {**gain, "held": None, "word": f"not shown to be better than {claim['reference']}"}
    if not rivals:
        return {**gain, "held": None, "word": f"none of {', '.join(claim['rivals'])} ascends as strongly"}
    more = {name: outcome({"is": "better"}, verdicts[name], margin) for name in rivals}
    no_more = [outcome({"is": "not_better"}, verdicts[name], margin)["held"] for name in rivals]
    held = True if any(one["held"] for one in more.values()) else False if all(no_more) else None
    told = (f"{name} {estimate(one)}" for name, one in more.items())
    return {**gain, "held": held, "word": f"against arms of at least its ascent strength: {', '.join(told)}"}


def judged(folder: Path, claims: dict[str, Any], arms: Sequence[str]) -> list[dict[str, Any]]:
    """The verdicts that the claims need, each with its ``family``: the intervals of a family hold together. None where
    the arms allow none, or there are too few runs."""
    out: list[dict[str, Any]] = []
    for family in dict.fromkeys(claim.get("family", "") for claim in claims["claims"]):
        pairs = contrasts([claim for claim in claims["claims"] if claim.get("family", "") == family], arms)
        if pairs:
            options = [f"--contrasts={','.join(pairs)}", f"--margin={claims['margin']}", "--json"]
            found = json.loads(run(["verdict", str(folder), *options]))["verdicts"]
            out += [{"family": family, **one} for one in found]
    return out


def keep(folder: Path, records: Path, verdicts: list[dict[str, Any]]) -> None:
    """What is committed of a comparison."""
    records.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(folder / name, records / name)
    for figure in (found for name in FIGURES for found in (folder / "figures").glob(name)):
        shutil.copyfile(figure, records / figure.name)
    runs = load_results(folder).drop(columns=list(LONG), errors="ignore")
    varies = runs.nunique(dropna=False) > 1
    runs.loc[:, varies].to_csv(records / "runs.csv", index=False)
    same = json.loads(runs.loc[:, ~varies].iloc[:1].to_json(orient="records", double_precision=15))[0]
    (records / "every_run.json").write_text(json.dumps(same, indent=1) + "\n", encoding="utf-8")
    told = [
        {key: found for key, found in one.items() if key != "associations"} for one in verdicts
    ]  # all pairs of runs
    (records / "verdict.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def ascents_of(records: Path) -> dict[str, float]:
    """The mean ascent strength of every arm of a comparison's committed table, in nats."""
    table = pd.read_csv(records / "table.csv", keep_default_na=False, na_values=[""])
    return dict(zip(table.arm, table.ascent, strict=True))


def settle(
    claims: dict[str, Any], verdicts: dict[str, list[dict[str, Any]]], ascents: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Every claim in every comparison that can decide it, under every method.

    Args:
        claims: what claims.yaml holds.
        verdicts: per comparison, as ``sam-masks verdict --json`` prints them.
        ascents: per comparison, the mean ascent strength of every arm.
    """
    out = []
    for claim in claims["claims"]:
        for name in claims["sweeps"] if claim["is"] == "not_explained" else claims["comparisons"]:
            family = [one for one in verdicts.get(name, []) if one.get("family", "") == claim.get("family", "")]
            for verdict in family:
                method, _, arm = verdict["arm"].partition("/")
                if (arm, verdict["reference"].rpartition("/")[2]) != (claim["arm"], claim["reference"]):
                    continue
                if claim["is"] == "beyond_ascent":
                    same = {one["reference"]: one for one in family if one["arm"] == verdict["arm"]}
                    against = {whom.rpartition("/")[2]: one for whom, one in same.items()}
                    strength = {whom.removeprefix(f"{method}/"): much for whom, much in ascents[name].items()}
                    decided = beyond_ascent(claim, against, strength, claims["margin"])
                else:
                    decided = outcome(claim, verdict, claims["margin"])
                out.append({**claim, "comparison": name, "method": method, "n": verdict["seeds"], **decided})
    return out


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
    options = parser.parse_args(arguments)
    folder = HERE / options.study
    claims = yaml.safe_load((folder / "claims.yaml").read_text(encoding="utf-8"))
    kept = options.out / (options.name or options.study)
    records = HERE / kept.name / "records" if options.scale == 1 else kept / "records"
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
        others = [str(place.parent) for place in sorted(out.parent.glob("*/runs")) if place.parent != out]
        how += [f"--reuse={','.join(others)}"] if others else []
        print(f"{name}: {out}", flush=True)
        run(["compare", f"--config={file}", *how, *smaller])
        made = json.loads((out / "study.json").read_text(encoding="utf-8"))
        arms = [arm["name"] for arm in made["config"]["arms"]]
        verdicts[name] = judged(out, claims, arms) if not smaller else []
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
