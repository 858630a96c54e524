"""Shared parts of the page's figures: their form, which is the plain JSON that Plotly draws, colours, axes and labels.

Colours that depend on the reader's scheme are written as "@ink", "@muted" and so on; the page fills them in.
"""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_sparse_profiling.run_folders import Row

MOST_BARS = 80
"""Bars that a figure has at most: the table has every run."""
LINE = 22
"""Characters in a line of a label."""

# Okabe and Ito's colours, which people with any colour blindness tell apart; two greys beside them.
BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, RED, PINK, GREY, LIGHT, SAND = "#E69F00", "#D55E00", "#CC79A7", "#8C8C8C", "#BDBDBD", "#DDCC77"
PURPLE = "#6A3D9A"
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY, YELLOW)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon")
AXIS: dict[str, Any] = {"automargin": True, "gridcolor": "@grid", "zerolinecolor": "@muted", "linecolor": "@muted"}
COMMON: dict[str, Any] = {
    "height": 420,
    "margin": {"l": 10, "r": 24, "t": 30, "b": 50},
    "xaxis": AXIS,
    "yaxis": AXIS,
    "modebar": {"bgcolor": "rgba(0,0,0,0)"},
    "font": {"color": "@ink", "size": 13, "family": "system-ui, sans-serif"},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "showlegend": False,  # the page has its own, which has room on a phone, too
    "hoverlabel": {"align": "left", "bgcolor": "@paper", "bordercolor": "@muted", "font": {"color": "@ink"}},
}
"""Keys of all layouts."""


@dataclass(frozen=True)
class Figure:
    """A figure: what to draw, and a caption that explains it to someone who sees nothing else.

    Attributes:
        name: Identifier, unique among the figures shown together.
        data: Plotly's traces.
        layout: Plotly's layout, without what is common to all.
    """

    name: str
    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)

    def plotly(self) -> dict[str, Any]:
        """Return the figure as the page draws it, with the layout that all figures share."""
        return {**vars(self), "layout": merged(COMMON, self.layout)}


# ---- layouts


def bars(count: int, xtitle: str, barmode: str = "group", top: int = 20) -> dict[str, Any]:
    """Return the layout of `count` horizontal bars, the first on top."""
    return {
        "barmode": barmode,
        "bargap": 0.3,
        "height": 36 * count + 70 + top,
        "margin": {"t": top},
        "xaxis": {"title": {"text": xtitle}},
        "yaxis": {"autorange": "reversed", "type": "category"},
    }


def axes(xtitle: str, ytitle: str) -> dict[str, Any]:
    """Return the layout of two axes with their titles."""
    return {"xaxis": {"title": {"text": xtitle}}, "yaxis": {"title": {"text": ytitle}}}


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested layouts as one; where both set a key, the second's."""
    both = {
        key: merged(first[key], second[key]) for key in first.keys() & second.keys() if isinstance(first[key], dict)
    }
    return {**first, **second, **both}


def filled(colour: str, hatch: str = "") -> dict[str, Any]:
    """Return a bar's colour and hatching."""
    marker: dict[str, Any] = {"color": colour, "line": {"color": "@paper", "width": 0.5}}
    if hatch:
        marker["pattern"] = {"shape": hatch, "fgcolor": "@ink", "bgcolor": colour, "size": 6, "solidity": 0.25}
    return marker


# ---- texts


def labels(rows: Sequence[Row]) -> list[str]:
    """Return a label of each row, no two alike, in lines that a phone has room for."""
    return unique([wrapped(one_line(row.label)) for row in rows])


def unique(names: Sequence[str]) -> list[str]:
    """Return the names, those that occur again with their number, since Plotly puts equal ones in one place."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return out


def wrapped(text: str) -> str:
    """Return a label in at most two lines, as Plotly's markup."""
    lines = textwrap.wrap(text, LINE) or [""]
    if len(lines) > 2:
        lines[1] = cut_label(f"{lines[1]} {lines[2]}", LINE)
    return "<br>".join(map(safe, lines[:2]))


def safe(text: str) -> str:
    """Return a text that Plotly shows as it is: it takes tags for markup, and %{...} for places to fill."""
    return html.escape(text, quote=False).replace("%{", "% {")


def cut_label(text: str, width: int) -> str:
    """Return a text of at most `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def one_line(label: str) -> str:
    """Return a row's label in one line."""
    return " ".join(label.split())


def device_name(row: Row) -> str:
    """Return the device of a row's runs."""
    device = next((record.device for record in row.records if record.device is not None), None)
    return "unknown device" if device is None else device.name
