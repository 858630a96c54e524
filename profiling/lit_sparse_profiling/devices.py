"""The device of a run: its index, and what a record says of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

from lit_sparse_profiling.sections import Device

CPUINFO = Path("/proc/cpuinfo")


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


def processor_name() -> str:
    """Return the model name of the processor and the number of its cores that this process may use."""
    # platform.processor() is empty on most Linux systems, and "arm" or "i386" on macOS.
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPUINFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    name = next(filter(None, models), "") or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {usable} cores"
