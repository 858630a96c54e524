"""Where, when and of what a measurement is."""

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

from lit_sparse_profiling.profiler import device_of
from lit_sparse_profiling.record import Device, RunRecord

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("lit_sparse", "kernels", "profiling", "configs", "benchmarks")
"""Folders a change of which makes a measurement another one than the commit's; its results do not."""


def provenance(bench: str, record: RunRecord, model: str | None = None) -> dict[str, Any]:
    """What each line of results begins with; a commit with + has changes that are not committed.

    Args:
        bench: What measured.
        record: Of what was measured.
        model: The model's name; taken from the record.
    """
    assert record.device is not None
    if model is None:
        assert record.model is not None
        model = record.model.base
    versions = {package: record.versions[package] for package in ("torch", "transformers", "peft")}
    source = {"bench": bench, "commit": commit(), "date": record.created[:10], "device": where(record.device)}
    return {**source, "versions": versions, "model": model}


def of_device(bench: str, device: torch.device) -> dict[str, Any]:
    """The same for what trains no model."""
    found = {package: version(package) for package in ("torch", "triton")}
    today = datetime.now(UTC).date().isoformat()
    source = {"bench": bench, "commit": commit(), "date": today, "device": where(device_of(device))}
    return {**source, "versions": found}


def where(device: Device) -> str:
    """The device in words."""
    if device.kind == "cpu":
        return f"{processor() or device.name}, {device.cores} threads"
    return device.name


def commit() -> str:
    """The commit that is checked out, with + if what is measured was changed since; COMMIT where no git can tell."""
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
    """The processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    found = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return found[0].partition(":")[2].strip() if found else platform.processor()
