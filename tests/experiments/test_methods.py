"""What ``sam-masks methods`` lists: every field of every method against the registry and against what it makes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from experiments.cli import main
from experiments.config import RunConfig
from experiments.methods import describe_methods
from masks.errors import InputError
from masks.spec import MaskSpec
from sam import MethodSpec, list_methods, method_info

NAMES = [info.name for info in list_methods()]
TYPES: dict[str, type | tuple[type, ...]] = {
    **{"method": str, "summary": str, "paper": str, "passes": str, "passes_at_defaults": (int, float)},
    **{"state_per_masked_coordinate": int, "state_per_parameter": int, "rho": float, "tuned_on": str},
    **{"options": dict, "fixes": dict, "does_not_support": list},
}


@pytest.fixture(scope="module")
def listed() -> dict[str, dict[str, Any]]:
    return {one["method"]: one for one in json.loads(describe_methods(as_json=True))}


def test_the_family_is_complete(listed: dict[str, Any]) -> None:
    assert list(listed) == NAMES == sorted(NAMES)
    issue = (
        *("sam", "asam", "sam_on", "ssam_f", "ssam_d", "fisher_sam", "micro_batch_sam", "esam", "friendly_sam"),
        *("vasso", "mup_sam", "universal_sam", "exact_sam", "looksam", "gsam", "wsam", "momentum_sam"),
    )
    assert set(issue) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_there_and_true(name: str, listed: dict[str, dict[str, Any]]) -> None:
    one, info = listed[name], method_info(name)
    assert set(one) == set(TYPES)
    assert {key: type(one[key]) for key in one if not isinstance(one[key], TYPES[key])} == {}
    assert all(one[key].strip() for key in ("summary", "paper", "passes", "tuned_on"))
    assert re.search(r"\b(19|20)\d\d\b", one["paper"])
    assert all(isinstance(limit, str) and limit.strip() for limit in one["does_not_support"])
    assert one["rho"] == info.rho > 0
    # Passes: the text and the number say the same where the text is a number.
    if re.fullmatch(r"[\d.]+", one["passes"]):
        assert float(one["passes"]) == one["passes_at_defaults"]
    assert one["passes_at_defaults"] >= 1
    # Options: written out at their defaults they are the method itself; unknown ones are refused.
    text = ":".join([name, *(f"{key}={option['default']}" for key, option in one["options"].items())])
    assert MethodSpec.parse(text) == MethodSpec(name)
    assert str(MethodSpec.parse(text)) == name
    with pytest.raises(InputError, match="unknown option of method"):
        MethodSpec.parse(f"{name}:no_such_option=1")
    # What it fixes is what a run gets that says nothing, and all that a run may say.
    run = RunConfig(method=name)
    for key, value in one["fixes"].items():
        got = getattr(run, key)
        assert (MaskSpec.parse(got) == MaskSpec.parse(value)) if key == "mask" else got == value
    if not one["fixes"]:
        assert (run.mask, run.norm_scope) == ("norm", "masked")


STATE = {
    "friendly_sam": (1, 0),
    "vasso": (1, 0),
    "looksam": (0, 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_that_of_the_paper(name: str, listed: dict[str, dict[str, Any]]) -> None:
    one = listed[name]
    assert (one["state_per_masked_coordinate"], one["state_per_parameter"]) == STATE.get(name, (0, 0))


def test_passes_at_their_defaults_on_paper(listed: dict[str, dict[str, Any]]) -> None:
    number = {name: one["passes_at_defaults"] for name, one in listed.items()}
    assert number["looksam"] == pytest.approx(1 + 1 / 5)
    assert number["esam"] == pytest.approx(1 + 0.5 + 1 / 3)
    assert number["momentum_sam"] == 1
    assert {number[name] for name in ("sam", "asam", "sam_on", "gsam", "wsam", "ssam_f", "fisher_sam")} == {2}


def test_the_text_says_all_that_json_says(
    listed: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods"]) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, text.splitlines())) <= 110
    sections = dict(zip(re.findall(r"^(\w+)$", text, flags=re.MULTILINE), re.split(r"\n\n", text), strict=True))
    assert list(sections) == NAMES
    for name, section in sections.items():
        said, one = " ".join(section.split()), listed[name]
        for part in (one["summary"], one["paper"], one["passes"], one["tuned_on"], *one["does_not_support"]):
            assert " ".join(part.split()) in said
        for key, option in one["options"].items():
            assert f"{key}={option['default']} ({option['type']})" in said
        for key, value in one["fixes"].items():
            assert f"{key}={value}" in said
        assert f"rho {one['rho']:g} by default" in said
        kept = one["state_per_masked_coordinate"] + one["state_per_parameter"]
        assert ("keeps nothing from step to step" in said) == (kept == 0)
    assert "1 + 1/k per step (1.2 at the defaults)" in " ".join(sections["looksam"].split())
    assert "at the defaults" not in " ".join(sections["sam"].split())


def test_json_on_the_command_line(listed: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == list(listed.values())
