"""What a device can do at best: its rate of floating-point operations, and of reading and writing memory."""

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
"""Seconds of a product from which on a larger one would come no nearer to the ceiling."""
REPETITIONS = 4


@dataclass(frozen=True)
class Ceilings:
    """The best rates measured on a device: FLOP/s of a dense matrix product, B/s (read and written) of a copy.

    The copy is too large for caches: what works in these may be faster than the ceiling.
    """

    flops: float
    bytes: float


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both now, on a device that does nothing else meanwhile; it takes about a second, less on a GPU.

    They are the best of several repetitions, with the settings (threads, TF32) that the process has. Up to 768 MiB are
    taken (fp32 on a GPU) and given back; torch's random state is left as it is.

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
            torch.cuda.empty_cache()
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
    # random numbers, since a GPU multiplies zeros faster; from a generator of their own, since the run has its draws
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, generator=generator, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return _seconds(lambda: torch.mm(a, b, out=out), device)


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _seconds(lambda: target.copy_(source), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of several repetitions, after one that does not count."""
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
