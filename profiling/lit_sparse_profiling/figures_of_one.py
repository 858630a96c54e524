"""The figures of one run: its kernels, what its method chose, and its state from switch to switch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lit_sparse_profiling.drawing import BLUE, GREY, Figure, axes, bars, filled, merged, safe, unique, wrapped
from lit_sparse_profiling.kernel_times import shorten_name
from lit_sparse_profiling.measures import GIB
from lit_sparse_profiling.memory_figures import PARTS
from lit_sparse_profiling.reconcile import BEFORE
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Level
from lit_sparse_profiling.speed_sections import Kernel, Kernels

MOST_KERNELS = 15
MOST_LAYERS = 10_000
"""Bound of a layer's number, since a figure has a row for each: damaged files have others."""
STEP_PHASES = ("forward", "backward", "optimizer step")
CATEGORY_PARTS = {
    "frozen": "frozen weights",
    "trainable": "trainable weights",
    "buffers": "buffers",
    "optimizer": "optimizer state",
    "strategy": "strategy state",
    "before": BEFORE,
    "batch": "batch",
    "gradients": "gradients",
    "saved": "saved for backward",
    "temporaries": "temporaries",
}
"""Names of the categories of a level, those that change least in a step first."""
CIVIDIS = ((0, 34, 78), (67, 78, 108), (125, 124, 120), (188, 175, 111), (254, 232, 56))
"""Red, green and blue of matplotlib's scale of that name, made for colour-blind people."""
CATEGORIES: Any = {"xaxis": {"type": "category"}, "yaxis": {"type": "category", "autorange": "reversed"}}


def step_course(record: RunRecord) -> Figure | None:
    """Return the bytes alive over the examined step, by category."""
    levels = [] if record.memory is None else record.memory.course
    if not levels:
        return None
    times = [level.seconds * 1e3 for level in levels]
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "stackgroup": "alive",
            "name": part,
            "x": times,
            "y": [level.held.get(category, 0) / GIB for level in levels],
            "line": {"width": 0, "color": PARTS[part][0]},
            "fillcolor": PARTS[part][0],
            "hovertemplate": f"{part}: %{{y:.3f}} GiB<extra></extra>",
        }
        for category, part in CATEGORY_PARTS.items()
        if any(level.held.get(category) for level in levels)
    ]
    return Figure(
        "step",
        "Memory within a step",
        "What is alive in the examined step, counted tensor by tensor, from beginning to end; each point is the "
        "highest moment of a hundredth of it. The step is slower than others, since it is counted.",
        data,
        merged(
            axes("time in the step, ms", "alive, GiB"),
            {"hovermode": "x unified", "margin": {"t": 100}, "height": 480, **_phase_marks(levels)},
        ),
    )


def _phase_marks(levels: Sequence[Level]) -> dict[str, Any]:
    """Return the layout of a line, and a name, where each phase of a step first begins."""
    begun = {level.phase: level.seconds * 1e3 for level in reversed(levels) if level.phase in STEP_PHASES}
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "@muted", "dash": "dot", "width": 1}}
    name = {"y": 1, "yref": "paper", "yanchor": "bottom", "yshift": 2, "textangle": -90, "showarrow": False}
    return {
        "shapes": [{**line, "x0": at, "x1": at} for at in begun.values()],
        "annotations": [
            {**name, "x": at, "text": phase, "font": {"color": "@muted", "size": 12}} for phase, at in begun.items()
        ],
    }


