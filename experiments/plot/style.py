"""How figures look: a mask has the same colour and mark in every figure of every report. Returns SVG text."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from itertools import product
from typing import TYPE_CHECKING, Any

from experiments.config import Arm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008), told apart under the common colour-vision deficiencies; then three darker ones.
BLACK, ORANGE, BLUE, SKY = "#000000", "#E69F00", "#0072B2", "#56B4E9"
VERMILION, GREEN, PURPLE = "#D55E00", "#009E73", "#CC79A7"
OLIVE, VIOLET, GREY = "#8A7F00", "#7F3C8D", "#7A7A7A"
BUILT_IN = {
    "none": (BLACK, "o"),
    "all": (ORANGE, "s"),
    "norm": (BLUE, "D"),
    "no_norm": (PURPLE, "X"),
    "random": (SKY, "^"),
    "random_depth": (OLIVE, "*"),
    "magnitude": (VERMILION, "v"),
    "fisher": (GREEN, "P"),
    "gradient": (VIOLET, "<"),
    "snip": (GREY, ">"),
    "dynamic": (VERMILION, "h"),
    "parameters": (BLUE, "p"),
    "file": (GREY, "d"),
}
MARKERS = "oDs^vPX*<>hpdH8"
NARROW = 5
"""Ratio of the ends of a logarithmic axis below which its ticks are evenly spaced numbers."""
LINES = ("-", "--", ":", "-.")
_COLOURS = (ORANGE, BLUE, SKY, VERMILION, GREEN, PURPLE, OLIVE, VIOLET, GREY)
_POOL = [place for place in product(_COLOURS, "H8dph") if place not in BUILT_IN.values()]


@dataclass(frozen=True)
class Style:
    """Colour, mark and dashes of an arm."""

    colour: str
    marker: str
    line: str = "-"


def mask_marks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of masks: fixed for the built-in ones, by a hash of its name for any other.

    Two others of one hash, a rare case, get different ones in the order of their names.
    """
    out = {name: BUILT_IN[name] for name in names if name in BUILT_IN}
    for name in sorted(set(names) - set(out)):
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % len(_POOL)
        places = [_POOL[(start + i) % len(_POOL)] for i in range(len(_POOL))]
        out[name] = next((place for place in places if place not in out.values()), places[0])
    return out


def styles(arms: Iterable[Arm]) -> dict[str, Style]:
    """Style of each arm: the colour is its mask's; arms of one mask differ in marks and dashes."""
    arms = tuple(arms)
    by_mask = {arm.name: re.split("[:@]", arm.mask, maxsplit=1)[0] for arm in arms}
    marks = mask_marks(dict.fromkeys(by_mask.values()))
    out: dict[str, Style] = {}
    for name, mask in by_mask.items():
        colour, marker = marks[mask]
        turn = sum(by_mask[other] == mask for other in out)
        first, n = MARKERS.index(marker) + turn, len(MARKERS)
        places = product(range(len(LINES)), range(n))
        wanted = [Style(colour, MARKERS[(first + i) % n], LINES[(turn + j) % len(LINES)]) for j, i in places]
        out[name] = next((style for style in wanted if style not in out.values()), wanted[0])
    return out


def label(name: str) -> str:
    """The name as text: matplotlib reads formulas between dollar signs and hides labels with a leading underscore."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def new(width: float = 7.2, height: float = 3.6, columns: int = 1, rows: int = 1, **shared: Any) -> tuple[Figure, Any]:
    """A figure and its axes, inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **shared)
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes


def logarithmic(axes: Any) -> None:
    """A logarithmic x axis with plain numbers; for axes that hold their data."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > NARROW * low else MaxNLocator(5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.3g}")


def epochs(axes: Any, what: str) -> None:
    """An x axis of whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(what)


def legend(axes: Any) -> None:
    """Beside the axes, where it hides nothing."""
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as SVG text with a title and a description; the same figure gives the same bytes.

    Args:
        name: unique on the page: identifiers begin with it.
        title, description: for readers that cannot see it.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "sam-masks", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    head, _, rest = text.partition(">")
    words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return f'{head} role="img" aria-label="{escape(title)}">{words}{rest}'


def dots(axes: Any, x: list[float], y: list[float], style: Style, **more: Any) -> None:
    """Marks without a line."""
    axes.plot(x, y, linestyle="", marker=style.marker, color=style.colour, **more)
