"""The events of torch.profiler as plain tuples, and sums over them: pure functions, which need no device."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch._C._autograd import DeviceType

from lit_sparse_profiling.ceilings import Ceilings
from lit_sparse_profiling.opcounts import OpCounts
from lit_sparse_profiling.speed_sections import Kernel, Kernels

OURS = (
    "lit_sparse",
    "_add_noise_kernel",
    "_block_adamw_kernel",
    "_block_delta_kernel",
    "_block_grad_kernel",
    "_copy_columns_kernel",
    "_glu_density",
    "_join_parts_kernel",
    "_master_adamw_kernel",
    "_momentum_noise_kernel",
    "_noise_kernel",
    "_subspace_back_kernel",
    "_subspace_moments_kernel",
)
"""Prefixes of the names of this project's ops and kernels. Kernels too, since an optimizer launches them from no op."""

RUNTIME = re.compile(r"(cuda|cu|hip)[A-Z]")
"""Names of the device runtime's calls. Their ids are a separate series, and could be mistaken for ids of ops."""

Kind = Literal["op", "node", "device", "window"]


class Event(NamedTuple):
    """One event, with times in nanoseconds.

    Attributes:
        kind: "op"; "node", an autograd node or another function around ops; "device", something that ran on the device
            (kernel, copy, fill); or "window", the annotation around the profiled steps.
        lane: Thread of the event; for a device event, its stream.
        id: Id of an op or node, unique among these.
        link: For a device event, the id of the op or node that launched it; 0 if unknown.
    """

    kind: Kind
    name: str
    lane: int
    begin: int
    end: int
    id: int = 0
    link: int = 0


class Row(NamedTuple):
    """All calls of a kernel launched by one op, and their total nanoseconds; on a CPU, all calls of an op."""

    name: str
    op: str
    calls: int
    nanoseconds: int


def read(recorded: Iterable[Any], device: torch.device, window: str) -> list[Event]:
    """Convert those of a profiler's `kineto_results.events()` that concern `device`, and drop the others.

    `window` is the name of the annotation around the profiled steps.
    """
    events = (_event(event, device, window) for event in recorded)
    return [event for event in events if event is not None]


def _event(event: Any, device: torch.device, window: str) -> Event | None:
    name = event.name()
    kind = _kind(event, name, device, window)
    if kind is None:
        return None
    lane = event.device_resource_id() if kind == "device" else event.start_thread_id()
    link = event.linked_correlation_id()
    return Event(kind, name, lane, event.start_ns(), event.end_ns(), event.correlation_id(), link)


def _kind(event: Any, name: str, device: torch.device, window: str) -> Kind | None:
    annotation = event.is_user_annotation()
    if event.device_type() == DeviceType.CUDA:
        here = device.type == "cuda" and event.device_index() == device.index
        # Kineto mirrors each annotation on the device, where it would count as one kernel that fills all gaps.
        return "device" if here and not annotation else None
    if annotation:
        return "window" if name == window else None
    # "[" begins the allocator's events. An event that ends in another thread cannot be nested with others of its own.
    if name.startswith(("profiler::", "[")) or RUNTIME.match(name) or event.start_thread_id() != event.end_thread_id():
        return None
    engine = name.startswith(("autograd::", "torch::autograd::"))
    return "op" if "::" in name and not engine else "node"


def window_of(events: Iterable[Event]) -> Event:
    """Return the window of the profiled steps.

    Raises:
        RuntimeError: if it was not recorded.
    """
    window = next((event for event in events if event.kind == "window"), None)
    if window is None:
        raise RuntimeError(
            "The profiled steps were to be found in the trace, but it has no mark of them; "
            "start and stop the profile in the same thread, and profile fewer steps."
        )
    return window


def in_window(events: Iterable[Event], window: Event) -> list[Event]:
    """Return the events that overlap the window."""
    return [event for event in events if event.end > window.begin and event.begin < window.end]


def busy_nanoseconds(events: Iterable[Event], window: Event) -> int:
    """Return the nanoseconds of the window in which at least one of the events ran."""
    total, reached = 0, window.begin
    for event in sorted(events, key=lambda event: event.begin):
        begin, end = max(event.begin, reached), min(event.end, window.end)
        total += max(end - begin, 0)
        reached = max(reached, end)
    return total


def step_thread_ops(events: list[Event]) -> list[Event]:
    """Return the ops of the stepping thread and of autograd's. Ops in worker threads are in their caller's time."""
    lanes = {event.lane for event in events if event.name.startswith("autograd::engine::")} | {window_of(events).lane}
    return [event for event in events if event.kind == "op" and event.lane in lanes]


