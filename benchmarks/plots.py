"""Draw the figures of README.md and docs/ from the measurements in benchmarks/results: `python -m benchmarks.plots`."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import PercentFormatter

from benchmarks.measurements import Line, newest, read_lines
from benchmarks.ranking import TEXT, Results, newest_first, row_of, rows, score
from benchmarks.rewinding import curves
from benchmarks.tradeoff import changes
from benchmarks.trials import Table, read_table

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent / "figures"
LABELS = {
    "full": "full fine-tuning",
    "lora": "LoRA, all linear layers",
    "lisa": "LISA",
}
MIB, GIB = 2**20, 2**30
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which are told apart with every kind of colour vision."""
MARKERS = "osD^vP*"
STYLE: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "lit_sparse",
    "savefig.facecolor": "white",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.4,
    "axes.prop_cycle": cycler(color=COLOURS),
}
"""Settings that make the same file from the same measurements, on any machine.

Text is drawn as outlines: with a viewer's own font, labels were cut. The white ground keeps it readable on a dark page.
"""


def lisa_state(lines: Sequence[Line]) -> Figure:
    """Draw the state that each policy of LISA keeps from switch to switch."""
    policies = newest((line for line in lines if "policy" in line), key="policy")
    figure, axes = _figure(1)
    for line in policies.values():
        held = [(optimizer + strategy) / MIB for _, optimizer, strategy in line["states"]]
        offloaded = line["policy"] == "offload"  # as large as `keep`, but in host memory: dashed, and drawn on top
        style = {"linestyle": "--", "zorder": 3} if offloaded else {}
        axes[0].plot(range(len(held)), held, marker=".", label=line["policy"], **style)
    full = next(iter(policies.values()))["full_state"] / MIB
    axes[0].axhline(full, color="grey", linestyle=":", label="full fine-tuning")
    axes[0].set(
        xlabel="switches to other layers",
        ylabel="optimizer and strategy state,\nMiB (less is better)",
        ylim=(0, 1.35 * full),
        xticks=range(0, 21, 5),
    )
    axes[0].legend(loc="upper left", ncols=2)
    return figure


def lisa_norms(lines: Sequence[Line]) -> Figure:
    """Draw the norms of each layer's weights, and of their change, by method."""
    arms = newest((line for line in lines if "norms" in line), key="norms")
    figure, (norms, changes) = _figure(2)
    for line, marker in zip(arms.values(), MARKERS, strict=False):
        names, label = [at["layer"] for at in line["layers"]], LABELS[line["norms"]]
        places, moved = range(len(names)), [at["change"] / at["norm"] for at in line["layers"]]
        changes.plot(places, moved, f"{marker}-", markersize=3, label=label)
        if line["norms"] == "full":
            norms.plot(places, [at["norm"] for at in line["layers"]], "o-", markersize=3, color="black")
        _named(changes, names)
        _named(norms, names)
    norms.set(title="How large each layer is", ylabel="L2 norm of its weights", ylim=(0, None))
    changes.set(title="How far a fit moves it", ylabel="L2 norm of the change,\nshare of that of the weights")
    changes.yaxis.set_major_formatter(PercentFormatter(1.0))
    changes.set_ylim(0, None)
    changes.legend(title="0 %: not trained")
    return figure


