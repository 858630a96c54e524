"""Runs whose energy is measured begin equally cool: a warm GPU leaks more, and takes more power for the same work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pynvml

ENERGY, TEMPERATURE = "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetTemperature"
MARGIN = 2
"""Degrees above the temperature before the first run from which on a GPU counts as cool."""
LONGEST = 120.0
"""Seconds after which a run begins, cool or not."""
POLL_SECONDS = 0.5


class Cooling:
    """Waits before each run until the GPUs are about as cool as before the first one.

    Only GPUs count that measure energy and temperature. On a machine without one, `wait` returns at once.

    Args:
        tell: Called with a sentence if waiting has an end before the GPUs are cool.
        api: The `pynvml` module, or a substitute.
        sleep, clock: Likewise of `time.sleep` and `time.monotonic`.
    """

    def __init__(
        self,
        tell: Callable[[str], Any],
        api: Any = pynvml,
        sleep: Callable[[float], Any] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._api, self._sleep, self._clock = tell, api, sleep, clock
        self._first: dict[int, int] | None = None

    def wait(self, tick: Callable[[], None] = lambda: None) -> float:
        """Wait, and return for how many seconds. `tick` is called a few times a second."""
        began = self._clock()
        now = self._temperatures()
        self._first = now if self._first is None else self._first
        while warm := {index for index, degrees in now.items() if degrees > self._first.get(index, degrees) + MARGIN}:
            if self._clock() - began >= LONGEST:
                self._tell(
                    f"After {LONGEST:.0f} s, GPU {min(warm)} is at {now[min(warm)]} °C, above the "
                    f"{self._first[min(warm)]} °C before the first run: energies of the runs are less comparable."
                )
                break
            tick()
            self._sleep(POLL_SECONDS)
            now = self._temperatures()
        return self._clock() - began

    def _temperatures(self) -> dict[int, int]:
        """Return the degrees Celsius of each GPU that counts its energy, by NVML's index."""
        api = self._api
        try:
            api.nvmlInit()
        except api.NVMLError:  # no driver, or a broken one: no run measures energy
            return {}
        try:
            found = [self._temperature(index) for index in range(api.nvmlDeviceGetCount())]
            return {index: degrees for index, degrees in enumerate(found) if degrees is not None}
        except api.NVMLError:  # the driver was unloaded, say: the run will tell of it
            return {}
        finally:
            api.nvmlShutdown()

    def _temperature(self, index: int) -> int | None:
        try:
            handle = self._api.nvmlDeviceGetHandleByIndex(index)
            getattr(self._api, ENERGY)(handle)
            return getattr(self._api, TEMPERATURE)(handle, self._api.NVML_TEMPERATURE_GPU)
        except self._api.NVMLError:  # a lost device, or one that does not tell: its energy is not measured either
            return None