def kernels(record: RunRecord) -> Figure | None:
    """Return the slowest kernels of a step, coloured by how near they come to the device's ceiling."""
    if record.kernels is None or not record.kernels.top:
        return None
    found, top = record.kernels, record.kernels.top[:MOST_KERNELS]
    names = unique([wrapped(shorten_name(kernel.name, 60).removeprefix("aten::")) for kernel in top])
    pairs = [(name, kernel, found.achieved(kernel)) for name, kernel in zip(names, top, strict=True)]
    data = _kernel_bars(found, pairs)
    layout = bars(len(top), "share of the step, %")
    return Figure(
        "kernels",
        "Kernels of a step",
        "The slowest kernels (on a CPU, ops) of a profiled step, and their share of it. Beside each is the share of "
        "the device's ceiling that it reaches, measured in the same run: of the FLOP/s of a large matrix product or of "
        "the B/s of a large copy, whichever is nearer. The brighter, the nearer; grey is unknown. In "
        f"{found.gaps:.1%} of the step none ran.",
        [data],
        merged(layout, {"xaxis": {"range": [0, 1.7 * max(data["x"])]}}),
    )


def _kernel_bars(found: Kernels, pairs: Sequence[tuple[str, Kernel, Any]]) -> dict[str, Any]:
    colours = [GREY if achieved is None else brightness(min(1, achieved[0])) for *_, achieved in pairs]
    return {
        "type": "bar",
        "orientation": "h",
        "y": [name for name, *_ in pairs],
        "x": [found.share(kernel) * 100 for _, kernel, _ in pairs],
        "customdata": [
            [safe(kernel.op), kernel.calls, kernel.seconds * 1e3, _achieved(achieved)] for _, kernel, achieved in pairs
        ],
        "text": [_achieved(achieved) for *_, achieved in pairs],
        "textposition": "outside",
        "textfont": {"color": "@ink", "size": 12},
        "cliponaxis": False,
        "marker": {"color": colours, "line": {"color": "@muted", "width": 0.5}},
        "hovertemplate": (
            "%{y}<br>op %{customdata[0]}: %{customdata[1]:.4g} calls, %{customdata[2]:.3f} ms, %{x:.1f} % of the step"
            "<br>%{customdata[3]}<extra></extra>"
        ),
        "showlegend": False,
    }


def brightness(share: float) -> str:
    """Return the colour of a share, 0 to 1, on Cividis' scale."""
    at = share * (len(CIVIDIS) - 1)
    low, high = CIVIDIS[math.floor(at)], CIVIDIS[math.ceil(at)]
    return "#" + "".join(f"{round(a + (b - a) * (at % 1)):02x}" for a, b in zip(low, high, strict=True))


def _achieved(achieved: tuple[float, str] | None) -> str:
    """Return in words how near a kernel comes to the ceilings."""
    if achieved is None:
        return ""
    return f"{achieved[0]:.0%} of {achieved[1]}" if achieved[0] <= 1 else f"over 100% of {achieved[1]}"


def chosen_share(record: RunRecord) -> Figure | None:
    """Return a map of the trained share of each matrix, where a method chose blocks."""
    share = chosen(record, "share")
    if share is None:
        return None
    roles = sorted({role for layer in share.values() for role in layer})
    return Figure(
        "chosen",
        "Where blocks were chosen",
        "The share of each weight matrix that is trained: a column per decoder layer, a row per role. Empty cells have "
        "no trained block.",
        [
            {
                "type": "heatmap",
                "x": [safe(layer) for layer in share],
                "y": [safe(role) for role in roles],
                "z": [[layer.get(role, 0) * 100 or None for layer in share.values()] for role in roles],
                "colorscale": "Cividis",
                "reversescale": True,
                "zmin": 0,
                "zmax": max(part for layer in share.values() for part in layer.values()) * 100,
                "xgap": 1,
                "ygap": 1,
                "colorbar": {"title": {"text": "trained, %", "side": "right"}, "thickness": 12},
                "hovertemplate": "layer %{x}, %{y}: %{z:.1f} % trained<extra></extra>",
            }
        ],
        merged(axes("decoder layer", "matrix"), {"height": 150 + 34 * len(roles), **CATEGORIES}),
    )


