"""What a comparison's records say of sharpness: verdicts, every radius of a sweep, rank correlations over arms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from studies.claims import estimate
from studies.tables import markdown, reported

_FEW = 6


def flatness(verdicts: list[dict[str, Any]]) -> str:
    """Per contrast of a sweep: gain and its parts, and the word of the verdict."""
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
                "interaction, points per log unit": _interaction(iso),
                "verdict": one["word"],
            }
            | _with_every_radius(one)
        )
    first = verdicts[0]
    left_out = "".join(f" {note.replace('LEFT OUT', 'Left out')}." for note in first["left_out"])
    because = "\n".join(
        f"- {one['arm']} - {one['reference']}: {one['word']}, because {'; and '.join(one['reasons'])}."
        for one in verdicts
    )
    return (
        f"{markdown(rows)}\n\nOf the verdicts:\n\n{because}\n\nThe table of verdicts is by {first['metric']}; n = "
        f"{first['seeds']} seeds; gain and flatter by: at the radii chosen; intervals by sign flips over seeds at "
        f"{100 * first['confidence']:.4g} % (95 % over the contrasts together, not over metrics); flatter by: "
        f"difference of the natural logarithms, mean over {averaged(first)}; through sharpness and not: mediation "
        "within seeds, unbounded where sharpness varies too little between runs of one arm and radius; at equal "
        "sharpness: analysis of covariance over the radii of both arms in the range of sharpness that both have, - "
        "where that is not decided; interaction: where its interval leaves 0 out, the curves of the arms are not "
        f"parallel, and the column before it decides nothing.{left_out}"
    )


def by_metric(verdicts: list[dict[str, Any]]) -> str:
    """How much flatter one arm of each contrast is than the other, by every metric."""
    first = verdicts[0]
    found = [
        {one["metric"]: one["mediation"]["flattening"]}
        | {other["metric"]: other["flattening"] for other in one["secondary"]}
        for one in verdicts
    ]
    rows = [
        {"flatter by, log units": metric}
        | {f"{one['arm']} - {one['reference']}": estimate(of[metric]) for one, of in zip(verdicts, found, strict=True)}
        for metric in found[0]
    ]
    return (
        f"{markdown(rows)}\n\nDifferences of the natural logarithms at the radii chosen, mean over {averaged(first)}; "
        f"the primary metric first; n = {first['seeds']} seeds; intervals by sign flips over seeds at "
        f"{100 * first['confidence']:.4g} %, not corrected for the number of metrics."
    )


def averaged(one: dict[str, Any]) -> str:
    """What a run's sharpness is a mean of in a verdict."""
    return "seeds and both measurements" if one["mediation"]["corrected"] else "seeds"


def _interaction(iso: dict[str, Any] | None) -> str:
    """An arm of a single radius has none."""
    return "-" if iso is None or iso["interaction"]["value"] is None else estimate(iso["interaction"])


def _with_every_radius(one: dict[str, Any]) -> dict[str, str]:
    """The same with collapsed radii, where the verdict has left some out."""
    if "every_radius" not in one:
        return {}
    every = one["every_radius"]
    iso = every["iso"]
    return {
        "at equal sharpness, with collapsed radii": "-" if iso is None else estimate(iso["direct"]),
        "interaction, with collapsed radii": _interaction(iso),
        "verdict with collapsed radii": every["word"],
    }


def radii(records: Path, left_out: list[str]) -> str:
    """Every radius of a sweep on the report's seeds: how good and how sharp, which was chosen, which left out."""
    study = json.loads((records / "study.json").read_text(encoding="utf-8"))
    metric = study["measure"]["metrics"].split(",")[0]
    table = pd.read_csv(records / "table.csv", keep_default_na=False, na_values=[""]).set_index("arm")
    chosen = table.rho.fillna(0.0)
    tried = pd.read_csv(records / "trials.csv").set_index(["arm", "rho"]).val_accuracy
    runs = pd.read_csv(records / "runs.csv", keep_default_na=False, na_values=[""], low_memory=False)
    runs = runs[runs.test_accuracy.notna()]
    twice = f"{metric}_repeat" in runs
    rows = []
    order = {arm: place for place, arm in enumerate(table.index)}
    for (arm, rho), of in sorted(runs.groupby(["arm", "rho"]), key=lambda cell: (order[cell[0][0]], cell[0][1])):
        sharp = [
            np.exp(np.log(of[[name, f"{name}_repeat"][: 1 + twice]]).to_numpy().mean())
            for name in (metric, "lambda_max")
        ]
        out = any(note.startswith(f"LEFT OUT: {arm} at rho {rho:g}:") for note in left_out)
        rows.append(
            {
                "arm": str(arm),
                "rho": f"{rho:.3g}" if rho else "-",
                "n": str(len(of)),
                "": "chosen" if rho and rho == chosen[arm] else "left out" if out else "",
                "validation, tuning seeds, %": f"{100 * tried[arm, rho]:.2f}" if (arm, rho) in tried.index else "-",
                "validation, report's seeds, %": f"{100 * of.val_accuracy.mean():.2f}",
                "test accuracy, %": f"{100 * of.test_accuracy.mean():.2f}",
                "training error, %": f"{100 * of.train_error.mean():.1f}",
            }
            | {name: f"{value:.3g}" for name, value in zip((metric, "lambda_max"), sharp, strict=True)}
        )
    return (
        f"{markdown(rows)}\n\nEvery radius: means over n seeds, of tuning seeds over those; sharpness: geometric means "
        f"over seeds{' and both measurements' * twice}."
    )


def association(records: Path) -> str:
    """Rank correlation, over the arms trained for as long as the base optimizer, of sharpness and accuracy, and within
    each of several methods; of few arms none."""
    study = json.loads((records / "study.json").read_text(encoding="utf-8"))
    metric = study["measure"]["metrics"].split(",")[0]
    same = {arm["name"] for arm in study["config"]["arms"] if arm["epochs_factor"] == 1}
    runs = reported(records)
    means = runs[runs.arm.isin(same)].groupby("arm")[["test_accuracy", metric, "train_error"]].mean()
    methods = means.index.str.rpartition("/").get_level_values(0)
    groups = {f"the {len(means)} arms": means}
    if len(set(methods) - {""}) > 1:
        groups |= {f"{len(of)} under {name}": of for name, of in means.groupby(methods) if name}
    found = [
        f"{sharpness:+.2f} and {fit:+.2f} over {name}"
        for name, of in groups.items()
        if len(of) >= _FEW
        for sharpness, fit in [of.corr("spearman").iloc[0, 1:]]
    ]
    if not found:
        return ""
    return (
        f"Rank correlation (Spearman) of the arms' mean test accuracy with their mean {metric}, and with their mean "
        f"training error on the labels trained on: {'; '.join(found)}. Arms trained for as many epochs as "
        "the base optimizer, at their chosen radii; exploratory, no claim rests on it."
    )
