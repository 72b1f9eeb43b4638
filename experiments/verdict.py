"""The verdict on a comparison: from its folder, for every contrast asked for, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis import PRIMARY
from analysis.equivalence import MARGIN_POINTS
from analysis.estimate import Interval
from analysis.metrics import MIDDLE, resolve
from analysis.reliability import REPEAT
from analysis.verdict import Verdict, verdict, verdicts
from experiments.config import BASELINE
from experiments.equal_loss import NotReached, at_equal_loss
from experiments.record import finite
from experiments.study import COLLAPSED, INVERSE, Study, load_frame, load_study
from masks.errors import InputError, unknown_name

__all__ = ["Judgement", "VerdictOptions", "as_json", "as_text", "judge", "load_frame"]

At = Literal["end", "equal_train_loss"]
NAMED_M, NAMED_IMAGES = 128, 1024
RANKS = (
    "Kendall's tau, and Spearman's rho given the controls, with test error and gap, all arms (above 0: sharper is "
    "worse;\ngap: test error minus train error on the labels named)"
)


@dataclass(frozen=True)
class VerdictOptions:
    """What is judged, and by which metric.

    Args:
        folder: folder of a comparison, as sam-masks compare made it.
        contrasts: pairs ARM-REFERENCE separated by commas (default: norm-all and norm-none; without an arm norm, each
            main arm against none).
        primary: the one metric that the verdict rests on, named beforehand (default:
            apgd_linf_adaptive_normalised@0.002).
        secondary: further metrics, separated by commas (default: all others that the runs have).
        margin: largest gain that does not matter, percentage points, fixed beforehand.
        alpha: rate at which the verdict may claim something false, over all contrasts.
        at: sharpness of the final weights, or where each run reached the training loss that all of the contrast
            reached (needs compare --measure-every).
        collapsed: percentage points of validation accuracy that a radius larger than the one chosen may cost; those
            that cost more are left out (100 keeps all).
        json: print everything as JSON.
    """

    folder: str
    contrasts: str | None = None
    primary: str | None = None
    secondary: str | None = None
    margin: float = MARGIN_POINTS
    alpha: float = 0.05
    at: At = "end"
    collapsed: float = COLLAPSED
    json: bool = False


@dataclass(frozen=True)
class Judgement:
    """The verdicts on a study.

    Attributes:
        folder: of the study.
        primary: the metric that they rest on.
        at: "end" or "equal_train_loss".
        chosen: the radius of each arm, chosen on validation data.
        verdicts: one for each contrast that could be judged.
        measured: how the primary metric was measured; see :class:`experiments.study.Study`.
        levels: the training loss at which a contrast was compared, by "arm-reference"; empty at the end.
        epochs: the first and the last epoch at whose end a run had reached it, likewise.
        not_decided: why a contrast could not be judged, likewise.
        notes: what was left out of the study, and what it cannot show.
    """

    folder: str
    primary: str
    at: str
    chosen: dict[str, float]
    verdicts: tuple[Verdict, ...]
    measured: dict[str, Any]
    levels: dict[str, float]
    epochs: dict[str, tuple[int, int]]
    not_decided: dict[str, str]
    notes: tuple[str, ...]


def judge(
    folder: Path | str,
    *,
    contrasts: Sequence[str] = (),
    primary: str | None = None,
    secondary: Sequence[str] | None = None,
    margin: float = MARGIN_POINTS,
    alpha: float = 0.05,
    at: At = "end",
    collapsed: float = COLLAPSED,
    resamples: int = 1999,
) -> Judgement:
    """Judge the contrasts of a comparison; see :class:`VerdictOptions` and :func:`analysis.verdict.verdict`.

    Args:
        folder: of the comparison.
        contrasts: as ``"norm-all"``; none for the default ones.
        primary: None for the default one.
        secondary: None for all others that the runs have.
        margin, alpha, at, collapsed: see :class:`VerdictOptions`.
        resamples: of the rank correlations; 0 leaves them out.

    Raises:
        InputError: the folder holds no comparison, an arm or metric that is not there, an arm whose chosen radius was
            left out because a run diverged, settings out of range, fewer than 2 seeds.
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, got {alpha}")
    if not (math.isfinite(margin) and margin > 0):
        raise InputError(f"margin must be a positive finite number of percentage points, got {margin}")
    if not collapsed > 0:
        raise InputError(f"collapsed must be a positive number of percentage points, got {collapsed}")
    study = load_study(Path(folder), collapsed)
    metric = _primary(study, primary)
    pairs = [_pair(study, text) for text in contrasts] or _default_contrasts(study)
    for arm in dict.fromkeys(arm for pair in pairs for arm in pair):
        _check_chosen(study, arm)
    others = [_known(study, name) for name in secondary or ()]
    if secondary is None:
        others = [m for m in study.metrics if m != metric]
    settings: dict[str, Any] = {
        "primary": metric, "secondary": others, "chosen": study.chosen, "margin": margin, "alpha": alpha
    }  # fmt: skip
    levels: dict[str, float] = {}
    epochs: dict[str, tuple[int, int]] = {}
    not_decided: dict[str, str] = {}
    if at == "end":
        found = verdicts(study.frame, pairs, resamples=resamples, **settings)
    else:
        judged = []
        for arm, reference in pairs:
            try:
                frame, level, when = at_equal_loss(study, (arm, reference))
            except NotReached as error:
                not_decided[f"{arm}-{reference}"] = str(error)
                continue
            levels[f"{arm}-{reference}"], epochs[f"{arm}-{reference}"] = level, when
            judged.append(
                verdict(frame, arm=arm, reference=reference, num_contrasts=len(pairs), resamples=0, **settings)
            )
        found = tuple(judged)
    return Judgement(
        folder=str(folder),
        primary=metric,
        at=at,
        chosen=study.chosen,
        verdicts=found,
        measured=study.settings[metric],
        levels=levels,
        epochs=epochs,
        not_decided=not_decided,
        notes=tuple(_limits(study, metric, pairs)),
    )


