"""The figures of memory: where it goes, beside the sizes of cards, and what was predicted of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lit_sparse_profiling.drawing import (
    BLUE,
    GREEN,
    GREY,
    LIGHT,
    MOST_BARS,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    SKY,
    YELLOW,
    Figure,
    axes,
    bars,
    cut_label,
    filled,
    labels,
    merged,
    safe,
)
from lit_sparse_profiling.measures import GIB, PEAK, peak_gib, predicted
from lit_sparse_profiling.reconcile import (
    ALLOCATOR_UNKNOWN,
    BEFORE,
    CONTEXT,
    CONTEXT_UNKNOWN,
    DRIVER_RESIDUE,
    ELSEWHERE,
    KEPT,
    NOT_COUNTED,
    OUTSIDE,
    PROCESS_RESIDUE,
    RESIDUE,
    reconcile,
)
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import Row

OTHER_PHASES = "in loading or evaluation, above the steps"
"""Part of a CPU's resident memory: what other phases of a run hold beyond its steps."""
NEAR = 0.05
"""Share of an axis below which two labels have no room."""
PARTS: Mapping[str, tuple[str, str]] = {
    "frozen weights": (BLUE, ""),
    "trainable weights": (SKY, ""),
    "buffers": (PURPLE, ""),
    "gradients": (ORANGE, ""),
    "optimizer state": (RED, ""),
    "strategy state": (PINK, ""),
    "batch": ("@ink", ""),
    "saved for backward": (GREEN, ""),
    "temporaries": (YELLOW, ""),
    BEFORE: (GREY, ""),
    RESIDUE: (RED, "x"),
    NOT_COUNTED: (GREY, "/"),
    "rounding": (GREY, "."),
    "cached or fragmented": (LIGHT, "\\"),
    ELSEWHERE: (LIGHT, "-"),
    OUTSIDE: (GREY, "\\"),
    KEPT: (GREY, "-"),
    PROCESS_RESIDUE: (PINK, "x"),
    CONTEXT: (GREY, "|"),
    DRIVER_RESIDUE: (PINK, "x"),
    CONTEXT_UNKNOWN: (PINK, "/"),
    ALLOCATOR_UNKNOWN: (GREY, "/"),
    OTHER_PHASES: (LIGHT, "-"),
    "not broken down": (LIGHT, "/"),
}
"""Colour and hatching of each part of the memory: what was measured as a difference is hatched."""


PREDICTED: Mapping[str, Literal["peak", "reserved"]] = {"allocated": "peak", "reserved": "reserved"}
LOOKS = {"allocated": (BLUE, "circle"), "reserved": (ORANGE, "square")}


@dataclass(frozen=True)
class Cards:
    """Sizes of cards to draw beside the memory: the sold GB by their MiB, and the user's own in bytes."""

    sold: Mapping[int, int]
    own: tuple[str, int] | None = None

    @staticmethod
    def of(rows: Sequence[Row]) -> tuple[str, int] | None:
        """Return name and bytes of the device of most records; GPUs before processors. None if none is known."""
        devices = [record.device for row in rows for record in row.records]
        known = [device for device in devices if device is not None and device.memory]
        found = Counter((d.name, d.memory or 0) for d in known if d.kind == "cuda") or Counter(
            (d.name, d.memory or 0) for d in known
        )
        return found.most_common(1)[0][0] if found else None


def memory(rows: Sequence[Row], cards: Cards) -> Figure | None:
    """Return the stacked memory of each row, with lines at the sizes of cards."""
    shown = [row for row in rows if row.status == "oom" or PEAK.median(row.records) is not None]
    shown.sort(key=lambda row: (row.status == "oom", PEAK.median(row.records) or 0))
    shown, cut = shown[:MOST_BARS], len(shown) > MOST_BARS
    if not any(PEAK.median(row.records) for row in shown):
        return None
    names = labels(shown)
    stacks = {name: parts_of(row) for name, row in zip(names, shown, strict=True)}
    found = list(dict.fromkeys(part for part in PARTS for stack in stacks.values() if part in stack))
    data = [_stack(part, stacks) for part in found]
    if out := [name for name, row in zip(names, shown, strict=True) if row.status == "oom"]:
        data.append(_words(out, "out of memory"))
    most = max(sum(max(0, size) for size in stack.values()) for stack in stacks.values()) / GIB
    least = min(sum(min(0, size) for size in stack.values()) for stack in stacks.values()) / GIB
    lines = _card_lines(cards, most, least)
    more = f" The {MOST_BARS} of {len(rows)} that take least." if cut else ""
    sold = ", ".join(map(str, sorted(cards.sold)))
    return Figure(
        "memory",
        "Where the memory goes",
        "Each bar is a way to train, from the weights to all that the process holds at its peak; on a GPU that is what "
        "the driver sees, on a CPU resident memory. Solid parts were counted tensor by tensor. Hatched parts are gaps "
        "between two measurements: the residue is what the allocator gave out beyond the count, and is small when the "
        f"count is right. Dotted lines are the sizes of cards sold with {sold} GB; the thick one is your own.{more}",
        data,
        merged(bars(len(shown), "memory at the peak, GiB", barmode="relative", top=108), lines),
    )


