"""A scripted stand-in for the `pynvml` module: a device whose state a test sets between two samples.

Structs, constants and errors are pynvml's own; `test_nvml.py` holds the functions' names and arguments to pynvml's.
"""

from collections import Counter
from threading import Event
from types import SimpleNamespace

import pynvml

MIB = 2**20
UUID = "GPU-11111111-2222-3333-4444-555555555555"
MIG_UUID = "MIG-66666666-7777-8888-9999-000000000000"
HANDLE = object()

LISTS = ("compute", "graphics", "mps")


class FakeNVML:
    """One device that is known as UUID and as MIG_UUID.

    Attributes:
        compute, graphics, mps: Bytes by pid, as the driver lists them.
        unlisted: Bytes in use that no list tells.
        reserved: Bytes that the driver keeps for itself: in `used` of version 1 only.
        milliwatts, millijoules, mhz, degrees: What the device says of them.
        fails: Error codes by the name of the function that fails with them; "v2" is the second version of memory.
        calls: How often each function was called.
        open: How many times it was initialised and not shut down.
        gate: If set, the memory query does not return before this event; `waiting` is set when it has come there.
    """

    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    NVML_VALUE_NOT_AVAILABLE_ulonglong = pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong
    nvmlMemory_v2 = pynvml.nvmlMemory_v2
    NVMLError = pynvml.NVMLError
    NVMLLibraryMismatchError = pynvml.NVMLLibraryMismatchError
    NVMLError_ArgumentVersionMismatch = pynvml.NVMLError_ArgumentVersionMismatch
    NVMLError_FunctionNotFound = pynvml.NVMLError_FunctionNotFound
    NVMLError_NoPermission = pynvml.NVMLError_NoPermission
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported
    NVMLError_Unknown = pynvml.NVMLError_Unknown

    def __init__(self) -> None:
        self.compute: dict[int, int | None] = {}
        self.graphics: dict[int, int | None] = {}
        self.mps: dict[int, int | None] = {}
        self.unlisted = 0
        self.reserved = 600 * MIB
        self.milliwatts, self.millijoules, self.mhz, self.degrees = 70_000, 5_000_000, 1_410, 35
        self.fails: dict[str, int | Exception] = {}
        self.calls: Counter[str] = Counter()
        self.open = 0
        self.gate: Event | None = None
        self.waiting = Event()

    def nvmlInit(self) -> None:
        self._called("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self._called("nvmlShutdown")
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        self._called("nvmlSystemGetDriverVersion")
        return "580.159.04"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:
        self._called("nvmlDeviceGetHandleByUUID")
        if uuid not in (UUID, MIG_UUID):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return HANDLE

    def nvmlDeviceGetCount(self) -> int:
        self._called("nvmlDeviceGetCount")
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        self._called("nvmlDeviceGetHandleByIndex")
        assert index == 0
        return HANDLE

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:
        self._called("nvmlDeviceGetTemperature", handle)
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self.degrees

    def nvmlDeviceGetName(self, handle: object) -> str:
        self._called("nvmlDeviceGetName", handle)
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetMemoryInfo(self, handle: object, version: int | None = None) -> object:
        self._called("nvmlDeviceGetMemoryInfo", handle)
        if self.gate is not None:
            self.waiting.set()
            self.gate.wait()
        listed = [getattr(self, name) for name in LISTS]
        pids = {pid for each in listed for pid in each}
        used = self.unlisted + sum(max(each.get(pid) or 0 for each in listed) for pid in pids)
        if version is None:
            return pynvml.c_nvmlMemory_t(used=used + self.reserved)
        self._called("v2")
        assert version == pynvml.nvmlMemory_v2
        return pynvml.c_nvmlMemory_v2_t(version=version, used=used, reserved=self.reserved)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[object]:
        self._called("nvmlDeviceGetComputeRunningProcesses", handle)
        return _processes(self.compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object) -> list[object]:
        self._called("nvmlDeviceGetGraphicsRunningProcesses", handle)
        return _processes(self.graphics)

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: object) -> list[object]:
        self._called("nvmlDeviceGetMPSComputeRunningProcesses", handle)
        return _processes(self.mps)

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        self._called("nvmlDeviceGetPowerUsage", handle)
        return self.milliwatts

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:
        self._called("nvmlDeviceGetTotalEnergyConsumption", handle)
        return self.millijoules

    def nvmlDeviceGetClockInfo(self, handle: object, type: int) -> int:
        self._called("nvmlDeviceGetClockInfo", handle)
        assert type == pynvml.NVML_CLOCK_SM
        return self.mhz

    def _called(self, name: str, handle: object = HANDLE) -> None:
        self.calls[name] += 1
        assert handle is HANDLE
        failure = self.fails.get(name)
        if failure is None and name != "nvmlInit" and not self.open:
            failure = pynvml.NVML_ERROR_UNINITIALIZED
        if failure is not None:
            raise failure if isinstance(failure, Exception) else pynvml.NVMLError(failure)


def _processes(held: dict[int, int | None]) -> list[object]:
    fields = [field[0] for field in pynvml.c_nvmlProcessInfo_t._fields_]
    known = [{"pid": pid, "usedGpuMemory": size} for pid, size in held.items()]
    return [SimpleNamespace(**(dict.fromkeys(fields, 0) | each)) for each in known]
