"""Resident memory of this process, in bytes: now, and at its peak.

Resident memory is what the process takes of the machine's: its tensors, but also the interpreter, libraries, mapped
weight files as far as they were read, and what the C allocator has not given back. Child processes (data loader
workers) are not in it.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

if sys.platform != "win32":
    import resource

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"

PER_PHASE = "VmHWM, set back at each phase: resident memory of this process, mapped files included"
SO_FAR = "the process's peak so far, not the phase's ({}): resident memory of this process, mapped files included"
UNKNOWN = "not measured: this system tells no peak of the resident memory"


class ResidentMemory:
    """Reads this process's resident memory; have one at a time, since setting the peak back is for the whole process.

    Attributes:
        method: How peaks are read, in words; it says so when they are the process's rather than a phase's.
    """

    def __init__(self) -> None:
        self._highest = _peak()
        self._resets = _try_reset_peak()
        self.method = PER_PHASE if self._resets else _peak_method()

    def current(self) -> int | None:
        """Bytes resident now; None where the system does not tell (it does on Linux)."""
        return _status("VmRSS")

    def lap(self) -> int | None:
        """The peak since the last lap (at first, since this object was made), and the begin of a new lap.

        Where the peak cannot be set back it is that of the process so far, as `method` says; None if there is none.
        """
        peak = _peak()
        self._highest = max(filter(None, (self._highest, peak)), default=None)
        if self._resets:
            CLEAR_REFS.write_text(RESET_PEAK)
        return peak

    def peak(self) -> int | None:
        """The process's peak since it began, through all laps."""
        return max(filter(None, (self._highest, _peak())), default=None)


def trim_heap() -> None:
    """Have glibc give the memory that was freed back to the system; it would keep some of it for later.

    For tools that took memory only to look at something: what they freed is not to count as the program's.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _status(key: str) -> int | None:
    """A size out of Linux's own account of this process; None where there is no such account."""
    if not STATUS.exists():
        return None
    sizes = [line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(sizes[0]) * 1024 if sizes else None  # "kB" there means KiB


def _peak() -> int | None:
    # ru_maxrss comes second: a process started by a large one inherits its figure, VmHWM does not
    return _status("VmHWM") or _maxrss()


def _maxrss() -> int | None:
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _try_reset_peak() -> bool:
    """Set the process's peak back to what it holds now; False where the system does not let us."""
    if _status("VmHWM") is None:
        return False
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:  # no such file, or a read-only /proc: the method says what that means
        return False
    return True


def _peak_method() -> str:
    if _peak() is None:
        return UNKNOWN
    return SO_FAR.format("ru_maxrss" if _status("VmHWM") is None else "VmHWM")
