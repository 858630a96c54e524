"""The device of a run: its index, and what a record says of it."""

from __future__ import annotations

import platform

import psutil
import torch

from lit_sparse_profiling.sections import Device


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
    name = platform.processor() or platform.machine()  # the first is empty on many Linux systems
    return Device("cpu", name, cores=torch.get_num_threads(), memory=psutil.virtual_memory().total)
