"""A mask looks the same everywhere, and arms can be told apart."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from experiments.config import DEFAULT_ARMS, Arm
from experiments.plot.style import BUILT_IN, label, mask_marks, new, styles, svg
from masks import list_masks


def test_built_in_masks_have_marks_of_their_own() -> None:
    assert {info.name for info in list_masks() if info.origin == "sam-masks"} == set(BUILT_IN)
    assert len(set(BUILT_IN.values())) == len(BUILT_IN)


def test_the_default_arms_differ_in_colour_except_those_without_a_mask() -> None:
    found = styles(DEFAULT_ARMS)
    assert found["none"].colour == found["none_2x"].colour
    assert len({style.colour for style in found.values()}) == len(DEFAULT_ARMS) - 1
    assert found["fisher"].colour == BUILT_IN["fisher"][0]


def test_a_mask_has_the_same_marks_in_every_report() -> None:
    alone = mask_marks(["mine"])["mine"]
    assert mask_marks(["all", "norm", "zzz_other", "mine"])["mine"] == alone
    assert alone not in BUILT_IN.values()
    assert alone == ("#0072B2", "p") or alone[1] in "H8dph"
    one, other = (styles([Arm("none", "none"), Arm(name, "norm:part=biases", (1.0,))])[name] for name in ("a", "b"))
    assert one == other


def test_marks_of_a_hundred_others_are_as_many_as_there_are() -> None:
    names = [f"plugin{i}" for i in range(30)]
    assert len(set(mask_marks(names).values())) == 30


def test_arms_of_one_mask_share_its_colour_and_can_be_told_apart() -> None:
    found = styles([Arm(f"arm{i}", "norm", (0.1,)) for i in range(50)])
    assert len(set(found.values())) == 50
    assert {style.colour for style in found.values()} == {BUILT_IN["norm"][0]}
    assert [style.line for style in found.values()][:4] == ["-", "--", ":", "-."]


def test_a_figure_is_xml_with_its_words_and_the_same_each_time() -> None:
    def drawn() -> str:
        figure, axes = new()
        axes.plot([1, 2], [3, 4], "o-", label=label("$x$ _y"))
        axes.set_title(label("_hidden $ & <b>"))
        return svg(figure, "mine", "T <1> & 2", 'D "3"')

    text = drawn()
    assert text == drawn()
    root = ET.fromstring(text)
    names = {child.tag.rpartition("}")[2]: child.text for child in root}
    assert (names["title"], names["desc"]) == ("T <1> & 2", 'D "3"')
    assert root.get("aria-label") == "T <1> & 2"
    assert all(node.get("id", "mine-").startswith("mine-") for node in root.iter())
    shown = ["".join(node.itertext()).lstrip("\u200b") for node in root.iter() if node.tag.endswith("}text")]
    assert "_hidden $ & <b>" in shown
