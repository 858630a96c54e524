"""Waiting between runs until a scripted GPU is cool, and where nothing measures energy."""

import pynvml
import pytest

from lit_sparse_profiling.cooling import LONGEST, POLL_SECONDS, Cooling
from tests.profiling.fake_nvml import FakeNVML


class Room:
    """A GPU that cools by a degree a second while nobody uses it, to `least`."""

    def __init__(self, least: int = 30) -> None:
        self.nvml, self.now, self.least = FakeNVML(), 0.0, least
        self.told: list[str] = []
        self.cooling = Cooling(self.told.append, self.nvml, self.sleep, lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now % 1 == 0:
            self.nvml.degrees = max(self.least, self.nvml.degrees - 1)


def test_the_second_run_begins_as_cool_as_the_first() -> None:
    room, ticks = Room(), list[int]()
    assert room.cooling.wait() == 0.0
    room.nvml.degrees = 60
    assert room.cooling.wait(lambda: ticks.append(1)) == 60 - (35 + 2)
    assert room.nvml.degrees == 37
    assert len(ticks) == 23 / POLL_SECONDS
    assert room.cooling.wait() == 0.0
    assert (room.told, room.nvml.open) == ([], 0)


def test_a_gpu_that_stays_warm_is_told() -> None:
    room = Room(least=50)
    room.cooling.wait()
    room.nvml.degrees = 60
    assert room.cooling.wait() == LONGEST
    (told,) = room.told
    assert told.startswith("After 120 s, GPU 0 is at 50 °C, above the 35 °C before the first run: ")


@pytest.mark.parametrize(
    "missing",
    ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetTemperature"],
)
def test_without_energy_or_temperature_nothing_waits(missing: str) -> None:
    room = Room()
    room.nvml.fails[missing] = pynvml.NVML_ERROR_NOT_SUPPORTED
    room.cooling.wait()
    room.nvml.degrees = 60
    assert room.cooling.wait() == 0.0
    assert room.nvml.open == 0
