"""The figures that compare the runs of one model: trade-offs, time, energy, curves."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from lit_sparse_profiling.drawing import (
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    GREY,
    LIGHT,
    MOST_BARS,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    SAND,
    SKY,
    SYMBOLS,
    YELLOW,
    Figure,
    axes,
    bars,
    cut_label,
    device_name,
    filled,
    labels,
    merged,
    one_line,
    safe,
)
from lit_sparse_profiling.measures import ENERGY, FORGETTING, GIB, LOSS, PEAK, SPEED, Measure, loss_name, phase_seconds
from lit_sparse_profiling.memory_figures import Cards, memory, predictions
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import Row
from lit_sparse_profiling.walltime import OTHER

METRICS = "metrics.csv"
MOST_CURVES = 24
MOST_POINTS = 200
"""Points of a curve; more are averaged in groups."""
MOST_LABELS = 10
"""Points of a figure that have their name beside them: all if there are no more, else those that no other beats."""
PHASES = {
    "imports": LIGHT,
    "command line": SAND,
    "data": YELLOW,
    "prediction": "#B15928",
    "model": SKY,
    "loading": SKY,
    "selection": ORANGE,
    "samples": PINK,
    "training": GREEN,
    "evaluation": BLUE,
    "forgetting": RED,
    "examination": GREY,
    "ceilings": "#5E5E5E",
    "saving": PURPLE,
    OTHER: "@muted",
}
"""Colours of known phases; others take those that are left."""


# ---- trade-offs


def tradeoff(rows: Sequence[Row], measure: Measure, name: str, title: str) -> Figure | None:
    """Return a figure of a measure over the peak memory, with the rows that no other beats in both."""
    points = [
        (row, peak, value)
        for row in rows
        if (peak := PEAK.median(row.records)) is not None and (value := measure.median(row.records)) is not None
    ]
    left_out = ""
    if measure is LOSS and points:
        names = Counter(str(loss_name(row.records[0])) for row, _, _ in points)
        # Training batches after a few steps, which is what `bench` has, say little of quality.
        common = max(names, key=lambda name: (name != "train_loss", names[name]))
        others = sum(names.values()) - names[common]
        points = [point for point in points if str(loss_name(point[0].records[0])) == common]
        left_out = f" The loss is {safe(common)}" + (
            f"; {others} runs that have another are left out." if others else "."
        )
    if len(points) < 2:
        return None
    devices = list(dict.fromkeys(device_name(row) for row, _, _ in points))
    data: list[dict[str, Any]] = []
    for device, colour, symbol in zip(devices, cycle(COLOURS), cycle(SYMBOLS), strict=False):
        data += _points([point for point in points if device_name(point[0]) == device], measure, device, colour, symbol)
    best = "high" if measure.better == "high" else "low"
    return Figure(
        name,
        title,
        f"Each point is a way to train, or the median of its repetitions; {best} and left is better. The line joins "
        f"those that no other beats in both, on the same device; the others are hollow.{left_out}",
        data,
        merged(
            axes("peak memory, GiB (lower is better)", f"{measure.title} ({measure.better}er is better)"),
            {"xaxis": {"range": roomy([peak for _, peak, _ in points])}},
        ),
    )


def _points(
    points: Sequence[tuple[Row, float, float]], measure: Measure, device: str, colour: str, symbol: str
) -> Iterator[dict[str, Any]]:
    """Yield the line of the best points, then all of them."""
    best = frontier(points, high=measure.better == "high")
    labelled = {id(row) for row, _, _ in (points if len(points) <= MOST_LABELS else best[:MOST_LABELS])}
    chosen = {id(row) for row, _, _ in best}
    if len(best) > 1:
        yield {
            "type": "scatter",
            "mode": "lines",
            "x": [peak for _, peak, _ in best],
            "y": [value for _, _, value in best],
            "line": {"color": colour, "width": 1.5, "shape": "hv"},
            "showlegend": False,
            "hoverinfo": "skip",
        }
    yield {
        "type": "scatter",
        "mode": "markers+text",
        "name": safe(device),
        "x": [peak for _, peak, _ in points],
        "y": [value for _, _, value in points],
        "text": [safe(cut_label(one_line(row.label), 16)) if id(row) in labelled else "" for row, _, _ in points],
        "textposition": [f"{side} right" for side in sides([(peak, value) for _, peak, value in points])],
        "textfont": {"size": 12},
        "cliponaxis": False,
        "customdata": [safe(one_line(row.label)) for row, _, _ in points],
        "marker": {
            "color": colour,
            "symbol": [symbol if id(row) in chosen else f"{symbol}-open" for row, _, _ in points],
            "size": [12 if id(row) in chosen else 9 for row, _, _ in points],
            "opacity": 1,
            "line": {"width": [0 if id(row) in chosen else 2 for row, _, _ in points]},
        },
        "hovertemplate": f"%{{customdata}}<br>%{{x:.3f}} GiB, %{{y:.4g}} {measure.title}<extra>{safe(device)}</extra>",
    }


def sides(points: Sequence[tuple[float, float]]) -> list[str]:
    """Return for each point on which side its name has most room: away from the nearest other point."""
    spans = [max(axis) - min(axis) or 1.0 for axis in zip(*points, strict=True)]
    found: list[str] = []
    for number, (x, y) in enumerate(points):
        others = [((a - x) / spans[0], (b - y) / spans[1], n) for n, (a, b) in enumerate(points) if n != number]
        _, up, other = min(others, key=lambda one: math.hypot(*one[:2]), default=(0.0, 0.0, number))
        found.append("bottom" if up > 0 or (up == 0 and other < number) else "top")
    return found


def roomy(values: Sequence[float]) -> list[float]:
    """Return the range of an axis with room for a label right of the last point."""
    span = max(values) - min(values) or max(values) or 1
    return [min(values) - 0.08 * span, max(values) + 0.25 * span]


def frontier(points: Sequence[tuple[Row, float, float]], high: bool) -> list[tuple[Row, float, float]]:
    """Return the points, by rising memory, that no other point beats or equals in both."""
    best: list[tuple[Row, float, float]] = []
    for point in sorted(points, key=lambda p: (p[1], -p[2] if high else p[2])):
        if not best or (point[2] > best[-1][2] if high else point[2] < best[-1][2]):
            best.append(point)
    return best


def speed(rows: Sequence[Row], cards: Cards) -> Figure | None:
    """Return tokens per second over memory."""
    return tradeoff(rows, SPEED, "speed", "Memory against speed")


def losses(rows: Sequence[Row], cards: Cards) -> Figure | None:
    """Return the loss over memory."""
    return tradeoff(rows, LOSS, "loss", "Memory against loss")


def forgotten(rows: Sequence[Row], cards: Cards) -> Figure | None:
    """Return forgetting over memory."""
    return tradeoff(rows, FORGETTING, "forgetting", "Memory against forgetting")


# ---- time and energy


def phases(rows: Sequence[Row], cards: Cards) -> Figure | None:
    """Return the seconds of each phase of a run, one after another."""
    shown = [(row, found) for row in rows if row.records and (found := phase_seconds(row.records[0]))][:MOST_BARS]
    if not shown:
        return None
    names = labels([row for row, _ in shown])
    order = list(dict.fromkeys(name for _, found in shown for name in found))
    spare = cycle([colour for colour in COLOURS if colour not in PHASES.values()] or COLOURS)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": safe(name),
            "y": names,
            "x": [found.get(name, 0) for _, found in shown],
            "customdata": [_calls(row.records[0], name) for row, _ in shown],
            "marker": filled(PHASES.get(name) or next(spare), "" if name in PHASES else "/"),
            "hovertemplate": f"%{{y}}<br>{safe(name)}: %{{x:.2f}} s%{{customdata}}<extra></extra>",
        }
        for name in order
    ]
    return Figure(
        "phases",
        "Where the time goes",
        "What the wall time of each run (of repetitions, of the first) was spent on; other lies between the parts. "
        "Selection is what a method does before it trains. Examination is the profiler's, and is not there with "
        "--profile=false.",
        data,
        bars(len(shown), "time, s", barmode="stack"),
    )


def _calls(record: RunRecord, name: str) -> str:
    """Return in words how often a run was in a phase, and its memory then."""
    phase = next((phase for phase in record.phases if phase.name == name), None)
    if phase is None:
        return ""
    peak = phase.peak_reserved or phase.peak_rss
    return f" in {phase.calls} calls" + ("" if peak is None else f"<br>peak memory {peak / GIB:.2f} GiB")


def energies(rows: Sequence[Row], cards: Cards) -> Figure | None:
    """Return the energy of a million tokens."""
    shown = [(row, value) for row in rows if (value := ENERGY.median(row.records)) is not None]
    shown = sorted(shown, key=lambda pair: pair[1])[:MOST_BARS]
    if not shown:
        return None
    return Figure(
        "energy",
        "Energy of a million tokens",
        "Lower is better: the energy of the whole device during the timed steps, from the driver's counter, divided by "
        "the tokens in them without padding. The rest of the computer is not in it. 3,600 kJ are one kWh.",
        [
            {
                "type": "bar",
                "orientation": "h",
                "y": labels([row for row, _ in shown]),
                "x": [value for _, value in shown],
                "marker": filled(GREEN),
                "hovertemplate": "%{y}<br>%{x:,.1f} kJ per million tokens<extra></extra>",
                "showlegend": False,
            }
        ],
        bars(len(shown), "kJ per million tokens"),  # short, for a phone
    )


# ---- curves


def read_metrics(file: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the (step, value) pairs of each column of the metrics.csv beside a record; {} if there is none."""
    path = file.parent / METRICS
    columns: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():  # reading a pipe may not end
        return {}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as lines:
            for line in csv.DictReader(lines):
                for name, text in line.items():
                    pair = number(line.get("step")), number(text)
                    if name not in ("step", "epoch") and pair[0] is not None and pair[1] is not None:
                        columns.setdefault(str(name), []).append((pair[0], pair[1]))
    except (OSError, csv.Error):
        return {}
    return columns


