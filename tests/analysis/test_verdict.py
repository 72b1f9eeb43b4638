"""The rules of the verdict one by one, and how often they err on studies of known truth."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis.estimate import Interval
from analysis.iso_sharpness import IsoEstimate, IsoSharpness
from analysis.mediation import Mediation, sign_agreement
from analysis.stats import sign_flip_p
from analysis.synthetic import StudyDesign
from analysis.verdict import decide, verdict
from benchmarks import verdict_calibration as calibration
from benchmarks.verdict_calibration import Case, run_case
from masks.errors import InputError

AGREE = sign_agreement([1, 1, 1, 1, 1, 1, -1, 1], [1, 1, 1, 1, 1, 1, 1, 1])


def around(value: float, half: float = 0.1) -> Interval:
    return Interval("x", value, value - half, value + half, 0.95, math.nan, math.nan, 8)


def split(direct: float, indirect: float, half: float = 0.1) -> IsoEstimate:
    share = around(indirect / (direct + indirect), half)
    return IsoEstimate("sweep", around(direct, half), around(indirect, half), share, around(1), around(0), 0.5)


def evidence(direct: float, indirect: float, half: float = 0.1) -> tuple[Mediation, IsoSharpness]:
    """All three splits say the same."""
    one = split(direct, indirect, half)
    within = Mediation(
        True, "", True, around(direct + indirect), around(0.5), around(1), around(0), one.indirect, one.direct,
        one.share, 0.01, 0.01, 1.0, 0.6, 0.4,
    )  # fmt: skip
    return within, IsoSharpness(True, "", 0, 1, 4, 4, one, one, one.direct)


def word(within: Mediation, iso: IsoSharpness, signs=AGREE, seeds: int = 8, **settings) -> str:
    return decide(within, iso, signs, seeds=seeds, needed=6, **settings)[0]


EXPLAINED, PARTLY, NOT = evidence(0.0, 1.0), evidence(0.5, 0.5), evidence(1.0, 0.0)


def test_the_clear_cases():
    assert word(*EXPLAINED) == "explained"
    assert word(*PARTLY) == "partly"
    assert word(*NOT) == "not explained"


def test_rule_1_too_few_seeds_goes_before_all():
    assert word(*EXPLAINED, seeds=5) == "too few seeds"
    assert word(*EXPLAINED, seeds=6) == "explained"
    assert word(replace(NOT[0], flattening=around(-1)), NOT[1], seeds=5) == "too few seeds"


def test_rule_2_without_a_gain_there_is_nothing_to_explain():
    for total in (around(0.05), around(-0.5)):
        got, reasons = decide(replace(EXPLAINED[0], total=total), EXPLAINED[1], AGREE, seeds=8, needed=6)
        assert got == "not identified"
        assert "no gain to explain" in reasons[0]


def test_rule_3_a_sharper_arm_is_not_explained_by_flatness_whatever_the_tests_say():
    sharper = replace(EXPLAINED[0], flattening=around(-0.5))
    assert word(sharper, EXPLAINED[1]) == "not explained"
    assert word(sharper, IsoSharpness(False, "no overlap: not decided", 1, 0, 0, 0)) == "not explained"
    assert word(replace(sharper, flattening=around(-0.05)), EXPLAINED[1]) == "not identified"


def test_rule_4_undecided_tests_decide_nothing():
    no_overlap = IsoSharpness(False, "no overlap: not decided", 1, 0, 0, 0)
    for within, _ in (EXPLAINED, PARTLY, NOT):
        got, reasons = decide(within, no_overlap, AGREE, seeds=8, needed=6)
        assert (got, reasons) == ("not identified", ("no overlap: not decided",))
    assert word(replace(NOT[0], decided=False, reason="no repeat"), NOT[1]) == "not identified"
    unbounded = replace(around(0.9), low=-math.inf, high=math.inf)
    for share in (None, unbounded):
        assert word(replace(EXPLAINED[0], share=share), EXPLAINED[1]) == "not identified"


@pytest.mark.parametrize("clear", [EXPLAINED, PARTLY, NOT])
def test_rule_5_contradictions_decide_nothing(clear):
    within, iso = clear
    bent = replace(iso.sweep, interaction=around(0.5))
    for changed in (replace(iso, sweep=bent), replace(iso, retest=bent)):
        assert word(within, changed) == "not identified"
    for value in (iso.sweep.direct.value + 0.3, iso.sweep.direct.value - 0.3):
        assert word(within, replace(iso, interpolated=around(value))) == "not identified"


def test_every_split_must_agree():
    """Whatever one split says against the other two, nothing is claimed."""
    cases = {"explained": (0.0, 1.0), "partly": (0.5, 0.5), "not explained": (1.0, 0.0)}
    for name, parts in cases.items():
        within, iso = evidence(*parts)
        for other, wrong in cases.items():
            if other == name:
                continue
            odd = split(*wrong)
            changed = replace(within, indirect=odd.indirect, direct=odd.direct, share=odd.share)
            for got in (word(changed, iso), word(within, replace(iso, sweep=odd, interpolated=odd.direct)),
                        word(within, replace(iso, retest=odd))):  # fmt: skip
                assert got == "not identified", (name, other)
    within, iso = EXPLAINED
    odd = split(1.0, 0.0)
    _, reasons = decide(
        replace(within, indirect=odd.indirect, direct=odd.direct, share=odd.share), iso, AGREE, seeds=8, needed=6
    )
    assert reasons[0].startswith("the evidence conflicts: through sharpness goes more than half of the gain along")


@pytest.mark.parametrize("clear", [EXPLAINED, PARTLY])
def test_flatness_needs_its_own_evidence(clear):
    within, iso = clear
    assert word(replace(within, flattening=around(0.05)), iso) == "not identified"
    assert word(replace(within, robustness_low=0.05), iso) == "not identified"
    assert word(replace(within, robustness_low=0.05), iso, min_robustness=0.01) != "not identified"
    worse = sign_agreement([1, 1, 1, 1, -1, -1, -1, -1], [-1, -1, -1, -1, 1, 1, 1, 1])
    assert worse.agreement < worse.null_low
    assert word(within, iso, worse) == "not identified"


def test_that_sharpness_is_not_the_reason_needs_a_gain_at_equal_sharpness():
    within, iso = NOT
    assert word(within, replace(iso, retest=replace(iso.retest, direct=around(0.05)))) == "not identified"


def test_that_sharpness_is_not_the_reason_needs_no_evidence_of_flatness():
    within, iso = NOT
    assert word(replace(within, flattening=around(0.05), robustness_low=0.0), iso) == "not explained"


def test_explained_is_never_said_beyond_the_margin_or_with_a_direct_part():
    within, iso = evidence(0.0, 1.0, half=0.25)
    assert word(within, iso) == "explained"
    assert word(within, iso, margin=0.25) == "not identified"
    within, iso = evidence(0.15, 1.0)
    assert word(within, iso) == "partly"
    assert word(*evidence(0.05, 1.0)) == "explained"


@pytest.mark.parametrize("half", [0.6, 2.0])
@pytest.mark.parametrize("parts", [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_wide_intervals_decide_nothing(parts, half):
    assert word(*evidence(*parts, half=half)) == "not identified"


def test_that_sharpness_is_not_the_reason_is_never_said_beyond_the_margin():
    within, iso = evidence(1.5, 0.15)
    assert word(within, iso) == "partly"
    within, iso = evidence(1.5, 0.15, half=0.2)
    assert word(within, iso) == "not identified"
    assert word(within, iso, margin=0.4) == "not explained"


def test_widening_all_intervals_never_makes_a_claim_stronger():
    """Wider intervals leave the word or lose it; a part seen but small may become a part not seen and small."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(600):
        direct, indirect = rng.uniform(-0.3, 1.2, 2)
        if abs(direct + indirect) < 0.2:
            continue
        half = rng.uniform(0.02, 0.3)
        before, after = (word(*evidence(direct, indirect, half=k * half)) for k in (1, 1.5))
        seen.add(before)
        if before == "partly" and after == "explained":
            assert direct + 1.5 * half < 0.3
        elif before == "partly" and after == "not explained":
            assert indirect + 1.5 * half < 0.3
        else:
            assert after in (before, "not identified")
    assert seen == {"explained", "partly", "not explained", "not identified"}


