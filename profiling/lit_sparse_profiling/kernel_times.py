"""Where the time of a step goes: kernels (on a CPU, ops), what they achieve of what the device can do, and the gaps."""

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
from lit_sparse_profiling.events import OURS, Event, read, summed
from lit_sparse_profiling.opcounts import OpCounts
from lit_sparse_profiling.record import Kernel, Kernels

__all__ = ["Ceilings", "KernelProfile", "OpCounts", "ceilings", "table"]

WINDOW = "lit_sparse: profiled steps"
NAMESPACES = re.compile(r"^void |\(anonymous namespace\)::|\bat::(native::)?|\bstd::")


class KernelProfile:
    """Times every kernel, on a CPU every op, of a few steps: `start()`, the steps, `stop(steps)`, then `kernels(...)`.

    The profiler costs time for every op, so that a step is slower and, on a GPU, has more gaps than one that is not
    profiled. One torch.profiler can run in a thread at a time. CUDA is synchronised at start and stop.

    Args:
        device: Where the steps run, a CPU or a CUDA device.
        trace: File for the Chrome trace, `.json` or `.json.gz`; its folder is made if need be.

    Raises:
        ValueError: if the device is of another kind.
    """

    def __init__(self, device: torch.device, trace: Path | None = None) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"Kernels of {device} were to be profiled, but only cpu and cuda can be; give one of these."
            )
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.trace = device, trace
        self._running: tuple[profile, record_function] | None = None
        self._events: list[Event] = []
        self._steps = 0

    def start(self) -> None:
        """Begin to profile.

        Raises:
            RuntimeError: if this profile or another torch.profiler runs already.
        """
        if self._running is not None:
            raise RuntimeError("A profile is to start, but it runs already; stop it first.")
        if _profiler_enabled():  # torch would end that one without a word
            raise RuntimeError("A profile is to start, but another torch.profiler runs; stop that one first.")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        profiler = profile(activities=activities)
        profiler.start()
        torch.zeros((), device=self.device)  # the first launch under a profiler takes longer than those that follow
        self._synchronize()
        window = record_function(WINDOW)
        window.__enter__()
        self._running = profiler, window

    def stop(self, steps: int) -> None:
        """End, after so many steps; the trace is written now, if one was asked for.

        Raises:
            RuntimeError: if the profile does not run.
            ValueError: if there was no step.
        """
        if steps < 1:
            self.close()
            raise ValueError(f"A profile needs a step at least, but {steps} were given; step between start and stop.")
        profiler = self._end()
        if profiler is None:
            raise RuntimeError("A profile is to stop, but it does not run; start it first.")
        if self.trace is not None:
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.trace))
        self._steps, self._events = steps, _recorded(profiler, self.device)

    def close(self) -> None:
        """End without a result, if it runs: for steps that failed."""
        self._end()

    def kernels(
        self, counts: OpCounts | None, best: Ceilings, dtype: torch.dtype, top: int = 20, ours: Sequence[str] = OURS
    ) -> Kernels:
        """The figures of the profiled steps.

        An op's counted FLOPs and bytes go to its kernels in proportion to their time. The op of a kernel is the one
        that was counted: a copy's kernel has `aten::clone` if that called `aten::copy_`. On a CPU likewise: an op that
        was counted has the time of those that it calls with it, any other only its own.

        Args:
            counts: Of one such step; None leaves FLOPs and bytes unknown.
            best: The device's ceilings, of products in `dtype`.
            dtype: That of the computation.
            top: How many of the kernels that take longest are kept.
            ours: What the names of the project's own kernels or ops begin with.

        Raises:
            RuntimeError: if nothing was profiled, or the profiler saw no kernel of the GPU.
        """
        if not self._steps:
            raise RuntimeError("Kernels are asked for, but no step was profiled; start, step and stop first.")
        trace = None if self.trace is None else str(self.trace)
        cuda = self.device.type == "cuda"
        return summed(self._events, self._steps, counts, best, dtype, cuda=cuda, top=top, ours=ours, trace=trace)

    def _end(self) -> profile | None:
        """End the window and the profiler; gives the profiler, None if there was none."""
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


def _recorded(profiler: profile, device: torch.device) -> list[Event]:
    # the raw events: torch's EventList merges ops, and with them goes the link from a kernel to its op
    results = None if profiler.profiler is None else profiler.profiler.kineto_results
    if results is None:
        raise RuntimeError("torch.profiler was to record ops, but it kept none; use a build of torch with Kineto.")
    return read(results.events(), device, WINDOW)


def table(kernels: Kernels, rows: int = 10) -> Table:
    """The kernels that take longest, ours marked; below it the gaps and the ceilings.

    What a kernel achieves is shown beside the ceiling that it comes nearer to.
    """
    shown = kernels.top[:rows]
    on_cpu = all(kernel.name == kernel.op for kernel in kernels.top)
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, caption=_caption(kernels, len(shown)), caption_justify="left")
    names = ["op"] if on_cpu else ["kernel", "op"]
    for name in names:
        grid.add_column(name, overflow="fold")  # these give way where the terminal is narrow, the figures do not
    for figure in ("calls/step", "ms", "share", "achieved", "of ceiling"):
        grid.add_column(figure, justify="right", no_wrap=True)
    for kernel in shown:
        name = ("* " if kernel.ours else "") + shortened(kernel.name)
        labels = [name] if on_cpu else [name, kernel.op]
        grid.add_row(*map(escape, labels), *_figures(kernels, kernel))
    return grid


def _figures(kernels: Kernels, kernel: Kernel) -> list[str]:
    figures = [f"{kernel.calls:,.4g}", f"{kernel.seconds * 1e3:.3f}", f"{kernels.share(kernel):.1%}"]
    achieved = kernels.achieved(kernel)
    if achieved is None:
        return [*figures, "", ""]
    share, unit = achieved
    ceiling = kernels.flops_ceiling if unit == "FLOP/s" else kernels.bytes_ceiling
    return [*figures, _rate(share * ceiling, unit), f"{share:.0%}"]


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


def shortened(name: str, width: int = 44) -> str:
    """A kernel's name without return type and torch's namespaces, cut to `width` characters."""
    bare = NAMESPACES.sub("", name)
    return bare if len(bare) <= width else bare[: width - 1] + "…"
