"""Energy and power of a device over the timed windows, from readings of its energy counter."""

from __future__ import annotations

from collections.abc import Iterator

COUNTER_SECONDS = 0.1
"""Time between two advances of the counter: an energy is wrong by up to what the device takes in that time."""
LONG_WINDOW = 5.0
"""Seconds from which a window's energy is right to 2 %."""


class Windows:
    """Energy and mean power over the closed windows.

    Attributes:
        joules: Energy of the windows in which the counter could be read, None without one.
        energy_seconds: Seconds of these windows; None likewise.
    """

    def __init__(self) -> None:
        self.joules: float | None = None
        self.energy_seconds: float | None = None
        self._all_seconds, self._measured, self._steps_back = 0.0, 0, 0
        self._begun: tuple[float, float | None] | None = None
        self._watts: list[float] = [0.0, 0.0]  # sum and count: a run of days has millions of samples

    def begin(self, now: float, joules: float | None) -> None:
        """Open a window at this time in seconds, and this reading of the energy counter."""
        if self._begun is not None:
            raise ValueError("An energy window is to begin, but one is open already; end it first.")
        self._begun = (now, joules)

    def end(self, now: float, joules: float | None) -> None:
        """Close the window, likewise."""
        if self._begun is None:
            raise ValueError("An energy window is to end, but none is open; begin it first.")
        (began, before), self._begun = self._begun, None
        seconds = now - began
        self._all_seconds += seconds
        # A window counts only if both readings succeeded: the device may have been lost within it.
        if before is None or joules is None:
            return
        if joules < before:  # a driver that was loaded anew counts from 0
            self._steps_back += 1
            return
        self.joules = (self.joules or 0.0) + joules - before
        self.energy_seconds = (self.energy_seconds or 0.0) + seconds
        self._measured += 1

    def open_seconds(self, now: float) -> float | None:
        """Return for how long a window is open whose energy is counted; None if there is none."""
        if self._begun is None or self._begun[1] is None:
            return None
        return now - self._begun[0]

    def add(self, watts: float | None) -> None:
        """Add a power sample; samples outside windows are ignored."""
        if self._begun is not None and watts is not None:
            self._watts = [self._watts[0] + watts, self._watts[1] + 1]

    @property
    def watts(self) -> float | None:
        """Mean power: energy over time if the device counts energy, else the mean of the samples in windows."""
        if self.joules is not None and self.energy_seconds:
            return self.joules / self.energy_seconds
        total, count = self._watts
        return total / count if count else None

    def notes(self) -> Iterator[str]:
        """Yield a sentence for what the energy lacks, and for how uncertain it is."""
        if self._steps_back:
            yield f"The device's energy counter stepped back in {self._steps_back} windows, whose energy is left out."
        if self.energy_seconds is None:
            return
        if self.energy_seconds < self._all_seconds:
            yield f"The energy is that of {self.energy_seconds:.1f} of {self._all_seconds:.1f} s of timed steps."
        mean = self.energy_seconds / self._measured
        if 0 < mean < LONG_WINDOW:
            yield (
                f"The energy is uncertain by up to {COUNTER_SECONDS / mean:.0%}: its windows last {mean:.1f} s each "
                f"and the counter advances about every {COUNTER_SECONDS:g} s; time at least {LONG_WINDOW:g} s on end."
            )
