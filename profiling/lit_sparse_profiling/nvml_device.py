"""One device behind NVML's C interface, with the quirks of drivers, containers and MIG.

Only the memory query is fatal: all others are dropped once they fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

COMPUTE = "nvmlDeviceGetComputeRunningProcesses"
OTHERS = ("nvmlDeviceGetGraphicsRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses")
POWER = "nvmlDeviceGetPowerUsage"
ENERGY = "nvmlDeviceGetTotalEnergyConsumption"
CLOCK = "nvmlDeviceGetClockInfo"


@dataclass(frozen=True)
class Reading:
    """One reading of the device.

    Attributes:
        used: Bytes in use on the device, by all processes.
        processes: Bytes by pid; None for a process whose size the driver does not tell.
        watts: Power; None if the device does not report it.
        sm_mhz: Clock of the multiprocessors; None if the device does not report it.
    """

    used: int
    processes: dict[int, int | None]
    watts: float | None
    sm_mhz: int | None


class NVMLDevice:
    """A device or MIG instance, opened by its UUID. Every method raises NVML's own errors.

    Args:
        uuid: "GPU-..." or "MIG-...".
        api: The `pynvml` module, or a substitute.

    Attributes:
        mig: True for a MIG instance.
        name: Name of the device.
        driver: Version of the driver.
        memory: Version of the memory call that the driver supports.
        opening: A reading at the time of opening.
        dropped: For each query that failed, and is made no more, a sentence that says why. Figures need not end for it.
    """

    def __init__(self, uuid: str, api: Any) -> None:
        self.mig = uuid.startswith("MIG-")
        self._api = api
        # Queries that this device does not answer. On a MIG instance these would be answered for the whole device.
        self._absent = {POWER, ENERGY, CLOCK} if self.mig else set[str]()
        self.dropped: list[str] = []
        api.nvmlInit()
        try:
            self._handle = api.nvmlDeviceGetHandleByUUID(uuid)
            self.name: str = api.nvmlDeviceGetName(self._handle)
            self.driver: str = api.nvmlSystemGetDriverVersion()
            self.memory: Literal["v2", "v1"] = self._memory_version()
            self.opening = self.read()
        except Exception:
            api.nvmlShutdown()  # NVML counts initialisations: each needs its shutdown
            raise

    def read(self) -> Reading:
        """Read memory, processes, power and clock."""
        milliwatts, mhz = self._ask(POWER), self._ask(CLOCK, self._api.NVML_CLOCK_SM)
        watts = None if milliwatts is None else milliwatts / 1000
        return Reading(self._used(), self._processes(), watts, mhz)

    def joules(self) -> float | None:
        """Return the energy since the driver was loaded; None if the device has no energy counter."""
        millijoules = self._ask(ENERGY)
        return None if millijoules is None else millijoules / 1000

    def close(self) -> None:
        """Shut NVML down."""
        self._api.nvmlShutdown()

    def _memory_version(self) -> Literal["v2", "v1"]:
        """Return "v2" if the driver has that call, which reports its own reserve apart; "v1" has it in `used`."""
        api = self._api
        too_old = (api.NVMLError_NotSupported, api.NVMLError_FunctionNotFound, api.NVMLError_ArgumentVersionMismatch)
        try:
            api.nvmlDeviceGetMemoryInfo(self._handle, version=api.nvmlMemory_v2)
        except (*too_old, api.NVMLError_Unknown):  # drivers in WSL answer "unknown error"
            return "v1"
        return "v2"

    def _used(self) -> int:
        version = self._api.nvmlMemory_v2 if self.memory == "v2" else None
        return int(self._api.nvmlDeviceGetMemoryInfo(self._handle, version=version).used)

    def _processes(self) -> dict[int, int | None]:
        listed = self._ask(COMPUTE)
        if listed is None:  # no list would be complete, and a lone graphics process would pass for the only one
            return {}
        found: dict[int, int | None] = {}
        for process in [*listed, *(each for query in OTHERS for each in self._ask(query) or [])]:
            size = process.usedGpuMemory
            if size == self._api.NVML_VALUE_NOT_AVAILABLE_ulonglong.value:
                size = None
            # A process that computes and draws is in two lists, with the same bytes: the larger, not the sum.
            known = [each for each in (found.get(process.pid), size) if each is not None]
            found[process.pid] = max(known, default=None)
        return found

    def _ask(self, query: str, *args: Any) -> Any:
        """Return the device's answer; None if it has none to this query, which is not repeated.

        A query that fails for reasons of its own (not ready, unknown error, no data) is dropped with a note. A device
        that is lost, or a driver that is gone, is left to the memory query, which must succeed.
        """
        api = self._api
        denied = (api.NVMLError_NotSupported, api.NVMLError_FunctionNotFound, api.NVMLError_NoPermission)
        if query in self._absent:
            return None
        try:
            return getattr(api, query)(self._handle, *args)
        except (*denied, api.NVMLLibraryMismatchError):
            self._absent.add(query)
        except Exception as error:  # of any class: bindings that do not fit the driver raise others than NVML's own
            self._absent.add(query)
            self.dropped.append(f"NVML does not answer {query} ({error}); its figures are those until then.")
        return None