# -- whole studies ------------------------------------------------------------------------------------------

STRONG = StudyDesign(seeds=12, gain=1.5, reliability=0.9, scope="cell")


def judge(design: StudyDesign, seed: int = 0, **settings):
    settings = {
        "arm": "arm1",
        "reference": "arm0",
        "primary": "sharpness",
        "chosen": design.chosen,
        "resamples": 0,
    } | settings
    return verdict(design.draw(seed), **settings)


@pytest.mark.parametrize(
    ("mechanism", "expected"), [("full", "explained"), ("half", "partly"), ("none", "not explained")]
)
def test_a_strong_study_is_judged_right(mechanism, expected):
    got = judge(replace(STRONG, mechanism=mechanism))
    assert got.word == expected
    assert got.lines[0] == f"arm1 against arm0, 12 seeds, by sharpness: {expected.upper()}."


def test_a_verdict_holds_all_its_numbers():
    got = judge(STRONG, secondary=("decoy",), resamples=99)
    frame = STRONG.draw(0)
    at = frame[frame.rho == STRONG.chosen["arm0"]].set_index(["arm", "seed"]).test_error
    assert got.mediation.total.value == pytest.approx(100 * (at["arm0"] - at["arm1"]).mean())
    assert got.p_total == sign_flip_p(at["arm0"] - at["arm1"])
    assert got.equivalence.interval.value == pytest.approx(got.mediation.total.value)
    assert [r.scope for r in got.reliability] == ["within_seed", "within_cell"]
    assert got.reliability[1].value == pytest.approx(0.9, abs=0.06)
    assert got.signs.n == 12
    assert {a.metric for a in got.associations} == {"sharpness", "decoy"}
    assert got.secondary[0].metric == "decoy"
    assert got.secondary[0].p_indirect > 0.05
    assert len(got.assumptions) == 5
    assert dataclasses.is_dataclass(got)
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.word = "explained"


