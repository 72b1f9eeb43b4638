"""A mask as text, there and back."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from masks import Budget, Mask, MaskContext, MaskError, MaskSpec, Schedule, mask_info, register_mask


@pytest.mark.parametrize(
    "text",
    [
        "norm",
        "norm:part=weights",
        "random:exclude_norm=true",
        "random@every=1",
        "fisher",
        "fisher:labels=model:order=smallest:scope=per_layer:exclude_norm=true@every=2",
        "fisher@init",
        "magnitude@after=3",
        "magnitude@every=100steps",
        "parameters:pattern=layer[12].*:role=weight+bias",
        "parameters:role=bias:depth=1/3",
    ],
)
def test_text_there_and_back(text: str) -> None:
    spec = MaskSpec.parse(text)
    assert str(spec) == text
    assert MaskSpec.parse(str(spec)) == spec
    assert spec.info is mask_info(spec.name)


def test_all_options_are_resolved_and_defaults_are_not_written() -> None:
    spec = MaskSpec.parse(" fisher:order=largest@every=1 ")
    assert spec.options == {"labels": "data", "order": "largest", "scope": "global", "exclude_norm": False}
    assert spec.schedule == Schedule("every", 1)
    assert str(spec) == "fisher"
    assert spec == MaskSpec("fisher") == MaskSpec("fisher", {"labels": "data"}, Schedule("every", 1))
    assert MaskSpec("random").schedule == Schedule()
    assert MaskSpec.parse("parameters:role=weight+bias").options["role"] == ("weight", "bias")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown mask ''"),
        ("nrom", "unknown mask 'nrom'; did you mean norm"),
        ("norm:part", "option 'part' of mask norm must be written option=value"),
        ("norm:", "option '' of mask norm must be written option=value"),
        ("norm:prt=weights", "unknown option of mask norm 'prt'; did you mean part"),
        ("norm:part=wieghts", r"option part of mask norm must be both\|weights\|biases, got 'wieghts'"),
        ("norm:part=weights:part=biases", "option part of mask norm is given twice"),
        ("norm@", "unknown schedule ''"),
        ("norm@weekly", "unknown schedule 'weekly'"),
        ("norm@init@init", "unknown schedule 'init@init'"),
    ],
)
def test_unreadable_texts(text: str, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        MaskSpec.parse(text)


@pytest.mark.usefixtures("clean_registry")
def test_every_type_of_option_is_written_as_it_is_read() -> None:
    @register_mask("typed", kind="natural", summary="", source="")
    def build(
        context: MaskContext,
        budget: None,
        *,
        flag: bool = True,
        count: int = 1,
        rate: float = 0.5,
        maybe: str | None = "x",
        names: tuple[str, ...] = ("a",),
        pair: tuple[int, bool] = (1, True),
        choice: Literal["a", 2, None] = "a",
    ) -> Mask:
        return Mask(context.table, (True,) * len(context.table))

    spec = MaskSpec(
        "typed",
        {"flag": False, "count": -3, "rate": 1e-7, "maybe": None, "names": (), "pair": (2, False), "choice": None},
    )
    assert str(spec) == "typed:flag=false:count=-3:rate=1e-07:maybe=none:names=:pair=2+false:choice=none"
    again = MaskSpec.parse(str(spec))
    assert again == spec
    assert [type(value) for value in again.options.values()] == [bool, int, float, type(None), tuple, tuple, type(None)]
    assert MaskSpec.parse("typed:choice=2").options["choice"] == 2
    assert str(MaskSpec("typed", {"names": ["b", "c"]})) == "typed:names=b+c"
    assert str(MaskSpec("typed")) == "typed"


def test_build_passes_a_budget_on_to_budgeted_builders_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    context, budget = MaskContext(model), Budget(5, 28)
    assert MaskSpec.parse("random").build(context, budget).num_kept == 5
    assert MaskSpec.parse("norm:part=biases").build(context, budget).num_kept == 4
    assert MaskSpec.parse("norm").build(context, None).num_kept == 8
    with pytest.raises(MaskError, match="mask random needs a budget"):
        MaskSpec.parse("random").build(context, None)
    smallest = MaskSpec.parse("magnitude:order=smallest").build(context, budget)
    assert smallest.provenance.options == {"order": "smallest", "scope": "global", "exclude_norm": False}
    assert smallest.dense()[3].all()  # the zero biases of the LayerNorm