def parts_of(row: Row) -> dict[str, int]:
    """Return the bytes of each part of a row's memory; of repetitions, those of the median peak."""
    measured = sorted(
        (record for record in row.records if peak_gib(record) is not None), key=lambda r: peak_gib(r) or 0
    )
    if not measured:
        return {}
    record = measured[(len(measured) - 1) // 2]
    lines = reconcile(record)
    if not any(line.name == "counted" for line in lines):
        return {"not broken down": round((peak_gib(record) or 0) * GIB)}
    found = {line.name: line.bytes for line in lines if not line.total and line.name != "foreign" and line.bytes}
    rest = round((peak_gib(record) or 0) * GIB) - sum(found.values())
    names = {line.name for line in lines}
    if not names & {"process", "resident at most", "allocator reserved", "reserved at most"}:
        found["not broken down"] = max(0, rest)  # counted, but neither the driver's nor the process's figure is known
    elif "resident at most" in names and rest > 0:  # that is of the steps; the peak is of the whole run
        found[OTHER_PHASES] = rest
    return {part if part in PARTS else "not broken down": size for part, size in found.items()}


def _stack(part: str, stacks: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    colour, hatch = PARTS[part]
    return {
        "type": "bar",
        "orientation": "h",
        "name": part,
        "y": list(stacks),
        "x": [stack.get(part, 0) / GIB for stack in stacks.values()],
        "marker": filled(colour, hatch),
        "hovertemplate": f"%{{y}}<br>{part}: %{{x:.3f}} GiB<extra></extra>",
    }


def _words(names: Sequence[str], text: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "text",
        "y": list(names),
        "x": [0] * len(names),
        "text": [f" {text}"] * len(names),
        "textposition": "middle right",
        "textfont": {"color": "@bad"},
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _card_lines(cards: Cards, most: float, least: float) -> dict[str, Any]:
    """Return lines at cards up to the next above `most` GiB, and at the user's own. The axis begins at `least`."""
    sizes = sorted((mib / 1024, f"{gb} GB") for gb, mib in cards.sold.items())
    above = next((size for size, _ in sizes if size >= most), most)
    right = max(most, above if above < 3 * most else 0) * 1.06
    marks = [(size, name, "@muted", 1) for size, name in sizes if size <= right]
    if cards.own is not None:
        name, size = cards.own[0], cards.own[1] / GIB
        text = f"{cut_label(name, 30)}: {size:.1f} GiB" + (" →" if size > right else "")
        marks = [mark for mark in marks if abs(mark[0] - size) > NEAR * right]
        marks.append((min(size, right), text, "@accent", 3))
    shown, notes, end = [], [], -math.inf
    for at, text, colour, width in marks:
        dash = "dot" if width == 1 else "solid"
        shown.append({"type": "line", "yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1})
        shown[-1]["line"] = {"color": colour, "width": width, "dash": dash}
        if width == 1 and at - end < NEAR * right:
            continue  # no room for its name: the caption has all sizes
        end = at
        place = {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False, "text": safe(text)}
        place |= {"textangle": -90, "yshift": 2} if width == 1 else {"xanchor": "right", "yshift": 46}
        notes.append(place | {"font": {"color": colour, "size": 12}})
    return {"shapes": shown, "annotations": notes, "xaxis": {"range": [least * 1.05, right]}}


def predictions(rows: Sequence[Row], cards: Cards) -> Figure | None:
    """Return the predicted over the measured peaks."""
    records = [record for row in rows for record in row.records]
    series = {
        name: [(record, both) for record in records if (both := predicted(record, what)) is not None]
        for name, what in PREDICTED.items()
    }
    sizes = [size / GIB for found in series.values() for _, both in found for size in both]
    if not sizes:
        return None
    furthest, (told, measured) = max(
        (one for found in series.values() for one in found), key=lambda one: abs(one[1][0] / one[1][1] - 1)
    )
    line = {"x": [0.8 * min(sizes), 1.25 * max(sizes)], "y": [0.8 * min(sizes), 1.25 * max(sizes)]}
    equal = {"type": "scatter", "mode": "lines", "line": {"color": "@muted", "dash": "dot"}, "hoverinfo": "skip"}
    scale = {"xaxis": {"type": "log"}, "yaxis": {"type": "log"}}
    return Figure(
        "predicted",
        "Predicted against measured",
        "The allocator's peak as predicted before the first step, and as it was; on a GPU also what it reserved. "
        "On the dotted line they are equal; below it the prediction was too low. The furthest off is "
        f"{safe(furthest.name)}, by {told / measured - 1:+.1%}.",
        [
            {**equal, **line, "showlegend": False},
            *(_predicted(name, *look, series[name]) for name, look in LOOKS.items() if series[name]),
        ],
        merged(axes("measured, GiB", "predicted, GiB"), scale),
    )


def _predicted(
    name: str, colour: str, symbol: str, found: Sequence[tuple[RunRecord, tuple[int, int]]]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [measured / GIB for _, (_, measured) in found],
        "y": [told / GIB for _, (told, _) in found],
        "customdata": [[safe(record.name), (told / measured - 1) * 100] for record, (told, measured) in found],
        "marker": {"color": colour, "symbol": symbol, "size": 10},
        "hovertemplate": (
            f"%{{customdata[0]}}, {name}<br>measured %{{x:.3f}} GiB, predicted %{{y:.3f}} GiB "
            "(%{customdata[1]:+.1f} %)<extra></extra>"
        ),
    }
