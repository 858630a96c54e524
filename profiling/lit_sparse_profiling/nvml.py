"""What the NVIDIA driver says of the device in use: its memory and whose that is, its power, energy and clocks.

Torch's allocator knows its own memory; the driver also knows the CUDA context, what libraries took past the allocator,
and other processes. Its figures are samples: what comes and goes between two of them is not seen, so that for torch's
own memory the allocator's peaks are the better ones.

What can be known of memory depends on how this process is found among those that the driver lists:

- "own pid": its pid is listed. `foreign` is what the other processes held together; where the driver does not tell the
  size of one, it is what was in use beside ours, and so has the driver's own share in it.
- "only process": the pid is not listed with its size, but one process was alone on the device, and always the same
  one: in a container the driver lists the pids of the host. A process that was there when NVML was opened counts only
  if ours was known to be on the device too: at `mark_context`, or where `held` says so.
- "device delta": anything else. `process` is what the device's use rose by since NVML was opened, at most, and
  `foreign` what was in use then, both as if `held` had come after. What others take later counts as ours, and what
  else we had before, such as the context, as theirs.

Memory of version "v2" leaves out what the driver reserves for itself; "v1" has it in `used`, and so in `foreign` of a
device delta. Managed memory is in `used` but in no process's share.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from threading import Event, Lock, Thread
from time import perf_counter
from typing import Any, Literal, Self, TypeVar

import pynvml
import torch

from lit_sparse_profiling.sections import Attribution, Driver

T = TypeVar("T")

COMPUTE = "nvmlDeviceGetComputeRunningProcesses"
OTHERS = ("nvmlDeviceGetGraphicsRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses")
POWER = "nvmlDeviceGetPowerUsage"
ENERGY = "nvmlDeviceGetTotalEnergyConsumption"
CLOCK = "nvmlDeviceGetClockInfo"

PATIENCE = 5.0
"""Seconds that `NVML.stop` waits for an answer of the driver."""


class NVMLMissing(RuntimeError):
    """There is no NVML here, it does not work, or it does not know the device."""


def device_uuid(device: torch.device) -> str:
    """The UUID of a CUDA device as NVML reads it, "GPU-..." or, of a MIG instance, "MIG-...".

    Never go by an index: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER change CUDA's, and NVML does not heed them.

    Raises:
        ValueError: if it is no CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"The UUID of device {str(device)!r} was asked for, but only CUDA devices have one; give one.")
    properties = torch.cuda.get_device_properties(device)
    kind = "MIG" if " MIG " in properties.name else "GPU"  # "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    return f"{kind}-{properties.uuid}"


