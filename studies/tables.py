"""The table of a comparison's arms and those of a study's claims, from its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from studies.claims import estimate

_NEAR = 10
_FAMILIES = {"ascent": "ascent strength"}
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
    shared = json.loads((records / "every_run.json").read_text(encoding="utf-8"))["test_is_shared"]
    images = "test images that all share" if shared else "images that each draws its test images from"
    measured = json.loads((records / "study.json").read_text(encoding="utf-8"))["measure"]
    diverged = f"; {int(trials.diverged.sum())} of the tuning runs diverged" if trials.diverged.any() else ""
    return (
        f"{markdown(rows)}\n\nn = {n} seeds; 95 % intervals, unadjusted: of accuracy over seeds and test images, of "
        f"gain (over none, paired) Student's t over seeds, given the {images}; p by sign flips, Holm's correction over "
        f"{families}; normalization: share of the mask that is of normalization layers; rho chosen per arm that has "
        f"one from {_range(tried)} radii by the mean validation accuracy of {tries} other seeds, of equals the "
        f"smallest; {_range(near)} of an arm's radii came within {_NEAR} points of its best in it{diverged}; training "
        "error: on the labels trained on; ascent: L(w + eps) - L(w), mean over all steps, nats; lambda_max: of the "
        f"Hessian of the loss on {measured['images']} training images, mean over seeds; cost: operations of a step "
        "over those of none, counted, without building masks."
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


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f} [{100 * low:{sign}.2f}, {100 * high:{sign}.2f}]"


def family(verdicts: list[dict[str, Any]]) -> str:
    """The contrasts of a family whose claim is on several together: each difference of accuracy and of sharpness."""
    first = verdicts[0]
    rows = [
        {
            "contrast": f"{one['arm']} - {one['reference']}",
            "gain, points": estimate(one["mediation"]["total"]),
            "flatter by, log units": estimate(one["mediation"]["flattening"]),
        }
        for one in verdicts
    ]
    return (
        f"{markdown(rows)}\n\nThe family on {_FAMILIES[first['family']]}, flatter by {first['metric']}; n = "
        f"{first['seeds']} seeds; at the radii chosen; intervals by sign flips over seeds at "
        f"{100 * first['confidence']:.4g} % (95 % over the family's {len(rows)} contrasts together)."
    )


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