def test_the_same_study_gets_the_same_verdict():
    assert judge(STRONG, resamples=99) == judge(STRONG, resamples=99)


def test_a_mirrored_contrast_has_no_gain_to_explain():
    got = judge(STRONG, arm="arm0", reference="arm1")
    assert got.word == "not identified"
    assert "no gain" in got.reasons[0]


def test_sharper_and_better_is_not_explained():
    got = judge(replace(STRONG, flattening=-0.5, mechanism="none"))
    assert got.word == "not explained"
    assert "sharper" in got.reasons[0]


def test_contrasts_widen_the_intervals_and_need_more_seeds():
    one, six = judge(STRONG), judge(STRONG, num_contrasts=6)
    assert six.confidence == pytest.approx(1 - 0.05 / 6)
    assert six.mediation.indirect.low < one.mediation.indirect.low
    assert six.seeds_needed == 8
    few = judge(replace(STRONG, seeds=7), num_contrasts=6)
    assert few.word == "too few seeds"
    assert judge(replace(STRONG, seeds=5)).word == "too few seeds"
    assert "[unbounded]" in judge(replace(STRONG, seeds=5)).lines[2]


def test_studies_without_sweep_or_repeat_are_not_identified():
    frame = STRONG.draw(0)
    settings = {"arm": "arm1", "reference": "arm0", "primary": "sharpness", "resamples": 0}
    single = frame[frame.rho == STRONG.chosen["arm0"]]
    got = verdict(single, **settings)
    assert got.word == "not identified"
    assert "overlap too small" in got.reasons[0] or "no overlap" in got.reasons[0]
    once = verdict(frame.drop(columns="sharpness_repeat"), chosen=STRONG.chosen, **settings)
    assert once.word == "not identified"
    assert once.reliability == ()
    assert "was not measured" in once.reasons[0]


def test_secondary_metrics_that_not_all_runs_have_do_not_stop_the_verdict():
    frame = STRONG.draw(0)
    frame.loc[3, "decoy"] = math.nan
    got = verdict(frame, arm="arm1", reference="arm0", primary="sharpness", chosen=STRONG.chosen, secondary=["decoy"],
                  resamples=99)  # fmt: skip
    assert "decoy: 1 of 144 runs have no finite value" in got.secondary[0].problem
    assert {a.metric for a in got.associations} == {"sharpness"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"primary": "flatness"}, "unknown column 'flatness'"),
        ({"secondary": ["flatness"]}, "unknown column 'flatness'"),
        ({"secondary": ["sharpness"]}, "named twice"),
        ({"margin": 0.0}, "margin > 0"),
        ({"alpha": 0.0}, "alpha"),
        ({"num_contrasts": 0}, "num_contrasts"),
        ({"min_robustness": 2.0}, "min_robustness"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        judge(STRONG, **settings)


# -- calibration, the quick version -------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["full", "half", "none", "confounded_runs", "confounded_sweep", "confounded_all"])
def test_wrong_words_are_rarer_than_alpha(mechanism):
    """80 studies each of two strengths: at a true rate of 5 % more than 14 of 160 has probability 1 %."""
    wrong = right = 0
    for gain, reliability in ((0.6, 0.6), (1.5, 0.9)):
        design = StudyDesign(mechanism=mechanism, seeds=8, gain=gain, reliability=reliability, scope="cell")
        got = run_case(Case("quick", design), 80)
        wrong += round(80 * got["wrong"])
        right += round(
            80 * got["words"].get({"full": "explained", "half": "partly"}.get(mechanism, "not explained"), 0)
        )
    assert wrong <= scipy_stats.binom.ppf(0.99, 160, 0.05)
    if not mechanism.startswith("confounded"):
        assert right >= 40  # it does say something


def test_the_full_calibration_prints_and_writes(tmp_path, capsys, monkeypatch):
    few = [case for case in calibration.cases() if case.design.seeds == 8 and case.design.reliability == 0.6]
    monkeypatch.setattr(calibration, "cases", lambda: few)
    monkeypatch.setattr(calibration, "RELIABILITIES", (0.6,))
    monkeypatch.setattr(calibration, "SEEDS", (8,))
    monkeypatch.setattr(calibration, "ProcessPoolExecutor", Inline)
    report = calibration.main(["--studies", "3", "--json", str(tmp_path / "new" / "out.json")])
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == report
    assert report["environment"]["numpy"] == np.__version__
    assert len(report["cases"]) == 8
    assert "Mask still matters" in capsys.readouterr().out


class Inline:
    """In place of a pool of processes."""

    def __init__(self, *_, **__) -> None: ...

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_) -> None: ...

    map = staticmethod(map)