class NVML:
    """Samples one device in a thread, from `start` to `stop`, or in a `with` block; `result` says what was found.

    Make it before this process takes anything of the device, so that what it takes can be told from what was there;
    where that is too late, say what it has in `held`.

    It never raises for what happens to the device or the driver after it was made: `Driver.lost` says it, and the
    figures are those until then. `watts_peak` is smoothed by the device, over about a second on recent ones. A MIG
    instance tells its memory and processes, but no power, energy or clocks, which are the whole device's.

    Args:
        uuid: Of the device or MIG instance; see `device_uuid`.
        interval: Seconds between samples; the driver has little new to say more often than ten times a second.
        api: The `pynvml` module, or one like it.
        held: Bytes of the device that this process is known to hold already, as torch's allocator tells.

    Raises:
        NVMLMissing: if the driver is absent or broken, or does not know the device or its memory.
        ValueError: if `interval` is not above 0.
    """

    def __init__(self, uuid: str, interval: float = 0.1, api: Any = pynvml, held: int = 0) -> None:
        if interval <= 0:
            raise ValueError(f"NVML was to be sampled every {interval} seconds; give a time above 0.")
        self.uuid, self.interval, self._error = uuid, interval, api.NVMLError
        self._device = _opened(uuid, api)
        self._shares = _Shares(os.getpid(), self._device.opening, held)
        self._windows = _Windows()
        self._watts_peak: float | None = None
        self._sm_mhz: Counter[int] = Counter()
        self._samples = 0
        self._lost: str | None = None
        self._lock = Lock()  # for the figures only: a call that never returns must not hold it
        self._stopping, self._closed = Event(), False
        self._thread: Thread | None = None

    @classmethod
    def of(cls, device: torch.device, interval: float = 0.1, api: Any = pynvml) -> Self:
        """The sampler of a CUDA device, told what torch has taken of it; raises as `device_uuid` and the class do."""
        return cls(device_uuid(device), interval, api, torch.cuda.memory_reserved(device))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def mark_context(self) -> None:
        """Take what this process holds now for its CUDA context.

        To be called when the context is there (`torch.cuda.synchronize(device)` makes it) and no tensor yet.
        """
        self._observe(context=True)

    def start(self) -> None:
        """Take the first sample and begin to sample in a thread; once begun, it does nothing.

        Raises:
            RuntimeError: if it was stopped, which is for good; as do all methods but `stop` and `result`.
        """
        if self._thread is None or self._closed:
            self.sample()
            self._thread = Thread(target=self._run, name="nvml", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, take the last sample if it ever began, and shut NVML down; once stopped, it does nothing."""
        if self._closed:
            return
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():  # NVML cannot be shut down below a call that is under way
                self._mark_lost(f"no answer for {PATIENCE:g} seconds")
                self._closed = True
                return
            self.sample()
        self._closed = True
        self._shut_down()

    def sample(self) -> None:
        """Take one sample now, in this thread."""
        self._observe()

    def begin_window(self) -> None:
        """A timed stretch begins: energy and mean power are those of the windows. Synchronise the device before.

        The device's counter moves in steps of tens of milliseconds, so that windows should last seconds.

        Raises:
            ValueError: if one is open already.
        """
        joules = self._query(self._device.joules)
        with self._lock:
            self._windows.begin(joules)

    def end_window(self) -> None:
        """The timed stretch ends. Synchronise the device before.

        Raises:
            ValueError: if none is open.
        """
        joules = self._query(self._device.joules)
        with self._lock:
            self._windows.end(joules)

    def result(self) -> Driver:
        """What was found so far; it may be asked at any time."""
        with self._lock:
            shares, clocks = self._shares, sorted(self._sm_mhz.elements())
            return Driver(
                device=self._device.name,
                uuid=self.uuid,
                driver=self._device.driver,
                mig=self._device.mig,
                memory=self._device.memory,
                attribution=shares.attribution,
                used=shares.used,
                process=shares.process,
                context=shares.context,
                foreign=shares.foreign,
                samples=self._samples,
                joules=self._windows.joules,
                watts=self._windows.watts,
                watts_peak=self._watts_peak,
                sm_mhz=[float(median(clocks)), float(clocks[0])] if clocks else [],
                lost=self._lost,
            )

    def _run(self) -> None:
        while self._lost is None and not self._stopping.wait(self.interval):
            self.sample()

    def _observe(self, context: bool = False) -> None:
        reading = self._query(self._device.read)
        if reading is None:
            return
        with self._lock:
            self._samples += 1
            self._shares.take(reading, context)
            self._windows.take(reading.watts)
            self._watts_peak = _highest(self._watts_peak, reading.watts)
            self._sm_mhz.update([] if reading.sm_mhz is None else [reading.sm_mhz])

    def _query(self, query: Callable[[], T]) -> T | None:
        """The query's answer; None once the device or NVML has failed."""
        if self._closed:
            raise RuntimeError(f"NVML was to be asked for {self.uuid}, but it was stopped; make a new NVML.")
        if self._lost is not None:
            return None
        try:
            return query()
        except self._error as error:
            self._mark_lost(str(error))
            return None

    def _shut_down(self) -> None:
        try:
            self._device.close()
        except self._error as error:
            self._mark_lost(str(error))

    def _mark_lost(self, reason: str) -> None:
        if self._lost is None:  # the first failure is the cause of those after it
            self._lost = (
                f"NVML failed after {self._samples} samples of {self.uuid} ({reason}), and the figures are those until "
                "then; look at the device with nvidia-smi."
            )


@dataclass(frozen=True)
class _Reading:
    """One look at the device: bytes in use, those of each process by its pid (None: not told), watts, MHz."""

    used: int
    processes: dict[int, int | None]
    watts: float | None
    sm_mhz: int | None


def _opened(uuid: str, api: Any) -> _Device:
    try:
        return _Device(uuid, api)
    except api.NVMLError as error:
        raise NVMLMissing(
            f"NVML was to watch the device {uuid}, but says: {error}; "
            "see with `nvidia-smi -L` whether the driver works and which devices it knows."
        ) from error


class _Device:
    """One device, asked through NVML; all methods raise NVML's own errors."""

    def __init__(self, uuid: str, api: Any) -> None:
        self.mig = uuid.startswith("MIG-")
        self._api = api
        self._absent = {POWER, ENERGY, CLOCK} if self.mig else set[str]()
        api.nvmlInit()
        try:
            self._handle = api.nvmlDeviceGetHandleByUUID(uuid)
            self.name: str = api.nvmlDeviceGetName(self._handle)
            self.driver: str = api.nvmlSystemGetDriverVersion()
            self.memory: Literal["v2", "v1"] = self._memory()
            self.opening = self.read()
        except api.NVMLError:
            api.nvmlShutdown()
            raise

    def read(self) -> _Reading:
        milliwatts, mhz = self._ask(POWER), self._ask(CLOCK, self._api.NVML_CLOCK_SM)
        watts = None if milliwatts is None else milliwatts / 1000
        return _Reading(self._used(), self._processes(), watts, mhz)

    def joules(self) -> float | None:
        """Energy since the driver was loaded; None if the device does not count it."""
        millijoules = self._ask(ENERGY)
        return None if millijoules is None else millijoules / 1000

    def close(self) -> None:
        self._api.nvmlShutdown()

    def _memory(self) -> Literal["v2", "v1"]:
        api = self._api
        too_old = (api.NVMLError_NotSupported, api.NVMLError_FunctionNotFound, api.NVMLError_ArgumentVersionMismatch)
        try:
            api.nvmlDeviceGetMemoryInfo(self._handle, version=api.nvmlMemory_v2)
        except (*too_old, api.NVMLError_Unknown):  # the last is what drivers in WSL say to it
            return "v1"
        return "v2"

    def _used(self) -> int:
        version = self._api.nvmlMemory_v2 if self.memory == "v2" else None
        return int(self._api.nvmlDeviceGetMemoryInfo(self._handle, version=version).used)

    def _processes(self) -> dict[int, int | None]:
        listed = self._ask(COMPUTE)
        if listed is None:  # without it no list is whole, and a lone entry would not be alone
            return {}
        found: dict[int, int | None] = {}
        for process in [*listed, *(each for query in OTHERS for each in self._ask(query) or [])]:
            size = process.usedGpuMemory
            if size == self._api.NVML_VALUE_NOT_AVAILABLE_ulonglong.value:
                size = None
            # one that computes and draws is in two lists, with the same bytes
            found[process.pid] = _highest(found.get(process.pid), size)
        return found

    def _ask(self, query: str, *args: Any) -> Any:
        """The device's answer; None if it has none for this query, which is found out once."""
        api = self._api
        denied = (api.NVMLError_NotSupported, api.NVMLError_FunctionNotFound, api.NVMLError_NoPermission)
        if query in self._absent:
            return None
        try:
            return getattr(api, query)(self._handle, *args)
        except (*denied, api.NVMLLibraryMismatchError):
            self._absent.add(query)
            return None


class _Shares:
    """Whose the memory in use was: for each process its peak, and the peak of all others beside it.

    Which process is ours may turn out late, so that peaks are kept for each.
    """

    def __init__(self, pid: int, opening: _Reading, held: int) -> None:
        self.used = 0
        self._pid, self._opening, self._held = pid, opening, held
        self._others = max(opening.used - held, 0)
        self._context: _Reading | None = None
        self._most: dict[int, int] = {}
        self._beside: dict[int, int] = {}
        self._total = 0
        self._alone: set[int] = set()
        self.take(opening)

    def take(self, reading: _Reading, context: bool = False) -> None:
        """One more reading; `context` says that this process is known to hold its context then and nothing else."""
        self.used = max(self.used, reading.used)
        self._context = reading if context else self._context
        self._take_sizes(reading)
        if len(reading.processes) == 1:
            ((pid, size),) = reading.processes.items()
            if size and (context or self._held or pid not in self._opening.processes):
                self._alone.add(pid)

    @property
    def attribution(self) -> Attribution:
        if self._pid in self._most:
            return "own pid"
        return "only process" if len(self._alone) == 1 else "device delta"

    @property
    def process(self) -> int:
        ours = self._ours()
        return self.used - self._others if ours is None else self._most[ours]

    @property
    def foreign(self) -> int:
        ours = self._ours()
        return self._others if ours is None else self._beside[ours]

    @property
    def context(self) -> int | None:
        """Bytes at the reading that was marked; None if there was none, or if nothing of ours was there."""
        if self._context is None:
            return None
        ours = self._ours()
        grown = max(self._context.used - self._others, 0)
        return (grown if ours is None else self._context.processes.get(ours)) or None

    def _take_sizes(self, reading: _Reading) -> None:
        # a driver that hides a container's figures lists its processes with 0 bytes: that is no size
        held = {pid: size for pid, size in reading.processes.items() if size}
        total = reading.used if None in reading.processes.values() else sum(held.values())
        for pid, size in held.items():
            self._most[pid] = max(self._most.get(pid, 0), size)
            self._beside.setdefault(pid, self._total)  # before it came, all were others
        for pid, beside in self._beside.items():
            self._beside[pid] = max(beside, total - held.get(pid, 0))
        self._total = max(self._total, total)

    def _ours(self) -> int | None:
        """The pid under which the driver knows this process, if that was found."""
        pids = {"own pid": {self._pid}, "only process": self._alone, "device delta": {None}}
        return next(iter(pids[self.attribution]))


class _Windows:
    """Energy and power over the timed windows that were closed."""

    def __init__(self) -> None:
        self.joules: float | None = None
        self._seconds = 0.0
        self._begun: tuple[float, float | None] | None = None
        self._watts: list[float] = [0.0, 0.0]  # sum and count: a run of days has millions of samples

    def begin(self, joules: float | None) -> None:
        if self._begun is not None:
            raise ValueError("An energy window is to begin, but one is open already; end it first.")
        self._begun = (perf_counter(), joules)

    def end(self, joules: float | None) -> None:
        if self._begun is None:
            raise ValueError("An energy window is to end, but none is open; begin it first.")
        (began, before), self._begun = self._begun, None
        if before is not None and joules is not None:
            self.joules = (self.joules or 0.0) + joules - before
            self._seconds += perf_counter() - began

    def take(self, watts: float | None) -> None:
        if self._begun is not None and watts is not None:
            self._watts = [self._watts[0] + watts, self._watts[1] + 1]

    @property
    def watts(self) -> float | None:
        """Mean power: energy by time where the device counts it, else the mean of the samples in windows."""
        if self.joules is not None and self._seconds:
            return self.joules / self._seconds
        total, count = self._watts
        return total / count if count else None


def _highest(*values: float | None) -> Any:
    return max((value for value in values if value is not None), default=None)