def _primary(study: Study, name: str | None) -> str:
    if name is not None:
        metric = _known(study, name)
        if metric.startswith(INVERSE) and study.frame[metric].isna().any():
            raise InputError(
                f"larger {name} is flatter, so the verdict needs its inverse, and it is not positive in "
                f"{int(study.frame[metric].isna().sum())} of {len(study.frame)} runs; name another one with --primary"
            )
        return metric
    if PRIMARY in study.metrics:
        return PRIMARY
    raise InputError(
        f"the runs lack the primary metric {PRIMARY} (compare measures it with --metrics {PRIMARY} --sharpness-m 128 "
        f"--images 1024); they have {', '.join(study.metrics)}: name one with --primary"
    )


def _known(study: Study, name: str) -> str:
    """The metric's column: its inverse, where larger is flatter."""
    if name.endswith(f"@{MIDDLE}"):  # as compare takes it
        (name,) = resolve([name])
    metric = INVERSE + name if INVERSE + name in study.metrics else name
    if metric not in study.metrics:
        raise InputError(unknown_name("metric of the runs", name, study.metrics))
    return metric


def _pair(study: Study, text: str) -> tuple[str, str]:
    """Arm and reference of "arm-reference"; names of arms may hold a "-" themselves."""
    parts = text.split("-")
    splits = [("-".join(parts[:i]).strip(), "-".join(parts[i:]).strip()) for i in range(1, len(parts))]
    known = [pair for pair in splits if set(pair) <= set(study.arms)]
    if len(known) == 1:
        return known[0]
    if known or not splits:
        raise InputError(f"contrast {text!r} must be ARM-REFERENCE, for two of the arms {', '.join(study.arms)}")
    unknown = next(name for name in splits[0] if name not in study.arms)
    raise InputError(f"contrast {text!r}: {unknown_name('arm', unknown, study.arms)}")


def _default_contrasts(study: Study) -> list[tuple[str, str]]:
    if "norm" in study.arms:
        return [("norm", reference) for reference in ("all", BASELINE) if reference in study.arms]
    return [(arm, BASELINE) for arm in study.arms if arm != BASELINE and arm not in study.controls]


