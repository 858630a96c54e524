"""A sampler of what the NVIDIA driver reports for one device: memory and its owners, power, energy and clocks.

Torch's allocator knows its own memory only. The driver also knows the CUDA context, what libraries allocate without the
allocator, and other processes. Its figures are samples, and miss what comes and goes between two of them: for torch's
own memory, prefer the allocator's peaks.

`attribution.py` says how this process's memory is told apart, and what that can miss.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from threading import Event, Lock, Thread
from time import perf_counter
from typing import Any, Self, TypeVar

import pynvml
import torch

from lit_sparse_profiling.attribution import Shares
from lit_sparse_profiling.energy import LONG_WINDOW, Windows
from lit_sparse_profiling.nvml_device import NVMLDevice
from lit_sparse_profiling.sections import Driver

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that `NVML.stop` waits for the driver to answer."""


class NVMLMissing(RuntimeError):
    """NVML is absent or broken, or does not know the device."""


def device_uuid(device: torch.device) -> str:
    """Return the UUID of a CUDA device as NVML spells it: "GPU-...", or "MIG-..." for a MIG instance.

    Never address a device of NVML by CUDA's index: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER renumber CUDA's devices,
    and NVML ignores both.

    Raises:
        ValueError: if `device` is not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"The UUID of device {str(device)!r} was asked for, but only CUDA devices have one; give one.")
    properties = torch.cuda.get_device_properties(device)
    # torch reports the UUID without its prefix, and a MIG instance only by its name: "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    kind = "MIG" if " MIG " in properties.name else "GPU"
    return f"{kind}-{properties.uuid}"


def open_nvml(device: torch.device, notes: list[str]) -> NVML | None:
    """Return the started sampler of a GPU, or None. If a GPU has no working NVML, append the reason to `notes`."""
    if device.type != "cuda":
        return None
    try:
        nvml = NVML.of(device)
    except NVMLMissing as missing:
        notes.append(str(missing))
        return None
    nvml.start()
    return nvml


class NVML:
    """Sampler of one device in a thread, from `start` to `stop` or in a `with` block; `result` gives the figures.

    Create it before this process uses the device, so that its memory can be told from memory in use before. If that is
    too late, pass what the process holds as `held`.

    After construction it never raises for a failure of the device or the driver: a run must not end because its
    measurement did. `Driver.lost` reports a failure of the memory query, and the figures are those until then. Any
    other query that fails is dropped, and `notes` say so.

    `watts_peak` is smoothed by the device, over about a second on recent ones. A MIG instance reports memory and
    processes, but no power, energy or clocks, which belong to the whole device.

    Args:
        uuid: UUID of the device or MIG instance; see `device_uuid`.
        interval: Seconds between samples. The driver updates its figures about ten times a second.
        api: The `pynvml` module, or a substitute.
        held: Bytes of the device that this process is known to hold already, according to torch's allocator.

    Raises:
        NVMLMissing: if the driver is absent or broken, or does not know the device or its memory.
        ValueError: if `interval` is not positive.
    """

    def __init__(self, uuid: str, interval: float = 0.1, api: Any = pynvml, held: int = 0) -> None:
        if interval <= 0:
            raise ValueError(f"NVML was to be sampled every {interval} seconds; give a time above 0.")
        self.uuid, self.interval = uuid, interval
        self._device = _open_device(uuid, api)
        self._shares = Shares(os.getpid(), self._device.opening, held)
        self._windows = Windows()
        self._watts_peak: float | None = None
        self._sm_mhz: Counter[int] = Counter()  # a histogram: a run of days has millions of samples
        self._samples = 0
        self._lost: str | None = None
        # It guards the figures, and is never held during a call of NVML: one that hangs would block `result` for ever.
        self._lock = Lock()
        self._stopping, self._closed, self._paused = Event(), False, False
        self._thread: Thread | None = None

    @classmethod
    def of(cls, device: torch.device, interval: float = 0.1, api: Any = pynvml) -> Self:
        """Return the sampler of a CUDA device, with what torch has reserved on it as `held`.

        Raises:
            NVMLMissing: as the class does.
            ValueError: as `device_uuid` and the class do.
        """
        return cls(device_uuid(device), interval, api, torch.cuda.memory_reserved(device))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def mark_context(self) -> None:
        """Record this process's memory now as the size of its CUDA context.

        Call it when the context exists, which `torch.cuda.synchronize(device)` creates, and no tensor does.

        Raises:
            RuntimeError: if the sampler was stopped.
        """
        self._observe(context=True)

    def start(self) -> None:
        """Take a first sample and start the sampling thread; do nothing if it is running.

        Raises:
            RuntimeError: if the sampler was stopped, which is final.
        """
        if self._thread is None or self._closed:
            self.sample()
            self._thread = Thread(target=self._run, name="nvml", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, take a last sample if it was started, and shut NVML down; do nothing if stopped already."""
        if self._closed:
            return
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                # A call of NVML hangs. Shutting NVML down beneath it could crash the process; the daemon thread ends
                # with the process instead.
                self._mark_lost(f"no answer for {PATIENCE:g} seconds")
                self._closed = True
                return
            self.sample()
        self._closed = True
        self._shut_down()

    def sample(self) -> None:
        """Take one sample now, in the calling thread.

        Raises:
            RuntimeError: if the sampler was stopped.
        """
        self._observe()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take no samples in the block, whose memory is no part of the run's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @property
    def dropped(self) -> list[str]:
        """A sentence for each query that failed, and is made no more."""
        return self._device.dropped

    @property
    def notes(self) -> list[str]:
        """A sentence for each figure that is missing, or that is less than it seems."""
        return [*self.dropped, *self._windows.notes()]

    def begin_window(self) -> None:
        """Begin a timed window: energy and mean power are those of the windows. Synchronise the device first.

        The device's energy counter advances in steps of about 100 ms: windows should last at least 5 s.

        Raises:
            RuntimeError: if the sampler was stopped.
            ValueError: if a window is open.
        """
        joules = self._query(self._device.joules)
        with self._lock:
            self._windows.begin(perf_counter(), joules)

    def end_window(self) -> None:
        """End the timed window. Synchronise the device first.

        Raises:
            RuntimeError: if the sampler was stopped.
            ValueError: if no window is open.
        """
        joules = self._query(self._device.joules)
        with self._lock:
            self._windows.end(perf_counter(), joules)

    @property
    def window_is_short(self) -> bool:
        """True while a window is open in which energy is counted, and too short for the counter."""
        with self._lock:
            seconds = self._windows.open_seconds(perf_counter())
        return seconds is not None and seconds < LONG_WINDOW and self._lost is None

    def result(self) -> Driver:
        """Return the figures so far, at any time."""
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
                energy_seconds=self._windows.energy_seconds,
                watts=self._windows.watts,
                watts_peak=self._watts_peak,
                sm_mhz=[float(median(clocks)), float(clocks[0])] if clocks else [],
                lost=self._lost,
            )

    def _run(self) -> None:
        while self._lost is None and not self._stopping.wait(self.interval):
            if not self._paused:
                self.sample()

    def _observe(self, context: bool = False) -> None:
        reading = self._query(self._device.read)
        if reading is None:
            return
        with self._lock:
            self._samples += 1
            self._shares.add(reading, context)
            self._windows.add(reading.watts)
            if reading.watts is not None:
                self._watts_peak = max(self._watts_peak or 0.0, reading.watts)
            self._sm_mhz.update([] if reading.sm_mhz is None else [reading.sm_mhz])

    def _query(self, query: Callable[[], T]) -> T | None:
        """Return the query's answer; None once the device or NVML has failed."""
        if self._closed:
            raise RuntimeError(f"NVML was to be asked for {self.uuid}, but it was stopped; make a new NVML.")
        if self._lost is not None:
            return None
        try:
            return query()
        except Exception as error:  # of any class: bindings and drivers that do not fit raise others than NVML's own
            self._mark_lost(_reason(error))
            return None

    def _shut_down(self) -> None:
        try:
            self._device.close()
        except Exception as error:
            self._mark_lost(_reason(error))

    def _mark_lost(self, reason: str) -> None:
        if self._lost is None:  # the first failure is the cause of those after it
            self._lost = (
                f"NVML failed after {self._samples} samples of {self.uuid} ({reason}), and the figures are those until "
                "then; look at the device with nvidia-smi."
            )


def _open_device(uuid: str, api: Any) -> NVMLDevice:
    try:
        return NVMLDevice(uuid, api)
    except Exception as error:  # as in `_query`
        raise NVMLMissing(
            f"NVML was to watch the device {uuid}, but says: {_reason(error)}; "
            "see with `nvidia-smi -L` whether the driver works and which devices it knows."
        ) from error


def _reason(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, pynvml.NVMLError) else f"{type(error).__name__}: {text}".rstrip(": ")
