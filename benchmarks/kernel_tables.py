"""Tables of our kernels: beside torch's ways to do the same, the floor of an H100, and what they take of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.measurements import Line, caption, newest, number, read_lines, table

KERNELS_HEAD = ["op", "shape", "beside", "time, ours / theirs [95 %]", "peak KiB, ours / theirs", "of the ceiling"]


def kernels(results: Path) -> str:
    """Compare each op with torch's ways to do the same: a table for each device, or a sentence without a GPU."""
    command = "python -m benchmarks.kernels"
    lines = read_lines(results / "kernels.jsonl", command)
    devices = dict.fromkeys(line["device"] for line in lines)
    tables = [kernels_on(device, lines, command) for device in devices]
    if all("threads" in device for device in devices):
        tables.append(f"On a GPU: not measured yet. `make gpu` (`{command}`) measures this table there.")
    return "\n\n".join(tables)


def kernels_on(device: str, lines: Sequence[Line], command: str) -> str:
    here = newest((line for line in lines if line["device"] == device), key="shape")
    rows = [row for line in here.values() for row in kernels_rows(line)]
    return f"{caption(command, [*here.values()])}\n\n{table(KERNELS_HEAD, rows)}"


def kernels_rows(line: Line) -> Iterator[list[str]]:
    """Return a row for each rival of an op at one shape."""
    ours = line["peak_bytes"]["ours"]
    reached = max(line["of_matmul"] or 0, line["of_copy"] or 0)
    for place, (name, (middle, low, high)) in enumerate(line["ratio"].items()):
        head = [line["op"], line["shape"]] if not place else ["", ""]
        sizes = " / ".join(f"{size / 2**10:,.0f}" for size in (ours, line["peak_bytes"][name]))
        yield [*head, name, f"{middle:.3f} [{low:.3f}, {high:.3f}]", sizes, f"{reached:.0%}" if not place else ""]


PLANS = {
    "128x256, 4 stages, even": "128x256 tiles (kept)",
    "tma 128x256, 4 stages, even": "the same by TMA",
    "128x128, 8 warps, even": "128x128 tiles (before)",
    "gather + grouped_mm": "gather, grouped_mm",
    "whole dW": "whole dW",
}
"""Some of the plans in block_grad_variants.jsonl, with their names in the table."""


def block_grad(results: Path) -> str:
    """Return the plans of block_grad that were tried on a GPU: microseconds, and the share of the dense rate."""
    lines = read_lines(results / "block_grad_variants.jsonl", "")
    rows = []
    for line in lines:
        cells = [f"{line['tokens']:,}", str(line["blocks"])]
        for plan in PLANS:
            seconds = line["seconds"][plan]
            cells.append(f"{seconds * 1e6:.0f} us, {line['flops'] / seconds / line['ceiling']:.0%}")
        rows.append(cells)
    first = lines[0]
    about = (
        f"Measured once on {first['device']} at commit {first['commit']}, torch {first['versions']['torch']}, by a "
        "script that walked 34 plans and was removed with those that lost. The share is that of a dense bf16 product's "
        "rate in the same run."
    )
    return f"{about}\n\n{table(['tokens', 'blocks of 96', *PLANS.values()], rows)}"


def roofline(results: Path) -> str:
    """Return the floor of each op on an H100 beside the newest measurement of the same shape on a GPU."""
    command = "python -m benchmarks.roofline"
    lines = read_lines(results / "roofline.jsonl", command)
    timed = read_lines(results / "kernels.jsonl", "python -m benchmarks.kernels")
    measured = newest((line for line in timed if "threads" not in line["device"]), key="shape")
    rows = []
    for line in lines:
        run = measured.get(json.dumps(line["shape"]))
        taken = "-" if run is None else f"{run['seconds']['ours'] * 1e6:.1f} ({run['device'].split()[-1]})"
        cells = [f"{line['flops'] / 1e9:,.1f}", f"{line['bytes'] / 1e6:,.1f}", f"{line['seconds'] * 1e6:.1f}"]
        rows.append([line["op"], line["shape"], *cells, line["bound"], number(line["balance"], ".0%"), taken])
    head = ["op", "shape", "GFLOP", "MB", "at least, us", "bound by", "balance", "measured, us"]
    return f"Computed by `{command}`; table by `python benchmarks/readme.py`.\n\n{table(head, rows)}"


def registers(results: Path) -> str:
    """Return what each kernel takes of a multiprocessor: a range over its launches, and each model."""
    command = "python -m benchmarks.ahead"
    lines = read_lines(results / "ahead.jsonl", command)

    def between(values: Sequence[int], divisor: int = 1) -> str:
        return " to ".join(f"{value / divisor:,.0f}" for value in dict.fromkeys(values))

    rows = [
        [
            f"`{line['kernel'].strip('_')}`",
            line["model"],
            between(line["registers"]),
            between(line["shared"], 2**10),
            between(line["barriers"]),
            ", ".join(map(str, line["widths"])),
        ]
        for line in lines
    ]
    head = ["kernel", "model", "registers a thread", "shared, KiB", "barriers", "bits a load or store"]
    return f"{caption(command, lines)}\n\n{table(head, rows)}"