def _check_chosen(study: Study, arm: str) -> None:
    rho = study.chosen.get(arm, 0.0)
    if not ((study.frame["arm"] == arm) & (study.frame["rho"] == rho)).any():
        why = study.left_out.get((arm, rho), "none of its runs is there")
        raise InputError(
            f"arm {arm} cannot be judged at its chosen radius {rho:g}: {why}; name other contrasts with --contrasts"
        )


def _limits(study: Study, metric: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """What is left out of the study, and what it was not made for."""
    notes = [f"LEFT OUT: {arm} at rho {rho:g}: {why}" for (arm, rho), why in study.left_out.items()]
    if len(study.codes) > 1:
        made = ", ".join(f"{code}: {n} runs" for code, n in sorted(study.codes.items()))
        notes.append(f"MIXED CODE: the runs were made by {len(study.codes)} versions of the code ({made})")
    notes += _measured_notes(study, metric)
    arms = dict.fromkeys(arm for pair in pairs for arm in pair)
    radii = {arm: study.frame.loc[study.frame["arm"] == arm, "rho"].nunique() for arm in arms if arm in study.chosen}
    single = [arm for arm, number in radii.items() if number < 2]
    if single:
        notes.append(
            f"NO SWEEP: one radius of {', '.join(single)} was trained on the report's seeds; the test at equal "
            "sharpness needs all of them: the same sam-masks compare with --sweep adds them"
        )
    if metric + REPEAT not in study.frame.columns:
        notes.append(
            f"NOT REPEATED: {metric} was measured once; its reliability needs compare --repeats 2 "
            "and twice as many training images as --sharpness-m"
        )
    return notes


def _measured_notes(study: Study, metric: str) -> list[str]:
    """Where the primary metric is not the one named beforehand, or not measured alike."""
    how = study.settings[metric]
    notes = []
    if (metric, how.get("m"), how.get("images")) != (PRIMARY, NAMED_M, NAMED_IMAGES):
        notes.append(
            f"NOT AS NAMED: the primary metric named beforehand is {PRIMARY}, m = {NAMED_M} on {NAMED_IMAGES:,} "
            f"images; here {metric}, {_sizes(how)}"
        )
    mixed = [seed for seed, digests in how["data_digests"].items() if len(digests) > 1]
    if mixed:
        notes.append(f"MIXED DATA: runs of seed {', '.join(mixed)} were measured on different images")
    return notes


def _sizes(how: dict[str, Any]) -> str:
    size = f"m = {how['m']}" if "m" in how else "m not in the records"
    return f"{size} on {how['images']:,} training images" if "images" in how else f"{size}, images not in the records"


def describe_primary(judgement: Judgement) -> str:
    """What the primary metric was measured on, in one line."""
    how = judgement.measured
    noise = how.get("label_noise")
    labels = "as given" + ("" if noise is None else f" ({100 * noise:g} % redrawn at random)")
    digests = [digest[:8] for found in how["data_digests"].values() for digest in found]
    data = f"; data {', '.join(digests)}, by seed" if digests else ""
    return f"Primary metric {judgement.primary}: {_sizes(how)}, labels {labels}{data}."


def as_json(judgement: Judgement) -> Any:
    """Everything in plain values; numbers that are not finite are None."""
    return finite(asdict(judgement))


def as_text(judgement: Judgement) -> str:
    """The verdicts, the table of tests, reliability, rank correlations, assumptions and notes."""
    found = judgement.verdicts
    blocks = [describe_primary(judgement)]
    for one in found:
        name = f"{one.arm}-{one.reference}"
        level = judgement.levels.get(name)
        where = []
        if level is not None:
            first, last = judgement.epochs[name]
            where = [
                f"Sharpness where the run reached training loss {level:.4g} (epochs {first} to {last}); test error of "
                "the final weights."
            ]
        blocks.append("\n".join([one.lines[0], *where, *one.lines[1:]]))
    blocks += [f"{name}: NOT DECIDED.\nBecause {reason}." for name, reason in judgement.not_decided.items()]
    if found:
        family = "p Holm: over contrasts, for secondary metrics over contrasts and metrics."
        if judgement.at != "end":
            family = "p Bonferroni: times the number of contrasts, for secondary metrics after Holm over metrics."
        blocks.append(f"Tests ({100 * found[0].confidence:g} % intervals)\n{_plain(tests(judgement))}\n{family}")
        reliable = reliabilities(judgement)
        if len(reliable):
            blocks.append(f"Test-retest reliability (disjoint images, other probe seed)\n{_plain(reliable)}")
        ranks = correlations(judgement)
        if len(ranks):
            blocks.append(f"{RANKS}\n{_plain(ranks)}")
        blocks.append("\n".join(["Assumptions", *(f"- {line}" for line in found[0].assumptions)]))
    notes = [*judgement.notes, *dict.fromkeys(note for one in found for note in one.notes)]
    radii = ", ".join(f"{arm} {rho:g}" for arm, rho in judgement.chosen.items())
    notes.append(f"Radii, chosen on validation images of other seeds: {radii}")
    blocks.append("\n".join(["Notes", *(f"- {note.rstrip('.')}." for note in notes)]))
    return "\n\n".join(blocks)


def tests(judgement: Judgement) -> pd.DataFrame:
    """One line per test: contrast, what is tested, interval, p value, and p adjusted where several are one family.

    At the end by Holm; at equal training loss every contrast has runs of its own and is adjusted by Bonferroni.
    """
    adjusted = "p Holm" if judgement.at == "end" else "p Bonferroni"
    lines = []
    for one in judgement.verdicts:
        within, iso = one.mediation, one.iso
        rows: list[tuple[str, Interval | None, float, float]] = [
            ("total gain, points", within.total, one.p_total, one.gain.p_holm),
            ("flatter by, log units", within.flattening, within.p_flattening, math.nan),
            *(
                (f"gain at equal sharpness ({fit.correction})", fit.direct, fit.p_direct, math.nan)
                for fit in (iso.sweep, iso.retest)
                if fit is not None
            ),
            ("gain through sharpness, within seeds", within.indirect, within.p_indirect, math.nan),
        ]
        for other in one.secondary:
            rows += [
                (f"{other.metric}: flatter by", other.flattening, other.raw[0], other.p_flattening),
                (f"{other.metric}: gain at equal sharpness", other.direct, other.raw[2], other.p_direct),
                (f"{other.metric}: gain through sharpness", other.indirect, other.raw[1], other.p_indirect),
            ]
        for what, interval, p, p_holm in rows:
            if interval is not None:
                ends = (interval.value, interval.low, interval.high)
                lines.append((f"{one.arm}-{one.reference}", what, *ends, p, p_holm))
    return pd.DataFrame(lines, columns=["contrast", "test", "estimate", "low", "high", "p", adjusted])


def reliabilities(judgement: Judgement) -> pd.DataFrame:
    """One line per contrast, metric and scope."""
    lines = [
        (f"{v.arm}-{v.reference}", r.metric, r.scope.replace("_", " "), r.value, r.low, r.high, r.error_sd)
        for v in judgement.verdicts
        for r in v.reliability
    ]
    return pd.DataFrame(lines, columns=["contrast", "metric", "scope", "reliability", "low", "high", "error sd"])


def correlations(judgement: Judgement) -> pd.DataFrame:
    """Kendall's tau of each metric with test error and gaps, and the partial rank correlations given the controls."""
    shown = {"test_error": "test error", "gap_given": "gap, labels as given", "gap_clean": "gap, clean labels"}
    lines = [
        (a.metric, shown[a.target], a.coefficient, a.scope.replace("_", " "), a.value, a.low, a.high, a.p, a.p_holm)
        for a in (judgement.verdicts[0].associations if judgement.verdicts else ())
        if a.coefficient == "partial"
        or (a.coefficient == "kendall" and (a.target == "test_error" or a.scope == "within_seed"))
    ]
    columns = ["metric", "with", "coefficient", "scope", "value", "low", "high", "p", "p Holm"]
    return pd.DataFrame(lines, columns=columns)


def _plain(table: pd.DataFrame) -> str:
    def shown(value: Any) -> Any:
        if isinstance(value, str):
            return value
        return "-" if not np.isfinite(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"

    return table.map(shown).to_string(index=False)