def forgetting(curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """Draw domain gain over general loss: a curve for each method over its strength or rate, with spread.

    Points without a gain, of runs that diverged, are in the table only.
    """
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = [figure.add_subplot()]
    for (name, points), marker in zip(curves.items(), MARKERS, strict=False):
        curve = [(rose, fell) for rose, fell in points if statistics.fmean(fell) > 0]
        if not curve:
            continue
        rose, fell = zip(*curve, strict=True)
        style, across, along = f"{marker}-" if len(curve) > 1 else marker, [*map(spread, rose)], [*map(spread, fell)]
        x, y = ([*map(statistics.fmean, values)] for values in (rose, fell))
        axes[0].errorbar(x, y, along, across, style, label=name, capsize=2)
    seeds = max((len(rose) for points in curves.values() for rose, _ in points), default=0)
    axes[0].set(
        title=f"Up and to the left is better; mean and standard deviation of {seeds} seeds",
        xlabel="forgotten: rise of the loss on general text, nats a token (less is better)",
        ylabel="learnt: fall of the loss on the problems,\nnats a token (more is better)",
    )
    axes[0].title.set_fontsize("medium")
    handles, labels = axes[0].get_legend_handles_labels()
    named = [PENALTIES.get(str(label), str(label)) for label in labels]
    axes[0].legend(handles, named, fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


PENALTIES = {
    "none": "no penalty, by learning rate",
    "adaptive": "recorded importance,\nby strength",
    "unweighted": "the same without\ncoefficients of layers",
    "ewc": "EWC, by strength",
    "l2sp": "L2-SP, by strength",
    "kl": "KL to the base",
}
"""The methods of the study of forgetting, as its figure names them."""
NAMED = {
    "smt_abs_mean": "SMT, blocks by gradient",
    "smt_diagonal": "SMT, diagonal blocks",
    "lora": "LoRA",
    "dora": "DoRA",
    "shira": "SHiRA",
    "lisa_uniform": "LISA, 2 of 30 layers",
    "full": "full fine-tuning",
}


def cost(arms: Sequence[tuple[str, float, Sequence[float]]]) -> Figure:
    """Draw held-out loss over peak memory, a labelled point for each arm, with the spread over seeds."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for (name, peak, losses), marker in zip(arms, MARKERS, strict=False):
        axes.errorbar(peak / GIB, statistics.fmean(losses), spread(losses), fmt=marker, capsize=3, label=NAMED[name])
    axes.set(
        xlabel="peak memory of the process, GiB (less is better)",
        ylabel="held-out loss, nats a token (lower is better)",
        xlim=(0, None),
    )
    axes.legend(fontsize="small")
    return figure


def arms_of(lines: Sequence[Line], quality: Path) -> list[tuple[str, float, Sequence[float]]]:
    """Return name, peak memory and held-out losses at the best rate of the arms that are measured."""
    found = []
    for line in newest(lines, key="arm").values():
        made = read_table(line["table"])
        arm = next(arm for arm in made.arms if arm.name == line["arm"])
        losses = next(
            (fits.losses for results in newest_first(quality) if (fits := row_of(made, arm, results)).fits), []
        )
        if losses:
            found.append((arm.name, line["peak_resident"], losses))
    return found


COMPARED = ("weights_5", "weights_1")
"""The quality tables of the figure of losses over costs."""
COSTS = {
    "peak_resident": "peak memory of the process, GiB",
    "step_seconds": "a step, s",
    "forgotten": "rise of the loss on general text,\nnats a token",
}


def pareto(tables: Mapping[str, Sequence[tuple[str, float, Mapping[str, float]]]]) -> Figure:
    """Draw held-out loss over each cost, a row of panels for each table; arms that none beats in both are joined."""
    figure = Figure(figsize=(12, 4.5 * len(tables)), layout="constrained")
    named: list[tuple[Axes, list[tuple[float, float, str]]]] = []
    grid = figure.subplots(len(tables), len(COSTS), squeeze=False)
    for panels, (name, arms) in zip(grid, tables.items(), strict=True):
        for axes, (cost, label) in zip(panels, COSTS.items(), strict=True):
            points = sorted((costs[cost], loss, arm) for arm, loss, costs in arms if cost in costs)
            if not points:
                continue
            best = front([point[:2] for point in points])
            axes.plot(*zip(*(point[:2] for point in points), strict=True), "o", color="grey", markersize=4)
            axes.plot(*zip(*best, strict=True), "o-", drawstyle="steps-post", markersize=5)
            axes.set(xlabel=f"{label} (less is better)", title=name)
            named.append((axes, points))
        panels[0].set_ylabel("held-out loss, nats a token (lower is better)")
    figure.draw_without_rendering()  # names are placed where the layout has put the points
    for axes, points in named:
        name_points(axes, points)
    return figure


def name_points(axes: Axes, points: Sequence[tuple[float, float, str]], size: float = 6) -> None:
    """Write each point's name beside it, or as near as other names leave room, joined to it by a line.

    Args:
        axes: Axes whose place in the figure is known.
        points: Coordinates and name of each.
        size: Size of the names in points.
    """
    scale, taken = 72 / axes.figure.dpi, list[tuple[float, float, float]]()  # left, bottom and width of each name
    shifts = sorted((step * (size + 1) for step in range(-20, 21)), key=abs)
    for x, y, name in sorted(points, key=lambda point: point[1]):
        left, bottom = axes.transData.transform((x, y)) * scale + 3
        width = 0.6 * size * len(name)
        free = (
            shift
            for shift in shifts
            if all(
                abs(bottom + shift - low) > size or left + width < start or start + wide < left
                for start, low, wide in taken
            )
        )
        shift = next(free, 0.0)
        taken.append((left, bottom + shift, width))
        arrow = {"arrowstyle": "-", "linewidth": 0.3} if shift else None
        axes.annotate(name, (x, y), (3, 3 + shift), textcoords="offset points", fontsize=size, arrowprops=arrow)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other is below in one coordinate and not above in the other, by the first."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def compared(quality: Path) -> dict[str, list[tuple[str, float, dict[str, float]]]]:
    """Return name, mean held-out loss and costs of the arms of each table that were measured and did not diverge.

    Means are over the seeds that all of them have; a table is left out while one of them has a single seed.
    """
    out = {}
    for name in COMPARED:
        made = read_table(name)
        for results in newest_first(quality):
            found = [row for row in rows(made, results) if row.fits and all(map(math.isfinite, row.losses))]
            if any(row.arm.group for row in found) and all(len(row.fits) > 1 for row in found):  # not references alone
                seeds = set.intersection(*({line["seed"] for line in row.fits} for row in found))
                fits = {row.arm.name: [line for line in row.fits if line["seed"] in seeds] for row in found}
                arms = [
                    (name, statistics.fmean(map(score, lines)), costs_of(lines, made, results))
                    for name, lines in fits.items()
                ]
                out[name] = [arm for arm in arms if arm[2]]
                break
    return {name: arms for name, arms in out.items() if arms}


def costs_of(fits: Sequence[Line], made: Table, results: Results) -> dict[str, float]:
    """Return the costs of an arm that its trainings recorded; of memory, the peak."""
    out = {}
    if peaks := [line["peak_resident"] / GIB for line in fits if line.get("peak_resident")]:
        out["peak_resident"] = max(peaks)
    if steps := [line["step_seconds"] for line in fits if line.get("step_seconds")]:
        out["step_seconds"] = statistics.median(steps)
    before = results.before(made.trial(made.arms[0], made.arms[0].rates[0], made.seeds[0])) or {}
    if TEXT in before and all(TEXT in line["after"] for line in fits):
        out["forgotten"] = statistics.fmean(float(line["after"][TEXT]) for line in fits) - float(before[TEXT])
    return out


def rewinding(arms: Mapping[str, Sequence[tuple[float, float, float]]]) -> Figure:
    """Draw what each arm learns over what it forgets, as the changes of its runs are scaled from nothing to all."""
    figure, (axes,) = _figure(1)
    for (name, points), marker in zip(arms.items(), MARKERS, strict=False):
        scales, losses, texts = zip(*points, strict=True)
        (line,) = axes.plot(texts, losses, marker=marker, markersize=4, label=LABELS.get(name, name))
        for scale, x, y in zip(scales, texts, losses, strict=True):
            axes.annotate(
                f"{scale:g}", (x, y), xytext=(3, 3), textcoords="offset points", fontsize=6, color=line.get_color()
            )
    axes.set(xlabel="loss on general text, nats a token", ylabel="held-out loss, nats a token")
    axes.legend(title="number: scale of the changes")
    return figure


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation; nan, and so no error bar, for one value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


WAYS = {"one": "one rank", "ddp": "two ranks, DDP", "fsdp2": "two ranks, FSDP2", "nf4": "base in 4 bits"}
"""How the planner's configurations train, by name in the measurements."""


def planner(lines: Sequence[Line]) -> Figure:
    """Draw the predicted peak of each configuration against the measured one, and its error."""
    figure, axes = _figure(2)
    for way, name in WAYS.items():
        found = [line for line in lines if line.get("way", "one") == way]
        real = [line["measured"]["peak"] / MIB for line in found]
        ours = [line["predicted"]["peak"] / MIB for line in found]
        errors = [100 * (a / b - 1) for a, b in zip(ours, real, strict=True)]
        if found:
            axes[0].plot(real, ours, ".", label=f"{name} ({len(found)})")
            axes[1].plot(real, errors, ".", label=name)
    ends = [
        min(line["measured"]["peak"] for line in lines) / MIB,
        max(line["measured"]["peak"] for line in lines) / MIB,
    ]
    axes[0].plot(ends, ends, color="grey", linestyle=":", zorder=0, label="equal")
    axes[0].set(xlabel="peak measured, MiB", ylabel="peak predicted, MiB", xscale="log", yscale="log")
    axes[1].axhline(0, color="grey", linestyle=":", zorder=0)
    axes[1].set(xlabel="peak measured, MiB", ylabel="error, % (above 0: too much predicted)", xscale="log")
    for axis in (axes[0].xaxis, axes[1].xaxis, axes[0].yaxis):
        axis.set_ticks(ticks := [2, 3, 5, 10, 30, 100, 300, 1000], [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    axes[0].legend(loc="upper left")
    return figure


def _named(axes: Axes, names: Sequence[str]) -> None:
    """Label the axis of layers: every fifth decoder layer by number, other parts by name."""
    said = {"embed_tokens": "embeddings", "norm": "final norm"}
    short = {name: name.removesuffix(".weight").rpartition(".")[2] for name in names}
    ticks = [place for place, name in enumerate(names) if not name.isdigit() or (int(name) and int(name) % 5 == 0)]
    labels = [said.get(short[names[place]], short[names[place]]) for place in ticks]
    axes.set_xticks(ticks, labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlabel("decoder layer, from the input to the output")


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.5 * columns, 3.6), layout="constrained")
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def main(results: Path = RESULTS, into: Path = FIGURES) -> int:
    """Draw all figures whose measurements exist; return the exit status."""
    found = lines_of(results / "lisa.jsonl")
    drawn = {
        "lisa_state": (lisa_state, [line for line in found if "policy" in line]),
        "lisa_norms": (lisa_norms, [line for line in found if "norms" in line]),
        "cost": (cost, arms_of(lines_of(results / "arm_memory.jsonl"), results / "quality.jsonl")),
        "pareto": (pareto, compared(results / "quality.jsonl")),
        "rewinding": (rewinding, curves(results / "rewinding.jsonl")),
        "planner": (planner, lines_of(results / "planner.jsonl")),
        "forgetting": (forgetting, changes(results / "forgetting.jsonl")),
    }
    into.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, (draw, measured) in drawn.items():
            if measured:
                draw(measured).savefig(into / f"{name}.svg", metadata={"Date": None})
            else:
                print(f"{name}: not drawn, since nothing of it is measured yet.")
    return 0


def lines_of(path: Path) -> list[Line]:
    """Read the measurements in a file; none if it does not exist."""
    return read_lines(path, "the benchmark") if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