def number(text: Any) -> float | None:
    """Return a finite number in a cell; None if there is none."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MOST_POINTS` points: means of as many neighbours as it takes."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[at : at + size] for at in range(0, len(points), size)] if size else []
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def curves(
    rows: Sequence[Row], columns: Mapping[str, str], name: str, title: str, caption: str, ytitle: str
) -> Figure | None:
    """Return curves over the steps of columns of metrics.csv; the values of `columns` are Plotly's modes."""
    data: list[dict[str, Any]] = []
    shown = 0
    for row in rows:
        for file, record in zip(row.files, row.records, strict=True):
            logged = read_metrics(file) if shown < MOST_CURVES else {}
            found = {column: logged[column] for column in columns if column in logged}
            if not found:
                continue
            style = {"color": COLOURS[shown % len(COLOURS)], "dash": DASHES[shown // len(COLOURS) % len(DASHES)]}
            label = safe(cut_label(record.name if len(row.records) > 1 else one_line(row.label), 40))
            data += [
                _curve(points, columns[column], column, label, style, n == 0)
                for n, (column, points) in enumerate(found.items())
            ]
            shown += 1
    if not data:
        return None
    more = f" The first {MOST_CURVES} runs." if shown >= MOST_CURVES else ""
    return Figure(name, title, caption + more, data, axes("optimizer step", ytitle))


def _curve(
    points: Sequence[tuple[float, float]], mode: str, column: str, label: str, style: dict[str, Any], first: bool
) -> dict[str, Any]:
    kept = thinned(points)
    return {
        "type": "scatter",
        "mode": mode,
        "name": label,
        "legendgroup": label,
        "showlegend": first,
        "x": [step for step, _ in kept],
        "y": [value for _, value in kept],
        "line": {**style, "width": 1.8},
        **({"marker": {"color": style["color"], "size": 9, "symbol": "diamond"}} if "markers" in mode else {}),
        "hovertemplate": f"{label}<br>step %{{x}}: {safe(column)} %{{y:.4f}}<extra></extra>",
    }


def loss_curves(rows: Sequence[Row], cards: Cards) -> Figure | None:
    """Return the losses over the steps."""
    return curves(
        rows,
        {"train_loss": "lines", "heldout_loss": "lines+markers"},
        "curves",
        "Loss during training",
        "Lines are the loss of the training batches, diamonds that of held-out rows where they were scored. A long run "
        "shows means of neighbouring steps.",
        "loss, nats per token (lower is better)",
    )


def memory_course(rows: Sequence[Row], cards: Cards) -> Figure | None:
    """Return the memory peaks over the steps."""
    return curves(
        rows,
        {"peak_memory_gib": "lines"},
        "course",
        "Memory during training",
        "The highest memory since the point before: reserved by torch on a GPU, resident on a CPU. With batches of one "
        "length it is level after the first steps, some of which are the profiler's; a steady rise is a leak.",
        "peak memory, GiB",
    )


ACROSS: Sequence[tuple[str, Callable[[Sequence[Row], Cards], Figure | None], str]] = (
    ("Where the memory goes", memory, "any run of lit-sparse fit or bench that ends"),
    ("Memory against speed", speed, "two runs of one model with timed steps, as lit-sparse bench makes"),
    ("Memory against loss", losses, "two runs of one model that were trained by lit-sparse fit"),
    (
        "Memory against forgetting",
        forgotten,
        "two fits that score other text: the callback Forgetting, or the demo data",
    ),
    ("Where the time goes", phases, "any run of lit-sparse fit or bench that ends"),
    ("Loss during training", loss_curves, "a metrics.csv beside the record, which lit-sparse fit writes"),
    ("Memory during training", memory_course, "a metrics.csv with peak_memory_gib, which lit-sparse fit writes"),
    (
        "Predicted against measured",
        predictions,
        "runs whose record has a prediction: those of lit-sparse fit and bench",
    ),
    ("Energy of a million tokens", energies, "runs on an NVIDIA GPU whose driver counts energy (Volta and later)"),
)
"""Figures that compare runs: title, what makes it, and what would give it where there are no data."""
