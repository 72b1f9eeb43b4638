"""Does the mask generalise better because it finds flatter minima? The verdict in words, by fixed rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from analysis.association import Association, SecondaryMetric, associations, secondary_metrics
from analysis.equivalence import MARGIN_POINTS, Equivalence, equivalence
from analysis.estimate import Interval
from analysis.iso_sharpness import ASSUMPTIONS as ISO_ASSUMPTIONS
from analysis.iso_sharpness import IsoSharpness, iso_sharpness
from analysis.mediation import ASSUMPTIONS as MEDIATION_ASSUMPTIONS
from analysis.mediation import Mediation, SignAgreement, mediation, sign_agreement
from analysis.reliability import Reliability, paired_runs, reliability
from analysis.stats import seeds_needed, sign_flip_p
from masks.errors import InputError, unknown_name

Word = Literal["explained", "partly", "not explained", "not identified", "too few seeds"]


@dataclass(frozen=True)
class Verdict:
    """The verdict on one arm against one reference, with every number that it rests on.

    Attributes:
        word: "explained", "partly", "not explained", "not identified" or "too few seeds"; see :func:`decide`.
        reasons: what decided it.
        lines: the verdict for a reader.
        arm: the arm whose gain is to be explained.
        reference: the arm that it is compared to.
        metric: the primary metric, named beforehand.
        seeds: number of seeds.
        seeds_needed: with fewer no result could pass.
        confidence: of every interval here: ``1 - alpha / num_contrasts``.
        margin: of equivalence, points.
        p_total: two-sided sign-flip p value of the total gain, not adjusted for ``num_contrasts``.
        equivalence: of the total gain with 0, at level ``alpha / num_contrasts``.
        reliability: of the primary metric within seeds and within cells; empty where it was not measured twice.
        signs: test 1, over the pairs at the chosen radii.
        iso: test 2.
        mediation: test 3; holds the total gain and the flattening.
        secondary: the other metrics.
        associations: rank correlations of the metrics that all runs have; empty where none were asked for.
        assumptions: what tests 2 and 3 take for granted.
    """

    word: Word
    reasons: tuple[str, ...]
    lines: tuple[str, ...]
    arm: str
    reference: str
    metric: str
    seeds: int
    seeds_needed: int
    confidence: float
    margin: float
    p_total: float
    equivalence: Equivalence
    reliability: tuple[Reliability, ...]
    signs: SignAgreement
    iso: IsoSharpness
    mediation: Mediation
    secondary: tuple[SecondaryMetric, ...]
    associations: tuple[Association, ...]
    assumptions: tuple[str, ...]


def verdict(
    frame: pd.DataFrame,
    *,
    arm: str,
    reference: str,
    primary: str,
    chosen: Mapping[str, float] | None = None,
    secondary: Sequence[str] = (),
    margin: float = MARGIN_POINTS,
    alpha: float = 0.05,
    num_contrasts: int = 1,
    min_robustness: float = 0.1,
    resamples: int = 1999,
) -> Verdict:
    """Judge whether the gain of one arm over another runs through sharpness.

    Args:
        frame: the study, one row per run; see :mod:`analysis.reliability`.
        arm: the arm whose gain is to be explained.
        reference: the arm that it is compared to.
        primary: the one metric, named beforehand, that the verdict rests on.
        chosen: for each arm with several radii the one at which the gain is reported, chosen on other data.
        secondary: further metrics, reported with Holm's adjustment.
        margin: largest gain that does not matter, points, fixed beforehand.
        alpha: the rate at which the verdict may claim something false.
        num_contrasts: how many contrasts the study judges; each gets ``alpha / num_contrasts`` (Bonferroni).
        min_robustness: see :func:`decide`.
        resamples: of the associations; 0 leaves them out.

    Raises:
        InputError: a study that is not complete, or settings out of range; see :func:`analysis.reliability.run_grid`,
            :func:`paired_runs`, :func:`associations`.
    """
    for metric in secondary:
        if metric not in frame.columns:
            raise InputError(unknown_name("column", metric, map(str, frame.columns)))
    if primary in secondary or len(set(secondary)) < len(secondary):
        raise InputError(f"a metric is named twice: {', '.join([primary, *secondary])}")
    if not 0 <= min_robustness <= 1:
        raise InputError(f"min_robustness must lie in [0, 1], got {min_robustness}")
    needed = seeds_needed(num_contrasts, alpha)
    level = alpha / num_contrasts
    runs = paired_runs(frame, metric=primary, arm=arm, reference=reference, chosen=chosen)
    iso, within = iso_sharpness(runs, confidence=1 - level), mediation(runs, confidence=1 - level)
    gains = runs.contrast(runs.gain)
    signs = sign_agreement(gains, runs.contrast(runs.flatness), confidence=1 - level)
    equal = equivalence(gains, margin=margin, alpha=level, name=f"gain of {arm} over {reference}, points")
    word, reasons = decide(
        within, iso, signs, seeds=runs.n, needed=needed, margin=margin, min_robustness=min_robustness
    )
    both = frame.loc[frame["arm"].isin([arm, reference])]
    whole = [m for m in secondary if np.isfinite(pd.to_numeric(frame[m], errors="coerce")).all()]
    repeated = runs.repeats is not None and len(runs.radii) > 1
    return Verdict(
        word=word,
        reasons=reasons,
        lines=_lines(word, reasons, f"{arm} against {reference}, {runs.n} seeds, by {primary}", within, iso, equal),
        arm=arm,
        reference=reference,
        metric=primary,
        seeds=runs.n,
        seeds_needed=needed,
        confidence=1 - level,
        margin=margin,
        p_total=sign_flip_p(gains),
        equivalence=equal,
        reliability=(reliability(both, primary), reliability(both, primary, scope="within_cell")) if repeated else (),
        signs=signs,
        iso=iso,
        mediation=within,
        secondary=secondary_metrics(
            frame, secondary, arm=arm, reference=reference, chosen=chosen, confidence=1 - level
        ),
        associations=associations(frame, [primary, *whole], resamples=resamples) if resamples else (),
        assumptions=ISO_ASSUMPTIONS + MEDIATION_ASSUMPTIONS,
    )


def decide(
    within: Mediation,
    iso: IsoSharpness,
    signs: SignAgreement,
    *,
    seeds: int,
    needed: int,
    margin: float = MARGIN_POINTS,
    min_robustness: float = 0.1,
) -> tuple[Word, tuple[str, ...]]:
    """The verdict's word and its reasons. The first rule that holds decides; "above" and "below" are of intervals.

    | rule | holds if | word |
    | --- | --- | --- |
    | 1 | fewer seeds than any result could pass with | too few seeds |
    | 2 | total gain not above 0: nothing to explain | not identified |
    | 3 | flattening below 0: the arm is sharper, by this metric | not explained |
    | 4 | test 2 or 3 not decided, or a share cannot be bounded at all | not identified |
    | 5 | test 2 contradicts itself: an interaction not 0, or far from the interpolation | not identified |
    | 6 | in every split indirect above 0 and direct above 0; and evidence of flatness (*) | partly |
    | 7 | in every split share above 1/2; test 2's direct within +-margin; and evidence of flatness (*) | explained |
    | 8 | in every split share below 1/2; test 2's direct above 0 and its indirect below the margin | not explained |
    | 9 | else | not identified |

    The splits of the gain are test 2's (corrected by "sweep" and by "retest") and test 3's. (*) flattening above 0; a
    common cause must explain at least ``min_robustness`` of the variance of both flatness and gain to bring test 3's
    slope to 0; and test 1 does not show flatter runs to be worse.

    As every split must agree, a wrong claim needs all of them wrong: its rate stays below alpha if EITHER rho acts on
    error through sharpness only (test 2) OR runs of the same arm and rho have no common cause of sharpness and error
    (test 3). Where both fail together, "explained" may be said; then the sensitivity analysis of test 3 is what covers
    it. See ``benchmarks/verdict_calibration.py``.

    Args:
        within: test 3.
        iso: test 2.
        signs: test 1.
        seeds: number of seeds.
        needed: number of seeds from which a result could pass.
        margin: points.
        min_robustness: in [0, 1].
    """
    if seeds < needed:
        return "too few seeds", (f"{seeds} seeds; with fewer than {needed} no result could pass",)
    if not within.total.low > 0:
        return "not identified", ("there is no gain to explain: the interval of the total gain is not above 0",)
    if within.flattening.high < 0:
        return "not explained", ("the arm's minima are sharper, not flatter, by this metric",)
    undecided = tuple(part.reason for part in (iso, within) if not part.decided)
    if undecided:
        return "not identified", undecided
    fits = [estimate for estimate in (iso.sweep, iso.retest) if estimate is not None]
    shares = [*(fit.share for fit in fits), within.share]
    known = [share for share in shares if share is not None and math.isfinite(share.low)]
    if len(known) < len(shares):
        return "not identified", ("the share of the gain through sharpness cannot be bounded",)
    contradictions = _contradictions(iso)
    if contradictions:
        return "not identified", contradictions
    missing = _missing_evidence(within, signs, min_robustness)
    parts = [within.indirect, within.direct, *(fit.indirect for fit in fits), *(fit.direct for fit in fits)]
    if all(part.low > 0 for part in parts) and not missing:
        return "partly", ("in every split both parts of the gain, through sharpness and not, are above 0",)
    negligible = all(max(-fit.direct.low, fit.direct.high) < margin for fit in fits)
    if all(share.low > 0.5 for share in known) and negligible and not missing:
        return "explained", (
            "in every split more than half of the gain goes through sharpness, and at equal sharpness the arms differ "
            f"by less than {margin:g} points",
        )
    unmoved = all(fit.direct.low > 0 and fit.indirect.high < margin for fit in fits)
    if all(share.high < 0.5 for share in known) and unmoved:
        return "not explained", (
            "in every split less than half of the gain goes through sharpness, along the sweep less than "
            f"{margin:g} points, and at equal sharpness the arm is still better",
        )
    return "not identified", (*_disagreement(known[:-1], known[-1]), *missing)


def _contradictions(iso: IsoSharpness) -> tuple[str, ...]:
    out = []
    for fit in (iso.sweep, iso.retest):
        if fit is not None and not fit.interaction.low <= 0 <= fit.interaction.high:
            out.append(f"the mask's effect at equal sharpness depends on the sharpness (interaction, {fit.correction})")
    straight, fit = iso.interpolated, iso.sweep
    if straight and fit and (straight.low > fit.direct.high or straight.high < fit.direct.low):
        out.append("interpolation and covariance analysis disagree on the gain at equal sharpness")
    return tuple(out)


def _missing_evidence(within: Mediation, signs: SignAgreement, min_robustness: float) -> tuple[str, ...]:
    out = []
    if not within.flattening.low > 0:
        out.append("the arm is not shown to be flatter")
    if within.robustness_low < min_robustness:
        out.append(
            f"a common cause of R2 {within.robustness_low:.2f} with sharpness and error could make the link between "
            f"runs ({min_robustness:g} is asked for)"
        )
    if signs.agreement < signs.null_low:
        out.append("within the contrast flatter runs are worse: signs agree less often than at random")
    return tuple(out)


def _disagreement(sweep: Sequence[Interval], within: Interval) -> tuple[str, ...]:
    """What the two routes say each for itself, where together they decide nothing."""

    def says(share: Interval) -> str:
        return "more than half" if share.low > 0.5 else "less than half" if share.high < 0.5 else "either side of half"

    along = {says(share) for share in sweep}
    text = " or ".join(sorted(along))
    if {*along, says(within)} == {"more than half", "less than half"}:
        return (
            f"the evidence conflicts: through sharpness goes {text} of the gain along the sweep, but {says(within)} "
            "between runs of the same arm and rho; one of them has another cause",
        )
    return (f"through sharpness goes {text} of the gain along the sweep, {says(within)} between runs of the same cell",)


def _lines(
    word: Word, reasons: Sequence[str], title: str, within: Mediation, iso: IsoSharpness, equal: Equivalence
) -> tuple[str, ...]:
    lines = [
        f"{title}: {word.upper()}.",
        *(f"Because {reason}." for reason in reasons),
        f"Total gain {_shown(within.total)} points"
        + (f"; equivalent to 0 within {equal.margin:g}" if equal.equivalent else "")
        + f"; flatter by {_shown(within.flattening)} log units of sharpness.",
    ]
    for fit in (iso.sweep, iso.retest):
        if fit is not None:
            lines.append(
                f"At equal sharpness ({fit.correction}): {_shown(fit.direct)} points; the rest {_shown(fit.indirect)}."
            )
    undone = f"; a common cause of R2 {within.robustness_low:.2f} with sharpness and error could make it all"
    lines.append(
        f"Mediation within seeds: {_shown(within.indirect)} points through sharpness"
        + (undone if within.robustness_low > 0 else "")
        + f"; {_shown(within.direct)} points not."
    )
    return tuple(lines)


def _shown(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return "[unbounded]"
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
