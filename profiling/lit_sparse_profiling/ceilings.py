"""Measurement of a device's ceilings: the rates of a dense matrix product and of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMES = ", ".join(str(dtype) for dtype in DTYPES)
COPY_BYTES = 128 * 2**20
PRODUCT_SIZES = (512, 1024, 2048, 4096, 8192)
LONG_ENOUGH = 0.01
"""Seconds of a product. Launch overhead no longer matters in one that is longer, so that larger ones are not tried."""
REPETITIONS = 4
FIRST_GAP = 2.0
"""Seconds from the first measurement of a run to the second; later gaps double."""
COST_GAP = 20
"""Least gap, in times of what a measurement takes."""


@dataclass(frozen=True)
class Ceilings:
    """Highest rates measured on a device.

    The copied buffer is larger than the caches: an op whose data fits into them can exceed the ceiling.

    Attributes:
        flops: FLOP/s of a dense matrix product.
        bytes: Bytes/s, read plus written, of a copy.
    """

    flops: float
    bytes: float


class CeilingSeries:
    """The ceilings measured again and again during a run, between its timed steps.

    A ceiling that was measured once, while something else had the machine, makes every share of it wrong. Here the
    highest is the ceiling, and the spread says how far the machine was from quiet.

    Args:
        measure: Measures both ceilings.

    Attributes:
        found: The measurements so far.
        failure: Why measuring has ended; None while it works.
    """

    def __init__(self, measure: Callable[[], Ceilings]) -> None:
        self.found: list[Ceilings] = []
        self.failure: str | None = None
        self._measure, self._due, self._gap = measure, 0.0, FIRST_GAP

    @property
    def due(self) -> bool:
        """True if it is time for another measurement."""
        return self.failure is None and perf_counter() >= self._due

    def measure(self) -> None:
        """Measure now, and less and less often from now on: the gaps double, so that a long run loses no time."""
        begin = perf_counter()
        try:
            self.found.append(self._measure())
        except RuntimeError as error:  # 768 MiB that may be taken must not cost the run
            self.failure = str(error).strip().splitlines()[0]
            return
        now = perf_counter()
        self._gap = max(2 * self._gap, COST_GAP * (now - begin)) if len(self.found) > 1 else self._gap
        self._due = now + self._gap

    @property
    def best(self) -> Ceilings | None:
        """The highest rates; None if there are none."""
        if not self.found:
            return None
        return Ceilings(max(one.flops for one in self.found), max(one.bytes for one in self.found))


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both ceilings. It takes about a second on a CPU, less on a GPU; the device must be idle.

    Each is the best of several repetitions under the process's own settings (threads, TF32). Up to 768 MiB are
    allocated (three fp32 matrices on a GPU) and freed. Torch's random state is not changed.

    Raises:
        ValueError: if the device is neither a CPU nor a CUDA device, or the dtype is none of `DTYPES`.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"Ceilings of {device} were asked for, but they are known for cpu and cuda; give one of these."
        )
    if dtype not in DTYPES:
        raise ValueError(f"Ceilings in {dtype} were asked for, but products are timed in {_NAMES}; give one of these.")
    found = Ceilings(_product_rate(device, dtype), _copy_rate(device))
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()  # else the driver's figures of the run would include these buffers
    return found


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    best = 0.0
    for size in PRODUCT_SIZES:
        seconds = _product_seconds(size, device, dtype)
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_ENOUGH:
            break
    return best


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    # Random numbers: a GPU multiplies zeros faster, since it draws less power and keeps its clock. They come from a
    # generator of their own: the run's own random numbers must not depend on whether it was profiled.
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, generator=generator, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return _seconds(lambda: torch.mm(a, b, out=out), device)


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _seconds(lambda: target.copy_(source), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of several repetitions. The first one is dropped: it loads libraries and tunes."""
    timed = _seconds_on_cuda if device.type == "cuda" else _seconds_on_cpu
    return min([timed(work, device) for _ in range(1 + REPETITIONS)][1:])


def _seconds_on_cpu(work: Callable[[], object], _: torch.device) -> float:
    begin = perf_counter()
    work()
    return perf_counter() - begin


def _seconds_on_cuda(work: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1000
