"""How often the verdict errs, and how often its intervals cover, on synthetic studies of known truth.

    python -m benchmarks.verdict_calibration [--studies 1000] [--processes 1] [--json FILE]

Words: how often each word is said of each truth, and how often it is wrong. A word is wrong that says more than half of
a share that is not (see ``WRONG``), or explains a gain that is not there; under "confounded_all", where sharpness is a
mere sign of a cause that acts everywhere and no analysis of these data can tell, only if the sensitivity analysis with
the true strength of that cause does not cover the truth either.

Coverage: of 95 % intervals, over the truths "full", "half", "none" and a curved "full"; the least and the greatest one
of these in brackets. Shares are given, and so counted, only where the interval of the total gain excludes zero. Two
causes make intervals wider than 95 %, by construction. With 6 seeds there are 64 sign patterns, and the only interval
short of the whole line is the one of 62 / 64 = 96.9 %. An interval is unbounded where the data do not identify the
estimand (Fieller): the part of them that is bounded stands beside, and where most are not, coverage says little.

Mask still matters: how often the gain at equal sharpness differs from 0 where all of it runs through sharpness;
"naive" is the analysis of covariance over the whole sweep with one measurement of sharpness, as it is, and the same
intervals.

Every rate in the file stands with its Monte Carlo interval (Wilson, 95 %) and the number of studies it is over.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
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
from scipy import stats

from analysis.equivalence import seed_contributions, set_ratios, typical_interval
from analysis.estimate import Interval
from analysis.iso_sharpness import iso_sharpness
from analysis.mediation import mediation, sign_agreement
from analysis.reliability import PairedRuns, paired_runs
from analysis.stats import seeds_needed
from analysis.synthetic import CAUSE_R2, SHARE, StudyDesign
from analysis.verdict import decide

SCHEMA = "sam-masks/benchmarks/verdict_calibration/2"
ALPHA = 0.05
WRONG = {
    "full": {"partly", "not explained"},
    "half": {"explained", "not explained"},
    "none": {"explained", "partly"},
    "confounded_runs": {"explained", "partly"},
    "confounded_sweep": {"explained", "partly"},
    "confounded_all": {"explained", "partly"},
}
CLAIMS = {"explained", "partly", "not explained"}
RELIABILITIES, SEEDS = (0.6, 0.8, 0.95), (6, 8, 12)
BAND = [0.93, 0.97]
STRONG = {"gain": 1.5, "reliability": 0.8, "scope": "cell"}
DIGITS = {"gain": 2.0, "noise_sd": 0.7, "seed_sd": 0.7, "reliability": 0.8, "scope": "cell", "test_images": 700}
FOUR_RADII = {"radii": 4, "step": 0.7, "flattening": 0.5, "reliability": 0.8, "scope": "cell"}
BASELINE = {"gain": 0.6, "reliability": 0.8, "scope": "cell", "baseline": True}
Rate = list[float]


@dataclass(frozen=True)
class Case:
    """A design and the name of the group that it is reported in."""

    group: str
    design: StudyDesign


def cases() -> list[Case]:
    """ "grid" and "confounded" over reliabilities and seeds, "no gain" as well; the rest with 8 seeds."""
    out = []
    for seeds in SEEDS:
        for reliability in RELIABILITIES:
            for scope in ("cell", "sweep"):
                shared = {"seeds": seeds, "reliability": reliability, "scope": scope}
                out += [Case("grid", StudyDesign(mechanism=m, **shared)) for m in ("full", "half", "none")]
                if scope == "cell":
                    out.append(Case("grid", StudyDesign(mechanism="full", curvature=-0.8, **shared)))
                    out.append(Case("no gain", StudyDesign(mechanism="none", gain=0.0, **shared)))
                    out += [Case("confounded", StudyDesign(mechanism=m, **shared)) for m in SHARE if "confounded" in m]
    out += [Case("strong", StudyDesign(mechanism=m, **STRONG)) for m in SHARE]
    out += [Case("digits", StudyDesign(mechanism=m, **DIGITS)) for m in ("full", "half", "none")]
    out += [Case("baseline", StudyDesign(mechanism=m, **BASELINE)) for m in ("full", "half", "none")]
    out += [Case("four radii", StudyDesign(mechanism=m, **FOUR_RADII)) for m in ("full", "half", "none")]
    out.append(Case("no flattening", StudyDesign(mechanism="none", flattening=0.0, scope="cell")))
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


def wrong_words(design: StudyDesign) -> set[str]:
    return WRONG[design.mechanism] if design.gain else CLAIMS


def one_study(design: StudyDesign, seed: int) -> dict[str, Any]:
    """The word, for each interval whether it covers and whether it is bounded, and whether test 1 finds anything."""
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
        "mediation indirect, true confounding": (within.under_confounding(*cause), indirect),
        "iso interpolated": (iso.interpolated, direct),
        "naive direct": (naive_ancova(runs), direct),
    }
    for name, fit in (("sweep", iso.sweep), ("retest", iso.retest)):
        checks[f"iso {name} direct"] = (fit and fit.direct, direct)
        checks[f"iso {name} indirect"] = (fit and fit.indirect, indirect)
    if design.gain:
        checks["mediation share"] = (within.share, indirect / design.gain)
        for name, fit in (("sweep", iso.sweep), ("retest", iso.retest)):
            checks[f"iso {name} share"] = (fit and fit.share, indirect / design.gain)
    found = {k: (covers(i, truth), math.isfinite(i.low)) for k, (i, truth) in checks.items() if i is not None}
    wrong = word in wrong_words(design)
    if design.mechanism == "confounded_all":
        wrong = wrong and not found["mediation indirect, true confounding"][0]
    return {"word": word, "wrong": wrong, "found": found, "signs": signs.p <= ALPHA}


def rate(hits: int, n: int) -> Rate:
    """The rate and its Monte Carlo interval, Wilson's at 95 %."""
    interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
    return [round(v, 4) for v in (hits / n, float(interval.low), float(interval.high))]


