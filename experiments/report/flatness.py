"""The section on sharpness: does it go with test error, and what is left of a gain at equal sharpness?"""

from __future__ import annotations

from collections.abc import Iterator

from analysis import paired_runs
from experiments.config import BASELINE
from experiments.measure import LAMBDA_MAX
from experiments.plot import flatness as plot
from experiments.plot.style import Style
from experiments.report.content import Absent, Block, Details, picture, sentences
from experiments.report.findings import Findings
from experiments.study import Study
from experiments.verdict import Judgement, as_text

SWEEP = "the same sam-masks compare with --sweep, into the same folder"


def flatness(findings: Findings, style: dict[str, Style]) -> Iterator[Block]:
    """Scatter plots of the table's two metrics and the primary one, the verdicts, and the curves they rest on."""
    comparison, judgement = findings.comparison, findings.judgement
    n = findings.table.rows[0].n
    metrics = {LAMBDA_MAX: "lambda_max, units of loss / weight^2", comparison.measure.m_sharpness: "m-sharpness, nats"}
    primary = None if judgement is None else judgement.primary
    if primary is not None and primary in comparison.records[BASELINE][0].result["metrics"]:
        metrics.setdefault(primary, f"{primary}, nats")
    for i, (metric, what) in enumerate(metrics.items()):
        name = what.partition(",")[0]
        yield picture(
            plot.scatter(comparison, metric, what, style),
            f"sharpness-{i + 1}",
            f"Test error against {name}",
            f"A dot per run, a mark at each arm's means (of {name} the geometric one where all are positive), without "
            f"an interval; n = {n} seeds per arm at its chosen radius, runs without a value left out. "
            f"{metric} is measured on training images with the labels trained on.",
        )
    if judgement is None or findings.study is None:
        why = findings.absent.get("judgement", findings.absent.get("study", "no verdict was asked for"))
        yield Absent(
            "The comparison at equal sharpness", why, "mend that, or name other arms with --contrasts ARM-REFERENCE"
        )
        return
    yield from _verdicts(findings.study, judgement, style)


def _verdicts(study: Study, judgement: Judgement, style: dict[str, Style]) -> Iterator[Block]:
    for i, one in enumerate(judgement.verdicts):
        yield sentences(one.lines)
        runs = paired_runs(
            study.frame, metric=judgement.primary, arm=one.arm, reference=one.reference, chosen=study.chosen
        )
        if len(runs.radii) < 3:  # one radius each is no curve
            yield Absent(f"{one.arm} and {one.reference} at equal sharpness", one.iso.reason, SWEEP)
            continue
        band = "band: the range of sharpness that both have" if one.iso.decided else f"no band: {one.iso.reason}"
        yield picture(
            plot.equal_sharpness(runs, one.iso, style),
            f"equal-sharpness-{i + 1}",
            f"Test error against sharpness, {one.arm} and {one.reference}",
            f"A mark per radius, joined in their order: mean test error and geometric mean of {judgement.primary} over "
            f"n = {one.seeds} seeds; {band}.",
        )
    yield Details("Tests, reliability and assumptions behind these verdicts (sam-masks verdict)", as_text(judgement))
    yield sentences(judgement.notes)