def op_rows(ops: list[Event], known: Collection[str]) -> list[Row]:
    """Return one row per op, with its own time: without the ops that it calls.

    An op whose name is in `known` includes the ops that it calls. FLOPs and bytes were counted for that op
    (`aten::clone`), and cover the work of those (`aten::copy_`).
    """
    calls, own = Counter[str](), Counter[str]()
    for op, parent, owner in _nested(ops, known):
        calls[owner.name] += op is owner
        own[owner.name] += op.end - op.begin
        if parent is not None:
            own[parent.name] -= op.end - op.begin
    return [Row(name, name, calls[name], own[name]) for name in calls]


def kernel_rows(events: list[Event], known: Collection[str]) -> list[Row]:
    """Return one row per kernel and op.

    The op is the outermost one around the launch that is in `known`, else the innermost; "" if no launch was recorded.
    """
    launchers = [event for event in events if event.kind in ("op", "node")]
    owners = {op.id: owner.name for op, _, owner in _nested(launchers, known)}
    times = defaultdict[tuple[str, str], list[int]](list)
    for event in events:
        if event.kind == "device":
            times[event.name, owners.get(event.link, "")].append(event.end - event.begin)
    return [Row(name, op, len(found), sum(found)) for (name, op), found in times.items()]


def _nested(ops: list[Event], known: Collection[str]) -> Iterator[tuple[Event, Event | None, Event]]:
    """Yield each op, the owner of its caller, and its own owner: the outermost known op around it, or itself.

    Ops of a thread nest strictly: sorted by begin, longest first, callers precede the ops that they call.
    """
    ordered = sorted(ops, key=lambda op: (op.lane, op.begin, -op.end))
    for _, lane in groupby(ordered, key=lambda op: op.lane):
        open_: list[tuple[Event, Event]] = []
        for op in lane:
            # `+ 1`: an op of 0 ns, as the clock's resolution gives, is not inside one that ends when it begins.
            while open_ and open_[-1][0].end < max(op.end, op.begin + 1):
                open_.pop()
            parent = open_[-1][1] if open_ else None
            owner = parent if parent is not None and parent.name in known else op
            open_.append((op, owner))
            yield op, parent, owner


def summarize(
    events: list[Event],
    steps: int,
    counts: OpCounts | None,
    best: Ceilings,
    dtype: torch.dtype,
    *,
    cuda: bool,
    top: int = 20,
    ours: Sequence[str] = OURS,
    trace: str | None = None,
) -> Kernels:
    """Sum the events of the profiled steps; see `KernelProfile.kernels`.

    Raises:
        RuntimeError: if the events have no window, or no kernel though the steps ran on `cuda`.
    """
    window = window_of(events)
    inside = in_window(events, window)
    known = set() if counts is None else set(counts.ops)
    busy = [event for event in inside if event.kind == "device"] if cuda else step_thread_ops(inside)
    if cuda and not busy:
        raise RuntimeError(
            "Kernels were to be profiled, but torch.profiler saw none; "
            "another profiler may have the GPU, or the driver denies access: end the one, or profile without kernels."
        )
    rows = kernel_rows(inside, known) if cuda else op_rows(busy, known)
    kernels = _kernels(rows, steps, counts, tuple(ours))
    length = window.end - window.begin
    return Kernels(
        steps=steps,
        seconds=length / 1e9 / steps,
        gaps=1 - busy_nanoseconds(busy, window) / length,
        dtype=str(dtype).removeprefix("torch."),
        flops_ceiling=best.flops,
        bytes_ceiling=best.bytes,
        count=len(kernels),
        top=sorted(kernels, key=lambda kernel: -kernel.seconds)[:top],
        trace=trace,
    )


def _kernels(rows: list[Row], steps: int, counts: OpCounts | None, ours: tuple[str, ...]) -> list[Kernel]:
    spent = Counter[str]()
    for row in rows:  # an op may launch several kernels, which share its FLOPs and bytes
        spent[row.op] += row.nanoseconds
    return [_kernel(row, steps, counts, spent[row.op], ours) for row in rows]


def _kernel(row: Row, steps: int, counts: OpCounts | None, spent: int, ours: tuple[str, ...]) -> Kernel:
    count = None if counts is None else counts.ops.get(row.op)
    share = row.nanoseconds / spent if spent else 0.0
    return Kernel(
        name=row.name,
        op=row.op,
        calls=row.calls / steps,
        seconds=row.nanoseconds / 1e9 / steps,
        flops=None if count is None or count.flops is None else count.flops * share,
        bytes=None if count is None or count.bytes is None else count.bytes * share,
        ours=row.name.startswith(ours) or row.op.startswith(ours),
    )