def run_case(case: Case, studies: int) -> dict[str, Any]:
    """Rates over studies. The seeds depend on the design, so that cases are independent and can be run alone."""
    first = zlib.crc32(repr(case.design).encode()) << 20
    found = [one_study(case.design, first + i) for i in range(studies)]
    intervals = {}
    for name in sorted({name for study in found for name in study["found"]}):
        pairs = [study["found"][name] for study in found if name in study["found"]]
        intervals[name] = {
            "n": len(pairs),
            "covered": rate(sum(covered for covered, _ in pairs), len(pairs)),
            "bounded": round(sum(bounded for _, bounded in pairs) / len(pairs), 4),
        }
    words = Counter(study["word"] for study in found)
    return {
        "group": case.group,
        "design": asdict(case.design),
        "studies": studies,
        "words": {word: rate(count, studies) for word, count in sorted(words.items())},
        "wrong": rate(sum(study["wrong"] for study in found), studies),
        "signs_p_below_alpha": rate(sum(study["signs"] for study in found), studies),
        "intervals": intervals,
    }


def select(results: Iterable[dict[str, Any]], group: str, **design: Any) -> list[dict[str, Any]]:
    return [r for r in results if r["group"] == group and all(r["design"][k] == v for k, v in design.items())]


def coverage(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Coverage of each interval over the truths of "grid", at the reliability of what it compares."""
    rows = []
    scopes = {"iso": "sweep", "naive": "sweep", "mediation": "cell", "total": "cell", "flattening": "cell"}
    grid = select(results, "grid")
    for name in sorted({name for r in grid for name in r["intervals"]} - {"mediation indirect, true confounding"}):
        for seeds in SEEDS:
            for reliability in RELIABILITIES:
                chosen = select(grid, "grid", seeds=seeds, reliability=reliability, scope=scopes[name.split()[0]])
                parts = [r["intervals"][name] for r in chosen if name in r["intervals"]]
                n = sum(p["n"] for p in parts)
                if not n:  # no share in so few studies
                    continue
                covered = rate(sum(round(p["covered"][0] * p["n"]) for p in parts), n)
                rows.append(
                    {
                        "interval": name,
                        "seeds": seeds,
                        "reliability": reliability,
                        "n": n,
                        "covered": covered,
                        "least": min(p["covered"][0] for p in parts),
                        "greatest": max(p["covered"][0] for p in parts),
                        "bounded": round(sum(p["bounded"] * p["n"] for p in parts) / n, 4),
                        "in_band": BAND[0] <= covered[0] <= BAND[1],
                    }
                )
    return rows


def coverage_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        unbounded = f" {100 * (1 - row['bounded']):.0f}%inf" if row["bounded"] < 0.995 else ""
        shown = f"{100 * row['covered'][0]:.1f} ({100 * row['least']:.1f}-{100 * row['greatest']:.1f}){unbounded}"
        cells.setdefault(row["interval"], {})[f"n={row['seeds']} R={row['reliability']:g}"] = shown
    return pd.DataFrame(cells).T


def word_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for r in results:
        d = r["design"]
        truth = d["mechanism"] + (" (curved)" if d["curvature"] else "")
        design = {"group": r["group"], "truth": truth, "n": d["seeds"], "R": f"{d['reliability']:g} {d['scope']}"}
        shares = {
            word: f"{100 * r['words'].get(word, [0.0])[0]:.1f}" for word in ("explained", "partly", "not explained")
        }
        wrong = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in r["wrong"]))
        rows.append(design | shares | {"wrong": wrong})
    return pd.DataFrame(rows).set_index("group")


def matters(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How often "the mask still matters" is concluded where the gain runs fully through sharpness."""
    rows = []
    for seeds in SEEDS:
        for reliability in RELIABILITIES:
            (r,) = select(
                results, "grid", seeds=seeds, reliability=reliability, scope="sweep", mechanism="full", curvature=0.0
            )
            row: dict[str, Any] = {"seeds": seeds, "reliability": reliability}
            for how in ("naive direct", "iso sweep direct", "iso retest direct"):
                covered = r["intervals"][how]["covered"]
                row[how] = [round(1 - covered[k], 4) for k in (0, 2, 1)]
            rows.append(row)
    return rows


def matters_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    shown = [
        {
            k: "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in v)) if isinstance(v, list) else v
            for k, v in row.items()
        }
        for row in rows
    ]
    return pd.DataFrame(shown).set_index(["seeds", "reliability"])


def environment(processes: int) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "pandas": pd.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "processes": processes,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdict_calibration", description="Error rates.")
    parser.add_argument("--studies", type=int, default=1000, help="studies per design")
    parser.add_argument("--processes", type=int, default=1, help="processes to share the work")
    parser.add_argument("--json", type=Path, help="write every rate and the environment to this file")
    options = parser.parse_args(arguments)
    if min(options.studies, options.processes) < 1:
        parser.error("--studies and --processes must be at least 1")
    started, before = time.perf_counter(), environment(options.processes)
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes
    todo = cases()
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run_case, todo, [options.studies] * len(todo)))
    covered, still = coverage(results), matters(results)
    words = word_table(results)
    defaults = asdict(StudyDesign())
    for r in results:
        r["design"] = {k: v for k, v in r["design"].items() if v != defaults[k] or k == "mechanism"}
    report = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": before,
        "settings": {
            "studies": options.studies,
            "confidence": 1 - ALPHA,
            "attained_confidence": {str(n): round(attained(n), 4) for n in SEEDS},
            "band": BAND,
            "common_cause_r2": CAUSE_R2,
            "wrong_words": {mechanism: sorted(wrong) for mechanism, wrong in WRONG.items()},
            "design_unless_said_otherwise": defaults,
        },
        "notes": [part.replace("\n", " ") for part in (__doc__ or "").strip().split("\n\n")[2:]],
        "seconds": round(time.perf_counter() - started, 1),
        "mask_still_matters": still,
        "coverage": covered,
        "cases": results,
    }
    with pd.option_context("display.width", 250, "display.max_columns", 20, "display.max_rows", 200):
        for title, table in (
            ("Words, percent of studies", words),
            ("Coverage of 95 % intervals, percent (least to greatest of the truths)", coverage_table(covered)),
            ("Mask still matters, percent; the gain runs fully through sharpness", matters_table(still)),
        ):
            print(f"{title}\n{table}\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(dumps(report))
    return report


def attained(n: int) -> float:
    """Confidence of the sign-flip interval of n seeds: the least attainable one not below the nominal."""
    return 1 - 2 * math.floor(ALPHA / 2 * 2**n + 1e-9) / 2**n


def dumps(report: dict[str, Any]) -> str:
    """Indented, but each list of numbers and each innermost object on one line."""
    text = json.dumps(report, indent=1)
    for innermost in (r"\[[^][{}]*\]", r"\{[^{}]*\}"):
        text = re.sub(innermost, lambda part: re.sub(r"\s*\n\s*", " ", part[0]), text)
    return text + "\n"


if __name__ == "__main__":
    main()
