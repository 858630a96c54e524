"""Tables of the step time and memory of methods beside each other, and of what measuring costs, for each device."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measurements import Line, caption, newest, number, read_lines, table


def by_device(lines: Sequence[Line], block: Callable[[Sequence[Line]], str]) -> str:
    """Return a block for each device among `lines`, without empty ones."""
    devices = dict.fromkeys(line["device"] for line in lines)
    made = [block([line for line in lines if line["device"] == device]) for device in devices]
    return "\n\n".join(one for one in made if one)


def beside(lines: Sequence[Line], other: str, name: str, columns: Sequence[str]) -> tuple[str, list[Line]]:
    """Compare the step time of each mode with that of `other`; return the table and its lines.

    Args:
        lines: Measurements, of which the newest of each mode is shown.
        name: The name of `other` in the table.
        columns: Further columns, keys of SIZES.
    """
    modes = newest((line for line in lines if "mode" in line), key="mode")
    pairs = newest((line for line in lines if "pair" in line), key="pair")
    rows = []
    for line in modes.values():
        pair = pairs.get(json.dumps([line["mode"], other]))
        time = "1" if line["mode"] == other else "not timed" if pair is None else step_time(pair)
        trainable = f"{line['trainable']:,} ({line['trainable_share']:.2%})"
        rows.append([line["mode"], trainable, time, *(SIZES[column](line) for column in columns)])
    head = ["mode", "trainable", f"step time / {name} [95 %]", *columns]
    return table(head, rows), [*modes.values(), *pairs.values()]


def step_time(pair: Line) -> str:
    return f"{pair['ratio_median']:.3f} [{pair['ratio_low']:.3f}, {pair['ratio_high']:.3f}]"


PEAK, CHOOSING, SAVED = "peak resident, GiB", "while choosing", "saved for backward, MiB"
SIZES: dict[str, Callable[[Line], str]] = {
    PEAK: lambda line: f"{line['peak_rss'] / 2**30:.2f}",
    CHOOSING: lambda line: number(line["selection_peak_rss"], ".2f", 2**-30) if line["mode"].startswith("smt") else "-",
    SAVED: lambda line: f"{line['saved_bytes'] / 2**20:.1f}",
}
"""Columns of memory, by their heads."""


def peers(results: Path) -> str:
    """Compare each method with the frozen floor: a table for each device."""
    command = "python -m benchmarks.peers"

    def block(lines: Sequence[Line]) -> str:
        made, used = beside(lines, "floor", "frozen floor", [PEAK, CHOOSING, SAVED])
        return f"{caption(command, used)}\n\n{made}"

    return by_device(read_lines(results / "peers.jsonl", command), block)


GPU_HEAD = [
    "method",
    "",
    "trainable",
    "tokens/s",
    "step, ms",
    "of the matmul rate",
    "counted, GiB",
    "allocator, GiB",
    "residue",
    "reserved, GiB",
    "NVML, GiB",
    "J a step",
]


def gpu(results: Path) -> str:
    """Compare methods on GPUs: a table for each device and model, or a sentence if nothing was measured."""
    command = "python -m benchmarks.gpu"
    if not (results / "gpu.jsonl").exists():
        return f"Not measured yet with the present timing. `make gpu` (`{command}`) measures this table."
    lines = read_lines(results / "gpu.jsonl", command)
    places = dict.fromkeys((line["device"], line["model"]) for line in lines)
    return "\n\n".join(gpu_on(*place, lines, command) for place in places)


def gpu_on(device: str, model: str, lines: Sequence[Line], command: str) -> str:
    here = [line for line in lines if (line["device"], line["model"]) == (device, model)]
    methods = newest((line for line in here if "method" in line), key="method")
    pairs = newest((line for line in here if "pair" in line), key="pair")
    about = f"{caption(command, [*methods.values(), *pairs.values()])} Shapes of `{model}`."
    head = f"{about}\n\n{table(GPU_HEAD, map(gpu_row, methods.values()))}"
    rows = [[*line["pair"], step_time(line)] for line in pairs.values()]
    return f"{head}\n\n{table(['step time of', 'beside', 'ratio [95 %]'], rows)}" if rows else head


def gpu_row(line: Line) -> list[str]:
    return [
        line["method"],
        "measured",
        f"{line['trainable']:,} ({line['trainable_share']:.2%})",
        number(line["tokens_per_second"], ",.0f"),
        number(line["step_seconds_median"], ".1f", 1e3),
        number(line["utilization"], ".1%"),
        *(number(line[size], ".2f", 2**-30) for size in ("counted", "requested")),
        number(line["residue"], ".1%"),
        *(number(line[size], ".2f", 2**-30) for size in ("reserved", "nvml_process")),
        number(line["joules_per_step"], ".1f"),
    ]


def overhead(results: Path) -> str:
    """Return the overhead of the profiler on the steps that it times, and on whole fits, for each device."""
    command = "python -m benchmarks.overhead"
    lines = [
        line | {"key": [line["device"], "fits" in line]} for line in read_lines(results / "overhead.jsonl", command)
    ]
    return "\n".join(f"{ratio(line)}\n{caption(command, [line])}" for line in newest(lines, key="key").values())


def ratio(line: Line) -> str:
    low, high = (f"{line[name]:.3f}" for name in ("ratio_low", "ratio_high"))
    times = f"{line['ratio_median']:.3f} [{low}, {high}]"
    if "fits" in line:
        pairs = f"median of {line['rounds']} pairs, and its 95 % interval"
        return f"Whole fits of 60 short steps take {times} times as long as with `--profile=false` ({pairs})."
    rounds = f"median of {line['rounds']} rounds in turn, and its 95 % interval"
    return f"Steps with the profiler take {times} times as long as without ({rounds})."


LISA = "python -m benchmarks.lisa_costs"
STATE_HEAD = [
    "when a layer stops training",
    "MiB of state at first",
    "after 10 switches",
    "after 20 switches",
    "full fine-tuning",
    PEAK,
]


def lisa(results: Path) -> str:
    """Compare LISA with full fine-tuning and LoRA, and the state of its policies: tables for each device."""
    return by_device(read_lines(results / "lisa.jsonl", LISA), lisa_block)


def lisa_block(lines: Sequence[Line]) -> str:
    steps, timed = beside(lines, "full", "full fine-tuning", [PEAK, SAVED])
    policies = list(newest((line for line in lines if "policy" in line), key="policy").values())
    made = [f"{caption(LISA, timed)}\n\n{steps}"] if timed else []
    if policies:
        made.append(f"{caption(f'{LISA} state', policies)}\n\n{table(STATE_HEAD, map(state_row, policies))}")
    return "\n\n".join(made)


def state_row(line: Line) -> list[str]:
    held = [optimizer + strategy for _, optimizer, strategy in line["states"]]
    sizes = [*(held[switches] for switches in (0, 10, 20)), line["full_state"]]
    return [line["policy"], *(f"{size / 2**20:,.1f}" for size in sizes), f"{line['peak_rss'] / 2**30:.2f}"]


def meft(results: Path) -> str:
    """Compare MEFT with activation checkpointing: bytes kept against depth, and memory and time of each device."""
    command = "python -m benchmarks.meft"
    if not (results / "meft.jsonl").exists():
        return f"Not measured yet: `{command}` measures these tables."

    def block(lines: Sequence[Line]) -> str:
        curves = list(newest((line for line in lines if "curve" in line), key="curve").values())
        made = [f"{caption(f'{command} curve', curves)}\n\n{depths(curves)}"] if curves else []
        steps, timed = beside(lines, "adapters_every_1", "adapters, every layer recomputed", [PEAK, SAVED])
        made += [f"{caption(f'{command} pairs', timed)}\n\n{steps}"] if timed else []
        return "\n\n".join(made)

    return by_device(read_lines(results / "meft.jsonl", command), block)


def depths(curves: Sequence[Line]) -> str:
    """Return a table of KiB kept by each arm at each depth, and of bytes that each further layer adds a token."""
    rows = []
    for line in curves:
        (first, *_, last), tokens = line["depths"], line["tokens"]
        added = (line["bytes"][-1] - line["bytes"][0]) / (last - first) / tokens
        rows.append([line["curve"], *(f"{kept / 2**10:,.0f}" for kept in line["bytes"]), f"{added:,.0f}"])
    head = ["KiB kept for the backward pass", *(f"{depth} layers" for depth in curves[0]["depths"])]
    return table([*head, "bytes a token and further layer"], rows)


def deft(results: Path) -> str:
    """Compare LoRA with and without the penalty on activations: a table for each device."""
    command = "python -m benchmarks.deft"
    if not (results / "deft.jsonl").exists():
        return f"Not measured yet: `{command}` measures this table."

    def block(lines: Sequence[Line]) -> str:
        made, used = beside(lines, "lora", "LoRA alone", [SAVED])
        return f"{caption(command, used)}\n\n{made}"

    return by_device(read_lines(results / "deft.jsonl", command), block)
