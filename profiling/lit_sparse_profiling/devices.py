"""The device of a run: its index, and what a record says of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from lit_sparse_profiling.sections import Device

CPUINFO = Path("/proc/cpuinfo")
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Files of a cgroup's limit and use, and the line of its memory.stat on cached files that give way, by the hierarchy:
the unified one (version 2), and that of memory (version 1)."""


def resolve_index(device: torch.device) -> torch.device:
    """Return the device with its index, as its tensors have it: "cuda" without one is the current device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def describe_device(device: torch.device) -> Device:
    """Return kind, name, cores and memory of the device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device("cuda", properties.name, memory=properties.total_memory)
    return Device("cpu", processor_name(), cores=torch.get_num_threads(), memory=psutil.virtual_memory().total)


def free_of_host() -> int:
    """Return the bytes of host memory that this process may still take.

    Containers and batch systems limit a process by cgroups, below what the machine has available.
    """
    return min([psutil.virtual_memory().available, *cgroup_rooms()])


def cgroup_rooms() -> Iterator[int]:
    """Yield the bytes that are left in each cgroup with a limit around this process, from its own to the outermost."""
    lines = OWN_CGROUP.read_text(encoding="utf-8").splitlines() if OWN_CGROUP.exists() else []
    for _, hierarchy, path in (line.split(":", 2) for line in lines):
        if hierarchy not in CGROUP_FILES:
            continue
        limit, use, cached = CGROUP_FILES[hierarchy]
        own = Path(path.lstrip("/"))
        for part in (own, *own.parents):  # of a container, only the outermost may be there
            folder = CGROUPS / hierarchy / part
            files = [folder / name for name in (limit, use, "memory.stat")]
            if not all(file.is_file() for file in files):
                continue
            most, used, stat = (file.read_text(encoding="utf-8").strip() for file in files)
            if most != "max":
                counts = dict(line.split() for line in stat.splitlines())
                yield int(most) - int(used) + int(counts.get(cached, 0))


def processor_name() -> str:
    """Return the model name of the processor and the number of its cores that this process may use."""
    # platform.processor() is empty on most Linux systems, and "arm" or "i386" on macOS.
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPUINFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    name = next(filter(None, models), "") or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {usable} cores"
