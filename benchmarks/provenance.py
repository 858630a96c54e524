"""Describe the origin of a measurement: commit, date, device, versions and model."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_sparse_profiling.devices import describe_device
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Device

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("lit_sparse", "kernels", "profiling", "configs", "benchmarks")
"""Folders whose uncommitted changes mark a measurement, except for the results themselves."""


def provenance(bench: str, record: RunRecord, model: str | None = None) -> dict[str, Any]:
    """Return the first entries of a line of results; a + after the commit marks uncommitted changes.

    Args:
        bench: Name of the benchmark.
        record: Record of the measured run.
        model: Name of the model; by default that of the record.
    """
    assert record.device is not None
    if model is None:
        assert record.model is not None
        model = record.model.base
    versions = {package: record.versions[package] for package in ("torch", "transformers", "peft")}
    source = {"bench": bench, "commit": commit(), "date": record.created[:10], "device": where(record.device)}
    return {**source, "versions": versions, "model": model}


def of_device(bench: str, device: torch.device) -> dict[str, Any]:
    """Return the same entries for a measurement without a model."""
    found = {package: version(package) for package in ("torch", "triton")}
    today = datetime.now(UTC).date().isoformat()
    source = {"bench": bench, "commit": commit(), "date": today, "device": where(describe_device(device))}
    return {**source, "versions": found}


def where(device: Device) -> str:
    """Describe a device."""
    if device.kind == "cpu":
        return f"{processor() or device.name}, {device.cores} threads"
    return device.name


def commit() -> str:
    """Return the commit that is checked out, with + if measured folders have uncommitted changes.

    Where git cannot tell, the variable COMMIT does.
    """
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    if shutil.which("git") is None:
        return "unknown"
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changes = ["git", "status", "--porcelain", "--", *MEASURED, ":!benchmarks/results"]
    dirty = subprocess.run(changes, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return head.stdout.strip() + ("+" if dirty else "")


def processor() -> str:
    """Return the processor's name, from /proc/cpuinfo on Linux."""
    info = Path("/proc/cpuinfo")
    found = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return found[0].partition(":")[2].strip() if found else platform.processor()