def drawn_layers(record: RunRecord) -> Figure | None:
    """Return a map of the layers that are trained from switch to switch, where a method draws them."""
    draws = chosen(record, "draws")
    if draws is None:
        return None
    layers = sorted({layer for drawn in draws.values() for layer in drawn})
    every = list(range(max(layers) + 1))
    return Figure(
        "draws",
        "Which layers train when",
        "The decoder layers that are drawn at each switch; a filled cell is trained from that step to the next switch.",
        [
            {
                "type": "heatmap",
                "x": [f"step {safe(step)}" for step in draws],
                "y": [str(layer) for layer in every],
                "z": [[1 if layer in drawn else None for drawn in draws.values()] for layer in every],
                "colorscale": [[0, BLUE], [1, BLUE]],
                "showscale": False,
                "xgap": 1,
                "ygap": 1,
                "hovertemplate": "layer %{y} trains from %{x} on<extra></extra>",
            }
        ],
        merged(axes("first step of the interval", "decoder layer"), {"height": 160 + 12 * len(every), **CATEGORIES}),
    )


def states(record: RunRecord) -> Figure | None:
    """Return the bytes of state after each change of the trainable set."""
    if not record.states:
        return None
    steps = [state.step for state in record.states]
    most = max(state.optimizer + state.strategy for state in record.states)
    unit, size = ("GiB", GIB) if most >= GIB else ("MiB", 2**20)
    parts = {
        "optimizer state": [s.optimizer for s in record.states],
        "strategy state": [s.strategy for s in record.states],
    }
    return Figure(
        "states",
        "State from switch to switch",
        "Optimizer and strategy state after each change of what is trained. Where state of layers that left is dropped "
        "the bars stay equal; where it is kept they grow. Strategy state may lie in host memory.",
        [
            {
                "type": "bar",
                "name": part,
                "x": steps,
                "y": [held / size for held in sizes],
                "marker": filled(*PARTS[part]),
                "hovertemplate": f"after step %{{x}}: {part} %{{y:.2f}} {unit}<extra></extra>",
            }
            for part, sizes in parts.items()
            if any(sizes)
        ],
        merged(axes("optimizer step", f"state, {unit}"), {"barmode": "stack", "xaxis": {"type": "category"}}),
    )


def chosen(record: RunRecord, key: str) -> dict[str, Any] | None:
    """Return the first of the tables that `every_chosen` finds; None if there is none."""
    return next(every_chosen(record, key), None)


def every_chosen(record: RunRecord, key: str) -> Iterator[dict[str, Any]]:
    """Yield the tables that methods say they chose under `key`: shares of layers and roles, or layers by step.

    Records come from anywhere: what has another form is left out.
    """
    for update in record.updates:
        told = update.get("chosen")
        found = told.get(key) if isinstance(told, dict) else None
        cells = [_cells(part, key) for part in found.values()] if isinstance(found, dict) else []
        if isinstance(found, dict) and None not in cells and any(cells):
            yield found


def _cells(part: Any, key: str) -> list[float] | None:
    """Return the numbers of a layer's shares or of the layers of a step; None if it has another form."""
    if key == "share":
        cells, kinds, most = list(part.values()) if isinstance(part, dict) else None, (int, float), 1
    else:
        cells, kinds, most = part, (int,), MOST_LAYERS
    fits = isinstance(cells, list) and all(isinstance(cell, kinds) and 0 <= cell <= most for cell in cells)
    return cells if fits else None


OF_ONE: Sequence[tuple[str, Callable[[RunRecord], Figure | None], str]] = (
    ("Memory within a step", step_course, "an examined step: --profile.examine true"),
    ("Kernels of a step", kernels, "profiled steps: --profile.profiled above 0"),
    ("Where blocks were chosen", chosen_share, "a method that chooses blocks, such as smt.yaml"),
    ("Which layers train when", drawn_layers, "a method that draws layers, such as lisa.yaml"),
    ("State from switch to switch", states, "a method whose trained set changes, such as lisa.yaml"),
)
"""Figures of one run, likewise."""
