"""Resident memory of this process, in bytes: the current value and its peak.

It includes tensors, the interpreter, libraries, the pages of mapped weight files that were read, and freed memory that
the C allocator has not returned. It does not include child processes, such as data loader workers.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

if sys.platform != "win32":
    import resource

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to `clear_refs`, it sets VmHWM back to VmRSS (Linux, man 5 proc)."""

PER_PHASE = "VmHWM, set back at each phase: resident memory of this process, mapped files included"
SO_FAR = "the process's peak so far, not the phase's ({}): resident memory of this process, mapped files included"
UNKNOWN = "not measured: this system tells no peak of the resident memory"


class ResidentMemory:
    """Reader of this process's resident memory. Use one at a time: resetting the peak affects the whole process.

    Attributes:
        method: How peaks are read, in words, and whether they are a phase's or the process's.
    """

    def __init__(self) -> None:
        self._highest = _peak()
        self._resets = _try_reset_peak()
        self.method = PER_PHASE if self._resets else _peak_method()

    def current(self) -> int | None:
        """Return the resident bytes now; None except on Linux."""
        return _status("VmRSS")

    def lap(self) -> int | None:
        """Return the peak since the last lap, or since construction, and begin a new lap.

        If the peak cannot be reset, it is that of the process so far, as `method` says. It is None if the system does
        not report one.
        """
        peak = _peak()
        self._highest = max(filter(None, (self._highest, peak)), default=None)
        if self._resets:
            CLEAR_REFS.write_text(RESET_PEAK)
        return peak

    def peak(self) -> int | None:
        """Return the process's peak since it began, over all laps."""
        return max(filter(None, (self._highest, _peak())), default=None)


def free_heap() -> None:
    """Free Python's reference cycles, and make glibc return freed memory to the system, which it else keeps for later.

    Call it before memory is measured, and after an instrument has freed its own: both would count as the program's
    resident memory.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Make glibc return freed memory to the system, which it otherwise keeps for later allocations.

    Call it after an instrument has freed its memory, which would otherwise count as the program's resident memory.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


@cache
def _mallinfo() -> Callable[[], _MallInfo] | None:
    """Return glibc's `mallinfo2`; None where the C library has none (before glibc 2.33, musl, macOS)."""
    found = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if found is not None:
        found.restype = _MallInfo
    return found


def heap_in_use() -> int | None:
    """Return the bytes that this process has from the C allocator now: tensors, numpy's arrays, buffers of libraries.

    None if the C library does not tell, or if another allocator is in its place.
    """
    ask = _mallinfo()
    if ask is None:
        return None
    info = ask()
    return info.uordblks + info.hblkhd or None


def _status(key: str) -> int | None:
    """Return a size from Linux's /proc/self/status, in bytes; None on other systems."""
    if not STATUS.exists():
        return None
    sizes = [line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(sizes[0]) * 1024 if sizes else None  # "kB" there means KiB


def _peak() -> int | None:
    # VmHWM first: a process that a larger one forked inherits the parent's ru_maxrss.
    return _status("VmHWM") or _maxrss()


def _maxrss() -> int | None:
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _try_reset_peak() -> bool:
    """Reset the process's peak to its resident memory now; return False if the system does not allow it."""
    if _status("VmHWM") is None:
        return False
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:  # no such file, or /proc is read-only, as in many containers
        return False
    return True


def _peak_method() -> str:
    if _peak() is None:
        return UNKNOWN
    return SO_FAR.format("ru_maxrss" if _status("VmHWM") is None else "VmHWM")
