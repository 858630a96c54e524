"""The time of a step by kernel (on a CPU, by op), compared with the device's ceilings, and the gaps between kernels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch._C._autograd import _profiler_enabled
from torch.profiler import ProfilerActivity, profile, record_function

from lit_sparse_profiling.ceilings import Ceilings, ceilings
from lit_sparse_profiling.documents import printable
from lit_sparse_profiling.events import OURS, Event, read, summarize
from lit_sparse_profiling.opcounts import OpCounts
from lit_sparse_profiling.open_profilers import make_profile
from lit_sparse_profiling.speed_sections import Kernel, Kernels

__all__ = ["Ceilings", "KernelProfile", "OpCounts", "ceilings", "table"]

WINDOW = "lit_sparse: profiled steps"
NAMESPACES = re.compile(r"^void |\(anonymous namespace\)::|\bat::(native::)?|\bstd::")


class KernelProfile:
    """Profile of every kernel, on a CPU every op, of a few steps: `start()`, the steps, `stop(steps)`, `kernels(...)`.

    The profiler adds time to every op: a profiled step is slower and, on a GPU, has more gaps. Only one torch.profiler
    can run in a thread at a time. CUDA is synchronised at start and stop.

    Args:
        device: Device of the steps, a CPU or a CUDA device.
        trace: File for the Chrome trace, `.json` or `.json.gz`; its folder is created.

    Raises:
        ValueError: if the device is neither.
    """

    def __init__(self, device: torch.device, trace: Path | None = None) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"Kernels of {device} were to be profiled, but only those of cpu and cuda can be; give one of these."
            )
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.trace = device, trace
        self._running: tuple[profile, record_function] | None = None
        self._events: list[Event] = []
        self._steps = 0

    def start(self) -> None:
        """Start to profile.

        Raises:
            RuntimeError: if this profile or another torch.profiler is running.
        """
        if self._running is not None:
            raise RuntimeError("A profile is to start, but it is running; stop it first.")
        if _profiler_enabled():  # torch would stop that one silently, and its owner would get an empty trace
            raise RuntimeError("A profile is to start, but another torch.profiler runs; stop that one first.")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        profiler = make_profile(activities=activities)
        profiler.start()
        torch.zeros((), device=self.device)  # the first launch under a profiler is slow: keep it out of the window
        self._synchronize()
        window = record_function(WINDOW)
        window.__enter__()
        self._running = profiler, window

    def stop(self, steps: int) -> None:
        """Stop after `steps` steps, and write the trace if one was requested.

        Raises:
            RuntimeError: if the profile is not running.
            ValueError: if `steps` is below 1.
        """
        if steps < 1:
            self.close()
            raise ValueError(
                f"A profile needs at least one step, but {steps} were given; run a step between start and stop."
            )
        profiler = self._end()
        if profiler is None:
            raise RuntimeError("A profile is to stop, but it is not running; start it first.")
        if self.trace is not None:
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.trace))
        self._steps, self._events = steps, _read_events(profiler, self.device)

    def close(self) -> None:
        """Stop without a result, if running: for steps that failed."""
        self._end()

    def kernels(
        self, counts: OpCounts | None, best: Ceilings, dtype: torch.dtype, top: int = 20, ours: Sequence[str] = OURS
    ) -> Kernels:
        """Return the time of the profiled steps by kernel.

        An op's FLOPs and bytes are divided among its kernels in proportion to their time. A kernel belongs to the op
        that was counted: a copy's kernel to `aten::clone`, if that called `aten::copy_`. Likewise on a CPU, where a
        counted op includes the time of the ops that it calls, and any other op does not.

        Args:
            counts: FLOPs and bytes of one such step; None leaves them unknown.
            best: The device's ceilings for products in `dtype`.
            dtype: Dtype of the computation.
            top: Number of slowest kernels to keep.
            ours: Prefixes of the names of the project's own kernels and ops.

        Raises:
            RuntimeError: if nothing was profiled, or the profiler saw no kernel on a GPU.
        """
        if not self._steps:
            raise RuntimeError("Kernels are asked for, but no step was profiled; start, step and stop first.")
        trace = None if self.trace is None else str(self.trace)
        cuda = self.device.type == "cuda"
        return summarize(self._events, self._steps, counts, best, dtype, cuda=cuda, top=top, ours=ours, trace=trace)

    def _end(self) -> profile | None:
        """End the window and the profiler, and return the profiler; None if it was not running."""
        if self._running is None:
            return None
        (profiler, window), self._running = self._running, None
        self._synchronize()
        window.__exit__(None, None, None)
        profiler.stop()
        return profiler

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _read_events(profiler: profile, device: torch.device) -> list[Event]:
    # The raw events: torch's EventList merges ops, and loses the link from a kernel to its op.
    results = None if profiler.profiler is None else profiler.profiler.kineto_results
    if results is None:
        raise RuntimeError("torch.profiler was to record ops, but it kept none; use a build of torch with Kineto.")
    return read(results.events(), device, WINDOW)


def table(kernels: Kernels, rows: int = 10) -> Table:
    """Return a table of the slowest kernels, ours marked by "*", with gaps and ceilings in the caption.

    A kernel's rate is shown as a fraction of the ceiling that it comes closer to, or as "above" it.
    """
    shown = kernels.top[:rows]
    on_cpu = all(kernel.name == kernel.op for kernel in kernels.top)  # `Kernels` does not say which device it was
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, caption=_caption(kernels, len(shown)), caption_justify="left")
    names = ["op"] if on_cpu else ["kernel", "op"]
    for name in names:
        grid.add_column(name, overflow="fold")  # names wrap in a narrow terminal, figures do not
    for figure in ("calls/step", "ms", "share", "achieved", "of ceiling"):
        grid.add_column(figure, justify="right", no_wrap=True)
    for kernel in shown:
        own = kernel.name.removeprefix("aten::") if on_cpu else shorten_name(kernel.name)
        name = ("* " if kernel.ours else "") + own
        labels = [name] if on_cpu else [name, kernel.op]
        grid.add_row(*(escape(printable(label)) for label in labels), *_figures(kernels, kernel))
    return grid


def _figures(kernels: Kernels, kernel: Kernel) -> list[str]:
    figures = [f"{kernel.calls:,.4g}", f"{kernel.seconds * 1e3:.3f}", f"{kernels.share(kernel):.1%}"]
    achieved = kernels.achieved(kernel)
    if achieved is None:
        return [*figures, "", ""]
    share, unit = achieved
    ceiling = kernels.flops_ceiling if unit == "FLOP/s" else kernels.bytes_ceiling
    # More than the ceiling is no share of it: `utilization.findings` says what it can mean.
    return [*figures, _rate(share * ceiling, unit), f"{share:.0%}" if share <= 1 else "above"]


def _caption(kernels: Kernels, shown: int) -> str:
    what = "no op ran, which is Python's share" if all(k.name == k.op for k in kernels.top) else "no kernel ran"
    best = f"{_rate(kernels.flops_ceiling, 'FLOP/s')} in {kernels.dtype}, {_rate(kernels.bytes_ceiling, 'B/s')}"
    lines = [
        f"{shown} of {kernels.count}; in {kernels.gaps:.1%} of a step of {kernels.seconds * 1e3:.2f} ms {what}",
        f"ceilings: {best}" + ("; * ours" if any(kernel.ours for kernel in kernels.top[:shown]) else ""),
    ]
    return "\n".join(lines)


def _rate(rate: float, unit: str) -> str:
    prefix, size = ("T", 1e12) if rate >= 1e12 else ("G", 1e9)
    return f"{rate / size:,.2f} {prefix}{unit}"


def shorten_name(name: str, width: int = 44) -> str:
    """Return a kernel's name without return type and torch's namespaces, cut to `width` characters."""
    bare = NAMESPACES.sub("", name)
    return bare if len(bare) <= width else bare[: width - 1] + "…"
