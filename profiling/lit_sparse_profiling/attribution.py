"""Attribution of a device's memory to this process and to others, from the driver's readings.

It depends on how this process appears among those that the driver lists:

- "own pid": its pid is listed, or that of a process that it started, whose memory counts as its own. `foreign` is the
  peak of the other processes' sum. If the driver does not tell the size of one of them, it is what was in use beside
  this process, the driver's own share included.
- "only process": its pid is not listed with a size, but one process was alone on the device, and always the same one.
  In a container the driver lists the host's pids. A process that was there when NVML was opened counts only if this
  process was known to be on the device too: at `mark_context`, or because `held` says so.
- "device delta": anything else. `process` is the highest rise of the device's use since NVML was opened, and `foreign`
  the use at that time, both as if `held` had come after. Memory that others take later counts as this process's, and
  what it had before beyond `held`, such as its context, as theirs.

Memory of version "v2" excludes what the driver reserves for itself. "v1" has it in `used`, and so in `foreign` of a
device delta. Managed memory is in `used`, but in no process's share.
"""

from __future__ import annotations

from dataclasses import replace

import psutil

from lit_sparse_profiling.nvml_device import Reading
from lit_sparse_profiling.sections import Attribution


class Shares:
    """Peaks of this process's memory and of all others', over the readings so far.

    Which pid is this process's may turn out late, so that peaks are kept for every pid.

    Args:
        pid: This process's pid, as it sees it itself.
        opening: The reading at the time of opening.
        held: Bytes that this process held then, as far as known.

    Attributes:
        used: Peak of the bytes in use on the device.
    """

    def __init__(self, pid: int, opening: Reading, held: int) -> None:
        self.used = 0
        self._pid, self._opening, self._held = pid, opening, held
        self._ours: dict[int, bool] = {pid: True}
        self._others = max(opening.used - held, 0)
        self._context: Reading | None = None
        self._most: dict[int, int] = {}
        self._beside: dict[int, int] = {}
        self._total = 0
        self._alone: set[int] = set()
        self.add(opening)

    def add(self, reading: Reading, context: bool = False) -> None:
        """Add a reading; `context` says that this process holds its CUDA context and nothing else at that time."""
        reading = self._with_children(reading)
        self.used = max(self.used, reading.used)
        self._context = reading if context else self._context
        self._add_sizes(reading)
        if len(reading.processes) == 1:
            ((pid, size),) = reading.processes.items()
            if size and (context or self._held or pid not in self._opening.processes):
                self._alone.add(pid)

    @property
    def attribution(self) -> Attribution:
        """Method by which this process's share is found."""
        if self._pid in self._most:
            return "own pid"
        # Two pids that were alone in turn: one of them, but it is unknown which, is another process.
        return "only process" if len(self._alone) == 1 else "device delta"

    @property
    def process(self) -> int:
        """Peak of this process's bytes."""
        ours = self._own_pid()
        return self.used - self._others if ours is None else self._most[ours]

    @property
    def foreign(self) -> int:
        """Peak of the bytes of other processes."""
        ours = self._own_pid()
        return self._others if ours is None else self._beside[ours]

    @property
    def context(self) -> int | None:
        """Bytes of the CUDA context; None without a marked reading, or if this process had none in it."""
        if self._context is None:
            return None
        ours = self._own_pid()
        grown = max(self._context.used - self._others, 0)
        whole = grown if ours is None else self._context.processes.get(ours) or 0
        return max(whole - self._held, 0) or None  # of what was held already, torch keeps the account

    def _add_sizes(self, reading: Reading) -> None:
        # A driver that hides sizes from a container lists its processes with 0 bytes: that is not a size.
        held = {pid: size for pid, size in reading.processes.items() if size}
        total = reading.used if None in reading.processes.values() else sum(held.values())
        for pid, size in held.items():
            self._most[pid] = max(self._most.get(pid, 0), size)
            self._beside.setdefault(pid, self._total)  # before this pid appeared, all memory was other processes'
        for pid, beside in self._beside.items():
            self._beside[pid] = max(beside, total - held.get(pid, 0))
        self._total = max(self._total, total)

    def _with_children(self, reading: Reading) -> Reading:
        """Return the reading with the bytes of processes that this one started under its own pid."""
        new = [pid for pid in reading.processes if pid not in self._ours]
        self._ours |= dict(zip(new, map(self._is_ours, new), strict=True))
        ours = [size for pid, size in reading.processes.items() if self._ours[pid]]
        if not ours:
            return reading
        known = [size for size in ours if size is not None]
        others = {pid: size for pid, size in reading.processes.items() if not self._ours[pid]}
        return replace(reading, processes={self._pid: sum(known) if known else None, **others})

    def _is_ours(self, pid: int) -> bool:
        try:
            return any(parent.pid == self._pid for parent in psutil.Process(pid).parents())
        except psutil.Error:  # it has ended, or the driver lists the pids of another container
            return False

    def _own_pid(self) -> int | None:
        """Return the pid under which the driver lists this process; None if unknown."""
        pids = {"own pid": {self._pid}, "only process": self._alone, "device delta": {None}}
        return next(iter(pids[self.attribution]))
