"""How often the verdict errs, and how often its intervals cover, on synthetic studies of known truth.

    python -m benchmarks.verdict_calibration [--studies 500] [--json FILE]

Three tables. Words: how often each word is said of each truth, and how often it is wrong. A word is wrong that says
more than half of a share that is not (see ``WRONG``); under "confounded_all", where sharpness is a mere sign of a cause
that acts everywhere and no analysis of these data can tell, only if the sensitivity analysis with the true strength of
that cause does not cover the truth either. Coverage: of 95 % intervals, over the truths "full", "half", "none" and a
curved "full"; the least one of them in brackets. Mask still matters: how often the gain at equal sharpness differs
from 0 where all of it runs through sharpness; "naive" is the analysis of covariance over the whole sweep with one
measurement of sharpness, as it is, and the same intervals.

Two processes; the Monte Carlo error of a rate r from N studies is ``sqrt(r (1 - r) / N)``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy

from analysis.equivalence import seed_contributions, set_ratios, typical_interval
from analysis.estimate import Interval
from analysis.iso_sharpness import iso_sharpness
from analysis.mediation import mediation, sign_agreement
from analysis.reliability import PairedRuns, paired_runs
from analysis.stats import seeds_needed
from analysis.synthetic import CAUSE_R2, SHARE, StudyDesign
from analysis.verdict import decide

SCHEMA = "sam-masks/benchmarks/verdict_calibration/1"
PROCESSES = 2
ALPHA = 0.05
WRONG = {
    "full": {"partly", "not explained"},
    "half": {"explained", "not explained"},
    "none": {"explained", "partly"},
    "confounded_runs": {"explained", "partly"},
    "confounded_sweep": {"explained", "partly"},
    "confounded_all": {"explained", "partly"},
}
RELIABILITIES, SEEDS = (0.6, 0.8, 0.9, 1.0), (8, 12)
STRONG = {"gain": 1.5, "reliability": 0.8, "scope": "cell"}
DIGITS = {"gain": 2.0, "noise_sd": 0.7, "seed_sd": 0.7, "reliability": 0.8, "scope": "cell"}


@dataclass(frozen=True)
class Case:
    """A design and the name of the group that it is reported in."""

    group: str
    design: StudyDesign


def cases() -> list[Case]:
    out = []
    for seeds in SEEDS:
        for reliability in RELIABILITIES:
            for scope in ("sweep", "cell") if reliability < 1 else ("cell",):
                shared = {"seeds": seeds, "reliability": reliability, "scope": scope}
                out += [Case("grid", StudyDesign(mechanism=m, **shared)) for m in ("full", "half", "none")]
                out.append(Case("grid", StudyDesign(mechanism="full", curvature=-0.8, **shared)))
        for m in SHARE:
            out.append(Case("strong", StudyDesign(mechanism=m, seeds=seeds, **STRONG)))
            if m.startswith("confounded"):
                out.append(Case("grid", StudyDesign(mechanism=m, seeds=seeds, reliability=0.8, scope="cell")))
            if m in ("full", "none"):
                out.append(Case("digits", StudyDesign(mechanism=m, seeds=seeds, **DIGITS)))
    return out


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def naive_ancova(runs: PairedRuns) -> Interval:
    """Gain at equal measured sharpness, ``gain = seed + direct * arm + b x + a x^2``, all radii, one measurement."""
    x = runs.flatness if runs.repeats is None else runs.repeats[0]
    arm = np.broadcast_to(np.where(runs.in_arm, 0.5, -0.5), x.shape)
    columns = np.stack([c - c.mean(axis=1, keepdims=True) for c in (arm, x, (x - x.mean()) ** 2)], axis=-1)
    y = runs.gain - runs.gain.mean(axis=1, keepdims=True)
    p, q = seed_contributions(np.einsum("scj,sck->sjk", columns, columns), np.einsum("scj,sc->sj", columns, y), 0)
    return typical_interval(set_ratios(p, q), estimate=float(p.sum()), n=runs.n, name="naive")


def one_study(design: StudyDesign, seed: int) -> dict[str, Any]:
    """The word, and for each interval whether it covers and whether it is bounded."""
    chosen = design.chosen
    runs = paired_runs(design.draw(seed), metric="sharpness", arm="arm1", reference="arm0", chosen=chosen)
    iso, within = iso_sharpness(runs), mediation(runs)
    signs = sign_agreement(runs.contrast(runs.gain), runs.contrast(runs.flatness))
    word, _ = decide(within, iso, signs, seeds=runs.n, needed=seeds_needed(1, ALPHA))
    indirect = SHARE[design.mechanism] * design.gain
    direct = design.gain - indirect
    cause = (design.cause_gain_r2, CAUSE_R2) if design.slope_of_cause else (0.0, 0.0)
    checks: dict[str, tuple[Interval | None, float]] = {
        "total": (within.total, design.gain),
        "flattening": (within.flattening, design.flattening),
        "mediation indirect": (within.indirect, indirect),
        "mediation direct": (within.direct, direct),
        "mediation share": (within.share, indirect / design.gain),
        "mediation indirect, true confounding": (within.under_confounding(*cause), indirect),
        "iso interpolated": (iso.interpolated, direct),
        "naive direct": (naive_ancova(runs), direct),
    }
    for name, fit in (("sweep", iso.sweep), ("retest", iso.retest)):
        checks[f"iso {name} direct"] = (fit and fit.direct, direct)
        checks[f"iso {name} indirect"] = (fit and fit.indirect, indirect)
        checks[f"iso {name} share"] = (fit and fit.share, indirect / design.gain)
    found = {k: (covers(i, truth), math.isfinite(i.low)) for k, (i, truth) in checks.items() if i is not None}
    wrong = word in WRONG[design.mechanism]
    if design.mechanism == "confounded_all":
        wrong = wrong and not found["mediation indirect, true confounding"][0]
    return {"word": word, "wrong": wrong, "found": found}


def run_case(case: Case, studies: int) -> dict[str, Any]:
    """Rates over studies. The seeds depend on the design, so that cases are independent and can be run alone."""
    first = zlib.crc32(repr(case.design).encode()) << 20
    found = [one_study(case.design, first + i) for i in range(studies)]
    intervals = {}
    for name in sorted({name for study in found for name in study["found"]}):
        pairs = [study["found"][name] for study in found if name in study["found"]]
        bounded = [covered for covered, is_bounded in pairs if is_bounded]
        intervals[name] = {
            "n": len(pairs),
            "covered": sum(covered for covered, _ in pairs) / len(pairs),
            "bounded": len(bounded) / len(pairs),
        }
    words = Counter(study["word"] for study in found)
    return {
        "group": case.group,
        "design": asdict(case.design),
        "studies": studies,
        "words": {word: count / studies for word, count in sorted(words.items())},
        "wrong": sum(study["wrong"] for study in found) / studies,
        "intervals": intervals,
    }


def select(results: Iterable[dict[str, Any]], group: str, **design: Any) -> list[dict[str, Any]]:
    return [r for r in results if r["group"] == group and all(r["design"][k] == v for k, v in design.items())]


def coverage_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """Coverage of the intervals that the verdict rests on, each at the reliability of what it compares."""
    rows = []
    scopes = {"iso": "sweep", "naive": "sweep", "mediation": "cell", "total": "cell", "flattening": "cell"}
    truths = ("full", "half", "none")
    for name in sorted({name for r in results for name in r["intervals"]} - {"mediation indirect, true confounding"}):
        row: dict[str, Any] = {"interval": name}
        for seeds in SEEDS:
            for reliability in RELIABILITIES:
                scope = scopes[name.split()[0]] if reliability < 1 else "cell"
                chosen = select(results, "grid", seeds=seeds, reliability=reliability, scope=scope)
                parts = [r["intervals"][name] for r in chosen if r["design"]["mechanism"] in truths]
                mean = sum(p["covered"] * p["n"] for p in parts) / sum(p["n"] for p in parts)
                bounded = sum(p["bounded"] * p["n"] for p in parts) / sum(p["n"] for p in parts)
                least = min(p["covered"] for p in parts)
                row[f"n={seeds} R={reliability:g}"] = f"{100 * mean:.1f} ({100 * least:.1f})" + (
                    f" {100 * (1 - bounded):.0f}%inf" if bounded < 0.995 else ""
                )
        rows.append(row)
    return pd.DataFrame(rows).set_index("interval")


def word_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for r in results:
        d = r["design"]
        truth = d["mechanism"] + (" (curved)" if d["curvature"] else "")
        design = {"group": r["group"], "truth": truth, "n": d["seeds"], "R": f"{d['reliability']:g} {d['scope']}"}
        shares = {word: f"{100 * r['words'].get(word, 0):.1f}" for word in ("explained", "partly", "not explained")}
        rows.append(design | shares | {"wrong": f"{100 * r['wrong']:.1f}"})
    return pd.DataFrame(rows).set_index("group")


def matters_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """How often "the mask still matters" is concluded where the gain runs fully through sharpness, percent."""
    rows = []
    for seeds in SEEDS:
        for reliability in RELIABILITIES:
            scope = "sweep" if reliability < 1 else "cell"
            (r,) = select(
                results, "grid", seeds=seeds, reliability=reliability, scope=scope, mechanism="full", curvature=0.0
            )
            rows.append(
                {"n": seeds, "R": reliability}
                | {
                    how: round(100 * (1 - r["intervals"][how]["covered"]), 1)
                    for how in ("naive direct", "iso sweep direct", "iso retest direct")
                }
            )
    return pd.DataFrame(rows).set_index(["n", "R"])


def environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "pandas": pd.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "processes": PROCESSES,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdict_calibration", description="Error rates.")
    parser.add_argument("--studies", type=int, default=500, help="studies per design")
    parser.add_argument("--json", type=Path, help="write every rate and the environment to this file")
    options = parser.parse_args(arguments)
    if options.studies < 1:
        parser.error("--studies must be at least 1")
    started, before = time.perf_counter(), environment()
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes
    todo = cases()
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run_case, todo, [options.studies] * len(todo)))
    report = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": before,
        "settings": {"studies": options.studies, "confidence": 1 - ALPHA},
        "seconds": round(time.perf_counter() - started, 1),
        "cases": results,
    }
    with pd.option_context("display.width", 250, "display.max_columns", 20, "display.max_rows", 200):
        for title, table in (
            ("Words, percent of studies", word_table(results)),
            ("Coverage of 95 % intervals, percent (least of four truths)", coverage_table(results)),
            ("Mask still matters, percent; the gain runs fully through sharpness", matters_table(results)),
        ):
            print(f"{title}\n{table}\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
