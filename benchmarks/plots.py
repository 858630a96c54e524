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

from benchmarks.measurements import Line, newest, read_lines
from benchmarks.ranking import newest_first, row_of
from benchmarks.tradeoff import changes
from benchmarks.trials import read_table

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent / "figures"
LABELS = {
    "full": "full fine-tuning",
    "lora": "LoRA, all linear layers",
    "lisa": "LISA",
}
MIB, GIB = 2**20, 2**30
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "lit_sparse", "font.size": 9, "axes.grid": True}
"""Settings that make the same file from the same measurements, on any machine."""


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
        xlabel="switches", ylabel="optimizer and strategy state, MiB", ylim=(0, 1.35 * full), xticks=range(0, 21, 5)
    )
    axes[0].legend(loc="upper left", ncols=2)
    return figure


def lisa_norms(lines: Sequence[Line]) -> Figure:
    """Draw the norms of each layer's weights, and of their change, by method."""
    arms = newest((line for line in lines if "norms" in line), key="norms")
    figure, (norms, changes) = _figure(2)
    for line in arms.values():
        names, label = [at["layer"] for at in line["layers"]], LABELS[line["norms"]]
        places = range(len(names))
        changes.semilogy(places, [at["change"] / at["norm"] for at in line["layers"]], ".-", label=label)
        if line["norms"] == "full":
            norms.semilogy(places, [at["norm"] for at in line["layers"]], ".-", color="grey")
        _named(changes, names)
        _named(norms, names)
    norms.set(ylabel="norm of the base's weights")
    changes.set(ylabel="norm of the change / norm of the weights")
    changes.legend()
    return figure


def forgetting(curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """Draw domain gain over general loss: a curve for each method over its strength or rate, with spread.

    Points without a gain, of runs that diverged, are in the table only.
    """
    figure, axes = _figure(1)
    for name, points in curves.items():
        curve = [(rose, fell) for rose, fell in points if statistics.fmean(fell) > 0]
        if not curve:
            continue
        rose, fell = zip(*curve, strict=True)
        style, across, along = "o-" if len(curve) > 1 else "*", [*map(spread, rose)], [*map(spread, fell)]
        x, y = ([*map(statistics.fmean, values)] for values in (rose, fell))
        axes[0].errorbar(x, y, along, across, style, label=name, capsize=2)
    axes[0].set(xlabel="general loss, rise in nats a token", ylabel="domain loss, fall in nats a token")
    axes[0].legend(fontsize="small")
    return figure


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
    for (name, peak, losses), marker in zip(arms, "osD^vP*", strict=False):
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
        losses = next((row_of(made, arm, results).losses for results in newest_first(quality)), [])
        if losses:
            found.append((arm.name, line["peak_resident"], losses))
    return found


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation; nan, and so no error bar, for one value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _named(axes: Axes, names: Sequence[str]) -> None:
    """Label the axis of layers: every fifth decoder layer by number, other parts by name."""
    short = {name: name.removesuffix(".weight").rpartition(".")[2] for name in names}
    ticks = [place for place, name in enumerate(names) if not name.isdigit() or int(name) % 5 == 0]
    axes.set_xticks(ticks, [short[names[place]] for place in ticks], rotation=60)
    axes.set_xlabel("layer")


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.5 * columns, 3.2), layout="constrained")
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def main(results: Path = RESULTS, into: Path = FIGURES) -> int:
    """Draw all figures whose measurements exist; return the exit status."""
    found = lines_of(results / "lisa.jsonl")
    drawn = {
        "lisa_state": (lisa_state, [line for line in found if "policy" in line]),
        "lisa_norms": (lisa_norms, [line for line in found if "norms" in line]),
        "cost": (cost, arms_of(lines_of(results / "arm_memory.jsonl"), results / "quality.jsonl")),
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
