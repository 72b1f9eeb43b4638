"""What becomes of a study's claims: decided by the intervals of the verdicts alone, see claims.yaml for the words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


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
                which = {
                    "comparison": name,
                    "method": method,
                    "n": verdict["seeds"],
                    "confidence": verdict["confidence"],
                }
                out.append({**claim, **which, **decided})
    return out
